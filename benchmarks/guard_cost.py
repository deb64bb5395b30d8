"""What does racing save, and what does it lose? `python benchmarks/guard_cost.py --out runs/guard_cost`.

For held-out subjects of the mini-world: train a LoRA, run 32 candidates for each of two prompts to the end, keep the
previews of every third step, and let the judge say which attributes each finished picture really shows. On these
tables candidates 0-15 are raced, by the guard's policy and by simpler ones; later ones are the seeds that saved compute
may begin. Then the guard itself runs, for its winner, its rows and its seconds. Intervals: 95 %, bootstrap over
subjects.
"""

import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from quickstart_quality import personalised

from nearid_personalize.denoising import Moment, denoise
from nearid_personalize.images import write_atomically
from nearid_personalize.miniworld import Split
from nearid_personalize.miniworld.judge import judge

STEP_FRACTIONS = tuple(i / 10 for i in range(1, 10))


@dataclass(frozen=True)
class Options:
    """What is measured."""

    out: Path = Path("runs/guard_cost")
    """Folder for the tables; finished subjects are not drawn again, only scored."""
    num_subjects: int = 24
    first_subject: int = 2000
    """Index of the first subject of the split."""
    split: Split = "test"
    num_recorded: int = 32
    """Candidates per prompt."""
    steps: int = 30
    """Denoising steps."""
    lora_steps: int = 50
    """LoRA steps: few, so that candidates differ."""
    workers: int = 1
    """Processes; each uses one thread."""


def pixels_to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """`[n,3,H,W]` in [0, 1] -> uint8 `[n,H,W,3]`."""
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()


def draw_subject(job: tuple[Options, int]) -> None:
    """Train, draw and judge one subject; writes `<index>.npz` (pictures, previews) and then `<index>.json`."""
    options, index = job
    path = options.out / f"{index}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    pet, contexts, pipe = personalised(options.split, index, options.lora_steps)
    pictures, previews, prompts = [], [], []
    for context in contexts:
        prompt = f"a photo of sks {pet.category} in {context}"
        seen: list[np.ndarray] = []

        def keep(moment: Moment, seen: list[np.ndarray] = seen) -> None:
            if moment.step % (options.steps // 10) == 0 and moment.step < options.steps:
                seen.append(pixels_to_bytes(moment.preview()))

        arguments = {"prompt": prompt, "num_inference_steps": options.steps, "guidance_scale": 3.0}
        generators = [torch.Generator().manual_seed(seed) for seed in range(options.num_recorded)]
        images = denoise(pipe, arguments, generators, keep).images
        verdicts = [judge(image, pet, context) for image in images]
        pictures.append(np.stack([np.asarray(image) for image in images]))
        previews.append(np.stack(seen, axis=1))  # [M,S,H,W,3]
        prompts.append(
            {
                "prompt": prompt,
                "agreement": [verdict.agreement for verdict in verdicts],
                "wrong": [verdict.wrong for verdict in verdicts],
            }
        )
    np.savez_compressed(options.out / f"{index}.npz", pictures=np.stack(pictures), previews=np.stack(previews))
    write_atomically(path, json.dumps({"prompts": prompts, "seconds": time.perf_counter() - started}))


def main(options: Options) -> None:
    """Draw what is missing."""
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(options, index) for index in range(options.first_subject, options.first_subject + options.num_subjects)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.map(draw_subject, jobs, chunksize=1)


if __name__ == "__main__":
    main(tyro.cli(Options))
