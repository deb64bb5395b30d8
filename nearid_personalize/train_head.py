"""Train an identity head.

accelerate launch --quiet -m nearid_personalize.train_head --trunk M --data D --output FOLDER

Parses the flags, prints the plan, and calls `nearid_personalize.training.head`.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from nearid_personalize.attention import Attention, using_trunk_attention
from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.data import (
    OFF,
    Augmentation,
    IdentityDataset,
    JoinedItems,
    Rows,
    check_disjoint,
    load_rows,
    split_repeats,
)
from nearid_personalize.data.cache import (
    CacheKey,
    CachePart,
    CachePlan,
    LiveTokens,
    Precision,
    TokenCache,
    TokenSource,
    Trunk,
    cache_in_memory,
    cache_on_disk,
    default_workers,
    plan_cache,
)
from nearid_personalize.data.previews import Previews, load_previews
from nearid_personalize.data.reconstruct import Reconstruction, load_reconstruction
from nearid_personalize.encoder.checkpoints import check_released_layout, load_encoder, trunk_fingerprint
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.miniworld import rows as miniworld_rows
from nearid_personalize.names import packaged
from nearid_personalize.training.head import (
    FINISHED,
    PAPER,
    DataShare,
    Given,
    HeadOptions,
    HeadResult,
    Layout,
    TrainingFacts,
    accelerator_for,
    check_resumable,
    export,
    is_finished,
    step_bytes,
    train_head,
)


@dataclass(frozen=True)
class Arguments:
    """Where the trunk and the pictures come from, and how the head is trained."""

    trunk: str
    """Folder or Hub id of a vision model, or of a NearID model to train further; "miniworld": the toy world's."""
    head: Annotated[HeadOptions, tyro.conf.arg(name="")]
    init_head: Literal["trunk", "random"] = "trunk"
    """Start from the trunk's own pooling head (or, for CLIP and DINO, from the mean token), or from random weights."""
    recipe: Literal["paper"] | None = None
    """Defaults of the other flags: the paper's steps, batch, rate, precision and augmentation. Flags that are given go
    first."""
    data: tuple[str, ...] = ("miniworld",)
    """Identities: Hub ids (Aleksandar/NearID, with a revision Aleksandar/NearID@main), parquet, folders of subjects'
    folders, or the toy world. PLACE:4 shows a set's identities four times in every epoch."""
    distractors: tuple[str, ...] = ()
    """Further sets of distractors for the first of --data: Aleksandar/NearID-Flux, …"""
    hash_splits: bool = False
    """Identities whose split the data does not tell get one by a hash of their id (80 / 10 / 10 %)."""
    num_identities: int = 3000
    """Training identities of the toy world; other data: all of its training split."""
    num_validation: int = 300
    """Validation identities, none of them a training one; 0: none. Other data: at most as many of each split val."""
    num_views: int = 3
    """Views of each identity, and as many distractors."""
    min_changes: int = 1
    """Toy world: fewest attributes in which a training distractor differs; 1 teaches the finest drift."""
    max_changes: int = 4
    """Toy world: most attributes in which a training distractor differs."""
    data_seed: int = 0
    """Toy world: which identities. Other data: draws of sources and augmentations."""
    augment: bool = False
    """Vary pictures as the paper does: black backgrounds, colour jitter, flip, shift, scale."""
    variants: int = 1
    """Versions of every picture (its augmentation, its slot's distractor source) that are taken in turn, where tokens
    are on disk; live tokens are of a new version in every epoch."""
    reconstruct_with: Path | None = None
    """Folder of a diffusers pipeline: a share of the pictures passes through its autoencoder."""
    reconstructed: float = 0.3
    """That share, 0 to 1; with previews, of the pictures that are none."""
    preview_augment: str | None = None
    """Folder or Hub id of a Stable Diffusion pipeline, or "miniworld": a share of the pictures is shown as that model
    sees them half-way, so that the head can score previews."""
    previewed: float = 0.15
    """That share, 0 to 1. With --variants 3 or more a picture is seldom a preview in all of them: finished pictures are
    then told apart about as well as without previews."""
    tokens: Literal["auto", "disk", "live"] = "auto"
    """Where the trunk's tokens are: on disk, or nowhere (the trunk runs at every step). auto: on disk if those that are
    not there yet fit."""
    token_folder: Path | None = None
    """Folder of token caches, kept for other runs. Default: `tokens` in the output folder."""
    trunk_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen trunk's arithmetic. auto: that of --mixed-precision, or of the launcher's."""
    head_alone: bool = False
    """Export the head without the trunk, whose id and fingerprint go along: 15 M parameters in place of 428 M."""
    released_layout: bool = False
    """Export the model as Aleksandar/nearid-siglip2 is laid out, for its authors' own class; SigLIP trunks only."""
    attention: Attention = "auto"
    """What computes the trunk's attention. auto: its own. flash needs a CUDA GPU, half precision and flash-attn."""
    num_workers: int | None = None
    """Threads that decode pictures while the trunk runs; 0: none. Default: one for each core, at most 8."""
    dry_run: bool = False
    """Print the plan and stop."""

    def check(self) -> None:
        """Raise InputError for numbers that cannot be."""
        for flag, value, least in (
            ("--num-identities", self.num_identities, 1),
            ("--num-validation", self.num_validation, 0),
            ("--num-views", self.num_views, 2),
            ("--min-changes", self.min_changes, 1),
            ("--max-changes", self.max_changes, self.min_changes),
            ("--variants", self.variants, 1),
            ("--num-workers", self.num_workers or 0, 0),
        ):
            if value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")
        if self.head_alone and self.released_layout:
            raise InputError("--released-layout is of a whole model: drop --head-alone")

    @property
    def layout(self) -> Layout:
        """How the model is exported."""
        if self.head_alone:
            return "head"
        return "released" if self.released_layout else "model"


