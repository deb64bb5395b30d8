"""Who is accepted: scores against the subject, floors, duplicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nearid_personalize.floors.base import Floor, first_failures
from nearid_personalize.floors.copies import near_duplicates
from nearid_personalize.guard.result import BLACKENED, Candidate
from nearid_personalize.scorer.ranking import verdict_on

if TYPE_CHECKING:
    from PIL import Image

    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject


class Judgement(NamedTuple):
    """What a finished picture came to."""

    score: float
    """NaN: it holds nothing to score."""
    reason: str
    """Why it is rejected; empty: it is accepted."""
    failed_floor: bool
    """Whether a floor rejects it, rather than its score."""


@dataclass(frozen=True)
class Acceptance:
    """What decides on a finished picture."""

    scorer: IdentityScorer
    subject: Subject
    floors: tuple[Floor, ...] = ()
    duplicate_limit: float | None = None
    """Of accepted pictures this similar only the best stays accepted; None: duplicates are not looked for."""

    def judge(self, images: Sequence[Image.Image], blackened: Sequence[bool], prompt: str) -> list[Judgement]:
        """A judgement on each image; `blackened`: whether a safety checker replaced it by a black one."""
        judgements = [Judgement(score=math.nan, reason=BLACKENED, failed_floor=False)] * len(images)
        places = [place for place, black in enumerate(blackened) if not black]
        if not places:
            return judgements
        seen = [images[place] for place in places]
        scores = self.scorer.score(seen, self.subject).tolist()
        failures = first_failures(self.floors, seen, prompt)
        for place, score, failure in zip(places, scores, failures, strict=True):
            too_low = verdict_on(place, score, self.subject.threshold).reason
            judgements[place] = Judgement(score, too_low or failure, failed_floor=bool(failure) and not too_low)
        return judgements

    def without_duplicates(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The candidates in seed order; of accepted ones that look the same, only the best stays accepted."""
        by_seed = {candidate.seed: candidate for candidate in sorted(candidates, key=lambda c: c.seed)}
        accepted = sorted((c for c in by_seed.values() if c.status == "accepted"), key=lambda c: -c.score)
        if self.duplicate_limit is None or len(accepted) < 2:
            return tuple(by_seed.values())
        images = [candidate.image for candidate in accepted if candidate.image is not None]
        for candidate, original in zip(accepted, near_duplicates(images, range(len(images)), self.duplicate_limit)):
            if original is not None:
                reason = f"looks like seed {accepted[original].seed}"
                by_seed[candidate.seed] = replace(candidate, status="duplicate", reason=reason)
        return tuple(by_seed.values())


def preview_scores(scorer: IdentityScorer, subject: Subject, pixels: Tensor) -> Tensor:
    """Scores `[n]` of previews `[n,3,H,W]`; NaN for one that holds no picture.

    A VAE in half precision may overflow on the clean prediction of an early step, and not on the finished latents.
    """
    scores, seen = torch.full((len(pixels),), math.nan), pixels.isfinite().flatten(1).all(dim=1)
    if seen.any():
        scores[seen] = scorer.score(pixels[seen], subject)
    return scores
