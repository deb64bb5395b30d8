"""Train an identity head: `accelerate launch trainers/train_head.py --trunk FOLDER --data miniworld --output FOLDER`.

Parses the flags, prints the plan, and calls `nearid_personalize.training.head.train_head`.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from nearid_personalize.encoder import load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.miniworld.dataset import MiniWorldDataset
from nearid_personalize.training.head import HeadOptions, HeadResult, train_head


@dataclass(frozen=True)
class Arguments:
    """Where the trunk and the pictures come from, and how the head is trained."""

    trunk: str
    """Folder or Hub id of a SigLIP vision model, or of a NearID model to train further."""
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
        ):
            if value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")


def run(arguments: Arguments) -> HeadResult | None:
    """Show the plan, then train."""
    arguments.check()
    model, preprocessing, _ = load_encoder(arguments.trunk)
    model.freeze_trunk()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trunk       {arguments.trunk}: {model.num_parameters():,} parameters, {trained:,} of them trained")
    print(f"pictures    {preprocessing.size} x {preprocessing.size} pixels")
    print(
        f"identities  {arguments.num_identities} + {arguments.num_validation} to validate, {arguments.num_views} views"
    )
    for name, value in asdict(arguments.head).items():
        print(f"{name:18}{value}")
    if arguments.dry_run:
        return None
    changes = (arguments.min_changes, arguments.max_changes)
    rows = MiniWorldDataset("train", arguments.num_identities, arguments.num_views, arguments.data_seed, changes)
    validation = None
    if arguments.num_validation:
        validation = MiniWorldDataset("val", arguments.num_validation, arguments.num_views, arguments.data_seed)
    result = train_head(arguments.head, model, rows, preprocessing, validation)
    for step, retrieval in result.validation.items():
        low, high = retrieval.ssr_interval
        print(f"step {step:6}  SSR {retrieval.ssr:.3f} [{low:.3f}, {high:.3f}]  PA {retrieval.pa:.3f}")
    print(f"saved to {result.output}")
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
