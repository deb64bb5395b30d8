"""SDXL and NearID at their full widths, in bf16, on a CPU: `python benchmarks/real_size.py`.

Random weights at the published shapes (`real_models.py`). Three parts, which `--parts` chooses from:

- guard: a plain picture against the same seed under the guard; seconds by stage; what previews would cost of 30 steps.
- lora: one step of the LoRA trainer, with its validation, in a process of its own; seconds and peak memory.
- scorer: pictures a second.

Takes 8 GB of disk and up to 16 GB of memory. Results go to OUT/real_size.json.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from real_models import nearid, sdxl

from nearid_personalize import IdentityGuard

ROOT = Path(__file__).parent.parent
PROMPT = "a photo of sks dog in space"
STEPS_IN_USE = 30
"""Denoising steps that people take with SDXL; previews are weighed against these."""


@dataclass(frozen=True)
class Options:
    """What is run."""

    out: Path = Path("runs/real_size")
    """Folder for the models, the LoRA and real_size.json."""
    parts: tuple[Literal["guard", "lora", "scorer"], ...] = ("guard", "lora", "scorer")
    """What to measure."""
    resolution: int = 512
    """Picture side, pixels."""
    steps: int = 4
    """Denoising steps of the guard's pictures."""
    num_candidates: int = 4
    """Candidates, denoised in one batch."""
    compare_batch: bool = False
    """Draw the plain pictures of all candidates too, in one batch, to compare with those of the guard."""
    width: int = 1
    """Divides the UNet's channels; 1: SDXL's own, 10: a dry run of this benchmark."""
    seed: int = 0


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds it took."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def peak_gb() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def photos(number: int, size: int) -> list[Image.Image]:
    """Stand-ins for photos: smooth noise."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(number):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pictures.append(small.resize((size, size), Image.Resampling.BICUBIC))
    return pictures


def draw_plain(pipe: Any, seeds: Sequence[int], call: dict[str, Any]) -> dict[int, Image.Image]:
    """The pipeline's own pictures of these seeds, drawn in one batch."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return dict(zip(seeds, pipe([PROMPT] * len(generators), generator=generators, **call).images))


def differences(candidates: Sequence[Any], plain: dict[int, Image.Image]) -> dict[int, int]:
    """By seed, the greatest difference of a finished candidate's pixels from the plain picture's, of 255."""
    found = {}
    for candidate in candidates:
        if candidate.image is not None and candidate.status != "stopped" and candidate.seed in plain:
            pair = (np.asarray(picture, int) for picture in (candidate.image, plain[candidate.seed]))
            found[candidate.seed] = int(np.abs(np.subtract(*pair)).max())
    return found


def measure_guard(options: Options) -> dict[str, Any]:
    """A plain picture, and four candidates under the guard; who went on must be the plain pictures of their seeds."""
    pipe, built = timed(lambda: sdxl(torch.bfloat16, width=options.width))
    pipe.set_progress_bar_config(disable=True)
    scorer = nearid(small=options.width > 1)
    size = {"height": options.resolution, "width": options.resolution}
    call = {"num_inference_steps": options.steps, **size}
    seeds = range(options.seed, options.seed + options.num_candidates)
    subject, enrol_seconds = timed(lambda: scorer.enroll(photos(5, options.resolution)))
    guard = IdentityGuard(pipe, scorer, subject)
    count = options.num_candidates
    result, seconds = timed(lambda: guard(PROMPT, num_images=1, num_candidates=count, seed=options.seed, **call))
    plain, plain_seconds = timed(lambda: draw_plain(pipe, [result.ranked[0].seed], call))
    batch = draw_plain(pipe, seeds, call) if options.compare_batch else {}
    stages = result.cost.seconds
    looks = {fraction for candidate in result.candidates for fraction in candidate.previews}
    row_steps = result.cost.denoiser_rows / 2  # guidance takes two rows
    step_seconds = stages["generate"] / max(row_steps, 1)
    return {
        "build_s": built,
        "plain_picture_s": plain_seconds,
        "enroll_5_photos_s": enrol_seconds,
        "guard_s": seconds,
        "stages_s": stages,
        "statuses": [candidate.status for candidate in result.candidates],
        "survivors_differ_from_plain_by_of_255": differences(result.candidates, plain),
        "survivors_differ_from_plain_batch_by_of_255": differences(result.candidates, batch),
        "denoiser_step_s": step_seconds,
        "looked_at": sorted(looks),
        "previews_share": stages["preview"] / sum(stages.values()),
        f"previews_share_at_{STEPS_IN_USE}_steps": share_in_use(stages["preview"], stages["generate"], options.steps),
        "peak_gb": peak_gb(),
    }


