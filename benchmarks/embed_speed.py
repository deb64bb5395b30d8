"""Pictures per second of `IdentityScorer.embed`, from tensors and from files, against the bare forward pass.

`OMP_NUM_THREADS=1 python benchmarks/embed_speed.py` takes a minute or two on one core;
`python benchmarks/embed_speed.py --shape so400m-384 --device cuda --dtype bfloat16 --num-images 2048 --batch-size 128
--peak-tflops 989` is for a GPU. Weights are random, pictures are drawn at random: speed depends on neither.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import SiglipVisionConfig

from nearid_personalize import IdentityScorer, NearIDModel
from nearid_personalize.encoder.model import NearIDConfig

SHAPES = {
    "base-224": SiglipVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    "so400m-384": SiglipVisionConfig(
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
    ),
}


@dataclass(frozen=True)
class Options:
    """What is timed, and on what."""

    shape: Literal["base-224", "so400m-384"] = "base-224"
    """The trunk: ViT-B/16 at 224 pixels, or the released model's."""
    device: str = "cpu"
    """Where the model is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the trunk; the head is in float32."""
    num_images: int = 8
    """Pictures per repeat."""
    batch_size: int = 4
    """Pictures per forward pass."""
    repeats: int = 7
    """Rounds; each times every way once, in turn, so that a busy machine slows all of them."""
    file_side: int = 512
    """Pixels of the side of the JPEG files."""
    compile_backend: str | None = None
    """A `torch.compile` backend for both, such as inductor."""
    peak_tflops: float | None = None
    """The device's peak for this dtype, in 1e12 floating-point operations per second: prints the ceiling it sets."""


def flops_per_image(config: SiglipVisionConfig) -> int:
    """Floating-point operations of the trunk's matrix products for one picture, counted on a run without data."""
    with torch.device("meta"):
        model = NearIDModel._from_config(NearIDConfig(vision_config=config), attn_implementation="eager")
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model.tokens(pixels)
    return counter.get_total_flops()


def photo(seed: int, side: int) -> Image.Image:
    """Coarse blocks under fine noise: a JPEG of it decodes at about a photo's cost."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
    noise = random.normal(0, 8, (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(blocks) + noise, 0, 255).astype(np.uint8))


def seconds(action: Callable[[], object], device: str) -> float:
    """Wall time of one call, all that it started on the device included."""
    started = time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(options: Options) -> None:
    """Print pictures per second of each way: median, minimum, maximum, and the median ratio to the bare forward."""
    torch.manual_seed(0)
    config = SHAPES[options.shape]
    side = config.image_size
    scorer = IdentityScorer(
        NearIDModel(NearIDConfig(vision_config=config)),
        side,
        (0.5,) * 3,
        (0.5,) * 3,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        batch_size=options.batch_size,
        compile_backend=options.compile_backend,
    )
    tensors = torch.randint(0, 256, (options.num_images, 3, side, side), dtype=torch.uint8)
    ready = [scorer.preprocessing(batch, options.device) for batch in tensors.split(options.batch_size)]

    @torch.no_grad()
    def bare() -> None:
        for pixels in ready:
            scorer._features(pixels)

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.jpg" for index in range(options.num_images)]
        for index, path in enumerate(files):
            photo(index % 32, options.file_side).save(path, quality=90)
        ways: dict[str, Callable[[], object]] = {
            "bare forward": bare,
            "embed, uint8 tensors": lambda: scorer.embed(tensors),
            f"embed, JPEG files {options.file_side}x{options.file_side}": lambda: scorer.embed(files),
        }
        for action in ways.values():  # warm up: allocators, compilation, the files' pages
            action()
        rounds = [
            {name: options.num_images / seconds(action, options.device) for name, action in ways.items()}
            for _ in tqdm(range(options.repeats), desc="repeats")
        ]

    print(f"{options.shape}, {options.dtype}, {options.device}, batch {options.batch_size}, n = {options.repeats}")
    print(f"{'images/s':32}{'median':>10}{'min':>10}{'max':>10}{'to bare':>10}")
    for name in ways:
        rates = [rates[name] for rates in rounds]
        ratio = np.median([rates[name] / rates["bare forward"] for rates in rounds])
        print(f"{name:32}{np.median(rates):10.2f}{min(rates):10.2f}{max(rates):10.2f}{ratio:10.3f}")
    flops = flops_per_image(config)
    print(f"trunk: {flops / 1e9:.1f} GFLOP per image")
    if options.peak_tflops:
        ceiling = options.peak_tflops * 1e12 / flops
        shares = ", ".join(f"{name} {np.median([r[name] for r in rounds]) / ceiling:.1%}" for name in ways)
        print(f"ceiling at {options.peak_tflops:g} TFLOP/s: {ceiling:.1f} images/s; reached: {shares}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
