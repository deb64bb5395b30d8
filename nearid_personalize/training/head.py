"""Train the identity head on the tokens of a frozen trunk, and measure it.

The trunk runs once over every valid picture; its tokens are kept in half precision and the loop runs the head alone.
Every random choice is a function of (seed, step), so a resumed run makes exactly the choices of an unbroken one.

Shape letters: N identities, M pictures, B batch, V views, T tokens, D width.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nearid_personalize import metrics
from nearid_personalize.encoder import NearIDModel, Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.images import preprocess, write_atomically
from nearid_personalize.losses import two_tier_loss

Rows = Dataset[dict[str, Tensor]]
"""Items: `views`, `distractors` float [V,3,H,W] in [0, 1]; `view_mask`, `distractor_mask` bool [V]."""


@dataclass(frozen=True)
class HeadOptions:
    """How the head is trained. Defaults suit a small trunk; the paper's rate at full size is 1e-4."""

    output: Path
    """Folder that receives the model; its `checkpoint` subfolder holds what a resumed run needs."""
    steps: int = 600
    """Optimizer steps in all."""
    batch_size: int = 128
    """Identities per step."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after the warm-up and before the cosine decay to 0."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """AdamW's, per step and unit of learning rate."""
    max_gradient_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    temperature: float = 0.07
    """Divides the cosines in the loss."""
    alpha: float = 0.5
    """Weight of the ranking tier."""
    seed: int = 0
    """Decides order, anchors, nothing else: the head starts from the trunk's own."""
    evaluate_every: int = 100
    """Steps between measurements on the validation rows; 0: only at the end."""
    checkpoint_every: int = 0
    """Steps between checkpoints to resume from; 0: none."""
    resume: bool = False
    """Go on from `output`/checkpoint; start afresh when there is none."""
    keep_checkpoint: bool = False
    """Keep the last checkpoint when training ends."""
    tokens_on_disk: bool = False
    """Keep the token cache in a memory-mapped temporary file in `output` instead of RAM."""
    num_workers: int = 0
    """Processes that load pictures while the trunk runs; 0: none beside the main one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient_norm", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "alpha", "evaluate_every", "checkpoint_every", "num_workers"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")

    def recipe(self) -> dict[str, float]:
        """The options that decide what is learnt: a run resumes only under the same ones."""
        bookkeeping = {"output", "evaluate_every", "checkpoint_every", "resume", "keep_checkpoint"}
        bookkeeping |= {"tokens_on_disk", "num_workers"}
        return {name: value for name, value in asdict(self).items() if name not in bookkeeping}


# --- the token cache -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCache:
    """Trunk tokens of every valid picture of a set of rows.

    tokens: float16 [M,T,D]. slots: int64 [N,2,V], the picture in each slot, -1 where it is padding; [:,0] are views,
    [:,1] the distractors on those views' contexts.
    """

    tokens: Tensor
    slots: Tensor

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def view_mask(self) -> Tensor:
        """Bool [N,V]."""
        return self.slots[:, 0] >= 0

    def trainable_rows(self) -> Tensor:
        """Int64: the rows with an anchor and at least one positive."""
        return (self.view_mask.sum(dim=1) >= 2).nonzero()[:, 0]


@torch.no_grad()
def cache_tokens(
    model: NearIDModel,
    rows: Rows,
    preprocessing: Preprocessing,
    rows_per_batch: int = 16,
    num_workers: int = 0,
    file: Path | None = None,
) -> TokenCache:
    """Run the trunk once over every valid picture of `rows` (padded slots never), on the model's device.

    The cache lives in RAM, or memory-mapped in `file`: 2 bytes per value, so 24,000 pictures of 64 tokens x 192 take
    0.6 GB. The caller deletes the file.
    """
    loader = DataLoader(rows, batch_size=rows_per_batch, num_workers=num_workers)
    tokens: Tensor | None = None
    slots, used = [], 0
    with tqdm(total=len(loader.dataset), desc="trunk tokens", unit="row") as progress:  # type: ignore[arg-type]
        for batch in loader:
            pictures = torch.stack([batch["views"], batch["distractors"]], dim=1)  # [B,2,V,3,H,W]
            valid = torch.stack([batch["view_mask"], batch["distractor_mask"]], dim=1).bool()  # [B,2,V]
            pixels = preprocess(pictures[valid], preprocessing.size, preprocessing.mean, preprocessing.std)
            new = model.tokens(pixels.to(model.device)).half().cpu()  # [m,T,D]
            if tokens is None:
                # Room for every slot; pages of slots that turn out to be padding are never touched.
                capacity = len(rows) * valid[0].numel()  # type: ignore[arg-type]
                tokens = _half_tensor((capacity, *new.shape[1:]), file)
            tokens[used : used + len(new)] = new
            where = torch.full(valid.shape, -1)
            where[valid] = torch.arange(used, used + len(new))
            slots.append(where)
            used += len(new)
            progress.update(len(valid))
    if tokens is None:
        raise InputError("the data set has no rows")
    return TokenCache(tokens[:used], torch.cat(slots))


def _half_tensor(shape: tuple[int, ...], file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(shape, dtype=torch.float16)
    size = torch.Size(shape).numel()
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.float16).view(shape)


def embed_slots(model: NearIDModel, cache: TokenCache, rows: Tensor) -> Tensor:
    """Pool the pictures of some rows: int64 [B] -> unit embeddings [B,2,V,D], zeros in padded slots."""
    slots = cache.slots[rows]
    valid = slots >= 0
    pooled = model.pool(cache.tokens[slots[valid]].to(model.device))
    embeddings = pooled.new_zeros(*slots.shape, pooled.shape[-1])
    embeddings[valid.to(model.device)] = pooled
    return embeddings


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """How well an encoder tells identities from their near-identity distractors; fractions in [0, 1].

    The intervals are 95 % bootstrap intervals over identities.
    """

    ssr: float
    ssr_interval: tuple[float, float]
    pa: float
    pa_interval: tuple[float, float]
    published_pa: float
    num_identities: int


def evaluate_retrieval(
    model: NearIDModel, rows: Rows, preprocessing: Preprocessing, num_workers: int = 0, seed: int = 0
) -> Retrieval:
    """SSR and PA of a model on rows of pictures; `seed` is the bootstrap's."""
    return evaluate_tokens(model, cache_tokens(model, rows, preprocessing, num_workers=num_workers), seed)


