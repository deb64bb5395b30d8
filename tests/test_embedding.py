"""Every distinct picture passes the trunk once; no more of them are held than a few batches."""

from functools import partial

import pytest
import torch
from conftest import checkered
from PIL import Image
from tiles import PREPROCESSING, tiny_model

from nearid_personalize.embedding import embed_distinct
from nearid_personalize.errors import InputError


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embeddings_are_those_of_one_picture_at_a_time_whatever_the_batch(batch_size: int):
    model = tiny_model()
    seeds = [5, 1, 5, None, 2, 1, 9, None, 5]
    readers = [(lambda: None) if seed is None else partial(checkered, seed) for seed in seeds]
    pools = {"head": model.pool, "mean": model.mean_pool}
    found = embed_distinct(model, PREPROCESSING, pools, readers, batch_size=batch_size)
    assert found.slots.tolist() == [0, 1, 0, -1, 2, 1, 3, -1, 0]
    with torch.no_grad():
        for slot, seed in enumerate([5, 1, 2, 9]):
            tokens = model.tokens(PREPROCESSING([checkered(seed)]))
            mean = torch.nn.functional.normalize(tokens.mean(dim=1), dim=1)
            assert torch.allclose(found.embeddings["head"][slot], model.pool(tokens)[0], atol=1e-5)
            assert torch.allclose(found.embeddings["mean"][slot], mean[0], atol=1e-5)


def test_a_copy_in_another_file_format_or_size_is_the_same_picture_once_the_model_sees_it():
    model = tiny_model()
    small = checkered(3, PREPROCESSING.size)
    found = embed_distinct(model, PREPROCESSING, {"head": model.pool}, [lambda: small, lambda: small.convert("RGBA")])
    assert found.slots.tolist() == [0, 0] and len(found.embeddings["head"]) == 1


def test_pictures_are_read_as_they_are_needed():
    model, taken, run_when_taken = tiny_model(), [], []
    model.backbone.encoder.register_forward_hook(lambda *_: run_when_taken.append(len(taken)))

    def readers():
        for seed in range(40):
            taken.append(seed)
            yield partial(checkered, seed)

    found = embed_distinct(model, PREPROCESSING, {"head": model.pool}, readers(), batch_size=4)
    assert len(found.slots) == 40 and len(run_when_taken) == 10
    assert all(ahead - 4 * (batch + 1) <= 8 for batch, ahead in enumerate(run_when_taken))


def test_a_picture_that_cannot_be_read_stops_it():
    def broken() -> Image.Image:
        raise InputError("row 'x', view 1: no picture")

    model = tiny_model()
    with pytest.raises(InputError, match="row 'x'"):
        embed_distinct(model, PREPROCESSING, {"head": model.pool}, [partial(checkered, 1), broken])


def test_nothing_listed_is_nothing_embedded():
    model = tiny_model()
    found = embed_distinct(model, PREPROCESSING, {"head": model.pool}, [lambda: None])
    assert found.slots.tolist() == [-1] and len(found.embeddings["head"]) == 0
