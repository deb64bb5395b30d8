"""Shards of a token cache: a true safetensors file, written in little memory, whole or not at all."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nearid_personalize.data.shards import Span, TokenRows, open_shard, write_shard


def batches_of(num_rows, rows_per_batch, tokens=(3, 5)):
    """Rows of two or three views, each with as many distractors."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, num_rows, rows_per_batch):
        count = min(rows_per_batch, num_rows - start)
        valid = torch.ones(count, 2, 3, dtype=torch.bool)
        valid[::2, :, 2] = False
        pictures = torch.randn(int(valid.sum()), *tokens, generator=generator)
        yield TokenRows(pictures, valid, torch.rand(count, 3, generator=generator) * valid[:, 0])


@pytest.mark.parametrize("rows_per_batch", [1, 4, 11])
def test_a_shard_is_a_safetensors_file_of_what_was_written(tmp_path, rows_per_batch):
    path, written = tmp_path / "shard.safetensors", list(batches_of(11, rows_per_batch))
    write_shard(path, 11, iter(written))
    read, shard = load_file(path), open_shard(path)
    tokens = torch.cat([batch.tokens for batch in written]).half()
    valid = torch.cat([batch.valid for batch in written])
    assert torch.equal(read["tokens"], tokens) and torch.equal(read["slots"] >= 0, valid)
    assert torch.equal(read["slots"][valid], torch.arange(len(tokens)))
    assert torch.equal(read["anchor_weights"], torch.cat([batch.anchor_weights for batch in written]))
    assert torch.equal(shard.slots, read["slots"]) and torch.equal(shard.anchor_weights, read["anchor_weights"])
    assert shard.shape == tokens.shape and len(shard) == len(tokens)
    with safe_open(path, "pt") as file:  # a slice that safetensors itself finds
        assert torch.equal(file.get_slice("tokens")[2:4], tokens[2:4])
    assert list(tmp_path.iterdir()) == [path]


def test_spans_are_read_to_where_they_are_wanted(tmp_path):
    path, (batch,) = tmp_path / "shard.safetensors", list(batches_of(8, 8))
    write_shard(path, 8, [batch])
    wanted = torch.zeros(6, 3, 5, dtype=torch.float16)
    open_shard(path).read_into(wanted, [Span(start=7, count=2, target=0), Span(start=0, count=3, target=3)])
    expected = batch.tokens.half()
    assert torch.equal(wanted[:2], expected[7:9]) and torch.equal(wanted[3:], expected[:3]) and not wanted[2].any()


def test_what_fails_half_way_leaves_nothing(tmp_path):
    class Killed(Exception):
        pass

    def dies():
        yield from batches_of(4, 4)
        raise Killed

    with pytest.raises(Killed):
        write_shard(tmp_path / "shard.safetensors", 8, dies())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_never_holds_a_whole_shard(tmp_path):
    # 320 rows of 200 kB a picture: 320 MB in all, 16 MB a batch.
    size = 2 * (320 * 2 * 3 - 320 // 2 * 2) * 100 * 1000
    batches = (
        batch._replace(tokens=torch.ones(len(batch.tokens), 100, 1000, dtype=torch.float16))
        for batch in batches_of(320, 16, (1, 1))
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmHWM")
    write_shard(tmp_path / "shard.safetensors", 320, batches)
    assert (tmp_path / "shard.safetensors").stat().st_size > size
    # Half: the allocator keeps some of what batches have freed.
    assert resident("VmHWM") - before < 0.5 * size


def resident(name):
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
