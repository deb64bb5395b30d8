"""Does the guard pick pictures of the right subject? `python benchmarks/quickstart_quality.py --out runs/quality`.

For held-out subjects of the mini-world: train the quickstart's LoRA, draw candidates for two prompts, let the judge say
which attributes each candidate really shows, and compare what is picked by chance, by the frozen backbone, by the
guard and by the judge itself. All intervals are 95 % bootstrap intervals over subjects.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.cli import quickstart_lora
from nearid_personalize.denoising import denoise
from nearid_personalize.images import write_atomically
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, Split, photos, sample_pet, weights_dir
from nearid_personalize.miniworld.judge import judge
from nearid_personalize.miniworld.subjects import ATTRIBUTES
from nearid_personalize.scorer import IdentityScorer
from nearid_personalize.training.lora import load_lora, train_lora


@dataclass(frozen=True)
class Options:
    """What is measured."""

    out: Path = Path("runs/quality")
    """Folder for the drawn and judged candidates; finished subjects are not drawn again, only scored."""
    num_subjects: int = 48
    first_subject: int = 2000
    """Index of the first subject of the split; the quickstart shows the ones from 0."""
    split: Split = "test"
    num_candidates: int = 16
    steps: int = 20
    """Denoising steps."""
    lora_steps: int | None = None
    """LoRA steps. Default: the quickstart's."""
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    workers: int = 1
    """Processes; each uses one thread."""


def shots_of(split: Split, index: int) -> tuple[Pet, list[Image.Image], tuple[str, str]]:
    """A subject, four reference photos of it, and two contexts that are in none of them."""
    pet = sample_pet(split, index)
    elsewhere = [(shot, context) for shot, context in photos(pet, len(CONTEXTS)) if context != "space"]
    return pet, [Image.fromarray(shot.image) for shot, _ in elsewhere[:4]], ("space", elsewhere[4][1])


