"""Which checkpoint is the subject? `python benchmarks/lora_validation.py --out runs/validation`.

For held-out subjects of the mini-world: train a LoRA on four photos, draw at every checkpoint, and let the judge say
how many of the subject's attributes the pictures really show, and whether they are in the place asked for. Compared
are the last checkpoint, the one of lowest validation loss, and those chosen by the frozen backbone, by NearID (each
with and without the trainer's floors) and by the judge itself. The choice is made on validation prompts and seeds,
agreement is measured on others. Early stop is read off the same runs: the schedule of a run does not depend on when it
is stopped. All intervals are 95 % bootstrap intervals over subjects.

The rate is ten times the trainer's: at its own nothing is overtrained in this world, and the last checkpoint is right.
Figures come for two outcomes: "agreement", of attributes alone, and "placed", which counts a picture of another place
than the one asked for as 0.

Pictures are stored, so that another scorer (`--scorer FOLDER`) only scores them anew.
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
from PIL import Image

from nearid_personalize.floors import TextImageEncoder
from nearid_personalize.images import write_atomically
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, Split, photos, sample_pet, weights_dir
from nearid_personalize.miniworld.judge import context_of, judge
from nearid_personalize.samples import adherence, draw_samples, measure_samples
from nearid_personalize.scorer import IdentityScorer
from nearid_personalize.training.cached import Picture
from nearid_personalize.training.lora import LoraOptions, Snapshot, train_lora
from nearid_personalize.training.validation import (
    Limits,
    ValidationOptions,
    best_of,
    out_of_patience,
    without_lora,
    without_word,
)

NUM_REFERENCES = 4
ARMS = (
    "last",
    "loss_references",
    "loss_held_out",
    "frozen",
    "frozen_floors",
    "nearid",
    "nearid_floors",
    "judge",
    "hindsight",
)
OUTCOMES = ("agreement", "placed")


@dataclass(frozen=True)
class Options:
    """What is trained, drawn and measured."""

    out: Path = Path("runs/validation")
    """Folder for pictures and verdicts; finished subjects are only scored again."""
    num_subjects: int = 24
    first_subject: int = 2100
    split: Split = "test"
    lora_steps: int = 80
    num_checkpoints: int = 8
    learning_rate: float = 1e-2
    """Of the denoiser's LoRA; the text encoder's and the token's rise with it."""
    steps: int = 10
    """Denoising steps."""
    num_validation_seeds: int = 2
    num_measured_seeds: int = 2
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    workers: int = 1
    """Processes; each uses one thread."""
    finished: bool = False
    """Draw nothing; report on the subjects that are finished."""


@dataclass(frozen=True)
class Case:
    """A subject, its photos, and where it is drawn: contexts of the validation, and others for measuring."""

    pet: Pet
    references: list[Image.Image]
    held_out: list[Image.Image]
    validation: tuple[str, ...]
    measured: tuple[str, ...]

    def prompts(self, contexts: tuple[str, ...]) -> list[str]:
        """What the pipeline is asked for."""
        return [f"a photo of sks {self.pet.category} in {context}" for context in contexts]


def case_of(split: Split, index: int) -> Case:
    """Four photos in as many contexts; of the other four contexts two are drawn for validation and two to measure.

    Two contexts of the photos are drawn for validation as well: it is there that a copy is easiest.
    """
    pet = sample_pet(split, index)
    shots = photos(pet, len(CONTEXTS))
    others = photos(pet, NUM_REFERENCES, seed=1)
    places = [context for _, context in shots]
    return Case(
        pet,
        [Image.fromarray(shot.image) for shot, _ in shots[:NUM_REFERENCES]],
        [Image.fromarray(shot.image) for shot, _ in others],
        (*places[:2], *places[4:6]),
        tuple(places[6:8]),
    )


# --- training and drawing --------------------------------------------------------------------------------------------


