import numpy as np
import pytest
import torch

from nearid_personalize import IdentityScorer
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.miniworld.pairs import as_drawn, embed_pairs, known_pairs


@pytest.fixture(scope="module")
def vae():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderTiny.from_pretrained(weights_dir("pipeline") / "vae", use_safetensors=True).eval()


def test_more_pictures_leave_the_others_as_they_are():
    few, many = known_pairs("val", 3, 1, 2, 1), known_pairs("val", 3, 4, 3, 5)
    for name, count in (("photos", 1), ("genuine", 2), ("impostor", 1)):
        assert np.array_equal(getattr(few, name), getattr(many, name)[:count])
    assert [len(many.photos), len(many.genuine), len(many.impostor)] == [4, 3, 5]
    assert len(np.unique(np.concatenate([many.photos, many.genuine, many.impostor]), axis=0)) == 12


def test_other_subjects_splits_and_seeds_differ():
    first = known_pairs("val", 3, 1, 1, 1).photos
    for other in (
        known_pairs("val", 4, 1, 1, 1),
        known_pairs("test", 3, 1, 1, 1),
        known_pairs("val", 3, 1, 1, 1, seed=1),
    ):
        assert not np.array_equal(first, other.photos)


def test_pictures_pass_through_the_autoencoder_and_photos_do_not(vae):
    scorer = IdentityScorer.from_pretrained("miniworld")
    pairs = known_pairs("val", 0, 2, 2, 3)
    photos, genuine, impostor = embed_pairs(scorer, vae, pairs)
    assert torch.allclose(photos, scorer.embed(list(pairs.photos)), atol=1e-4)
    drawn = as_drawn(vae, pairs.impostor)
    assert drawn.shape == (3, 3, 64, 64) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.allclose(impostor, scorer.embed(drawn), atol=1e-4)
    assert float((genuine @ photos.T).mean()) > float((impostor @ photos.T).mean())