def evaluate_tokens(model: NearIDModel, cache: TokenCache, seed: int = 0, num_resamples: int = 2000) -> Retrieval:
    """SSR and PA of a model's head on cached tokens of its trunk: cheap, so that several heads share one cache."""
    views, distractors = identity_similarities(model, cache)
    counts = metrics.won_and_valid(metrics.identity_margins(views, distractors))
    return Retrieval(
        ssr=metrics.share_of_perfect_rows(counts),
        ssr_interval=metrics.bootstrap_interval(counts, metrics.share_of_perfect_rows, num_resamples, seed),
        pa=metrics.share_of_won_terms(counts),
        pa_interval=metrics.bootstrap_interval(counts, metrics.share_of_won_terms, num_resamples, seed),
        published_pa=metrics.published_pairwise_accuracy(views, distractors),
        num_identities=int((counts[:, 1] > 0).sum()),
    )


@torch.no_grad()
def identity_similarities(model: NearIDModel, cache: TokenCache) -> tuple[Tensor, Tensor]:
    """Cosines [N,V,V] between views, and of view i with the distractor on view j's context; NaN where absent."""
    views: list[Tensor] = []
    distractors: list[Tensor] = []
    for rows in torch.arange(len(cache)).split(64):
        embeddings = embed_slots(model, cache, rows).cpu()
        valid = cache.slots[rows] >= 0
        for kind, out in ((0, views), (1, distractors)):
            cosine = embeddings[:, 0] @ embeddings[:, kind].transpose(1, 2)  # [B,V,V]
            out.append(cosine.masked_fill(~(valid[:, 0, :, None] & valid[:, kind, None, :]), float("nan")))
    return torch.cat(views), torch.cat(distractors)


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadResult:
    """What training gave: the folder, the loss of every step of this run, and measurements by step (0: untrained)."""

    output: Path
    losses: list[float]
    validation: dict[int, Retrieval]


