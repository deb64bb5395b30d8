"""What a guarded call returns: candidates, their status and reason, and the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


Status = Literal["accepted", "rejected", "stopped", "duplicate"]


BLACKENED = "blackened by the safety checker"


class NothingAcceptedWarning(UserWarning):
    """No candidate was accepted, so that the result holds no images."""


@dataclass(frozen=True)
class Candidate:
    """One generated image and what became of it."""

    seed: int
    score: float
    """Cosine in [-1, 1]: of the image, or of the last preview when it was stopped. NaN: nothing was scored, as when a
    safety checker replaced the image by a black one."""
    status: Status
    stopped_at_step: int | None
    """Finished denoising steps, for status "stopped" alone."""
    image: Image.Image | None
    """None for status "stopped"."""
    reason: str
    """Why it was not accepted; empty when it was."""
    previews: Mapping[float, float] = field(default_factory=dict)
    """Score of the predicted clean picture, by step fraction in (0, 1)."""
    last_preview: Image.Image | None = None
    """What a stopped candidate looked like."""
    failed_floor: bool = False
    """Whether a floor rejected it, though its score was high enough."""


@dataclass(frozen=True)
class Cost:
    """Compute spent."""

    denoiser_rows: int
    """Rows (samples) that went through the denoiser, with classifier-free guidance two per candidate and step."""
    denoiser_rows_best_of_n: int
    """What running every candidate to the end takes."""
    seconds: dict[str, float]
    """Wall time by stage."""


@dataclass(frozen=True)
class GuardResult:
    """What came of a call: `images` are accepted, best first, at most `num_images`; `candidates` are in seed order."""

    images: Any
    candidates: tuple[Candidate, ...]
    cost: Cost
    threshold: float
    prompt: str
    seed: int

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Every candidate, best first: accepted, duplicates, rejected (a failed floor last), stopped."""
        return tuple(sorted(self.candidates, key=_rank))

    @property
    def accepted(self) -> tuple[Candidate, ...]:
        """Accepted candidates, best first, also those beyond `num_images`."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "accepted")

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        """Rejected candidates, best first; `reason` says why."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "rejected")

    @property
    def best(self) -> Candidate:
        """The best candidate, accepted or not."""
        return self.ranked[0]


@dataclass(frozen=True)
class RaceProgress:
    """A race while it runs, as `watch` sees it.

    step, num_steps: finished denoising steps of the batch under way, of how many. looks: by seed, how those still in it
    looked and scored at their last preview; None, NaN before there was one. candidates: those finished or stopped.
    """

    step: int
    num_steps: int
    looks: Mapping[int, tuple[Image.Image | None, float]]
    candidates: tuple[Candidate, ...]


Watch = Callable[[RaceProgress], None]
"""Told after every denoising step; what it raises breaks the call off and leaves the pipeline as it was found."""


class GuardResults(tuple[GuardResult, ...]):
    """One result per prompt of a list; `images` puts theirs one after another, as a pipeline does."""

    @property
    def images(self) -> Any:
        """The accepted images of all prompts, flat: those of the first prompt, then those of the second, and so on.

        A prompt may have fewer than `num_images`. Which images belong to which prompt is told by each result.
        """
        flat = [image for result in self for image in result.images]
        return _joined(flat) if flat else self[0].images


_ORDER: dict[Status, int] = {"accepted": 0, "duplicate": 1, "rejected": 2, "stopped": 3}


def _rank(candidate: Candidate) -> tuple[int, bool, bool, float]:
    """Sorting key, best first: by status, then, of rejected ones, those that failed a floor last, then by score.

    Candidates without a score come last of their status.
    """
    unscored = math.isnan(candidate.score)
    return _ORDER[candidate.status], unscored, candidate.failed_floor, 0.0 if unscored else -candidate.score


def _joined(images: Sequence[Any]) -> Any:
    """Images of one output type as a pipeline returns them: arrays and tensors stacked, pictures in a list."""
    if images and isinstance(images[0], np.ndarray):
        return np.stack(images)
    if images and isinstance(images[0], Tensor):
        return torch.stack(list(images))
    return list(images)