def parse(flags: Sequence[str] | None = None) -> Arguments:
    """What `flags` spell, those of the process by default, over the defaults of the recipe that one of them may name.

    Raises InputError for a wrong or missing flag.
    """
    found, _ = parse_flags(_Recipe, flags, "train_head", __doc__, add_help=False, return_unknown_args=True)
    return parse_flags(Arguments, flags, "train_head", __doc__, default=_defaults(found.recipe))


@dataclass(frozen=True)
class _Recipe:
    recipe: Literal["paper"] | None = None


def _defaults(recipe: str | None) -> Arguments:
    """What flags are when they are not given; trunk and output always are."""
    if recipe is None:
        return Arguments(trunk=tyro.MISSING, head=HeadOptions(output=tyro.MISSING))
    return Arguments(
        trunk=tyro.MISSING,
        head=HeadOptions(output=tyro.MISSING, **PAPER),
        recipe="paper",
        augment=True,
        variants=11,  # its epochs: each sees another version, whether tokens fit the disk or not
        trunk_precision="fp16",
    )


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSet:
    """One of --data: rows to train on, and how often an epoch shows them."""

    rows: Rows
    repeats: int


def open_rows(arguments: Arguments) -> tuple[list[TrainingSet], list[Rows]]:
    """Training sets, and the rows to validate on; no identity of a set is in both."""
    sets, held_out = [], []
    for number, flag in enumerate(arguments.data):
        place, repeats = split_repeats(flag)
        if place in [split_repeats(other)[0] for other in arguments.data[:number]]:
            raise InputError(f"--data {flag}: named twice; {place}:2 shows it twice in every epoch")
        train, validation = _open_set(arguments, place, arguments.distractors if number == 0 else ())
        sets.append(TrainingSet(train, repeats))
        if validation is not None:
            check_disjoint(train, validation)
            held_out.append(validation)
    if arguments.num_validation and not held_out:
        raise InputError(
            f"--num-validation {arguments.num_validation}: {' and '.join(arguments.data)} have no split val; "
            "--hash-splits makes one, or give --num-validation 0"
        )
    return sets, held_out