def train_head(
    options: HeadOptions,
    model: NearIDModel,
    rows: Rows,
    preprocessing: Preprocessing,
    validation_rows: Rows | None = None,
) -> HeadResult:
    """Train `model`'s head in place on `rows` with the two-tier objective and save the whole model to `output`.

    `output` receives model.safetensors, config.json, preprocessor_config.json, and training.json (recipe, losses,
    measurements). Checkpoints are accelerate's own files, pickles among them: resume only from your own folders.

    Raises InputError when no row has two views, or a checkpoint was made under another recipe.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise InputError(f"--num_processes {accelerator.num_processes}: the head trains in one process; launch with 1")
    _make_folder(options.output)
    model.freeze_trunk().eval().to(accelerator.device)

    with tempfile.TemporaryDirectory(dir=options.output, prefix=".tokens-") as scratch:
        file = Path(scratch) / "tokens.fp16" if options.tokens_on_disk else None
        cache = cache_tokens(model, rows, preprocessing, num_workers=options.num_workers, file=file)
        validation_cache = None
        if validation_rows is not None:
            validation_cache = cache_tokens(model, validation_rows, preprocessing, num_workers=options.num_workers)
        result = train_on_tokens(options, model, cache, validation_cache, accelerator)

    save_model(model, preprocessing, options.output)
    write_atomically(options.output / "training.json", json.dumps(_report(options, result), indent=2) + "\n")
    if not options.keep_checkpoint:
        shutil.rmtree(options.output / "checkpoint", ignore_errors=True)
    return result


def train_on_tokens(
    options: HeadOptions,
    model: NearIDModel,
    cache: TokenCache,
    validation_cache: TokenCache | None,
    accelerator: Accelerator,
) -> HeadResult:
    """The loop itself; leaves the trained head in `model`."""
    trainable = cache.trainable_rows()
    if len(trainable) == 0:
        raise InputError("no identity has two views: a row needs an anchor and a positive")
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, options.warmup_steps, options.steps))
    head, optimizer, scheduler = accelerator.prepare(model.head, optimizer, scheduler)
    position = _Position(options.recipe())
    accelerator.register_for_checkpointing(position)
    checkpoint = options.output / "checkpoint"
    if options.resume and checkpoint.is_dir():
        accelerator.load_state(str(checkpoint))

    losses: list[float] = []
    validation: dict[int, Retrieval] = {}
    start = position.step
    if validation_cache is not None and start == 0:
        validation[0] = evaluate_tokens(model, validation_cache)
    with tqdm(total=options.steps, initial=start, desc="head", unit="step") as progress:
        for step in range(start, options.steps):
            loss = batch_loss(model, cache, trainable[batch_rows(len(trainable), options, step)], options, step)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(head.parameters(), options.max_gradient_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            position.step = done = step + 1
            progress.update()
            progress.set_postfix(_postfix(losses, validation), refresh=False)
            if validation_cache is not None and _due(done, options.evaluate_every, options.steps):
                validation[done] = evaluate_tokens(model, validation_cache)
            if options.checkpoint_every and done % options.checkpoint_every == 0:
                _save_checkpoint(accelerator, checkpoint)
    return HeadResult(options.output, losses, validation)


def batch_loss(model: NearIDModel, cache: TokenCache, rows: Tensor, options: HeadOptions, step: int) -> Tensor:
    """The two-tier loss of some rows: one valid view of each is the anchor, drawn by (seed, step)."""
    embeddings = embed_slots(model, cache, rows)  # [B,2,V,D]
    valid = cache.slots[rows] >= 0  # [B,2,V]
    order = anchor_first(valid[:, 0], _generator(options.seed, step, "anchors"))  # [B,V]
    valid_views = valid[:, 0].gather(1, order).to(embeddings.device)
    order = order[:, :, None].to(embeddings.device)
    views = embeddings[:, 0].gather(1, order.expand(-1, -1, embeddings.shape[-1]))  # [B,V,D]
    return two_tier_loss(
        anchor=views[:, 0],
        positives=views[:, 1:],
        distractors=embeddings[:, 1],
        positive_mask=valid_views[:, 1:],
        distractor_mask=valid[:, 1].to(embeddings.device),
        temperature=options.temperature,
        alpha=options.alpha,
    )


def anchor_first(view_mask: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [B,V] -> int64 [B,V]: each row's slots, turned so that a valid one, drawn evenly, comes first."""
    anchor = torch.multinomial(view_mask.float(), 1, generator=generator)  # [B,1]
    return (anchor + torch.arange(view_mask.shape[1])) % view_mask.shape[1]


def batch_rows(num_rows: int, options: HeadOptions, step: int) -> Tensor:
    """Positions in this step's batch. Each epoch is a seeded order of all rows, cut short to whole batches."""
    size = min(options.batch_size, num_rows)
    epoch, batch = divmod(step, num_rows // size)
    order = torch.randperm(num_rows, generator=_generator(options.seed, epoch, "order"))
    return order[batch * size : (batch + 1) * size]


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the learning rate in [0, 1]: linear warm-up, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))


def save_model(model: NearIDModel, preprocessing: Preprocessing, folder: Path) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        # The keys of the model itself, not those of the file that its trunk was once loaded from.
        model.save_pretrained(scratch, save_original_format=False)
        for path in Path(scratch).iterdir():
            os.replace(path, folder / path.name)
    write_atomically(folder / "preprocessor_config.json", preprocessing.to_json())


class _Position:
    """How far training is, and under which recipe: the part of a checkpoint that is ours."""

    def __init__(self, recipe: dict[str, float]) -> None:
        self.recipe, self.step = recipe, 0

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["recipe"].items():
            if self.recipe[name] != value:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {self.recipe[name]}: the checkpoint to resume was made with {flag} {value}")
        self.step = state["step"]


def _save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Replace the checkpoint by one that is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".checkpoint-") as scratch:
        accelerator.save_state(str(Path(scratch) / "new"))
        if folder.is_dir():
            os.replace(folder, Path(scratch) / "old")
        os.replace(Path(scratch) / "new", folder)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}; give a folder that can be written") from None


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


def _report(options: HeadOptions, result: HeadResult) -> dict[str, Any]:
    return {
        "recipe": options.recipe(),
        "losses": [round(loss, 6) for loss in result.losses],
        "validation": {str(step): asdict(retrieval) for step, retrieval in result.validation.items()},
    }