def personalised(
    split: Split, index: int, lora_steps: int | None
) -> tuple[Pet, tuple[str, str], StableDiffusionPipeline]:
    """A subject, its two contexts, and the packaged pipeline with the quickstart's LoRA trained on its references."""
    pet, references, contexts = shots_of(split, index)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "references"
        folder.mkdir()
        for i, reference in enumerate(references):
            reference.save(folder / f"{i}.png")
        lora = train_lora(quickstart_lora(folder, Path(scratch) / "lora", pet.category, lora_steps))
        pipe = StableDiffusionPipeline.from_pretrained(weights_dir("pipeline"), use_safetensors=True)
        load_lora(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pet, contexts, pipe


def draw_subject(job: tuple[Options, int]) -> None:
    """Train, draw and judge one subject; writes `<index>.npz` (pictures) and then `<index>.json`."""
    options, index = job
    path = options.out / f"{index}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    pet, contexts, pipe = personalised(options.split, index, options.lora_steps)
    trained = time.perf_counter()
    pictures, prompts = [], []
    for context in contexts:
        prompt = f"a photo of sks {pet.category} in {context}"
        images = draw(pipe, prompt, options)
        verdicts = [judge(image, pet, context) for image in images]
        pictures.append(np.stack([np.asarray(image) for image in images]))
        prompts.append(
            {
                "prompt": prompt,
                "agreement": [verdict.agreement for verdict in verdicts],
                "wrong": [verdict.wrong for verdict in verdicts],
            }
        )
    seconds = {"lora": trained - started, "all": time.perf_counter() - started}
    np.savez_compressed(options.out / f"{index}.npz", pictures=np.stack(pictures))
    write_atomically(path, json.dumps({"pet": asdict(pet), "prompts": prompts, "seconds": seconds}))


def draw(pipe: StableDiffusionPipeline, prompt: str, options: Options) -> list[Image.Image]:
    """Candidates of a prompt, from generator seeds 0, 1, ...; all run to the end."""
    arguments = {"prompt": prompt, "num_inference_steps": options.steps, "guidance_scale": 3.0}
    return denoise(
        pipe, arguments, [torch.Generator().manual_seed(seed) for seed in range(options.num_candidates)]
    ).images


def score_subject(options: Options, index: int, scorer: IdentityScorer, frozen: IdentityScorer) -> tuple[dict, float]:
    """The record of a drawn subject with both encoders' scores and the guard's verdicts; LoRA seconds."""
    record = json.loads((options.out / f"{index}.json").read_text())
    pictures = np.load(options.out / f"{index}.npz")["pictures"]
    _, references, _ = shots_of(options.split, index)
    subject = scorer.enroll(references)
    frozen_subject = frozen.enroll(references, aggregation=subject.aggregation)  # the same for both: a fair comparison
    for prompt, candidates in zip(record["prompts"], pictures, strict=True):
        images = [Image.fromarray(candidate) for candidate in candidates]
        prompt["scores"] = scorer.score(images, subject).tolist()
        prompt["frozen_scores"] = frozen.score(images, frozen_subject).tolist()
        prompt["accepted"] = [score >= subject.threshold for score in prompt["scores"]]
    return record, record["seconds"]["lora"]


ARMS = ("random", "frozen", "guard", "best")


def arms_of(prompt: dict) -> tuple[list[float], float, float]:
    """Judge agreement of each arm's pick `[4]`, and the mean agreement of accepted and of rejected candidates."""
    agreement = np.array(prompt["agreement"])
    accepted = np.array(prompt["accepted"])
    picks = [
        agreement.mean(),
        agreement[int(np.argmax(prompt["frozen_scores"]))],
        agreement[int(np.argmax(prompt["scores"]))],
        agreement.max(),
    ]
    means = [agreement[which].mean() if which.any() else float("nan") for which in (accepted, ~accepted)]
    return [float(p) for p in picks], float(means[0]), float(means[1])


def captured_gain(arms: np.ndarray, arm: str) -> float:
    """(picked - random) / (best - random), of arm means over rows `[N,4]`."""
    random, picked, best = (arms[:, ARMS.index(name)].mean() for name in ("random", arm, "best"))
    return float((picked - random) / (best - random))


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A 95 % bootstrap interval over subjects of a statistic of rows `[N,4]`; `rows` is `[subjects, prompts, 4]`."""
    return bootstrap_interval(
        torch.from_numpy(rows), lambda drawn: float(statistic(drawn.reshape(-1, rows.shape[-1]).numpy()))
    )


def wrong_attributes(records: list[dict]) -> dict[str, dict[str, float]]:
    """Per arm, the share of pictures that show each attribute wrongly; of "random", of all candidates."""
    prompts = [prompt for record in records for prompt in record["prompts"]]
    shown = {
        "random": [wrong for prompt in prompts for wrong in prompt["wrong"]],
        "frozen": [prompt["wrong"][int(np.argmax(prompt["frozen_scores"]))] for prompt in prompts],
        "guard": [prompt["wrong"][int(np.argmax(prompt["scores"]))] for prompt in prompts],
    }
    return {
        arm: {name: sum(name in w for w in wrong) / len(wrong) for name in ATTRIBUTES} for arm, wrong in shown.items()
    }


def summarise(records: list[dict]) -> dict:
    """The table the README quotes."""
    arms = np.array([[arms_of(prompt)[0] for prompt in record["prompts"]] for record in records])  # [S,P,4]
    flat = arms.reshape(-1, len(ARMS))
    summary: dict = {"num_subjects": len(records), "num_prompts": len(flat)}
    for i, name in enumerate(ARMS):
        summary[f"agreement_{name}"] = [float(flat[:, i].mean()), *interval(arms, lambda rows, i=i: rows[:, i].mean())]
    for name in ("frozen", "guard"):
        summary[f"gain_{name}"] = [captured_gain(flat, name), *interval(arms, lambda r, n=name: captured_gain(r, n))]
    summary["gain_difference"] = [
        captured_gain(flat, "guard") - captured_gain(flat, "frozen"),
        *interval(arms, lambda rows: captured_gain(rows, "guard") - captured_gain(rows, "frozen")),
    ]
    outcomes = np.array([arms_of(prompt)[1:] for record in records for prompt in record["prompts"]])
    summary["agreement_accepted"], summary["agreement_rejected"] = (float(x) for x in np.nanmean(outcomes, axis=0))
    for name, wrong in wrong_attributes(records).items():
        summary[f"wrong_{name}"] = ", ".join(f"{attribute} {share:.3f}" for attribute, share in wrong.items())
    accepted = [sum(p["accepted"]) / len(p["accepted"]) for record in records for p in record["prompts"]]
    summary["share_accepted"] = float(np.mean(accepted))
    return summary


def main(options: Options) -> None:
    """Draw what is missing, score everything, print the table, write `summary.json`."""
    options.out.mkdir(parents=True, exist_ok=True)
    indices = range(options.first_subject, options.first_subject + options.num_subjects)
    jobs = [(options, index) for index in indices]
    if options.workers > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            pool.map(draw_subject, jobs, chunksize=1)
    else:
        for job in jobs:
            draw_subject(job)
    scorer = IdentityScorer.from_pretrained(options.scorer or weights_dir("nearid"))
    frozen = IdentityScorer.from_pretrained(weights_dir("siglip"))
    scored = [score_subject(options, index, scorer, frozen) for index in indices]
    summary = summarise([record for record, _ in scored])
    summary["lora_seconds_median"] = float(np.median([seconds for _, seconds in scored]))
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:22}", "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value)


if __name__ == "__main__":
    main(tyro.cli(Options))
