"""What `--validate-every` and `--patience` are worth. `python benchmarks/lora_validation.py --out runs/validation`.

For held-out subjects of the mini-world, `trainers/train_lora.py` is run as the README does: its rates, its length, its
validation within its budget. At every step that it validates, other seeds are drawn, in two places that no photo shows,
and the judge says how many of the subject's attributes those pictures really show, and whether they are in the place
asked for. Compared are the last checkpoint, the one of lowest validation loss, and those chosen by the frozen backbone,
by NearID (each with and without the trainer's floors; NearID with floors is what the trainer keeps) and by the judge
itself. All intervals are 95 % bootstrap intervals over subjects.

Early stop is read off the same runs, since the schedule of a run does not depend on when it is stopped. What it saves
is time: 1 - t / T, where t is the time until it stopped, all validations and the measuring of their cost included, and
T what all steps take without any validation. Without a stop it is therefore below 0. Times are core seconds of one
thread, from the run's own journal; what is drawn for the judge is not counted.

Figures come for two outcomes: "agreement", of attributes alone, and "placed", which counts a picture of another place
than the one asked for as 0. `--rate-factor 10` trains at ten times the rates: then there is more to lose.

A finished subject is not trained again: the command goes on where it was interrupted, and `--finished` reports on what
there is. Pictures are stored, so that another scorer (`--scorer FOLDER`) only scores them anew.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from nearid_personalize.files import write_atomically
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.lora.samples import adherence, draw_samples, measure_samples
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, Split, context_prompts, photos, sample_pet, weights_dir
from nearid_personalize.miniworld.judge import context_of, judge
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.training.lora.base_model import recommended_rates
from nearid_personalize.training.lora.loop import LoraOptions, Snapshot, train_lora
from nearid_personalize.training.lora.pictures import Picture
from nearid_personalize.training.lora.validation import IdentityValidation, ValidationOptions, without_word
from nearid_personalize.training.lora.validation_plan import ValidationPlan
from nearid_personalize.training.lora.validation_records import Limits, best_of, improvements
from nearid_personalize.training.patience import out_of_patience

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
    lora_steps: int = 400
    validate_every: int = 50
    validation_budget: float = 0.1
    rate_factor: float = 1.0
    """All learning rates, as a multiple of the trainer's for the mini-world."""
    steps: int = 10
    """Denoising steps of the pictures that the judge sees."""
    num_measured_seeds: int = 2
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    workers: int = 1
    """Processes; each uses one thread."""
    finished: bool = False
    """Draw nothing; report on the subjects that are finished."""


@dataclass(frozen=True)
class Case:
    """A subject, its photos, others of it, and the places where the judge sees it."""

    pet: Pet
    references: list[Image.Image]
    held_out: list[Image.Image]
    measured: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """What is drawn for the judge."""
        return [f"a photo of sks {self.pet.category} in {context}" for context in self.measured]


def case_of(split: Split, index: int) -> Case:
    """Four photos in as many places; two other places for the judge."""
    pet = sample_pet(split, index)
    shots = photos(pet, len(CONTEXTS))
    others = photos(pet, NUM_REFERENCES, seed=1)
    return Case(
        pet=pet,
        references=[Image.fromarray(shot.image) for shot, _ in shots[:NUM_REFERENCES]],
        held_out=[Image.fromarray(shot.image) for shot, _ in others],
        measured=tuple(context for _, context in shots[6:8]),
    )


# --- training and drawing --------------------------------------------------------------------------------------------


def recipe(case: Case, folder: Path, options: Options) -> LoraOptions:
    """The README's command, on the mini-world."""
    lora = LoraOptions.of(
        base_model="miniworld",
        references=folder / "references",
        output=folder / "lora",
        prompt=f"a photo of sks {case.pet.category}",
        steps=options.lora_steps,
        validate_every=options.validate_every,
    )
    rates = recommended_rates(weights_dir("pipeline"))
    return lora.but(**{name: options.rate_factor * rate for name, rate in rates.items()})


def validation_of(case: Case, options: Options) -> ValidationOptions:
    """What `trainers/train_lora.py` fills in for the mini-world; patience is read off afterwards."""
    return ValidationOptions(
        validation_model="miniworld",
        text_image_model="miniworld",
        validation_prompts=context_prompts(f"sks {case.pet.category}"),
        validation_guidance_scale=3.0,
        validation_budget=options.validation_budget,
    )


class CoreClock:
    """Core seconds of this process, without those between `stop` and `go`."""

    def __init__(self) -> None:
        self.left_out, self.stopped_at = 0.0, 0.0

    def __call__(self) -> float:
        return time.process_time() - self.left_out

    def stop(self) -> None:
        """What follows does not count."""
        self.stopped_at = time.process_time()

    def go(self) -> None:
        """What follows counts again."""
        self.left_out += time.process_time() - self.stopped_at


@dataclass
class RecordedValidation(IdentityValidation):
    """The trainer's own validation; its pictures are kept, and at each of its steps more are drawn for the judge."""

    case: Case | None = None
    bench: Options = field(default_factory=Options)
    pictures: list[np.ndarray] = field(default_factory=list)  # the base model's first; uint8 [P,S,64,64,3] each
    measured: list[np.ndarray] = field(default_factory=list)  # the same without the base model's
    loss_held_out: list[float] = field(default_factory=list)

    def draw(self, snapshot: Snapshot, plan: ValidationPlan) -> list[list[Any]]:
        images = super().draw(snapshot, plan)
        if plan.steps:  # those that are only timed belong to no plan
            self.pictures.append(as_array(images))
        return images

    def __call__(self, snapshot: Snapshot) -> bool:
        goes_on = super().__call__(snapshot)
        clock, case, options = self.clock, self.case, self.bench
        assert isinstance(clock, CoreClock) and case is not None, "set before training"
        clock.stop()
        seeds = range(100, 100 + options.num_measured_seeds)
        images = draw_samples(snapshot.pipe, case.prompts, seeds, num_inference_steps=options.steps, guidance_scale=3.0)
        self.measured.append(as_array(images))
        prompt = f"a photo of sks {case.pet.category}"
        self.loss_held_out.append(snapshot.loss_on([Picture(image, prompt) for image in case.held_out]))
        clock.go()
        return goes_on