def recipe(case: Case, folder: Path, options: Options) -> LoraOptions:
    """The quickstart's recipe, but for its length and rates."""
    factor = options.learning_rate / 1e-3
    return LoraOptions(
        base_model="miniworld",
        references=folder / "references",
        output=folder / "lora",
        prompt=f"a photo of sks {case.pet.category}",
        batch_size=4,
        steps=options.lora_steps,
        learning_rate=options.learning_rate,
        text_learning_rate=5e-4 * factor,
        token_learning_rate=5e-3 * factor,
        validate_every=options.lora_steps // options.num_checkpoints,
    )


class Recorder:
    """The hook that draws every checkpoint, and the base model before the first."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.validation: list[np.ndarray] = []  # the base model's, then one [P,S,64,64,3] per checkpoint
        self.measured: list[np.ndarray] = []
        self.steps: list[int] = []
        self.losses: dict[str, list[float]] = {"loss_references": [], "loss_held_out": []}

    def draw(self, snapshot: Snapshot, contexts: tuple[str, ...], seeds: range) -> np.ndarray:
        """Pictures uint8 [P,S,64,64,3]."""
        prompts, steps = self.case.prompts(contexts), self.options.steps
        grid = draw_samples(snapshot.pipe, prompts, seeds, num_inference_steps=steps, guidance_scale=3.0)
        return np.array([[np.asarray(image) for image in row] for row in grid])

    def __call__(self, snapshot: Snapshot) -> None:
        """Draw a checkpoint and take its validation losses."""
        options, case = self.options, self.case
        seeds = range(options.num_validation_seeds)
        if not self.validation:
            with without_lora(snapshot.pipe):
                self.validation.append(self.draw(snapshot, case.validation, seeds))
        self.validation.append(self.draw(snapshot, case.validation, seeds))
        others = range(100, 100 + options.num_measured_seeds)
        self.measured.append(self.draw(snapshot, case.measured, others))
        self.steps.append(snapshot.step)
        prompt = f"a photo of sks {case.pet.category}"
        for name, images in (("loss_references", case.references), ("loss_held_out", case.held_out)):
            self.losses[name].append(snapshot.loss_on([Picture(image, prompt) for image in images]))


def draw_subject(job: tuple[Options, int]) -> None:
    """Train, draw and judge one subject; writes `<index>.npz` (pictures) and then `<index>.json`."""
    options, index = job
    path = options.out / f"{index}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    started = time.process_time()
    case = case_of(options.split, index)
    recorder = Recorder(case, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "references").mkdir()
        for number, image in enumerate(case.references):
            image.save(folder / "references" / f"{number}.png")
        train_lora(recipe(case, folder, options), recorder)
    trained = time.process_time()
    np.savez_compressed(
        options.out / f"{index}.npz", validation=np.stack(recorder.validation), measured=np.stack(recorder.measured)
    )
    agreement, placed = judged(np.stack(recorder.measured), case)
    record = {
        "pet": asdict(case.pet),
        "steps": recorder.steps,
        "agreement": agreement.tolist(),
        "placed": placed.tolist(),
        **recorder.losses,
        "core_seconds": {"train and draw": trained - started, "judge": time.process_time() - trained},
    }
    write_atomically(path, json.dumps(record))


def judged(pictures: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [C,P,S,64,64,3] -> agreement [C,P,S], and the same with 0 for pictures of another place."""
    found, right = np.zeros(pictures.shape[:3]), np.zeros(pictures.shape[:3])
    for cell in np.ndindex(found.shape):
        context = case.measured[cell[1]]
        found[cell] = judge(pictures[cell], case.pet, context).agreement
        right[cell] = context_of(pictures[cell]) == context
    return found, found * right


# --- choosing --------------------------------------------------------------------------------------------------------