def _open_set(arguments: Arguments, place: str, distractors: Sequence[str]) -> tuple[Rows, Rows | None]:
    """The training rows of one place, and those to validate on, if it has any and they are wanted."""
    wanted = arguments.num_validation
    if place == "miniworld":
        seed, views = arguments.data_seed, arguments.num_views
        sources = {"similar": (arguments.min_changes, arguments.max_changes)}
        train = miniworld_rows("train", arguments.num_identities, views, sources, seed=seed)
        return train, miniworld_rows("val", wanted, views, seed=seed) if wanted else None
    whole = load_rows(place, distractors, hash_splits=arguments.hash_splits)
    has_validation = wanted > 0 and "val" in whole.split_names
    return whole.split("train"), whole.split("val")[:wanted] if has_validation else None


def open_datasets(arguments: Arguments, sets: Sequence[TrainingSet], size: int) -> list[IdentityDataset]:
    """The training sets as pictures of some size."""
    augmentation = Augmentation() if arguments.augment else OFF
    views, seed = arguments.num_views, arguments.data_seed
    return [IdentityDataset(share.rows, size, views, seed, augmentation=augmentation) for share in sets]


def open_transform(arguments: Arguments, device: torch.device) -> Previews | Reconstruction | None:
    """What a share of the training pictures passes through; a picture is a preview or a reconstruction, never both."""
    reconstruction = None
    if arguments.reconstruct_with:
        reconstruction = load_reconstruction(arguments.reconstruct_with, arguments.reconstructed, device)
    if arguments.preview_augment is None:
        return reconstruction
    return load_previews(arguments.preview_augment, arguments.previewed, reconstruction, device)


# --- tokens ----------------------------------------------------------------------------------------------------------


def trunk_precision(arguments: Arguments, accelerator: Accelerator) -> Precision:
    """The precision that is asked for, or the run's."""
    following: dict[str, Precision] = {"fp16": "fp16", "bf16": "bf16"}
    if arguments.trunk_precision == "auto":
        return following.get(accelerator.mixed_precision, "fp32")
    return arguments.trunk_precision


def plan_tokens(arguments: Arguments, trunk: Trunk, datasets: Sequence[IdentityDataset]) -> CachePlan:
    """The cache of all variants of all data sets."""
    fingerprint = trunk_fingerprint(trunk.model)
    varied = trunk.transform.fingerprint if isinstance(trunk.transform, Previews | Reconstruction) else ""
    parts = []
    for dataset in datasets:
        for number in range(arguments.variants):
            variant = replace(dataset, variant=number)
            rows = f"{variant.fingerprint} {varied}"
            parts.append(CachePart(CacheKey(fingerprint, trunk.preprocessing, rows, trunk.precision), variant, number))
    return plan_cache(arguments.token_folder or arguments.head.output / "tokens", trunk, parts)


def choose_tokens(arguments: Arguments, plan: CachePlan, accelerator: Accelerator) -> str:
    """disk or live: what is asked for, or whether what is missing fits, as the main process sees it."""
    if arguments.tokens != "auto":
        return arguments.tokens
    chosen = ["disk" if plan.fits else "live"]
    broadcast_object_list(chosen)
    return chosen[0]


def open_tokens(
    arguments: Arguments,
    kind: str,
    plan: CachePlan,
    trunk: Trunk,
    datasets: Sequence[IdentityDataset],
    accelerator: Accelerator,
) -> TokenSource:
    """The training rows' tokens: from a cache that is written first where it is missing, or live."""
    workers = _workers(arguments, accelerator)
    if kind == "disk":
        process = (accelerator.process_index, accelerator.num_processes)
        return cache_on_disk(plan, trunk, workers, process, accelerator.wait_for_everyone)
    return LiveTokens(
        trunk.model,
        lambda variant: JoinedItems([replace(dataset, variant=variant) for dataset in datasets]),
        torch.cat([dataset.view_mask for dataset in datasets]),
        trunk.preprocessing,
        trunk.transform,
        workers,
        trunk.precision,
    )


