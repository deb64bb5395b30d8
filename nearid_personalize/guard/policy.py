"""Who goes on in the middle of denoising: pure functions of preview scores.

Scores are identity similarities: cosine in [-1, 1], larger = more alike. NaN stands for "never scored".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import BoolTensor, FloatTensor, Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.guard.profile import (
    NOTHING_KNOWN,
    Level,
    PreviewProfile,
    Relation,
    RunFacts,
    check_fractions,
    full_spread,
)

STEP_FRACTIONS = (0.3, 0.5, 0.7)
"""When a policy that does not say is asked."""


class StoppingPolicy(ABC):
    """Decides in the middle of denoising which candidates go on. Of your own: derive from it and write `decide`."""

    @property
    def step_fractions(self) -> tuple[float, ...]:
        """When to ask, in (0, 1), ascending."""
        return STEP_FRACTIONS

    @property
    def profile(self) -> PreviewProfile | None:
        """What it was made to know of previews."""
        return None

    def informed(self, profile: PreviewProfile | None, run: RunFacts = NOTHING_KNOWN) -> "StoppingPolicy":
        """The policy for the next batch, which may know more: of previews, and of the race at hand."""
        return self

    def keeps_at_least(self, num_started: int, num_images: int) -> int:
        """How many of a batch go on whatever their previews; 0: it may stop anybody."""
        return 0

    @abstractmethod
    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """Return `[N]`, True = goes on, from previews `[N]` (NaN = already stopped) at `step_fraction` in (0, 1)."""


def check_policy(policy: object) -> None:
    """Raise InputError for what cannot be asked."""
    if policy is not None and not isinstance(policy, StoppingPolicy):
        raise InputError(f"policy {policy!r} is none; derive it from nearid_personalize.guard.StoppingPolicy")


def within_reach(scores: Tensor, best: Tensor, reach: Tensor) -> BoolTensor:
    """Who goes on: `[..., N]` previews (NaN = stopped) no more than `reach` `[...]` below `best` `[...]`.

    A NaN reach keeps all: where nothing tells candidates apart, nobody is stopped.
    """
    going = ~scores.isnan()
    return going & ~(scores < (best - reach)[..., None])  # type: ignore[return-value]


def reach_of(margin: float | Tensor, correlation: float | Tensor, spread: Tensor, num_seen: Tensor) -> Tensor:
    """How far below the best preview a candidate may be and still go on, in the units of previews.

    Final scores, regressed on previews of this `correlation` and `spread`, differ from what is expected by a residual;
    the difference of two candidates has sqrt(2) times its standard deviation. `margin` times that is allowed.
    num_seen: previews that tell the spread; few tell it badly, so the residual is widened as a Student variable is.
    """
    correlation = torch.as_tensor(correlation, dtype=torch.float64)
    unexplained = (1 / correlation**2 - 1).sqrt()
    widened = ((num_seen + 1) / (num_seen - 1).clamp(min=1)).sqrt()
    reach = torch.as_tensor(margin, dtype=torch.float64) * math.sqrt(2) * unexplained * widened * spread
    return torch.where(spread > 0, reach, math.nan)


@dataclass(frozen=True)
class RacingPolicy(StoppingPolicy):
    """Stops candidates whose expected final score is too far below that of the best.

    One rule: regress final scores on previews; keep everyone whose expected final score is within `margin` * sqrt(2) *
    (residual standard deviation) of the best one's, or of the `num_images`-th best one's where several are wanted.
    """

    margin: float = 1.75
    """How careful it is, at least 0: larger keeps more. `plan_race` finds the value that keeps a stated loss."""
    step_fractions: tuple[float, ...] = (0.3, 0.4, 0.55, 0.7)
    """In (0, 1), ascending: when to ask."""
    prior: tuple[tuple[float, float], ...] = ((0.2, 0.22), (0.3, 0.42), (0.5, 0.68), (0.7, 0.85), (0.9, 0.975))
    """What is believed before anyone has finished: (fraction, correlation of preview with final score), linear in
    between and from (0, 0) to (1, 1). It lies between what was measured on SDXL, FLUX.1 and the mini-world."""
    prior_weight: float = 16.0
    """How many finished candidates the prior counts as, > 0."""
    profile: PreviewProfile | None = None
    """What is known of previews, see `informed`."""
    run: RunFacts = NOTHING_KNOWN
    """What is known of the race at hand, see `informed`."""

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise InputError(f"margin must be 0 or more, got {self.margin}")
        if not self.prior_weight > 0:
            raise InputError(f"prior_weight must be above 0, got {self.prior_weight}")
        check_fractions(self.step_fractions)

    def informed(self, profile: PreviewProfile | None, run: RunFacts = NOTHING_KNOWN) -> "RacingPolicy":
        """The policy that knows more.

        Finished scores and the threshold of `run` count once its levels tell where previews of this race end.
        """
        return replace(self, profile=profile, run=run)

    def keeps_at_least(self, num_started: int, num_images: int) -> int:
        """How many of a batch go on whatever their previews: those still missing from the finished, and one."""
        return max(1, num_images - len(self.run.finished))

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """See `StoppingPolicy`. A higher preview is never stopped while a lower one goes on; equal ones share a fate.

        As many as are still missing from `num_images` finished candidates always go on, and at least one.
        """
        scores = preview_scores.double()
        seen = scores[~scores.isnan()]
        at_least = self.keeps_at_least(len(scores), num_images)
        if len(seen) <= at_least:
            return ~scores.isnan()  # type: ignore[return-value]
        correlation, scale = self.relation(step_fraction)
        spread, num_seen = full_spread(seen, len(scores)), len(seen)
        rivals = seen
        level = self.run.levels.get(step_fraction)
        if self.run.finished and level is not None and level.is_known:
            # A batch after the first may be too small to tell its spread
            spread = math.sqrt((spread**2 + level.spread**2) / 2) if num_seen > 2 else level.spread
            num_seen += len(self.run.finished)
            rivals = torch.cat([seen, self.as_previews(self.run.finished, level, correlation * scale)])
        best = rivals.topk(num_images).values[-1] if len(rivals) >= num_images else rivals.min()
        if self.run.threshold is not None and len(rivals) > len(seen):
            assert level is not None, "there are more rivals once the level is known"
            best = torch.maximum(best, self.as_previews((self.run.threshold,), level, correlation * scale)[0])
        told_by = torch.tensor(num_seen, dtype=torch.float64)
        reach = reach_of(self.margin, correlation, torch.tensor(spread, dtype=torch.float64), told_by)
        # Those that are missing go on even where finished candidates are out of reach
        return within_reach(scores, best, reach) | (scores >= seen.topk(at_least).values[-1])  # type: ignore[return-value]

    @staticmethod
    def as_previews(finals: Sequence[float], level: Level, slope: float) -> Tensor:
        """The previews `[n]` that final scores would be expected of."""
        return level.preview + (torch.tensor(list(finals), dtype=torch.float64) - level.final) / max(slope, 1e-9)

    def relation(self, step_fraction: float) -> tuple[float, float]:
        """Correlation in (0, 1) and scale > 0 at a fraction: prior and profile, each by its weight in candidates."""
        fractions, correlations = zip((0.0, 0.0), *self.prior, (1.0, 1.0))
        believed = float(np.interp(step_fraction, fractions, correlations))
        seen = self.profile.at((step_fraction,)).relation(0) if self.profile else Relation(0.0, 1.0, 0.0)
        share = seen.weight / (seen.weight + self.prior_weight)
        correlation = (1 - share) * believed + share * seen.correlation
        return min(max(correlation, 1e-6), 0.9999), seen.scale**share


@dataclass(frozen=True)
class FixedSchedule(StoppingPolicy):
    """Keeps a fixed share at fixed fractions, the best by preview.

    share_kept: {fraction of the steps in (0, 1): share in (0, 1] of those still going that goes on, rounded up};
    {0.5: 0.5} halves the candidates half-way. Fractions in between change nothing; `num_images` always go on.
    """

    share_kept: Mapping[float, float] = field(default_factory=lambda: {0.5: 0.5})

    def __post_init__(self) -> None:
        check_fractions(self.step_fractions)
        for fraction, share in self.share_kept.items():
            if not 0 < share <= 1:
                raise InputError(f"share_kept at {fraction} must be in (0, 1], got {share}")

    @property
    def step_fractions(self) -> tuple[float, ...]:
        """When it wants to be asked."""
        return tuple(sorted(self.share_kept))

    def keeps_at_least(self, num_started: int, num_images: int) -> int:
        """How many of a wave go on whatever their previews."""
        return self._kept(max(self.step_fractions), num_started, num_images)

    def _kept(self, step_fraction: float, num_started: int, num_images: int) -> int:
        share = math.prod(share for at, share in self.share_kept.items() if at <= step_fraction + 1e-6)
        # The small subtraction keeps 0.1 * 0.1 * 100 = 1.0000000000000002 at one.
        return max(num_images, math.ceil(share * num_started - 1e-9))

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """See `StoppingPolicy`; of equal previews the first ones go on."""
        kept = self._kept(step_fraction, len(preview_scores), num_images)
        best = preview_scores.nan_to_num(-math.inf).argsort(descending=True, stable=True)[:kept]
        going = torch.zeros_like(preview_scores, dtype=torch.bool)
        going[best] = True
        return going & ~preview_scores.isnan()  # type: ignore[return-value]


DEFAULT_POLICY = RacingPolicy()