def as_array(images: list[list[Any]]) -> np.ndarray:
    """Pictures [P][S] -> uint8 [P,S,H,W,3]."""
    return np.array([[np.asarray(image) for image in row] for row in images])


def train_subject(case: Case, options: Options) -> RecordedValidation:
    """Train one LoRA as the trainer does."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "references").mkdir()
        for number, image in enumerate(case.references):
            image.save(folder / "references" / f"{number}.png")
        lora = recipe(case, folder, options)
        validation = RecordedValidation.open(lora, validation_of(case, options), CoreClock())
        assert isinstance(validation, RecordedValidation), "`open` makes what it is called on"
        validation.case, validation.bench = case, options
        train_lora(lora, validation)
        return validation


def draw_subject(job: tuple[Options, int]) -> None:
    """Train, draw and judge one subject; writes `<index>.npz` (pictures) and then `<index>.json`."""
    options, index = job
    path = options.out / f"{index}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    case = case_of(options.split, index)
    run = train_subject(case, options)
    np.savez_compressed(
        options.out / f"{index}.npz", validation=np.stack(run.pictures), measured=np.stack(run.measured)
    )
    agreement, placed = judged(np.stack(run.measured), case)
    records = run.journal.records
    record = {
        "pet": asdict(case.pet),
        "plan": records[0]["plan"],
        "steps": [one["step"] for one in records[1:]],
        "agreement": agreement.tolist(),
        "placed": placed.tolist(),
        "loss_references": [one["validation_loss"] for one in records[1:]],
        "loss_held_out": run.loss_held_out,
        "run_seconds": [one["seconds"]["run"] for one in records],
        "validation_seconds": [one["seconds"]["validations"] for one in records],
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
    case: Case, plan: dict, steps: list[int], pictures: np.ndarray, scorer: IdentityScorer, text_image: TextImageEncoder
) -> list[dict]:
    """What the trainer's validation writes with a scorer: the base model's record, then the checkpoints'."""
    rules = ValidationOptions(validation_model="miniworld")
    subject = scorer.enroll(case.references)
    texts = [without_word(prompt, "sks") for prompt in plan["prompts"]]
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
    """Share of the time saved, and the worth of what is kept then."""
    gain = ValidationOptions().patience_gain
    known = len(records)
    for n in range(2, len(records)):
        if out_of_patience(improvements(records[:n], gain), patience):
            known = n
            break
    training = record["run_seconds"][-1] - record["validation_seconds"][-1]
    means = np.array(record[outcome]).mean(axis=(1, 2))
    return 1 - record["run_seconds"][known - 1] / training, means[chosen(records[:known], True)]


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
    """Early stop by patience: share of the time saved, and what is kept against the last and against no stopping."""
    rows = torch.tensor([arms_of(*case, outcome) for case in cases]).double()
    figures = {}
    for patience in (1, 2, 3):
        saved, kept = torch.tensor([early_stop(*case[:2], patience, outcome) for case in cases]).double().T
        figures[f"patience_{patience}_time_saved"] = with_interval(saved, lambda s: s.mean())
        figures[f"patience_{patience}_{outcome}"] = with_interval(kept, lambda s: s.mean())
        for against in ("last", "nearid_floors"):
            name = f"patience_{patience}_{outcome}_over_{against}"
            figures[name] = with_interval(kept - rows[:, ARMS.index(against)], lambda s: s.mean())
    return figures


def costs(cases: list[Judged]) -> dict[str, list[float]]:
    """What the trainer planned, and the share of the run's time that validating took."""
    figures = {
        "validations": [len(record["plan"]["steps"]) for record, _, _ in cases],
        "pictures each": [len(record["plan"]["prompts"]) * record["plan"]["seeds"] for record, _, _ in cases],
        "denoising steps": [record["plan"]["denoising_steps"] for record, _, _ in cases],
        "share of the time": [r["validation_seconds"][-1] / r["run_seconds"][-1] for r, _, _ in cases],
    }
    return {name: with_interval(torch.tensor(values).double(), lambda v: v.mean()) for name, values in figures.items()}


def by_position(cases: list[Judged]) -> dict[str, list[float]]:
    """Means over subjects at the first and the last validation; the base model's before them where it was scored."""
    figures = {}
    for name in OUTCOMES:
        means = [np.mean(record[name], axis=(1, 2))[[0, -1]] for record, _, _ in cases]
        figures[f"first and last {name}"] = np.mean(means, axis=0).tolist()
    for name in ("identity", "adherence"):
        values = [[records[n][name] for n in (0, 1, -1)] for _, records, _ in cases]
        figures[f"base, first and last {name}"] = np.mean(values, axis=0).tolist()
    return figures


def summarise(cases: list[Judged]) -> dict:
    """All figures, and why checkpoints were refused."""
    summary: dict = {"num_subjects": len(cases), **costs(cases), **by_position(cases)}
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
        drawn = (case, record["plan"], record["steps"], pictures)
        cases.append((record, records_of(*drawn, scorer, text_image), records_of(*drawn, frozen, text_image)))
    if not cases:
        raise SystemExit(f"no finished subject under {options.out}")
    summary = summarise(cases)
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:44}", "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value)


if __name__ == "__main__":
    main(tyro.cli(Options))