def records_of(
    case: Case, steps: list[int], pictures: np.ndarray, scorer: IdentityScorer, text_image: TextImageEncoder
) -> list[dict]:
    """What the trainer's validation would have written: the base model's record, then the checkpoints'."""
    rules = ValidationOptions(validation_model="miniworld")
    subject = scorer.enroll(case.references)
    texts = [without_word(prompt, "sks") for prompt in case.prompts(case.validation)]
    photos_fit = float(adherence([case.references] * len(texts), texts, text_image).mean())
    records: list[dict] = []
    for step, grid in zip([0, *steps], pictures, strict=True):
        images = [[Image.fromarray(picture) for picture in row] for row in grid]
        scores = measure_samples(images, texts, scorer, subject, case.references, text_image)
        record = {"step": step, **scores.to_dict(), "adherence_of_references": photos_fit, "refused": ""}
        record["refused"] = Limits.from_base(records[0], rules).refusal(record) if records else ""
        records.append(record)
    return records


def crossed(agreement: np.ndarray) -> float:
    """[C,n] -> the agreement that the judge's own choice reaches: chosen on one half, measured on the other."""
    halves = agreement[:, 0::2], agreement[:, 1::2]
    return float(np.mean([b.mean(axis=1)[np.argmax(a.mean(axis=1))] for a, b in (halves, halves[::-1])]))


def chosen(records: list[dict], floors: bool) -> int:
    """The number of the checkpoint with the highest identity; with floors, the last one's where none passes."""
    best = best_of(records if floors else [{**record, "refused": ""} for record in records])
    steps = [record["step"] for record in records[1:]]
    return steps.index(best["step"]) if best else len(steps) - 1


def arms_of(record: dict, records: list[dict], frozen: list[dict], outcome: str) -> list[float]:
    """What each arm's checkpoint is worth on the measured pictures."""
    worth = np.array(record[outcome])  # [C,P,S]
    means = worth.mean(axis=(1, 2))
    picks = [-1, int(np.argmin(record["loss_references"])), int(np.argmin(record["loss_held_out"]))]
    picks += [chosen(own, floors) for own in (frozen, records) for floors in (False, True)]
    return [*(means[pick] for pick in picks), crossed(worth.reshape(len(means), -1)), means.max()]


def early_stop(record: dict, records: list[dict], patience: int, outcome: str) -> tuple[float, float]:
    """Share of the steps saved, and the worth of what is kept then."""
    known = next((n for n in range(2, len(records) + 1) if out_of_patience(records[:n], patience)), len(records))
    means = np.array(record[outcome]).mean(axis=(1, 2))
    return 1 - records[known - 1]["step"] / record["steps"][-1], means[chosen(records[:known], True)]


# --- the table -------------------------------------------------------------------------------------------------------

Judged = tuple[dict, list[dict], list[dict]]
"""A subject: what was drawn, NearID's records, the frozen backbone's."""


def captured(rows: torch.Tensor, arm: str, ceiling: str) -> float:
    """(arm - last) / (ceiling - last), of arm means over subjects `[N,arms]`; NaN where there is nothing to gain."""
    last, value, high = (float(rows[:, ARMS.index(name)].mean()) for name in ("last", arm, ceiling))
    return (value - last) / (high - last) if high > last else float("nan")


def with_interval(rows: torch.Tensor, statistic: Callable[[torch.Tensor], float]) -> list[float]:
    """A statistic of rows and its 95 % interval."""
    return [float(statistic(rows)), *bootstrap_interval(rows, lambda drawn: float(statistic(drawn)))]


