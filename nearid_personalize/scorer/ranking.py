"""Verdicts on scores and floors, and the order of candidates. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


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


@dataclass(frozen=True)
class Ranking:
    """Verdicts on pictures, best first: each has `index` (place in the input), `score`, `accepted`, `reason`."""

    entries: tuple[Verdict, ...]

    @property
    def accepted(self) -> tuple[Verdict, ...]:
        """Those that reach the subject's threshold, best first."""
        return tuple(entry for entry in self.entries if entry.accepted)

    @property
    def rejected(self) -> tuple[Verdict, ...]:
        """The others, best first; `reason` says why."""
        return tuple(entry for entry in self.entries if not entry.accepted)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
