"""Train an identity head: `accelerate launch --quiet trainers/train_head.py --trunk M --data D --output FOLDER`.

Parses the flags, prints the plan, and calls `nearid_personalize.training.head`.
"""

import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator

from nearid_personalize.checkpoints import trunk_fingerprint
from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.data import OFF, Augmentation, IdentityDataset, Rows, check_disjoint, load_rows
from nearid_personalize.data.cache import (
    CacheKey,
    LiveTokens,
    TokenSource,
    bytes_needed,
    cache_in_memory,
    cache_on_disk,
    free_bytes,
)
from nearid_personalize.data.previews import Previews, load_previews
from nearid_personalize.data.reconstruct import Reconstruction, load_reconstruction
from nearid_personalize.encoder import NearIDModel, load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.images import check_writable
from nearid_personalize.miniworld import rows as miniworld_rows
from nearid_personalize.preprocessing import Preprocessing
from nearid_personalize.training.head import (
    FINISHED,
    HeadOptions,
    HeadResult,
    TrainingFacts,
    accelerator_for,
    export,
    is_finished,
    train_head,
)

ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class Arguments:
    """Where the trunk and the pictures come from, and how the head is trained."""

    trunk: str
    """Folder or Hub id of a vision model, or of a NearID model to train further."""
    head: Annotated[HeadOptions, tyro.conf.arg(name="")]
    init_head: Literal["trunk", "random"] = "trunk"
    """Start from the trunk's own pooling head (or, for CLIP and DINO, from the mean token), or from random weights."""
    data: str = "miniworld"
    """Identities: a Hub id (Aleksandar/NearID), parquet, a folder of subjects' folders, or the toy world."""
    distractors: tuple[str, ...] = ()
    """Further sets of distractors for them: Aleksandar/NearID-Flux, …"""
    hash_splits: bool = False
    """Identities whose split the data does not tell get one by a hash of their id (80 / 10 / 10 %)."""
    num_identities: int = 3000
    """Training identities of the toy world; other data: all of its training split."""
    num_validation: int = 300
    """Validation identities, none of them a training one; 0: none. Other data: at most as many of its split val."""
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
    """Versions of every picture (its augmentation, its row's distractor source) that are taken in turn."""
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
    """Where the trunk's tokens are: on disk, or nowhere (the trunk runs at every step). auto: on disk if they fit."""
    token_folder: Path | None = None
    """Folder of token caches, kept for other runs. Default: `tokens` in the output folder."""
    head_alone: bool = False
    """Export the head without the trunk, whose id and fingerprint go along: 15 M parameters in place of 428 M."""
    num_workers: int = 0
    """Processes that load pictures while the trunk runs; 0: none beside the main one."""
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
            ("--num-workers", self.num_workers, 0),
        ):
            if value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")


def open_rows(arguments: Arguments) -> tuple[Rows, Rows | None]:
    """Training rows and, unless none are wanted, validation rows; no identity is in both."""
    wanted = arguments.num_validation
    if arguments.data == "miniworld":
        seed, views = arguments.data_seed, arguments.num_views
        sources = {"similar": (arguments.min_changes, arguments.max_changes)}
        train = miniworld_rows("train", arguments.num_identities, views, sources, seed=seed)
        held_out = miniworld_rows("val", wanted, views, seed=seed) if wanted else None
    else:
        whole = load_rows(arguments.data, arguments.distractors, hash_splits=arguments.hash_splits)
        train = whole.split("train")
        held_out = whole.split("val")[:wanted] if wanted else None
    if held_out is not None:
        check_disjoint(train, held_out)
    return train, held_out


def open_transform(arguments: Arguments, device: torch.device) -> Previews | Reconstruction | None:
    """What a share of the training pictures passes through; a picture is a preview or a reconstruction, never both."""
    reconstruction = None
    if arguments.reconstruct_with:
        reconstruction = load_reconstruction(arguments.reconstruct_with, arguments.reconstructed, device)
    if arguments.preview_augment is None:
        return reconstruction
    return load_previews(arguments.preview_augment, arguments.previewed, reconstruction, device)