def choices(cases: list[Judged], outcome: str) -> dict[str, list[float]]:
    """Worth of each arm, gain over the last checkpoint, share of the possible gain, NearID over the frozen backbone."""
    rows = torch.tensor([arms_of(*case, outcome) for case in cases]).double()
    figures = {f"{outcome}_{arm}": with_interval(rows, lambda r, i=i: r[:, i].mean()) for i, arm in enumerate(ARMS)}
    for i, arm in enumerate(ARMS[1:], start=1):
        figures[f"{outcome}_gain_{arm}"] = with_interval(rows, lambda r, i=i: (r[:, i] - r[:, 0]).mean())
    for arm in ARMS[1:-2]:
        for ceiling in ARMS[-2:]:
            name = f"{outcome}_captured_{arm}_of_{ceiling}"
            figures[name] = with_interval(rows, lambda r, a=arm, c=ceiling: captured(r, a, c))
    for floors in ("", "_floors"):
        mine, theirs = ARMS.index("nearid" + floors), ARMS.index("frozen" + floors)
        name = f"{outcome}_nearid{floors}_over_frozen{floors}"
        figures[name] = with_interval(rows, lambda r, m=mine, t=theirs: (r[:, m] - r[:, t]).mean())
    mine, theirs = ARMS.index("nearid_floors"), ARMS.index("frozen")
    name = f"{outcome}_nearid_floors_over_frozen"
    return figures | {name: with_interval(rows, lambda r: (r[:, mine] - r[:, theirs]).mean())}


def stops(cases: list[Judged], outcome: str) -> dict[str, list[float]]:
    """Early stop by patience: share of the steps saved, and what is kept against the last and against no stopping."""
    rows = torch.tensor([arms_of(*case, outcome) for case in cases]).double()
    figures = {}
    for patience in (1, 2, 3):
        saved, kept = torch.tensor([early_stop(*case[:2], patience, outcome) for case in cases]).double().T
        figures[f"patience_{patience}_steps_saved"] = with_interval(saved, lambda s: s.mean())
        for against in ("last", "nearid_floors"):
            name = f"patience_{patience}_{outcome}_over_{against}"
            figures[name] = with_interval(kept - rows[:, ARMS.index(against)], lambda s: s.mean())
    return figures


def by_checkpoint(cases: list[Judged]) -> dict[str, list[float]]:
    """Means over subjects, checkpoint by checkpoint; the base model first where it was drawn."""
    means = {name: [np.mean(record[name], axis=(1, 2)) for record, _, _ in cases] for name in OUTCOMES}
    means |= {name: [[r[name] for r in records] for _, records, _ in cases] for name in ("identity", "adherence")}
    means["accepted by the floors"] = [[not r["refused"] for r in records[1:]] for _, records, _ in cases]
    return {f"by_checkpoint {name}": np.mean(values, axis=0).tolist() for name, values in means.items()}


def summarise(cases: list[Judged]) -> dict:
    """All figures, and why checkpoints were refused."""
    summary: dict = {"num_subjects": len(cases), **by_checkpoint(cases)}
    for outcome in OUTCOMES:
        summary |= choices(cases, outcome) | stops(cases, outcome)
    refused = [record["refused"] for _, records, _ in cases for record in records if record["refused"]]
    kinds = [next(kind for kind in ("adherence", "diversity", "copies") if kind in reason) for reason in refused]
    return summary | {"refused": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def main(options: Options) -> None:
    """Draw what is missing, score everything, print the table, write `summary.json`."""
    options.out.mkdir(parents=True, exist_ok=True)
    indices = range(options.first_subject, options.first_subject + options.num_subjects)
    jobs = [] if options.finished else [(options, index) for index in indices]
    if options.workers > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            pool.map(draw_subject, jobs, chunksize=1)
    else:
        for job in jobs:
            draw_subject(job)
    scorer = IdentityScorer.from_pretrained(options.scorer or weights_dir("nearid"))
    frozen = IdentityScorer.from_pretrained(weights_dir("siglip"))
    text_image = TextImageEncoder.from_pretrained("miniworld")
    cases = []
    for index in (index for index in indices if (options.out / f"{index}.json").exists()):
        record = json.loads((options.out / f"{index}.json").read_text())
        pictures, case = np.load(options.out / f"{index}.npz")["validation"], case_of(options.split, index)
        records = records_of(case, record["steps"], pictures, scorer, text_image)
        cases.append((record, records, records_of(case, record["steps"], pictures, frozen, text_image)))
    summary = summarise(cases)
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:44}", "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value)


if __name__ == "__main__":
    main(tyro.cli(Options))