def share_in_use(previews: float, drawing: float, steps: int) -> float:
    """The previews' share of a race of 30 steps with the same looks, which stops as many."""
    return previews / (previews + drawing * STEPS_IN_USE / steps)


def write_models(options: Options, base: Path, encoder: Path) -> None:
    """Build the base model and the encoder and save them."""
    sdxl(torch.bfloat16, width=options.width).save_pretrained(base)
    scorer = nearid(small=options.width > 1)
    scorer.model.save_pretrained(encoder)
    scorer.preprocessing.save(encoder)


def in_its_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process. The allocator of this one would keep gigabytes that were freed, and what a
    process begins from counts towards its own peak."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def run_to_the_end(command: Sequence[str], log: Path) -> float:
    """Run a command, its output in `log`; the largest resident memory it had, GB. Ends this program where it fails."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\n{log.read_text()}")
    return usage.ru_maxrss * 1024 / 1e9


def measure_lora(options: Options) -> dict[str, Any]:
    """One optimizer step of the trainer's own command, with validation, on models saved to disk."""
    base, encoder, references = options.out / "sdxl", options.out / "nearid", options.out / "photos"
    in_its_own_process(write_models, options, base, encoder)
    references.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(4, options.resolution)):
        photo.save(references / f"{number}.png")
    flags = {
        "base-model": base,
        "references": references,
        "prompt": "a photo of sks dog",
        "output": options.out / "lora",
        "steps": 1,
        "batch-size": 1,
        "resolution": options.resolution,
        "precision": "bf16",
        "base-precision": "same",
        "validate-every": 1,
        "validation-model": encoder,
        "validation-prompts": PROMPT,
        "validation-steps": 2,
        "validation-seeds": 2,
        "validation-budget": 1,
    }
    command = [sys.executable, str(ROOT / "trainers" / "train_lora.py")]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    peak, seconds = timed(lambda: run_to_the_end(command, options.out / "lora.log"))
    journal = (options.out / "lora" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in journal]
    return {
        "command": " ".join(command[1:]),
        "seconds": seconds,
        "validations": [{"step": record["step"], "seconds": record["seconds"]} for record in records],
        "peak_gb": peak,
    }


def measure_scorer(options: Options) -> dict[str, Any]:
    """Pictures a second of the released encoder's shape."""
    scorer = nearid(small=options.width > 1)
    pictures = photos(4, options.resolution)
    scorer.embed(pictures[:1])
    _, seconds = timed(lambda: scorer.embed(pictures))
    return {"pictures_per_s": len(pictures) / seconds, "parameters": sum(p.numel() for p in scorer.model.parameters())}


def main(options: Options) -> None:
    """Measure, print and write."""
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {"guard": measure_guard, "lora": measure_lora, "scorer": measure_scorer}
    found: dict[str, Any] = {"options": asdict(options), "threads": torch.get_num_threads()}
    for name in options.parts:
        found[name] = in_its_own_process(parts[name], options)
        print(name, json.dumps(found[name], indent=1, default=str), flush=True)
        (options.out / "real_size.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
