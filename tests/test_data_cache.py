import dataclasses
import errno
import os

import pytest
import torch
from tiles import PREPROCESSING, Tiles, same, tiny_model, weights

from nearid_personalize import InputError, miniworld
from nearid_personalize.data import IdentityDataset
from nearid_personalize.data import cache as cache_module
from nearid_personalize.data import shards as shards_module
from nearid_personalize.data.cache import (
    CacheKey,
    CachePart,
    LiveTokens,
    ReadAhead,
    TokenCache,
    Trunk,
    cache_in_memory,
    cache_on_disk,
    plan_cache,
)
from nearid_personalize.encoder.checkpoints import trunk_fingerprint
from nearid_personalize.images import preprocess


def key_of(model, **changes):
    key = CacheKey(trunk_fingerprint(model), PREPROCESSING, "tiles", rows_per_shard=4)
    return dataclasses.replace(key, **changes)


def parts_of(model, *variants, **changes):
    """Variants of one data set."""
    return [
        CachePart(key_of(model, rows=f"tiles {number}", **changes), rows, number)
        for number, rows in enumerate(variants)
    ]


def write_cache(folder, model, *variants, transform=None, precision="fp32", **options):
    trunk = Trunk(model, PREPROCESSING, transform, precision)
    plan = plan_cache(folder, trunk, parts_of(model, *variants, precision=precision))
    return cache_on_disk(plan, trunk, **options)


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
    disk = write_cache(tmp_path, model, rows)
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
    cache = write_cache(tmp_path, model, *variants)
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
        write_cache(tmp_path, model, Dies(12))
    (home,) = tmp_path.iterdir()
    done = {path: path.stat().st_mtime_ns for path in home.glob("*.safetensors")}
    assert len(done) == 1 and not list(home.glob(".*"))
    cache = write_cache(tmp_path, model, rows)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    expected, _ = everything(cache_in_memory(model, rows, PREPROCESSING))
    assert torch.allclose(everything(cache)[0].float(), expected.float(), atol=2e-3)

    with torch.no_grad():
        model.backbone.embeddings.patch_embedding.bias += 0.5
    moved = everything(write_cache(tmp_path, model, rows))[0]
    assert not torch.allclose(moved, everything(cache)[0])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"rows": "b"}, {"precision": "bf16"}, {"preprocessing": dataclasses.replace(PREPROCESSING, size=16)}],
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
    home = tmp_path / parts_of(model, rows)[0].key.digest
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
            write_cache(tmp_path, model, rows, process=(index, 2), wait=leave_at_the_second)
    assert len(written[0]) == 2 and len(written[1]) == 1 and not written[0] & written[1]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    model, rows = tiny_model(), Tiles(12)
    plan = plan_cache(tmp_path, Trunk(model, PREPROCESSING), parts_of(model, rows))
    assert plan.total_bytes == plan.missing_bytes == 12 * 6 * 16 * 32 * 2
    monkeypatch.setattr(cache_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match="--token-folder"):
        write_cache(tmp_path, model, rows)
    assert "0 of 3 shards" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_plan_counts_what_is_there_and_no_padding(tmp_path):
    model, data = tiny_model(), miniworld.rows("train", 6, num_views=2)
    rows = IdentityDataset(data, PREPROCESSING.size)  # three slots, two views

    def plan(*variants):
        return plan_cache(tmp_path, Trunk(model, PREPROCESSING), parts_of(model, *variants))

    assert plan(rows).total_bytes == 6 * 4 * 16 * 32 * 2
    write_cache(tmp_path, model, rows)
    there = plan(rows)
    assert there.missing_bytes == 0 and not there.missing and "2 of 2 shards are there" in str(there)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert there.total_bytes <= written < there.total_bytes + 2 * 2000  # headers and slots
    next(tmp_path.rglob("rows-00000004.safetensors")).unlink()
    assert plan(rows).missing_bytes == 2 * 4 * 16 * 32 * 2


def test_another_variant_or_data_set_leaves_the_first_ones_shards(tmp_path):
    model, variants = tiny_model(), [Tiles(5, seed=seed) for seed in range(3)]
    write_cache(tmp_path, model, variants[0])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    write_cache(tmp_path, model, *variants[:2])
    other = CachePart(key_of(model, rows="other tiles"), variants[2])
    trunk = Trunk(model, PREPROCESSING)
    joined = cache_on_disk(plan_cache(tmp_path, trunk, [*parts_of(model, variants[0]), other]), trunk)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    memory = [cache_in_memory(model, rows, PREPROCESSING) for rows in (variants[0], variants[2])]
    tokens, valid = joined.read(torch.tensor([9, 0, 4]))
    for place, (cache, row) in enumerate(((memory[1], 4), (memory[0], 0), (memory[0], 4))):
        expected, mask = cache.read(torch.tensor([row]))
        assert torch.equal(valid[place], mask[0])
        first = int(valid[:place].sum())
        assert torch.allclose(tokens[first : first + len(expected)].float(), expected.float(), atol=2e-3)
    assert torch.equal(joined.anchor_weights(torch.tensor([9, 0])), valid[:2, 0].float())


