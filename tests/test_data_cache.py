import dataclasses

import pytest
import torch
from tiles import PREPROCESSING, Tiles, tiny_model

from nearid_personalize import InputError
from nearid_personalize.checkpoints import trunk_fingerprint
from nearid_personalize.data import cache as cache_module
from nearid_personalize.data.cache import (
    CacheKey,
    LiveTokens,
    TokenCache,
    bytes_needed,
    cache_in_memory,
    cache_on_disk,
)
from nearid_personalize.images import preprocess


def key_of(model, variants=("a",), **changes):
    return dataclasses.replace(CacheKey(trunk_fingerprint(model), PREPROCESSING, variants, 4), **changes)


def everything(cache, variant=0):
    return cache.read(torch.arange(len(cache)), variant)


def test_holds_valid_pictures_only_and_what_the_trunk_says():
    model, rows = tiny_model(), Tiles(5)
    cache = cache_in_memory(model, rows, PREPROCESSING, rows_per_batch=2)
    tokens, valid = cache.read(torch.tensor([4, 0]))
    assert valid.sum(dim=(1, 2)).tolist() == [6, 4]
    assert tokens.shape == (10, 16, 32)
    item = rows[4]
    with torch.no_grad():
        pixels = preprocess(item["distractors"], 32, PREPROCESSING.mean, PREPROCESSING.std)
        expected = model.tokens(pixels)[1]
    assert torch.allclose(tokens[3 + 1].float(), expected, atol=2e-3)
    assert cache.view_mask.tolist() == [rows[n]["view_mask"].tolist() for n in range(5)]


def test_padding_content_and_batching_change_nothing():
    model = tiny_model()
    one = everything(cache_in_memory(model, Tiles(4, padding=0.5), PREPROCESSING, rows_per_batch=4))
    other = everything(cache_in_memory(model, Tiles(4, padding=float("nan")), PREPROCESSING, rows_per_batch=3))
    assert torch.equal(one[1], other[1])
    assert torch.allclose(one[0].float(), other[0].float(), atol=2e-3)


def test_disk_memory_and_live_tokens_agree(tmp_path):
    model, rows = tiny_model(), Tiles(10)
    memory = cache_in_memory(model, rows, PREPROCESSING)
    disk = cache_on_disk(tmp_path, key_of(model), model, [rows], PREPROCESSING)
    live = LiveTokens(model, lambda variant: rows, memory.view_mask, PREPROCESSING)
    assert len(disk) == len(live) == 10 and len(disk.shards[0]) == 3
    for which in (torch.tensor([9, 0, 5, 4, 3]), torch.arange(10)):
        expected, valid = memory.read(which)
        for source in (disk, live):
            tokens, mask = source.read(which)
            assert torch.equal(mask, valid)
            assert torch.allclose(tokens.float(), expected.float(), atol=2e-3)


def test_variants_are_taken_in_turn(tmp_path):
    model = tiny_model()
    variants = [Tiles(5, seed=seed) for seed in range(2)]
    cache = cache_on_disk(tmp_path, key_of(model, ("a", "b")), model, variants, PREPROCESSING)
    for variant in range(4):
        expected, _ = everything(cache_in_memory(model, variants[variant % 2], PREPROCESSING))
        assert torch.allclose(everything(cache, variant)[0].float(), expected.float(), atol=2e-3)
    assert not torch.allclose(everything(cache, 0)[0], everything(cache, 1)[0])


def test_writing_goes_on_where_it_stopped_and_other_data_means_another_cache(tmp_path, monkeypatch):
    model, rows = tiny_model(), Tiles(12)

    class Killed(Exception):
        pass

    class Dies(Tiles):
        def __getitem__(self, index):
            if index == 6:
                raise Killed
            return super().__getitem__(index)

    with pytest.raises(Killed):
        cache_on_disk(tmp_path, key_of(model), model, [Dies(12)], PREPROCESSING)
    home = tmp_path / key_of(model).digest
    done = {path: path.stat().st_mtime_ns for path in home.glob("*.safetensors")}
    assert len(done) == 1
    cache = cache_on_disk(tmp_path, key_of(model), model, [rows], PREPROCESSING)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    expected, _ = everything(cache_in_memory(model, rows, PREPROCESSING))
    assert torch.allclose(everything(cache)[0].float(), expected.float(), atol=2e-3)

    with torch.no_grad():
        model.backbone.embeddings.patch_embedding.bias += 0.5
    moved = everything(cache_on_disk(tmp_path, key_of(model), model, [rows], PREPROCESSING))[0]
    assert not torch.allclose(moved, everything(cache)[0])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"variants": ("b",)}, {"variants": ("a", "b")}, {"preprocessing": dataclasses.replace(PREPROCESSING, size=16)}],
)
def test_digest_names_all_that_tokens_depend_on(change):
    model = tiny_model()
    assert key_of(model).digest == key_of(tiny_model()).digest != key_of(model, **change).digest


def test_fingerprint_is_the_trunks_alone():
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.head.probe += 1
    assert trunk_fingerprint(model) == trunk_fingerprint(other)
    with torch.no_grad():
        other.backbone.post_layernorm.weight[3] += 1e-3
    assert trunk_fingerprint(model) != trunk_fingerprint(other)


def test_processes_write_every_shard_once_between_them(tmp_path):
    model, rows = tiny_model(), Tiles(12)
    home = tmp_path / key_of(model).digest
    written = []
    for index in range(2):
        waits = []

        def leave_at_the_second(waits=waits):  # the other process is not there to be waited for: look, and leave
            waits.append(1)
            if len(waits) == 2:
                written.append({path.name for path in home.glob("*.safetensors")})
                raise InterruptedError

        for path in home.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(InterruptedError):
            cache_on_disk(
                tmp_path, key_of(model), model, [rows], PREPROCESSING, process=(index, 2), wait=leave_at_the_second
            )
    assert len(written[0]) == 2 and len(written[1]) == 1 and not written[0] & written[1]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    model, rows = tiny_model(), Tiles(12)
    assert bytes_needed(model, rows, PREPROCESSING, 12) == 12 * 6 * 16 * 32 * 2
    monkeypatch.setattr(cache_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match="--token-folder"):
        cache_on_disk(tmp_path, key_of(model), model, [rows], PREPROCESSING)
    assert "0 of 3 shards" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_transform_is_applied_by_seed(tmp_path):
    model, rows, seeds = tiny_model(), Tiles(8), []

    def darker(pixels, seed):
        seeds.append(seed)
        return pixels * 0.5

    cache = cache_on_disk(tmp_path, key_of(model), model, [rows], PREPROCESSING, darker)
    assert seeds == [0, 4]
    assert not torch.allclose(everything(cache)[0], everything(cache_in_memory(model, rows, PREPROCESSING))[0])


def test_empty_data_is_an_error():
    with pytest.raises(InputError, match="no rows"):
        cache_in_memory(tiny_model(), Tiles(0), PREPROCESSING)


def test_reading_does_not_depend_on_how_shards_are_cut():
    tokens, slots = torch.arange(24).view(8, 3, 1).half(), torch.arange(8).view(1, 4, 2, 1)
    whole = TokenCache(((tokens,),), slots)
    cut = TokenCache((tokens.split([3, 1, 4]),), slots)
    for rows in torch.tensor([[0, 1], [3, 2], [1, 1]]):
        assert torch.equal(whole.read(rows)[0], cut.read(rows)[0])