def open_validation(
    arguments: Arguments, trunk: Trunk, held_out: Sequence[Rows], accelerator: Accelerator
) -> TokenCache | None:
    """Tokens of the validation rows as they are; None: there are none."""
    if not held_out:
        return None
    plain = [IdentityDataset(rows, trunk.preprocessing.size, arguments.num_views) for rows in held_out]
    workers = _workers(arguments, accelerator)
    joined = JoinedItems(plain)
    return cache_in_memory(trunk.model, joined, trunk.preprocessing, num_workers=workers, precision=trunk.precision)


def _workers(arguments: Arguments, accelerator: Accelerator) -> int:
    given = arguments.num_workers
    return default_workers(accelerator.num_processes) if given is None else given


# --- the run ---------------------------------------------------------------------------------------------------------


def what_decides(
    arguments: Arguments, kind: str, trunk: Trunk, sets: Sequence[TrainingSet], held_out: Sequence[Rows]
) -> dict[str, Given]:
    """The flags beside the recipe that decide what is learnt, those first that name a difference best."""
    named = ["init_head", "num_views", "data_seed", "hash_splits", "augment"]
    if "miniworld" in [split_repeats(flag)[0] for flag in arguments.data]:
        named += ["num_identities", "min_changes", "max_changes"]
    given = {name: Given(getattr(arguments, name), getattr(arguments, name)) for name in named}
    given["augment"] = Given(arguments.augment, repr(Augmentation()) if arguments.augment else "")
    given["trunk"] = Given(arguments.trunk, trunk_fingerprint(trunk.model))
    given["trunk_precision"] = Given(trunk.precision, trunk.precision)
    given["tokens"] = Given(kind, kind)
    given["variants"] = Given(arguments.variants, arguments.variants if kind == "disk" else None)
    for name in ("distractors", "data"):
        shown = " ".join(getattr(arguments, name))
        sources = [share.rows.sources for share in sets]
        rows = [(share.rows.fingerprint, share.repeats) for share in sets]
        given[name] = Given(shown, sources if name == "distractors" else rows)
    given["num_validation"] = Given(arguments.num_validation, [rows.fingerprint for rows in held_out])
    used = {"reconstruct_with": arguments.reconstruct_with, "preview_augment": arguments.preview_augment}
    share = {"reconstruct_with": arguments.reconstructed, "preview_augment": arguments.previewed}
    for name, place in used.items():
        shown = "none" if place is None else f"{place} (a share of {share[name]})"
        fingerprint = trunk.transform.fingerprint if isinstance(trunk.transform, Previews | Reconstruction) else ""
        given[name] = Given(shown, fingerprint if place is not None else "")
    return given


def show_plan(
    arguments: Arguments,
    kind: str,
    plan: CachePlan,
    trunk: Trunk,
    sets: Sequence[TrainingSet],
    held_out: Sequence[Rows],
    accelerator: Accelerator,
) -> None:
    """Print what is going to be trained on what, and what it takes."""
    model = trunk.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trunk       {arguments.trunk}: {model.num_parameters():,} parameters, {trained:,} of them trained")
    print(f"pictures    {trunk.preprocessing.size} x {trunk.preprocessing.size} pixels, trunk in {trunk.precision}")
    for share in sets:
        times = f", {share.repeats} times an epoch" if share.repeats > 1 else ""
        sources = ", ".join(share.rows.sources) or "none"
        print(f"identities  {len(share.rows)} of {share.rows.name}{times}, distractors {sources}")
    print(f"validation  {sum(map(len, held_out)) or 'no'} identities")
    print(f"augment     {Augmentation() if arguments.augment else 'no'}")
    state = "on disk" if kind == "disk" else "live, the trunk runs at every step"
    print(f"tokens      {state}; {arguments.variants} variants on disk: {plan}")
    processes = accelerator.num_processes
    pictures = arguments.head.batch_size // processes * 2 * arguments.num_views
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    needed = step_bytes(model, pictures, plan.picture_shape, half) / 1e9
    print(f"memory      about {needed:.1f} GB in a step, of each of {processes} processes")
    for name, value in asdict(arguments.head).items():
        print(f"{name:30}{value}")


