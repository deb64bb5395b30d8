"""Identity as validation: pictures of a LoRA in training are scored, the best checkpoint is kept, training stops early.

Every validation draws the same seeds and prompts and measures them (`lora.samples`). Step 0 is the base model, from
which the floors are set. The checkpoint kept is the one with the highest identity that passes the floors.

OUTPUT/validation.jsonl has a line for each validation, the plan in the first. A resumed run draws no step again that
has its line. A kept LoRA is written before its line.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from torch import nn
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.guard.hooks import find_denoiser
from nearid_personalize.lora.samples import SampleScores, default_prompts, draw_samples, measure_samples
from nearid_personalize.report import finite_or_none
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.training.lora.families import family_class
from nearid_personalize.training.lora.loop import Snapshot, read_metadata
from nearid_personalize.training.lora.options import LoraOptions, require
from nearid_personalize.training.lora.pictures import Picture, read_references
from nearid_personalize.training.lora.validation_files import (
    BEST,
    JOURNAL,
    figures,
    forget,
    log_to_tensorboard,
    open_tensorboard,
    promote,
    write_sheet,
)
from nearid_personalize.training.lora.validation_plan import (
    Cost,
    ValidationPlan,
    Wanted,
    asked_steps,
    describe,
    least_before,
    listed,
    plan_validations,
    spaced,
)
from nearid_personalize.training.lora.validation_records import (
    Journal,
    Limits,
    Record,
    best_of,
    headline,
    improvements,
    verdict,
)
from nearid_personalize.training.patience import out_of_patience

PROBE_STEPS = 2, 5  # denoising steps of the pictures that are timed before the run


@dataclass(frozen=True)
class ValidationOptions:
    """What is drawn and measured while a LoRA trains, what is kept, and when to stop."""

    validation_model: str | None = None
    """NearID model that scores identity: folder, Hub id, or "miniworld". None: the trainer chooses by base model."""
    text_image_model: str | None = None
    """SigLIP or CLIP that scores adherence: folder, Hub id, or "miniworld". None: a well-known one if the Hub cache has
    it; else adherence is not measured and has no floor."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts to draw, with the token; some of them where the budget is small. None given: a default set."""
    living: bool = True
    """The subject is an animal or a person; decides which default prompts."""
    validation_seeds: int = 2
    """Most pictures per prompt, from seeds 0, 1, ...; diversity needs two."""
    validation_steps: int = 25
    """Most denoising steps per picture."""
    validation_guidance_scale: float | None = None
    """Classifier-free guidance. None: the pipeline's own."""
    validation_batch_size: int = 8
    """Pictures drawn together; less when memory runs out."""
    validation_photos: Path | None = None
    """Photos of the subject that are not trained on, for the validation loss. None: the references."""
    validation_budget: float = 0.1
    """Share of the run's time, in (0, 1], that denoising steps, prompts, seeds and number of validations are cut down
    to; the last step is validated whatever it costs. 1: everything as asked for."""
    adherence_floor: float = 0.5
    """Share of the base model's lead in adherence over the reference photos that must be left, in [0, 1]."""
    diversity_floor: float = 0.1
    """Share of the base model's diversity that must be left, in [0, 1]."""
    copy_ceiling: float = 0.5
    """Share of pictures, beyond the base model's, that may copy a reference, in [0, 1]; where prompts ask for scenes
    that the photos show, some copies are no fault."""
    keep: Literal["best", "last"] = "best"
    """Which checkpoint OUTPUT holds in the end; the other is in OUTPUT/last or OUTPUT/best."""
    patience: int = 0
    """Validations without a new best checkpoint after which the training stops. 0: never."""
    patience_gain: float = 0.01
    """What identity must gain on the best before it for patience to begin anew, in [0, 1): ever smaller gains are no
    reason to go on. The checkpoint kept is the best all the same."""
    tensorboard: bool = False
    """Log figures and pictures to OUTPUT/tensorboard too (needs the package tensorboard)."""

    def __post_init__(self) -> None:
        for name in ("validation_seeds", "validation_steps", "validation_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("adherence_floor", "diversity_floor", "copy_ceiling"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        require(0 < self.validation_budget <= 1, "validation_budget", self.validation_budget, "in (0, 1]")
        require(self.patience >= 0, "patience", self.patience, "0 or more")
        require(0 <= self.patience_gain < 1, "patience_gain", self.patience_gain, "in [0, 1)")

    def prompts_for(self, options: LoraOptions) -> tuple[str, ...]:
        """The prompts to draw; InputError for one without the token."""
        token = options.data.token
        for prompt in self.validation_prompts:
            require(token in prompt.split(), "validation_prompts", prompt, f"with the word {token!r}")
        return self.validation_prompts or default_prompts(options.data.subject_name, self.living)

    def measured(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What must stay the same for two validations to be comparable."""
        names = ["validation_model", "text_image_model", "validation_seeds", "validation_steps"]
        names += ["validation_guidance_scale", "validation_photos"]
        told = {name: getattr(self, name) for name in names} | {"validation_prompts": prompts}
        return json.loads(json.dumps(told, default=str))


def without_word(prompt: str, word: str) -> str:
    """A prompt without its rare token, for models that never learnt it."""
    return " ".join(other for other in prompt.split() if other != word)


# --- the validation --------------------------------------------------------------------------------------------------
@dataclass
class IdentityValidation:
    """The `validate` of `train_lora`: called with a `Snapshot`, returns False once patience is out. Made by `open`."""

    options: LoraOptions
    validation: ValidationOptions
    prompts: tuple[str, ...]
    scorer: IdentityScorer
    text_image: TextImageEncoder | None
    references: list[Any]
    subject: Subject
    loss_pictures: list[Picture]
    journal: Journal
    clock: Callable[[], float] = time.perf_counter
    """Tells seconds."""
    started: float = 0.0
    spent: float = 0.0
    """Seconds of all validations so far, and of measuring what they cost."""
    writer: Any = None

    @classmethod
    def open(
        cls, options: LoraOptions, validation: ValidationOptions, clock: Callable[[], float] = time.perf_counter
    ) -> "IdentityValidation":
        """Load the models and enroll the references; nothing is written yet.

        Raises InputError for models that cannot be loaded, prompts without the token, a missing tensorboard, and a
        resumed run that measured something else before.
        """
        prompts = validation.prompts_for(options)
        if validation.validation_model is None:
            raise InputError('--validation-model: give a NearID model, e.g. Aleksandar/nearid-siglip2, or "miniworld"')
        if validation.tensorboard and find_spec("tensorboard") is None:
            raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard")
        scorer = IdentityScorer.from_pretrained(validation.validation_model)
        named = validation.text_image_model
        references = [picture.image for picture in read_references(options.data)]
        journal_file = options.output / JOURNAL
        journal = Journal.read(journal_file) if options.checkpoints.resume else Journal(journal_file)
        check_comparable(journal.records, validation.measured(prompts))
        return cls(
            options=options,
            validation=validation,
            prompts=prompts,
            scorer=scorer,
            text_image=TextImageEncoder.from_pretrained(named) if named else None,
            references=references,
            subject=scorer.enroll(references),
            loss_pictures=read_loss_pictures(options, validation),
            journal=journal,
            clock=clock,
        )

    @property
    def output(self) -> Path:
        """The run's folder."""
        return self.options.output

    @property
    def leave_one_out(self) -> float:
        """How alike the references are to each other: their mean score against the others, NaN for a lone one."""
        return float(self.subject.reference_scores.mean())

    # --- before the first step

    def plan(self, snapshot: Snapshot, training_step: float) -> tuple[int, ...]:
        """Begin the run, or go on with it; returns the steps to validate. Called once, by the main process.

        training_step: seconds of an optimizer step. A fresh run deletes an earlier run's files and measures the base
        model; a resumed one keeps its plan.
        """
        self.begin()
        if self.journal.records:
            say(f"validation: as planned before, after {listed(self.planned.steps)}")
            return self.planned.steps
        wanted = self.wanted(snapshot.step)
        self.started -= 2 * training_step  # which timing it took
        if not attempted(lambda: self.measure_base(snapshot, wanted, training_step), "base model"):
            return ()
        say(describe(self.planned, wanted))
        return self.planned.steps

    def begin(self) -> None:
        """Start the clock where it stood, open TensorBoard, forget a run that this one replaces."""
        if not self.options.checkpoints.resume:
            forget(self.output)
        records = self.journal.records
        last = records[-1]["seconds"] if records else {"run": 0.0, "validations": 0.0}
        self.started, self.spent = self.clock() - last["run"], last["validations"]
        if self.validation.tensorboard:
            self.writer = open_tensorboard(self.output)

    def wanted(self, done: int) -> Wanted:
        """What was asked for, of a run with `done` steps behind it."""
        options, validation = self.options, self.validation
        every = asked_steps(options.validate_every, options.steps)
        # What a reward loses is measured against a validation before it
        rewards = options.reward.reward_weight > 0 and options.first_reward_step - 1 > done
        return Wanted(
            steps=tuple(step for step in every if step > done),
            prompts=self.prompts,
            seeds=validation.validation_seeds,
            denoising_steps=validation.validation_steps,
            budget=validation.validation_budget,
            patience=validation.patience,
            least=least_before(options.first_reward_step - done, options.steps - done) if rewards else 1,
            done=done,
        )

    @property
    def planned(self) -> ValidationPlan:
        """What every validation of the run draws, and when; known once the base model is measured."""
        return ValidationPlan.from_dict(self.journal.records[0].get("plan"))

    def measure_base(self, snapshot: Snapshot, wanted: Wanted, training_step: float) -> None:
        """Fit the validations to the budget and make the record of step 0; what that took then says how many follow."""
        cost = Cost(fixed=0.0, picture=0.0, denoising_step=0.0, training_step=training_step)
        if wanted.budget < 1:
            cost = self.measure_cost(snapshot, training_step)
        self.spent = self.clock() - self.started
        plan = plan_validations(wanted, cost, self.spent)
        with without_lora(snapshot.pipe):
            base, began = self.measure(snapshot, 0, plan)
        seconds = self.clock() - began
        plan = spaced(plan, wanted, training_step, max(seconds, plan.seconds), self.spent + seconds)
        self.write({**base, "plan": plan.to_dict(), "measured": self.validation.measured(self.prompts)}, began)
        snapshot.log(figures(base), step=0)

    def measure_cost(self, snapshot: Snapshot, training_step: float) -> Cost:
        """Time pictures of few denoising steps, the score of one, and the validation loss; the first is a warm-up."""
        few, many = PROBE_STEPS
        probe = ValidationPlan(steps=(), prompts=self.prompts[:1], seeds=1, denoising_steps=few, seconds=0.0, share=0.0)
        longer = replace(probe, denoising_steps=many)
        images = self.draw(snapshot, probe)
        _, short = self.timed(lambda: self.draw(snapshot, probe))
        _, long = self.timed(lambda: self.draw(snapshot, longer))
        _, scoring = self.timed(lambda: self.score(snapshot, images, probe))
        _, loss = self.timed(lambda: snapshot.loss_on(self.loss_pictures))
        step = max(0.0, (long - short) / (many - few))
        return Cost(
            fixed=loss,
            picture=max(0.0, short + scoring - few * step),
            denoising_step=step,
            training_step=training_step,
        )

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What `work` returns, and its seconds."""
        began = self.clock()
        result = work()
        return result, self.clock() - began

    # --- after a step

    def __call__(self, snapshot: Snapshot) -> bool:
        """Draw, measure, log, keep; whether the training goes on."""
        if all(record["step"] != snapshot.step for record in self.journal.records):
            attempted(lambda: self.validate(snapshot), f"step {snapshot.step}")
        for record in self.journal.records:
            if record["step"] != snapshot.step:
                continue
            # Told again by a run that was interrupted here
            if ended := snapshot.guard_reward(adherence=record["adherence"], diversity=record["diversity"]):
                say(ended)
        until_now, validation = self.journal.until(snapshot.step), self.validation
        improved = improvements(until_now, validation.patience_gain)
        return not out_of_patience(improved, validation.patience)

    def validate(self, snapshot: Snapshot) -> None:
        """Make the record of a step, and keep its checkpoint where it is the best."""
        record, began = self.measure(snapshot, snapshot.step, self.planned)
        record |= {"refused": Limits.from_base(self.journal.records[0], self.validation).refusal(record)}
        before = self.journal.until(snapshot.step)
        if best_of([*before, record]) is record:
            snapshot.save(self.output / BEST, validation=self.told(record))
        self.write(record, began)
        snapshot.log(figures(record), step=snapshot.step)

    def measure(self, snapshot: Snapshot, step: int, plan: ValidationPlan) -> tuple[Record, float]:
        """Draw and measure; the record so far, and the time it began."""
        began = self.clock()
        images = self.draw(snapshot, plan)
        scores, photos = self.score(snapshot, images, plan)
        record = {
            "step": step,
            "leave_one_out": finite_or_none(self.leave_one_out),
            "threshold": self.subject.threshold,
            **scores.to_dict(),
            "adherence_of_references": photos,
            "loss": snapshot.loss if step else None,
            "validation_loss": snapshot.loss_on(self.loss_pictures),
            "refused": "",
        }
        write_sheet(self.output, images, scores, record, plan, self.references)
        return record, began

    def draw(self, snapshot: Snapshot, plan: ValidationPlan) -> list[list[Any]]:
        """The pictures of a plan, [prompts][seeds], as large as those that are trained on."""
        pipe, validation = snapshot.pipe, self.validation
        side = self.options.data.resolution
        size = {} if side is None else {"height": side, "width": side}  # None: the base model's own
        scale = validation.validation_guidance_scale
        guidance = {} if scale is None else family_class(type(pipe).__name__, "")(pipe).guidance(scale)
        return draw_samples(
            pipe,
            plan.prompts,
            range(plan.seeds),
            validation.validation_batch_size,
            num_inference_steps=plan.denoising_steps,
            **size,
            **guidance,
        )

    def score(
        self, snapshot: Snapshot, images: Sequence[Sequence[Any]], plan: ValidationPlan
    ) -> tuple[SampleScores, float | None]:
        """What pictures are worth, and the adherence of the reference photos to their prompts."""
        texts = [without_word(prompt, self.options.data.token) for prompt in plan.prompts]
        models = [self.scorer.model, *([self.text_image.model] if self.text_image else [])]
        with offload_models(*models, device=find_denoiser(snapshot.pipe).device):
            scores = measure_samples(images, texts, self.scorer, self.subject, self.references, self.text_image)
            if self.text_image is None:
                return scores, None
            photos = self.text_image.embed_images(self.references) @ self.text_image.embed_texts(texts).T
        return scores, float(photos.mean())

    def told(self, record: Record) -> dict[str, Any]:
        """What travels in the kept file's metadata."""
        names = ("step", "identity", "leave_one_out", "threshold", "accept_rate", "copy_rate", "adherence", "diversity")
        return {name: record[name] for name in names} | {"scorer": self.validation.validation_model}

    def write(self, record: Record, began: float) -> None:
        """Add a record to the journal and to TensorBoard, and say it."""
        now = self.clock()
        self.spent += now - began
        seconds = {"validation": now - began, "validations": self.spent, "run": now - self.started}
        record = {**record, "seconds": {name: round(value, 3) for name, value in seconds.items()}}
        self.journal.append(record)
        stands = verdict(record, self.journal.records)
        say(headline(record) + (f"; {stands}" if stands else ""))
        if self.writer:
            log_to_tensorboard(self.writer, record, self.output)

    # --- after the last

    @property
    def floors(self) -> tuple[str, ...]:
        """What a checkpoint had to keep, beside identity: only what was measured."""
        if not self.journal.records:
            return ()
        return Limits.from_base(self.journal.records[0], self.validation).floors

    def finish(self) -> Record | None:
        """Put the checkpoint to keep into OUTPUT once training is done; returns its record, None where it is the
        last one.
        """
        if self.writer:
            self.writer.close()
        if self.validation.keep == "last":
            return None
        records = self.journal.records
        best, last = best_of(records), read_metadata(self.output)["steps"]
        if not records:
            say("nothing was measured; the last checkpoint is kept")
            return None
        if all(record["step"] != last for record in records):
            say(f"step {last}, the last, was not measured: it is kept, for nothing measured is known to be better")
            return None
        if best is None:
            say("no checkpoint passed the floors; the last one is kept")
            return None
        if best["identity"] < records[0]["identity"]:
            say(f"no checkpoint lies above the base model; the best of them, of step {best['step']}, is kept")
        promote(self.output)
        return best


# --- its parts -------------------------------------------------------------------------------------------------------
def say(line: str) -> None:
    """A line on stderr that leaves progress bars whole."""
    tqdm.write(line, file=sys.stderr)


def check_comparable(records: Sequence[Record], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other prompts, models or seeds than those of a journal."""
    for name, was in records[0]["measured"].items() if records else ():
        if was != now[name]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"--resume: {flag} was {was!r}, now {now[name]!r}; keep it as it was")


def attempted(work: Callable[[], None], what: str) -> bool:
    """Do `work`; returns False where memory ran out, and says so. With several processes the error is raised."""
    try:
        work()
    except RuntimeError as error:  # on a CPU, running out of memory is just that
        if PartialState().num_processes > 1 or not should_reduce_batch_size(error):
            raise
    else:
        return True
    say(f"{what}: not measured, a picture did not fit into memory")  # outside the handler, which keeps the memory
    return False


@contextmanager
def without_lora(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside the block the pipeline draws as its base model does, trained token rows included."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    adapted: list[Any] = [part for part in parts if getattr(part, "peft_config", None)]
    trained = {parameter: parameter.requires_grad for part in adapted for parameter in part.parameters()}
    for part in adapted:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in adapted:
            part.enable_adapters()
        for parameter, requires_grad in trained.items():  # enabling sets it for all of an adapter
            parameter.requires_grad_(requires_grad)


def read_loss_pictures(options: LoraOptions, validation: ValidationOptions) -> list[Picture]:
    """The pictures of the validation loss; InputError when their folder cannot be read."""
    folder = validation.validation_photos
    if folder is None:
        return read_references(options.data)
    return read_references(replace(options.data, references=folder, masks=None, background_weight=1.0))
