"""How distractors are built."""

from dataclasses import dataclass, field
from typing import Literal

from nearid_personalize.distractors.nearness import Limits, Quantiles
from nearid_personalize.errors import InputError


@dataclass(frozen=True)
class BuildOptions:
    """How distractors are built; `--` names are those of `nearid distractors`."""

    seed: int = 0
    """Decides prompts, noise and random parts."""
    tries: int = 3
    """Seeds that are tried for a view until its distractor is kept."""
    category: str | None = None
    """Of all subjects, in place of what the data says."""
    parts: Literal["none", "given", "random"] = "none"
    """Repaint a part of the subject in place of all of it: the one in photo.part.mask.png, or a random connected piece
    of 5 to 60 % of it."""
    dilate: float = 0.04
    """How far beyond the mask is repainted, as a share of the photo's longer side."""
    feather: float = 0.0
    """Over which share of the photo's longer side, from the border inwards, the photo passes into the repainted."""
    padding: float = 0.5
    """Room around the subject in the crop that the model sees, as a share of the subject's longer side."""
    filter: bool = True
    """Refuse distractors that are not near enough, not different enough, or badly made; else each first try is kept."""
    quantiles: Quantiles = field(default_factory=Quantiles)
    limits: Limits = field(default_factory=Limits)
    """Limits that are set; the others come from quantiles of the first tries."""
    batch_size: int = 4
    """Pictures repainted together, by text-to-image pipelines."""
    link: bool = False
    """Hard links to the views' files in place of copies."""
    limit: int = 0
    """Of the first so many subjects only; 0: of all."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seed", self.seed, 0),
            ("tries", self.tries, 1),
            ("batch-size", self.batch_size, 1),
            ("limit", self.limit, 0),
        ):
            if value < least:
                raise InputError(f"--{name} {value}: must be {least} or more")
        for name, share, most in (
            ("dilate", self.dilate, 0.5),
            ("feather", self.feather, 0.5),
            ("padding", self.padding, 10),
        ):
            if not 0 <= share <= most:
                raise InputError(f"--{name} {share:g}: must be from 0 to {most:g}")
