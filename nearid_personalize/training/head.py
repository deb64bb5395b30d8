"""Train the identity head on the tokens of a frozen trunk.

The loop runs the head alone, on tokens that the trunk gave once (`data.cache`) or gives anew. Every random choice is
a function of (seed, step), so a resumed run makes exactly the choices of an unbroken one, and the batch of a step does
not depend on how many processes share it.

Shape letters: m pictures, B batch, V views, T tokens, D width.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nearid_personalize.checkpoints import save_head
from nearid_personalize.data.cache import TokenCache, TokenSource
from nearid_personalize.encoder import NearIDModel
from nearid_personalize.errors import InputError
from nearid_personalize.evaluation import Retrieval, evaluate_tokens, into_slots, with_interval
from nearid_personalize.images import check_writable, write_atomically
from nearid_personalize.losses import gather_rows, info_nce_loss, two_tier_loss
from nearid_personalize.preprocessing import Preprocessing

FINISHED = "training.json"
"""Written last: where it is, a run has been exported."""


@dataclass(frozen=True)
class HeadOptions:
    """How the head is trained. Defaults suit a small trunk; the paper's rate at full size is 1e-4."""

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


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadResult:
    """What training gave: every step's loss, measurements by step (0: untrained), and the step of the head kept."""

    losses: list[float]
    validation: dict[int, Retrieval]
    kept_step: int


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
) -> HeadResult:
    """Train `model`'s head in place on tokens of its trunk with the two-tier objective.

    Leaves the head to keep in `model` and writes nothing but checkpoints and logs to `output`: `export` does the rest.
    Checkpoints are accelerate's own files, pickles among them: resume only from your own folders.

    Raises InputError when no row has two views, the batch cannot be shared out evenly, or a checkpoint was made under
    another recipe.
    """
    accelerator = accelerator or accelerator_for(options)
    trainable = (source.view_mask.sum(dim=1) >= 2).nonzero()[:, 0]
    if len(trainable) == 0:
        raise InputError("no identity has two views: a row needs an anchor and a positive")
    if min(options.batch_size, len(trainable)) % accelerator.num_processes:
        raise InputError(
            f"--batch-size {options.batch_size}: {accelerator.num_processes} processes cannot share "
            f"{min(options.batch_size, len(trainable))} identities evenly"
        )
    check_writable(options.output, "--output")
    model.freeze_trunk().eval().to(accelerator.device)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, options.warmup_steps, options.steps))
    pooling, optimizer = accelerator.prepare(Pooling(model), optimizer)
    position = _Position(options.recipe())
    accelerator.register_for_checkpointing(position, scheduler)
    checkpoints = _Checkpoints(accelerator, options)
    if options.resume:
        checkpoints.load_newest()
    if options.tensorboard:
        accelerator.init_trackers("head", {k: v for k, v in options.recipe().items() if v is not None})

    losses = position.losses
    if validation is not None and position.step == 0:
        position.measured(0, evaluate_tokens(model, validation), model)
    quiet = not accelerator.is_main_process
    with tqdm(total=options.steps, initial=position.step, desc="head", unit="step", disable=quiet) as progress:
        while position.step < options.steps and not position.out_of_patience(options.patience):
            step = position.step
            losses.append(_train_step(options, accelerator, pooling, optimizer, source, trainable, step))
            scheduler.step()
            position.step = done = step + 1
            progress.update()
            progress.set_postfix(_postfix(losses, position.validation), refresh=False)
            if options.tensorboard:
                accelerator.log({"loss": losses[-1], "learning_rate": scheduler.get_last_lr()[0]}, step=done)
            if validation is not None and _due(done, options.evaluate_every, options.steps):
                measured = evaluate_tokens(model, validation)
                position.measured(done, measured, model)
                if options.tensorboard:
                    accelerator.log({"ssr": measured.ssr, "pa": measured.pa}, step=done)
            if options.checkpoint_every and done % options.checkpoint_every == 0:
                checkpoints.save(done)
    kept = position.step
    if options.keep == "best" and position.best_head:
        model.head.load_state_dict(position.best_head)
        kept = position.best_step
    if options.tensorboard:
        accelerator.end_training()
    return HeadResult(losses, position.validation, kept)


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
    trainable: Tensor,
    step: int,
) -> float:
    """One optimizer step; its loss, averaged over accumulated batches."""
    accumulated = options.gradient_accumulation_steps
    total = 0.0
    for part in range(accumulated):
        number = step * accumulated + part
        positions, variant = batch_rows(len(trainable), options, number)
        last = part == accumulated - 1
        # Gradients cross processes with the last accumulated batch only.
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(pooling):
            loss = batch_loss(pooling, source, trainable[positions], variant, options, number, accelerator)
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
    """The loss of batch `number`, rows int64 [B]: one valid view of each is the anchor, drawn by (seed, number).

    Each process reads and pools its share of the rows; all of them then see all embeddings, and the same loss.
    """
    share = len(rows) // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    tokens, valid = source.read(rows[mine], variant)
    embeddings = gather_rows(into_slots(pooling(tokens.to(accelerator.device)), valid))  # [B,2,V,D]
    valid = gather_rows(valid.to(accelerator.device).byte()).bool()  # [B,2,V]
    order = anchor_first(valid[:, 0].cpu(), _generator(options.seed, number, "anchors")).to(valid.device)  # [B,V]
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


