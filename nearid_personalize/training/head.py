"""Train the identity head on the tokens of a frozen trunk.

Tokens come from a cache (`data.cache`) or from the trunk. Every random choice is a function of (seed, step), and a
batch does not depend on the number of processes: a resumed run repeats an unbroken one exactly.

Shape letters: m pictures, B batch, V views, T tokens, D width.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nearid_personalize.data.cache import ReadAhead, TokenCache, TokenSource
from nearid_personalize.encoder.checkpoints import export_released_layout, save_head
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.pooling import attention_pool
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.evaluation import Retrieval, evaluate_tokens, into_slots, with_interval
from nearid_personalize.files import check_writable, write_atomically
from nearid_personalize.losses import gather_rows, info_nce_loss, two_tier_loss
from nearid_personalize.training.checkpoints import whole_checkpoints, write_checkpoint
from nearid_personalize.training.memory import PeakMemory, bytes_of, emptied
from nearid_personalize.training.patience import out_of_patience

FINISHED = "training.json"
"""Written last: where it is, a run has been exported."""

RECIPE = "recipe.json"
"""In a checkpoint: what decided what was learnt."""

Layout = Literal["model", "head", "released"]
"""What is exported: the whole model, its head alone, or the model as its authors' own class reads it."""


class Given(NamedTuple):
    """A flag that decides what is learnt."""

    shown: Any
    """What messages say: a number, a name."""
    decides: Any
    """What must not change when a run is resumed: of weights and pictures, the fingerprint."""


@dataclass(frozen=True)
class HeadOptions:
    """How the head is trained. Defaults suit a small trunk; `PAPER` is what the paper did at full size."""

    output: Path
    """Folder that receives the model; its `checkpoints` subfolder holds what a resumed run needs."""
    steps: int = 600
    """Optimizer steps in all."""
    batch_size: int = 128
    """Identities per step, over all processes."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one step; each is contrasted within itself."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after the warm-up and before the cosine decay to 0."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """AdamW's, per step and unit of learning rate."""
    max_gradient_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    objective: Literal["two-tier", "info-nce"] = "two-tier"
    """The paper's objective, or plain InfoNCE without distractors for comparison."""
    temperature: float = 0.07
    """Divides the cosines in the loss."""
    alpha: float = 0.5
    """Weight of the ranking tier; 0: InfoNCE with distractors."""
    seed: int = 0
    """Decides order, anchors, nothing else: the head starts from the trunk's own."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the head's arithmetic. Default: what `accelerate config` or the launcher says."""
    evaluate_every: int = 100
    """Steps between measurements on the validation rows; 0: only at the end."""
    keep: Literal["best", "last"] = "best"
    """Which head is exported: the best by validation SSR (then PA), or the last."""
    patience: int = 0
    """Stop after this many measurements without a better one; 0: never."""
    checkpoint_every: int = 0
    """Steps between checkpoints to resume from; 0: none."""
    checkpoints_total_limit: int = 2
    """Checkpoints that are kept; the oldest go."""
    resume: bool = False
    """Go on from the newest checkpoint in `output`; start afresh when there is none."""
    keep_checkpoints: bool = False
    """Keep the checkpoints when training ends."""
    tensorboard: bool = False
    """Log loss, rate and measurements to `output/tensorboard` (needs the package tensorboard)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "checkpoints_total_limit"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_gradient_norm", "temperature"):
            self._check(name, getattr(self, name) > 0, "positive")
        for name in ("warmup_steps", "weight_decay", "alpha", "evaluate_every", "patience", "checkpoint_every"):
            self._check(name, getattr(self, name) >= 0, "0 or more")

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise InputError(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(self, name)}")

    def recipe(self) -> dict[str, float | str | None]:
        """The options that decide what is learnt: a run resumes only under the same ones."""
        bookkeeping = {"output", "evaluate_every", "keep", "patience", "checkpoint_every", "checkpoints_total_limit"}
        bookkeeping |= {"resume", "keep_checkpoints", "tensorboard"}
        return {name: value for name, value in asdict(self).items() if name not in bookkeeping}


PAPER: dict[str, Any] = {
    "steps": 3344,
    "batch_size": 128,
    "learning_rate": 1e-4,
    "warmup_steps": 100,
    "weight_decay": 1e-4,
    "max_gradient_norm": 1.0,
    "objective": "two-tier",
    "temperature": 0.07,
    "alpha": 0.5,
}
"""Options of the paper's run (arXiv 2604.01973): about 11 epochs of its data."""


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadResult:
    """What training gave: every step's loss, measurements by step (0: untrained), and the step of the head kept."""

    losses: list[float]
    validation: dict[int, Retrieval]
    kept_step: int


