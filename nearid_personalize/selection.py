"""Who is accepted, and in which order: pure functions of scores.

Scores are identity similarities: cosine in [-1, 1], larger = more alike. NaN stands for "never scored".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import BoolTensor, FloatTensor, Tensor


class StoppingPolicy(Protocol):
    """Decides in the middle of denoising which candidates go on."""

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """Return `[N]`, True = goes on, from previews `[N]` (NaN = already stopped) at `step_fraction` in (0, 1)."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What became of candidate `index`; `reason` is empty when it was accepted."""

    index: int
    score: float
    accepted: bool
    reason: str


def verdict_on(index: int, score: float, threshold: float) -> Verdict:
    """Accept a score that reaches `threshold`."""
    if math.isnan(score):
        return Verdict(index, score, False, "not scored")
    if score >= threshold:
        return Verdict(index, score, True, "")
    return Verdict(index, score, False, f"score {score:.3f} below threshold {threshold:.3f}")


def rank_candidates(scores: Tensor | Sequence[float], threshold: float) -> tuple[Verdict, ...]:
    """Pass verdict on scores `[N]`, best first; equal scores keep their order, NaN comes last."""
    values = scores.tolist() if isinstance(scores, Tensor) else list(scores)
    verdicts = [verdict_on(index, score, threshold) for index, score in enumerate(values)]
    return tuple(sorted(verdicts, key=lambda v: (math.isnan(v.score), 0.0 if math.isnan(v.score) else -v.score)))


def best_accepted(ranked: Sequence[Verdict], num_images: int) -> tuple[Verdict, ...]:
    """Return at most `num_images` accepted candidates of a best-first ranking."""
    return tuple(verdict for verdict in ranked if verdict.accepted)[:num_images]