def anchor_first(view_mask: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [B,V] -> int64 [B,V]: each row's slots, turned so that a valid one, drawn evenly, comes first."""
    anchor = torch.multinomial(view_mask.float(), 1, generator=generator)  # [B,1]
    return (anchor + torch.arange(view_mask.shape[1])) % view_mask.shape[1]


def batch_rows(num_rows: int, options: HeadOptions, number: int) -> tuple[Tensor, int]:
    """Positions in batch `number`, and its epoch: each is a seeded order of all rows, cut short to whole batches."""
    size = min(options.batch_size, num_rows)
    epoch, batch = divmod(number, num_rows // size)
    order = torch.randperm(num_rows, generator=_generator(options.seed, epoch, "order"))
    return order[batch * size : (batch + 1) * size], epoch


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the learning rate in [0, 1]: linear warm-up, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))


# --- what is kept ----------------------------------------------------------------------------------------------------


@dataclass
class _Position:
    """How far training is, under which recipe, and the best head so far: the part of a checkpoint that is ours."""

    recipe: dict[str, Any]
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
        return patience > 0 and sum(step > self.best_step for step in self.validation) >= patience

    def state_dict(self) -> dict[str, Any]:
        measured = {step: asdict(retrieval) for step, retrieval in self.validation.items()}
        return {**vars(self), "validation": measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["recipe"].items():
            if self.recipe[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {self.recipe[name]}: the checkpoint to resume was made with {flag} {value}")
        self.step, self.best_step, self.best_head = state["step"], state["best_step"], state["best_head"]
        self.losses[:] = state["losses"]
        self.validation = {step: Retrieval(**measured) for step, measured in state["validation"].items()}


class _Checkpoints:
    """Checkpoints under `output/checkpoints`: each appears under its name when it is complete, never before."""

    def __init__(self, accelerator: Accelerator, options: HeadOptions) -> None:
        self.accelerator, self.limit = accelerator, options.checkpoints_total_limit
        self.folder = options.output / "checkpoints"

    def complete(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*"))

    def load_newest(self) -> None:
        if self.complete():
            self.accelerator.load_state(str(self.complete()[-1]))

    def save(self, step: int) -> None:
        partial = self.folder / f".partial-{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            final = self.folder / f"step-{step:08d}"
            if not final.exists():
                os.replace(partial, final)
            for old in self.complete()[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


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
    head_alone: bool = False,
) -> None:
    """Write the model (or its head alone), its card README.md and training.json to `output`; drop the checkpoints.

    training.json comes last: where it is, the run is finished.
    """
    if head_alone:
        save_head(model, options.output, facts.trunk, preprocessing)
    else:
        save_model(model, preprocessing, options.output)
    write_atomically(options.output / "README.md", model_card(options, result, facts))
    report = {
        **asdict(facts),
        "recipe": options.recipe(),
        "kept_step": result.kept_step,
        "losses": [round(loss, 6) for loss in result.losses],
        "validation": {str(step): asdict(retrieval) for step, retrieval in result.validation.items()},
    }
    write_atomically(options.output / FINISHED, json.dumps(report, indent=2) + "\n")
    if not options.keep_checkpoints:
        shutil.rmtree(options.output / "checkpoints", ignore_errors=True)


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