def run(arguments: Arguments) -> HeadResult | None:
    """Load the trunk and the data, then train."""
    arguments.check()
    model, preprocessing, _ = load_encoder(packaged(arguments.trunk, "siglip"))
    if arguments.init_head == "random":
        torch.manual_seed(arguments.head.seed)
        model.reset_head()
    model.freeze_trunk()
    sets, held_out = open_rows(arguments)
    accelerator = accelerator_for(arguments.head)
    model.to(accelerator.device)
    with using_trunk_attention(model.backbone, arguments.attention, accelerator.device):
        return train(arguments, model, preprocessing, sets, held_out, accelerator)


def train(
    arguments: Arguments,
    model: NearIDModel,
    preprocessing: Preprocessing,
    sets: list[TrainingSet],
    held_out: list[Rows],
    accelerator: Accelerator,
) -> HeadResult | None:
    """Show the plan, then train and export, unless a dry run is asked for."""
    if arguments.released_layout:
        check_released_layout(model)
    transform = open_transform(arguments, accelerator.device)
    trunk = Trunk(model, preprocessing, transform, trunk_precision(arguments, accelerator))
    datasets = open_datasets(arguments, sets, preprocessing.size)
    plan = plan_tokens(arguments, trunk, datasets)
    kind = choose_tokens(arguments, plan, accelerator)
    if accelerator.is_main_process:
        show_plan(arguments, kind, plan, trunk, sets, held_out, accelerator)
    if arguments.dry_run:
        return None
    given = what_decides(arguments, kind, trunk, sets, held_out)
    if arguments.head.resume:
        check_resumable(arguments.head, given)
    if arguments.head.resume and is_finished(arguments.head):
        accelerator.print(f"{arguments.head.output}: finished already; without --resume it is trained anew")
        return None
    check_writable(arguments.head.output, "--output")
    if accelerator.is_main_process:  # what an earlier run finished here no longer says that this one is
        (arguments.head.output / FINISHED).unlink(missing_ok=True)
    source = open_tokens(arguments, kind, plan, trunk, datasets, accelerator)
    validation = open_validation(arguments, trunk, held_out, accelerator)
    shares = [DataShare(len(share.rows), share.repeats) for share in sets]
    result = train_head(arguments.head, model, source, validation, accelerator, shares, given)
    if accelerator.is_main_process:
        facts = TrainingFacts(
            command=shlex.join(["trainers/train_head.py", *sys.argv[1:]]),
            trunk=arguments.trunk,
            data=" and ".join(share.rows.name for share in sets),
            sources=tuple(dict.fromkeys(name for share in sets for name in share.rows.sources)),
            num_identities=sum(len(share.rows) for share in sets),
            num_validation=sum(map(len, held_out)),
        )
        export(arguments.head, model, preprocessing, result, facts, arguments.layout, given)
        for step, retrieval in result.validation.items():
            low, high = retrieval.ssr_interval
            print(f"step {step:6}  SSR {retrieval.ssr:.3f} [{low:.3f}, {high:.3f}]  PA {retrieval.pa:.3f}")
        print(f"saved the head of step {result.kept_step} to {arguments.head.output}")
    accelerator.wait_for_everyone()
    return result


def main() -> None:
    """Parse, show the plan, train."""
    quieten_libraries()
    run(parse())


if __name__ == "__main__":
    sys.exit(run_program(main))