def open_tokens(
    arguments: Arguments,
    model: NearIDModel,
    preprocessing: Preprocessing,
    dataset: IdentityDataset,
    transform: Previews | Reconstruction | None,
    accelerator: Accelerator,
) -> TokenSource:
    """The training rows' tokens: from a cache that is written first where it is missing, or live."""
    folder = arguments.token_folder or arguments.head.output / "tokens"
    kind = arguments.tokens
    if kind == "auto":
        needed = bytes_needed(model, dataset, preprocessing, len(dataset) * arguments.variants)
        kind = "disk" if needed < free_bytes(folder) else "live"
        if kind == "live":
            accelerator.print(f"tokens: {needed / 1e9:.1f} GB do not fit on the disk of {folder}; the trunk runs live")
    if kind == "live":
        return LiveTokens(
            model, lambda variant: replace(dataset, variant=variant), dataset.view_mask, preprocessing, transform
        )
    variants = [replace(dataset, variant=variant) for variant in range(arguments.variants)]
    varied = transform.fingerprint if transform else ""
    names = tuple(f"{variant.fingerprint} {varied}" for variant in variants)
    return cache_on_disk(
        folder,
        CacheKey(trunk_fingerprint(model), preprocessing, names, ROWS_PER_SHARD),
        model,
        variants,
        preprocessing,
        transform,
        num_workers=arguments.num_workers,
        process=(accelerator.process_index, accelerator.num_processes),
        wait=accelerator.wait_for_everyone,
    )


def show_plan(arguments: Arguments, model: NearIDModel, preprocessing: Preprocessing, rows: Rows) -> None:
    """Print what is going to be trained on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    validated = f"at most {arguments.num_validation} to validate" if arguments.num_validation else "none to validate"
    print(f"trunk       {arguments.trunk}: {model.num_parameters():,} parameters, {trained:,} of them trained")
    print(f"pictures    {preprocessing.size} x {preprocessing.size} pixels")
    print(f"identities  {len(rows)} of {rows.name}, distractors {', '.join(rows.sources) or 'none'}; {validated}")
    for name, value in asdict(arguments.head).items():
        print(f"{name:30}{value}")


def run(arguments: Arguments) -> HeadResult | None:
    """Show the plan, then train."""
    arguments.check()
    model, preprocessing, _ = load_encoder(arguments.trunk)
    if arguments.init_head == "random":
        torch.manual_seed(arguments.head.seed)
        model.reset_head()
    model.freeze_trunk()
    train, held_out = open_rows(arguments)
    accelerator = accelerator_for(arguments.head)
    transform = open_transform(arguments, accelerator.device)
    if accelerator.is_main_process:
        show_plan(arguments, model, preprocessing, train)
    if arguments.dry_run:
        return None
    if arguments.head.resume and is_finished(arguments.head):
        accelerator.print(f"{arguments.head.output}: finished already; without --resume it is trained anew")
        return None
    check_writable(arguments.head.output, "--output")
    if accelerator.is_main_process:  # what an earlier run finished here no longer says that this one is
        (arguments.head.output / FINISHED).unlink(missing_ok=True)
    model.to(accelerator.device)
    dataset = IdentityDataset(
        train,
        preprocessing.size,
        arguments.num_views,
        arguments.data_seed,
        augmentation=Augmentation() if arguments.augment else OFF,
    )
    source = open_tokens(arguments, model, preprocessing, dataset, transform, accelerator)
    validation = None
    if held_out is not None:
        plain = IdentityDataset(held_out, preprocessing.size, arguments.num_views)
        validation = cache_in_memory(model, plain, preprocessing, num_workers=arguments.num_workers)
    result = train_head(arguments.head, model, source, validation, accelerator)
    if accelerator.is_main_process:
        facts = TrainingFacts(
            command=shlex.join(["trainers/train_head.py", *sys.argv[1:]]),
            trunk=arguments.trunk,
            data=train.name,
            sources=train.sources,
            num_identities=len(train),
            num_validation=0 if held_out is None else len(held_out),
        )
        export(arguments.head, model, preprocessing, result, facts, arguments.head_alone)
        for step, retrieval in result.validation.items():
            low, high = retrieval.ssr_interval
            print(f"step {step:6}  SSR {retrieval.ssr:.3f} [{low:.3f}, {high:.3f}]  PA {retrieval.pa:.3f}")
        print(f"saved the head of step {result.kept_step} to {arguments.head.output}")
    accelerator.wait_for_everyone()
    return result


def main() -> None:
    """Parse, show the plan, train."""
    quieten_libraries()
    run(parse_flags(Arguments, None, "train_head.py", __doc__))


if __name__ == "__main__":
    sys.exit(run_program(main))
