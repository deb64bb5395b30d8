"""Does the guard pick pictures of the right subject? `python benchmarks/quickstart_quality.py`.

For held-out subjects of the mini-world: train a LoRA for 50 steps, draw candidates for two prompts, let the judge say
which attributes each candidate really shows, and compare what is picked by chance, by the frozen backbone, by the
guard and by the judge itself. All intervals are 95 % bootstrap intervals over subjects.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from drawn import Drawing, Drawn, draw, interval, read
from PIL import Image

from nearid_personalize.files import write_atomically
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.miniworld.subjects import ATTRIBUTES
from nearid_personalize.scorer.scorer import IdentityScorer


@dataclass(frozen=True)
class Options:
    """What is measured."""

    drawing: Annotated[Drawing, tyro.conf.arg(name="")]
    out: Path = Path("runs/quickstart_quality")
    """Folder for summary.json."""
    num_candidates: int = 16
    """Of those drawn."""
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""


def score_subject(drawn: Drawn, scorer: IdentityScorer, frozen: IdentityScorer, num_candidates: int) -> list[dict]:
    """For each prompt what the judge says of the first candidates, both encoders' scores, and the guard's verdicts."""
    subject = scorer.enroll(drawn.references)
    alike = frozen.enroll(drawn.references, aggregation=subject.aggregation)  # the same for both: a fair comparison
    prompts = []
    for prompt in drawn.prompts:
        images = [Image.fromarray(picture) for picture in prompt.pictures[:num_candidates]]
        scores = scorer.score(images, subject)
        prompts.append(
            {
                "agreement": prompt.agreement[:num_candidates],
                "wrong": prompt.wrong[:num_candidates],
                "scores": scores.tolist(),
                "frozen_scores": frozen.score(images, alike).tolist(),
                "accepted": (scores >= subject.threshold).tolist(),
            }
        )
    return prompts


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


def wrong_attributes(records: list[list[dict]]) -> dict[str, dict[str, float]]:
    """Per arm, the share of pictures that show each attribute wrongly; of "random", of all candidates."""
    prompts = [prompt for record in records for prompt in record]
    shown = {
        "random": [wrong for prompt in prompts for wrong in prompt["wrong"]],
        "frozen": [prompt["wrong"][int(np.argmax(prompt["frozen_scores"]))] for prompt in prompts],
        "guard": [prompt["wrong"][int(np.argmax(prompt["scores"]))] for prompt in prompts],
    }
    return {
        arm: {name: sum(name in w for w in wrong) / len(wrong) for name in ATTRIBUTES} for arm, wrong in shown.items()
    }


def summarise(records: list[list[dict]]) -> dict:
    """The table the README quotes."""
    arms = np.array([[arms_of(prompt)[0] for prompt in record] for record in records])  # [S,P,4]
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
    outcomes = np.array([arms_of(prompt)[1:] for record in records for prompt in record])
    summary["agreement_accepted"], summary["agreement_rejected"] = (float(x) for x in np.nanmean(outcomes, axis=0))
    for name, wrong in wrong_attributes(records).items():
        summary[f"wrong_{name}"] = ", ".join(f"{attribute} {share:.3f}" for attribute, share in wrong.items())
    accepted = [sum(p["accepted"]) / len(p["accepted"]) for record in records for p in record]
    summary["share_accepted"] = float(np.mean(accepted))
    return summary


def main(options: Options) -> None:
    """Draw what is missing, score everything, print the table, write `summary.json`."""
    draw(options.drawing)
    options.out.mkdir(parents=True, exist_ok=True)
    scorer = IdentityScorer.from_pretrained(options.scorer or weights_dir("nearid"))
    frozen = IdentityScorer.from_pretrained(weights_dir("siglip"))
    drawn = [read(options.drawing, index) for index in options.drawing.indices]
    summary = summarise([score_subject(subject, scorer, frozen, options.num_candidates) for subject in drawn])
    summary["lora_seconds_median"] = float(np.median([subject.lora_seconds for subject in drawn]))
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:22}", "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value)


if __name__ == "__main__":
    main(tyro.cli(Options))
