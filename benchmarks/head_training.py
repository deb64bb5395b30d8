"""Steps per second of head training with and without the token cache: `python benchmarks/head_training.py`.

Same machine, same process, same batches: the cached loop reads the frozen trunk's tokens from disk; the plain loop
runs the trunk again at every step, padded slots included, as the reference implementation of the paper does. The trunk
has random weights, which cost what trained ones cost. Pictures are ready tensors, so decoding flatters the plain loop.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize.checkpoints import trunk_fingerprint
from nearid_personalize.data.cache import CacheKey, CachePart, LiveTokens, TokenSource, Trunk, cache_on_disk, plan_cache
from nearid_personalize.encoder import NearIDModel
from nearid_personalize.preprocessing import Preprocessing
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
    pictures = int(masks.sum()) * 2
    print(f"ratio   {statistics.median(plain) / statistics.median(cached):8.1f}")
    print(f"writing {pictures / writing:8.2f} pictures/s, once; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(tyro.cli(Options))
