"""Steps per second of head training with and without the token cache: `python benchmarks/head_training.py`.

Same machine, same process, same batches: the cached loop reads the frozen trunk's tokens from disk; the plain loop
runs the trunk again at every step, padded slots included, as the reference implementation of the paper does. The trunk
has random weights, which cost what trained ones cost. Pictures are ready tensors, so decoding flatters the plain loop.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize.data.cache import (
    CacheKey,
    CachePart,
    LiveTokens,
    TokenCache,
    TokenSource,
    Trunk,
    cache_on_disk,
    plan_cache,
)
from nearid_personalize.data.shards import TokenRows, open_shard, write_shard
from nearid_personalize.encoder.checkpoints import trunk_fingerprint
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.training.head import HeadOptions, Pooling, batch_loss


@dataclass(frozen=True)
class Options:
    """What is measured."""

    batch_size: int = 8
    """Identities per step; each has up to three views and as many distractors."""
    cached_steps: int = 20
    plain_steps: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    device: str = "cpu"
    reading_gigabytes: float = 4.0
    """Size of the cache that is read in two ways: in place, and mapped into memory."""
    reading_batch: int = 32
    """Identities in each batch of that."""


class RandomRows(Dataset[dict[str, Tensor]]):
    """Identities of noise; two of three have two views only, as in the paper's data set."""

    def __init__(self, num_rows: int, image_size: int) -> None:
        self.num_rows, self.image_size = num_rows, image_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        pictures = torch.rand(2, 3, 3, self.image_size, self.image_size, generator=generator)
        mask = torch.tensor([True, True, index % 3 == 0])
        return {"views": pictures[0], "distractors": pictures[1], "view_mask": mask, "distractor_mask": mask.clone()}


class PaddedTokens:
    """Tokens as the reference makes them: the trunk runs at every step, on padded slots as well."""

    def __init__(self, live: LiveTokens) -> None:
        self.live, self.view_mask = live, live.view_mask

    def __len__(self) -> int:
        return len(self.live)

    @torch.no_grad()
    def read(self, rows: Tensor, variant: int) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        items = [self.live.variants(variant)[int(row)] for row in rows]
        pictures = torch.stack([torch.stack([item["views"], item["distractors"]]) for item in items])
        valid = torch.stack([torch.stack([item["view_mask"], item["distractor_mask"]]) for item in items])
        pixels = pictures.flatten(0, 2).to(self.live.model.device) * 2 - 1
        tokens = self.live.model.tokens(pixels)
        return tokens[valid.flatten().to(tokens.device)], valid

    def anchor_weights(self, rows: Tensor, variant: int) -> Tensor:
        """See `TokenSource`."""
        return self.live.anchor_weights(rows, variant)


def seconds_per_step(steps: int, source: TokenSource, pooling: Pooling, options: Options) -> list[float]:
    """Time of each optimizer step."""
    accelerator = Accelerator(cpu=options.device == "cpu")
    optimizer = torch.optim.AdamW(pooling.parameters(), lr=1e-4)
    head_options = HeadOptions(Path("unused"), batch_size=options.batch_size)
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        rows = torch.arange(options.batch_size) + (step % (len(source) // options.batch_size)) * options.batch_size
        batch_loss(pooling, source, rows, 0, head_options, step, accelerator).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def reading(options: Options, folder: Path) -> None:
    """Print how long a random batch of a cache takes, read in place or gathered from files mapped into memory.

    The cache holds tokens of the so400m trunk at 384 pixels, 729 x 1152, of five pictures an identity on average. It is
    read twice from beginning to end in the same order, each way first in one half of the batches; before, the system
    is asked to let go of its pages.
    """
    shape, rows_per_shard = (729, 1152), 256
    num_rows = int(options.reading_gigabytes * 1e9 / (5 * shape[0] * shape[1] * 2))
    paths = []
    for start in range(0, num_rows, rows_per_shard):
        stop = min(start + rows_per_shard, num_rows)
        paths.append(folder / f"rows-{start:08d}.safetensors")
        write_shard(paths[-1], stop - start, (random_tokens(shape, row) for row in range(start, stop)))
    files = tuple(open_shard(path) for path in paths)
    slots, start = [], 0
    for shard in files:
        slots.append(torch.where(shard.slots >= 0, shard.slots + start, -1))
        start += len(shard)
    in_place = TokenCache((files,), torch.cat(slots)[None])
    mapped = TokenCache((tuple(load_file(path)["tokens"] for path in paths),), in_place.slots)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    for state in ("from disk", "from memory"):
        if state == "from disk":
            let_go(paths)
        seconds: dict[str, list[float]] = {"in place": [], "mapped": []}
        for number, rows in enumerate(order.split(options.reading_batch)):
            name, cache = ("in place", in_place) if number % 2 else ("mapped", mapped)
            seconds[name].append(timed(lambda cache=cache, rows=rows: cache.read(rows))[1] / len(rows))  # type: ignore[misc]
        for name, found in seconds.items():
            median, low, high = (1000 * value for value in (statistics.median(found), min(found), max(found)))
            print(f"{state}, {name}: {median:.2f} ms an identity (batches {low:.2f} to {high:.2f}, n {len(found)})")
        print(f"ratio   {statistics.median(seconds['mapped']) / statistics.median(seconds['in place']):8.2f}")


def let_go(paths: Sequence[Path]) -> None:
    """Ask the system to read files from the disk again."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def random_tokens(shape: tuple[int, int], row: int) -> TokenRows:
    """An identity's tokens: two views and their distractors, every other row three."""
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    valid[:, :, 2] = row % 2 == 1
    tokens = torch.full((int(valid.sum()), *shape), float(row), dtype=torch.float16)
    return TokenRows(tokens, valid, valid[:, 0].float())


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """A function's result and its seconds."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def main(options: Options) -> None:
    """Print both rates, their ratio, and what the cache cost."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=options.image_size,
        patch_size=options.patch_size,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
    )
    model = NearIDModel.from_vision_model(SiglipVisionModel(config)).freeze_trunk().to(options.device)
    preprocessing = Preprocessing(options.image_size)
    rows = RandomRows(2 * options.batch_size, options.image_size)
    masks = torch.stack([rows[i]["view_mask"] for i in range(len(rows))])
    live = LiveTokens(model, lambda variant: rows, masks, preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        part = CachePart(CacheKey(trunk_fingerprint(model), preprocessing, "random"), rows)
        trunk = Trunk(model, preprocessing)
        plan = plan_cache(Path(folder), trunk, [part])
        cache, writing = timed(lambda: cache_on_disk(plan, trunk))
        pooling = Pooling(model)
        seconds_per_step(2, cache, pooling, options)  # type: ignore[arg-type]
        cached = seconds_per_step(options.cached_steps, cache, pooling, options)  # type: ignore[arg-type]
    plain = seconds_per_step(options.plain_steps, PaddedTokens(live), pooling, options)
    for name, seconds in (("cached", cached), ("plain", plain)):
        median, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{name:7} {1 / median:8.3f} steps/s  (s per step: median {median:.3f}, {low:.3f} to {high:.3f})")
    with tempfile.TemporaryDirectory() as folder:
        reading(options, Path(folder))
    pictures = int(masks.sum()) * 2
    print(f"ratio   {statistics.median(plain) / statistics.median(cached):8.1f}")
    print(f"writing {pictures / writing:8.2f} pictures/s, once; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(tyro.cli(Options))