def test_what_a_killed_run_left_goes_after_an_hour(tmp_path):
    model, rows = tiny_model(), Tiles(5)
    write_cache(tmp_path, model, rows)
    (home,) = tmp_path.iterdir()
    old, young = home / ".rows.old.tmp", home / ".rows.young.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    next(home.glob("rows-*4.safetensors")).unlink()
    write_cache(tmp_path, model, rows)
    assert young.exists() and not old.exists()


def test_a_disk_that_fills_up_meanwhile_is_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards_module.os, "fsync", full)
    for name in ("at once", "later"):
        if name == "later":
            monkeypatch.setattr(cache_module, "write_atomically", lambda path, content: None)
        with pytest.raises(InputError, match="disk is full; give --token-folder"):
            write_cache(tmp_path / name, tiny_model(), Tiles(5))
        assert not [path for path in (tmp_path / name).rglob("*") if path.is_file()]


def test_a_damaged_shard_is_named(tmp_path):
    model, rows = tiny_model(), Tiles(5)
    write_cache(tmp_path, model, rows)
    path = next(tmp_path.rglob("rows-00000000.safetensors"))
    for content in (path.read_bytes()[:-1], b"", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"rows-00000000\.safetensors: .*delete"):
            write_cache(tmp_path, model, rows)


def test_half_precision_is_its_own_cache_and_nearly_the_same_tokens(tmp_path):
    model, rows = tiny_model(), Tiles(6)
    before = weights(model)
    caches = {name: write_cache(tmp_path, model, rows, precision=name) for name in ("fp32", "bf16", "fp16")}
    assert len(list(tmp_path.iterdir())) == 3
    full = everything(caches["fp32"])[0].float()
    for name in ("bf16", "fp16"):
        half = everything(caches[name])[0].float()
        assert not torch.equal(half, full) and torch.allclose(half, full, atol=0.1)
        live = LiveTokens(model, lambda variant: rows, caches["fp32"].view_mask, PREPROCESSING, precision=name)
        assert torch.allclose(everything(live)[0].float(), half, atol=5e-3)
    assert same(weights(model), before)  # the trunk is exported in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a run in mixed precision whose trunk is to be in float32
        live = LiveTokens(model, lambda variant: rows, caches["fp32"].view_mask, PREPROCESSING)
        assert torch.allclose(everything(live)[0], full, atol=2e-3)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_that_decode_change_nothing(tmp_path, workers):
    model, rows = tiny_model(), Tiles(70)
    expected = everything(cache_in_memory(model, rows, PREPROCESSING, num_workers=0))
    found = everything(cache_in_memory(model, rows, PREPROCESSING, num_workers=workers))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_live_tokens_pass_through_the_trunk_a_few_at_a_time(monkeypatch):
    model, rows = tiny_model(), Tiles(60)
    passed, tokens = [], type(model).tokens
    monkeypatch.setattr(type(model), "tokens", lambda self, pixels: passed.append(len(pixels)) or tokens(self, pixels))
    mask = torch.stack([rows[n]["view_mask"] for n in range(60)])
    live = LiveTokens(model, lambda variant: rows, mask, PREPROCESSING)
    read, valid = live.read(torch.arange(59, -1, -1))
    assert max(passed) <= cache_module.PICTURES_PER_PASS and sum(passed) == len(read) == int(valid.sum())
    passed.clear()
    many = torch.utils.data.default_collate([rows[n] for n in range(60)])
    Trunk(model, PREPROCESSING).tokens_of(many)
    assert max(passed) == cache_module.PICTURES_PER_PASS and len(passed) > 1


def test_reading_ahead_gives_the_same_tokens(tmp_path):
    cache = write_cache(tmp_path, tiny_model(), Tiles(9))
    batches = [torch.tensor(rows) for rows in ([3, 1], [8, 0, 2], [5])]
    with ReadAhead(cache) as ahead:
        for number, rows in enumerate(batches):
            for following in batches[number + 1 : number + 2]:
                ahead.expect(following, 0)
            tokens, valid = ahead.read(rows, 0)
            assert torch.equal(tokens, cache.read(rows)[0]) and torch.equal(valid, cache.read(rows)[1])


def test_transform_is_applied_by_seed(tmp_path):
    model, rows, seeds = tiny_model(), Tiles(8), []

    def darker(pixels, seed):
        seeds.append(seed)
        return pixels * 0.5

    cache = write_cache(tmp_path, model, rows, transform=darker)
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