class DataShare(NamedTuple):
    """One data set of a run."""

    num_rows: int
    repeats: int
    """How often an epoch shows each of its rows."""


class Pooling(nn.Module):
    """The part that is trained, as one module with one forward pass: what several processes keep in step."""

    def __init__(self, model: NearIDModel) -> None:
        super().__init__()
        self.head = model.head
        self.pool = model.pool  # a method, no submodule: the frozen trunk stays out of the processes' exchange

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [m,T,D] -> unit embeddings [m,D]."""
        return self.pool(tokens)


def train_head(
    options: HeadOptions,
    model: NearIDModel,
    source: TokenSource,
    validation: TokenCache | None = None,
    accelerator: Accelerator | None = None,
    sets: Sequence[DataShare] = (),
    given: Mapping[str, Given] | None = None,
) -> HeadResult:
    """Train `model`'s head in place on tokens of its trunk; writes only checkpoints and logs, see `export`.

    Checkpoints hold accelerate's pickles: resume only from your own folders.

    Args:
        sets: the data sets that the rows of `source` are of, in order. Default: one, shown once an epoch.
        given: further flags that decide what is learnt, by name; a run resumes only under the same ones.

    Raises InputError when no row has two views, the processes cannot share a batch, or a checkpoint was made under
    other options.
    """
    accelerator = accelerator or accelerator_for(options)
    schedule = Schedule.of(options, source.view_mask, sets)
    check_shares(options, schedule, accelerator)
    given = given or {}
    if options.resume:
        check_resumable(options, given)
    check_writable(options.output, "--output")
    run = HeadRun.open(options, model, accelerator, schedule)
    if options.resume:
        run.load_newest()
    if options.tensorboard:
        accelerator.init_trackers("head", {k: v for k, v in options.recipe().items() if v is not None})
    position = run.position
    if validation is not None and position.step == 0:
        position.measured(0, evaluate_tokens(model, validation), model)
    run.train(source, validation, given)
    kept = position.step
    if options.keep == "best" and position.best_head:
        model.head.load_state_dict(position.best_head)
        kept = position.best_step
    if options.tensorboard:
        accelerator.end_training()
    return HeadResult(losses=position.losses, validation=position.validation, kept_step=kept)


def check_shares(options: HeadOptions, schedule: "Schedule", accelerator: Accelerator) -> None:
    """Raise InputError where the processes cannot share a batch evenly."""
    size, processes = schedule.batch_size, accelerator.num_processes
    if size % processes:
        raise InputError(
            f"--batch-size {options.batch_size}: {processes} processes cannot share {size} identities evenly"
        )


@dataclass
class HeadRun:
    """All that lasts from one step to the next; made by `open`."""

    options: HeadOptions
    model: NearIDModel
    accelerator: Accelerator
    schedule: "Schedule"
    pooling: nn.Module
    """What accelerate made of the part that is trained."""
    optimizer: Any
    scheduler: LambdaLR
    position: "_Position"

    @classmethod
    def open(
        cls, options: HeadOptions, model: NearIDModel, accelerator: Accelerator, schedule: "Schedule"
    ) -> "HeadRun":
        """Freeze the trunk, and hand the head, its optimizer and the run's position to accelerate."""
        model.freeze_trunk().eval().to(accelerator.device)
        optimizer = torch.optim.AdamW(
            model.head.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, options.warmup_steps, options.steps))
        pooling, optimizer = accelerator.prepare(Pooling(model), optimizer)
        position = _Position()
        accelerator.register_for_checkpointing(position, scheduler)
        return cls(
            options=options,
            model=model,
            accelerator=accelerator,
            schedule=schedule,
            pooling=pooling,
            optimizer=optimizer,
            scheduler=scheduler,
            position=position,
        )

    def load_newest(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = whole_checkpoints(checkpoint_folder(self.options))
        if found:
            self.accelerator.load_state(str(found[-1]))

    def save(self, given: Mapping[str, Given]) -> None:
        """Write a checkpoint."""
        decisions = json.dumps(_decisions(self.options, given), indent=2) + "\n"
        write_checkpoint(
            self.accelerator,
            checkpoint_folder(self.options),
            self.position.step,
            lambda folder: write_atomically(folder / RECIPE, decisions),
            self.options.checkpoints_total_limit,
        )

    def train(self, source: TokenSource, validation: TokenCache | None, given: Mapping[str, Given]) -> None:
        """Take steps until all are done, or patience is out."""
        options, position = self.options, self.position
        quiet = not self.accelerator.is_main_process
        with ExitStack() as stack:
            if isinstance(source, TokenCache):
                source = stack.enter_context(ReadAhead(source))
            progress = tqdm(total=options.steps, initial=position.step, desc="head", unit="step", disable=quiet)
            stack.enter_context(progress)
            while position.step < options.steps and not position.out_of_patience(options.patience):
                self.take_step(source)
                progress.update()
                progress.set_postfix(_postfix(position.losses, position.validation), refresh=False)
                if validation is not None and _due(position.step, options.evaluate_every, options.steps):
                    self.measure(validation)
                if options.checkpoint_every and position.step % options.checkpoint_every == 0:
                    self.save(given)

    def take_step(self, source: TokenSource) -> None:
        """One optimizer step, and what is logged of it."""
        position = self.position
        loss = _train_step(
            self.options, self.accelerator, self.pooling, self.optimizer, source, self.schedule, position.step
        )
        position.losses.append(loss)
        self.scheduler.step()
        position.step += 1
        if self.options.tensorboard:
            rate = self.scheduler.get_last_lr()[0]
            self.accelerator.log({"loss": loss, "learning_rate": rate}, step=position.step)

    def measure(self, validation: TokenCache) -> None:
        """Measure the head on the validation rows."""
        measured = evaluate_tokens(self.model, validation)
        self.position.measured(self.position.step, measured, self.model)
        if self.options.tensorboard:
            self.accelerator.log({"ssr": measured.ssr, "pa": measured.pa}, step=self.position.step)


def accelerator_for(options: HeadOptions) -> Accelerator:
    """The accelerator that a run with these options uses."""
    return Accelerator(
        mixed_precision=options.mixed_precision,
        log_with="tensorboard" if options.tensorboard else None,
        project_dir=str(options.output / "tensorboard") if options.tensorboard else None,
    )


def _train_step(
    options: HeadOptions,
    accelerator: Accelerator,
    pooling: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: TokenSource,
    schedule: "Schedule",
    step: int,
) -> float:
    """One optimizer step; its loss, averaged over accumulated batches."""
    accumulated = options.gradient_accumulation_steps
    total = 0.0
    for part in range(accumulated):
        number = step * accumulated + part
        rows, variant = schedule.batch(number)
        if isinstance(source, ReadAhead) and number + 1 < options.steps * accumulated:
            following, its_variant = schedule.batch(number + 1)
            source.expect(own_share(following, accelerator), its_variant)
        last = part == accumulated - 1
        # Gradients cross processes with the last accumulated batch only.
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(pooling):
            loss = batch_loss(pooling, source, rows, variant, options, number, accelerator)
            accelerator.backward(loss / accumulated)
        total += loss.item() / accumulated
    accelerator.clip_grad_norm_(pooling.parameters(), options.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


def batch_loss(
    pooling: Callable[[Tensor], Tensor],
    source: TokenSource,
    rows: Tensor,
    variant: int,
    options: HeadOptions,
    number: int,
    accelerator: Accelerator,
) -> Tensor:
    """The loss of batch `number`, rows int64 [B]. The anchor is a valid view, drawn by (seed, number).

    Each process pools its share of the rows; all see all embeddings, and the same loss.
    """
    mine = own_share(rows, accelerator)
    tokens, valid = source.read(mine, variant)
    tokens = tokens.to(accelerator.device, non_blocking=True)
    embeddings = gather_rows(into_slots(pooling(tokens), valid))  # [B,2,V,D]
    weights = gather_rows(source.anchor_weights(mine, variant).to(accelerator.device)).cpu()  # [B,V]
    valid = gather_rows(valid.to(accelerator.device).byte()).bool()  # [B,2,V]
    order = anchor_first(weights, _generator(options.seed, number, "anchors")).to(valid.device)  # [B,V]
    valid_views = valid[:, 0].gather(1, order)
    views = embeddings[:, 0].gather(1, order[:, :, None].expand(-1, -1, embeddings.shape[-1]))  # [B,V,D]
    if options.objective == "info-nce":
        return info_nce_loss(views[:, 0], views[:, 1:], valid_views[:, 1:], options.temperature)
    return two_tier_loss(
        anchor=views[:, 0],
        positives=views[:, 1:],
        distractors=embeddings[:, 1],
        positive_mask=valid_views[:, 1:],
        distractor_mask=valid[:, 1],
        temperature=options.temperature,
        alpha=options.alpha,
    )


def own_share(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of a batch that this process reads and pools."""
    share = len(rows) // accelerator.num_processes
    return rows[accelerator.process_index * share :][:share]


def anchor_first(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Float [B,V] -> int64 [B,V]: each row's slots, turned so that one that is drawn by weight comes first."""
    anchor = torch.multinomial(weights, 1, generator=generator)  # [B,1]
    return (anchor + torch.arange(weights.shape[1])) % weights.shape[1]


@dataclass(frozen=True)
class Schedule:
    """Which rows are in which batch: a function of the seed and the batch's number."""

    options: HeadOptions
    rows: Tensor
    """Int64 [n], those with an anchor and a positive, data set after data set."""
    sets: tuple[DataShare, ...]
    """How many of `rows` are of each data set, and how often an epoch shows them."""

    @classmethod
    def of(cls, options: HeadOptions, view_mask: Tensor, sets: Sequence[DataShare] = ()) -> "Schedule":
        """The schedule of rows with some views, bool [N,V]. Raises InputError when none has two."""
        trainable = view_mask.sum(dim=1) >= 2
        if not trainable.any():
            raise InputError("no identity has two views: a row needs an anchor and a positive")
        sets = sets or (DataShare(len(trainable), 1),)
        counts = [int(part.sum()) for part in trainable.split([share.num_rows for share in sets])]
        shares = tuple(DataShare(count, share.repeats) for count, share in zip(counts, sets, strict=True))
        return cls(options, trainable.nonzero()[:, 0], shares)

    @property
    def epoch_size(self) -> int:
        """Rows that an epoch shows, repeats counted."""
        return sum(share.num_rows * share.repeats for share in self.sets)

    @property
    def batch_size(self) -> int:
        """Rows in a batch: as many as asked for, but fewer than would show one of them twice."""
        most = max(share.repeats for share in self.sets)
        distinct = self.epoch_size if most == 1 else max(1, self.epoch_size // most - (len(self.sets) - 1))
        return min(self.options.batch_size, distinct)

    def batch(self, number: int) -> tuple[Tensor, int]:
        """Rows of batch `number`, and its epoch: each is a seeded order of all rows, cut short to whole batches."""
        epoch, batch = divmod(number, self.epoch_size // self.batch_size)
        order = self._order(_generator(self.options.seed, epoch, "order"))
        return self.rows[order[batch * self.batch_size : (batch + 1) * self.batch_size]], epoch

    def _order(self, generator: torch.Generator) -> Tensor:
        """Positions in `rows`, each as often as it is repeated, every data set spread evenly over the epoch."""
        positions, times, start = [], [], 0
        for count, repeats in self.sets:
            order = torch.randperm(count, generator=generator)
            for repeat in range(repeats):
                positions.append(start + order)
                times.append((repeat + torch.arange(count, dtype=torch.float64) / max(count, 1)) / repeats)
            start += count
        return torch.cat(positions)[torch.cat(times).argsort(stable=True)]


def step_bytes(
    model: NearIDModel, num_pictures: int, picture_shape: tuple[int, int], autocast: torch.dtype | None = None
) -> int:
    """Peak memory of a training step: the model, the head's gradients and moments, tokens, activations.

    num_pictures: m of a batch in one process. picture_shape: (T, D) of their tokens. autocast: half precision of the
    head's arithmetic. Nothing is computed: the step is done on fake tensors.
    """
    head = copy.deepcopy(model.head)
    with FakeTensorMode(allow_non_fake_inputs=True):
        emptied(head, "cpu")
        with PeakMemory(head.parameters()) as memory:
            moments = [torch.empty_like(weight) for weight in head.parameters() for _ in range(2)]
            following = torch.empty(num_pictures, *picture_shape, dtype=torch.float16)  # read ahead
            tokens = torch.empty_like(following)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                pooled = attention_pool(head, tokens.float())
                F.normalize(pooled.float(), dim=-1).sum().backward()
            step = memory.peak
        del moments, following, tokens
    return bytes_of(model) + step


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the learning rate in [0, 1]: linear warm-up, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))


# --- what is kept ----------------------------------------------------------------------------------------------------


@dataclass
class _Position:
    """How far training is, and the best head so far: the part of a checkpoint that is ours."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: dict[int, Retrieval] = field(default_factory=dict)
    best_step: int = 0
    best_head: dict[str, Tensor] = field(default_factory=dict)

    def measured(self, step: int, retrieval: Retrieval, model: NearIDModel) -> None:
        """Remember a measurement, and the head when it is the best one."""
        self.validation[step] = retrieval
        best = self.validation[self.best_step] if self.best_head else None
        if best is None or (retrieval.ssr, retrieval.pa) > (best.ssr, best.pa):
            self.best_step = step
            self.best_head = {name: value.detach().cpu().clone() for name, value in model.head.state_dict().items()}

    def out_of_patience(self, patience: int) -> bool:
        """Whether the last `patience` measurements were no better than the best before them."""
        return out_of_patience([step == self.best_step for step in self.validation], patience)

    def state_dict(self) -> dict[str, Any]:
        measured = {step: asdict(retrieval) for step, retrieval in self.validation.items()}
        return {**vars(self), "validation": measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.best_step, self.best_head = state["step"], state["best_step"], state["best_head"]
        self.losses[:] = state["losses"]
        self.validation = {step: Retrieval(**measured) for step, measured in state["validation"].items()}


def checkpoint_folder(options: HeadOptions) -> Path:
    """Where the checkpoints lie."""
    return options.output / "checkpoints"


def _decisions(options: HeadOptions, given: Mapping[str, Given]) -> dict[str, Given]:
    """All that decides what is learnt, by flag."""
    return {name: Given(value, value) for name, value in options.recipe().items()} | dict(given)


def check_resumable(options: HeadOptions, given: Mapping[str, Given]) -> None:
    """Raise InputError when what lies in `output` was trained otherwise than it would go on; reads no weights."""
    found = whole_checkpoints(checkpoint_folder(options))
    if is_finished(options):
        stored = json.loads((options.output / FINISHED).read_text(encoding="utf-8"))["given"]
    elif found:
        stored = json.loads((found[-1] / RECIPE).read_text(encoding="utf-8"))
    else:
        return
    now = json.loads(json.dumps(_decisions(options, given)))
    for name, (shown, decides) in now.items():
        then_shown, then_decides = stored.get(name, (shown, decides))
        flag = f"--{name.replace('_', '-')}"
        if decides != then_decides and shown == then_shown:
            raise InputError(f"{flag} {shown}: has changed since the run to resume began; begin anew without --resume")
        if decides != then_decides:
            raise InputError(f"{flag} {shown}: the checkpoint to resume was made with {flag} {then_shown}")


def save_model(model: NearIDModel, preprocessing: Preprocessing, folder: Path) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        # The keys of the model itself, not those of the file that its trunk was once loaded from.
        model.save_pretrained(scratch, save_original_format=False)
        for path in Path(scratch).iterdir():
            os.replace(path, folder / path.name)
    preprocessing.save(folder)


@dataclass(frozen=True)
class TrainingFacts:
    """Where a head comes from: what its card tells beside the recipe and the figures."""

    command: str
    trunk: str
    """Hub id or folder of the frozen trunk."""
    data: str
    sources: tuple[str, ...]
    """Sources of distractors."""
    num_identities: int
    num_validation: int


def export(
    options: HeadOptions,
    model: NearIDModel,
    preprocessing: Preprocessing,
    result: HeadResult,
    facts: TrainingFacts,
    layout: Layout = "model",
    given: Mapping[str, Given] | None = None,
) -> None:
    """Write the model, README.md and training.json to `output`; drop the checkpoints."""
    if layout == "head":
        save_head(model, options.output, facts.trunk, preprocessing)
    elif layout == "released":
        export_released_layout(model, options.output, preprocessing)
    else:
        save_model(model, preprocessing, options.output)
    write_atomically(options.output / "README.md", model_card(options, result, facts))
    report = {
        **asdict(facts),
        "recipe": options.recipe(),
        "given": _decisions(options, given or {}),
        "kept_step": result.kept_step,
        "losses": [round(loss, 6) for loss in result.losses],
        "validation": {str(step): asdict(retrieval) for step, retrieval in result.validation.items()},
    }
    write_atomically(options.output / FINISHED, json.dumps(report, indent=2) + "\n")
    if not options.keep_checkpoints:
        shutil.rmtree(checkpoint_folder(options), ignore_errors=True)


def model_card(options: HeadOptions, result: HeadResult, facts: TrainingFacts) -> str:
    """Markdown: data, split sizes, command, figures."""
    lines = [
        "---",
        "library_name: nearid-personalize",
        "tags: [nearid, identity, personalization]",
        *([] if Path(facts.trunk).exists() else [f"base_model: {facts.trunk}"]),  # the Hub knows no folders
        "---",
        "# Identity head",
        "",
        f"An attention-pooling head on the frozen trunk `{facts.trunk}`, trained with near-identity distractors "
        "(NearID, arXiv 2604.01973).",
        "",
        f"- Data: {facts.data}; {facts.num_identities:,} identities to train on, {facts.num_validation:,} others to "
        f"validate; distractors: {', '.join(facts.sources) or 'none'}.",
        f"- Command: `{facts.command}`",
        f"- {options.objective}, alpha {options.alpha}, temperature {options.temperature}; seed {options.seed}",
        f"- The head of step {result.kept_step} of {len(result.losses)} was kept ({options.keep}).",
        "",
    ]
    if result.validation:
        lines += [
            "On the validation identities, with 95 % bootstrap intervals over identities (step 0: the untrained head). "
            "The head was chosen by these figures: report others, of identities it never met.",
            "",
            "| step | SSR | PA | n |",
            "|---|---|---|---|",
        ]
        for step in sorted({0, result.kept_step} & result.validation.keys()):
            found = result.validation[step]
            ssr, pa = with_interval(found.ssr, found.ssr_interval), with_interval(found.pa, found.pa_interval)
            lines.append(f"| {step} | {ssr} | {pa} | {found.num_identities} |")
    return "\n".join(lines) + "\n"


def is_finished(options: HeadOptions) -> bool:
    """Whether a run with these options has been exported to `output` already."""
    return (options.output / FINISHED).is_file()


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, purpose, number)."""
    purposes = ("order", "anchors")
    return torch.Generator().manual_seed((seed * len(purposes) + purposes.index(purpose)) * 1_000_003 + number)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _postfix(losses: list[float], validation: dict[int, Retrieval]) -> dict[str, str]:
    recent = losses[-20:]
    shown = {"loss": f"{sum(recent) / len(recent):.3f}"}
    if validation:
        shown["SSR"] = f"{next(reversed(validation.values())).ssr:.3f}"
    return shown
