"""Train an identity head: `accelerate launch trainers/train_head.py --trunk FOLDER --data miniworld --output FOLDER`.

Parses the flags, prints the plan, and calls `nearid_personalize.training.head`.
"""

import hashlib
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator

from nearid_personalize.data.cache import (
    CacheKey,
    LiveTokens,
    Rows,
    TokenCache,
    TokenSource,
    bytes_needed,
    cache_in_memory,
    cache_on_disk,
    free_bytes,
    trunk_fingerprint,
)
from nearid_personalize.data.reconstruct import load_reconstruction
from nearid_personalize.encoder import NearIDModel, Preprocessing, load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.miniworld.dataset import MiniWorldDataset
from nearid_personalize.training.head import (
    HeadOptions,
    HeadResult,
    accelerator_for,
    export,
    is_finished,
    make_folder,
    train_head,
)


@dataclass(frozen=True)
class Arguments:
    """Where the trunk and the pictures come from, and how the head is trained."""

    trunk: str
    """Folder or Hub id of a vision model, or of a NearID model to train further."""
    head: Annotated[HeadOptions, tyro.conf.arg(name="")]
    data: Literal["miniworld"] = "miniworld"
    """Identities to train on."""
    num_identities: int = 3000
    """Training identities."""
    num_validation: int = 300
    """Validation identities; none of them is a training one."""
    num_views: int = 3
    """Views of each identity, and as many distractors."""
    min_changes: int = 1
    """Fewest attributes in which a training distractor differs (validation: 2 to 4): 1 teaches the finest drift."""
    max_changes: int = 4
    """Most attributes in which a training distractor differs."""
    data_seed: int = 0
    """Which identities."""
    reconstruct_with: Path | None = None
    """Folder of a diffusers pipeline: a share of the pictures passes through its autoencoder."""
    reconstructed: float = 0.3
    """That share, 0 to 1."""
    tokens: Literal["auto", "disk", "live"] = "auto"
    """Where the trunk's tokens are: on disk, or nowhere (the trunk runs at every step). auto: on disk if they fit."""
    token_folder: Path | None = None
    """Folder of token caches, kept for other runs. Default: `tokens` in the output folder."""
    num_workers: int = 0
    """Processes that load pictures while the trunk runs; 0: none beside the main one."""
    dry_run: bool = False
    """Print the plan and stop."""

    def check(self) -> None:
        """Raise InputError for numbers that cannot be. (Raised while parsing, tyro would draw a box around it.)"""
        for flag, value, least in (
            ("--num-identities", self.num_identities, 1),
            ("--num-validation", self.num_validation, 0),
            ("--num-views", self.num_views, 2),
            ("--min-changes", self.min_changes, 1),
            ("--max-changes", self.max_changes, self.min_changes),
            ("--num-workers", self.num_workers, 0),
        ):
            if value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")


def open_tokens(
    arguments: Arguments, model: NearIDModel, preprocessing: Preprocessing, rows: Rows, accelerator: Accelerator
) -> TokenSource:
    """The training rows' tokens: from a cache that is written first where it is missing, or live."""
    transform = None
    facts = f"{arguments.num_views} {arguments.num_identities} {arguments.data_seed} {arguments.min_changes} "
    facts += f"{arguments.max_changes}"
    if arguments.reconstruct_with:
        transform = load_reconstruction(arguments.reconstruct_with, arguments.reconstructed)
        facts += f" {transform.share} {transform.latent_noise} {trunk_fingerprint(transform.autoencoder)}"
    folder = arguments.token_folder or arguments.head.output / "tokens"
    kind = arguments.tokens
    if kind == "auto":
        needed = bytes_needed(model, rows, preprocessing, len(rows))  # type: ignore[arg-type]
        kind = "disk" if needed < free_bytes(folder) else "live"
        if kind == "live":
            accelerator.print(f"tokens: {needed / 1e9:.1f} GB do not fit on the disk of {folder}; the trunk runs live")
    if kind == "live":
        mask = torch.ones(len(rows), arguments.num_views, dtype=torch.bool)  # type: ignore[arg-type]
        return LiveTokens(model, lambda variant: rows, mask, preprocessing, transform)
    key = CacheKey(trunk_fingerprint(model), preprocessing, (hashlib.sha256(facts.encode()).hexdigest(),), 256)
    return cache_on_disk(
        folder,
        key,
        model,
        [rows],
        preprocessing,
        transform,
        num_workers=arguments.num_workers,
        process=(accelerator.process_index, accelerator.num_processes),
        wait=accelerator.wait_for_everyone,
    )


def show_plan(arguments: Arguments, model: NearIDModel, preprocessing: Preprocessing) -> None:
    """Print what is going to be trained on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trunk       {arguments.trunk}: {model.num_parameters():,} parameters, {trained:,} of them trained")
    print(f"pictures    {preprocessing.size} x {preprocessing.size} pixels")
    print(
        f"identities  {arguments.num_identities} + {arguments.num_validation} to validate, {arguments.num_views} views"
    )
    for name, value in asdict(arguments.head).items():
        print(f"{name:30}{value}")


def run(arguments: Arguments) -> HeadResult | None:
    """Show the plan, then train."""
    arguments.check()
    model, preprocessing, _ = load_encoder(arguments.trunk)
    model.freeze_trunk()
    accelerator = accelerator_for(arguments.head)
    if accelerator.is_main_process:
        show_plan(arguments, model, preprocessing)
    if arguments.dry_run:
        return None
    if arguments.head.resume and is_finished(arguments.head):
        accelerator.print(f"{arguments.head.output}: finished already; without --resume it is trained anew")
        return None
    make_folder(arguments.head.output)
    model.to(accelerator.device)
    changes = (arguments.min_changes, arguments.max_changes)
    rows = MiniWorldDataset("train", arguments.num_identities, arguments.num_views, arguments.data_seed, changes)
    source = open_tokens(arguments, model, preprocessing, rows, accelerator)
    validation: TokenCache | None = None
    if arguments.num_validation:
        held_out = MiniWorldDataset("val", arguments.num_validation, arguments.num_views, arguments.data_seed)
        validation = cache_in_memory(model, held_out, preprocessing, num_workers=arguments.num_workers)
    result = train_head(arguments.head, model, source, validation, accelerator)
    if accelerator.is_main_process:
        facts = {"command": shlex.join(["trainers/train_head.py", *sys.argv[1:]])}
        export(arguments.head, model, preprocessing, result, facts)
        for step, retrieval in result.validation.items():
            low, high = retrieval.ssr_interval
            print(f"step {step:6}  SSR {retrieval.ssr:.3f} [{low:.3f}, {high:.3f}]  PA {retrieval.pa:.3f}")
        print(f"saved the head of step {result.kept_step} to {arguments.head.output}")
    accelerator.wait_for_everyone()
    return result


def main() -> int:
    """Exit status 0, or 2 after one line about wrong input."""
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
