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
from torch.nn.functional import pad

from nearid_personalize.errors import InputError
from nearid_personalize.guard.profile import (
    NOTHING_KNOWN,
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


def chance_among_best(
    expected: Tensor,
    error: float,
    num_wanted: int,
    finished: Sequence[float] = (),
    threshold: float | None = None,
) -> Tensor:
    """Chance `[n]` in [0, 1] of each candidate to end among the `num_wanted` best, and at `threshold` or above.

    Final scores are independent normal variables with means `expected` `[n]` and standard deviation `error` > 0;
    `finished` are scores that compete and are certain. By quadrature over the candidate's own score; for each value,
    the number of others above it is a sum of unequal coin tosses, counted exactly (Poisson binomial).
    """
    grid = torch.linspace(-4.5, 4.5, 91, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    expected = expected.double()
    own = expected[:, None] + error * grid  # [n, Q]
    above = torch.special.ndtr((expected - own[..., None]) / error)  # [n, Q, n]: is the last one above the first?
    above = above * (1 - torch.eye(len(expected), dtype=torch.float64))[:, None]
    counts = torch.zeros(*own.shape, num_wanted, dtype=torch.float64)  # chance that exactly 0 ... num_wanted - 1 are
    counts[..., 0] = 1
    for toss in above.unbind(-1):
        counts = counts * (1 - toss[..., None]) + pad(counts, (1, -1)) * toss[..., None]
    certain = (torch.tensor(list(finished), dtype=torch.float64) > own[..., None]).sum(-1)
    free = torch.arange(num_wanted) < (num_wanted - certain)[..., None]
    wins = (counts * free).sum(-1)
    if threshold is not None:
        wins = wins * (own >= threshold)
    return (wins * density).sum(-1) / density.sum()


@dataclass(frozen=True)
class RacingPolicy(StoppingPolicy):
    """Stops candidates whose chance to end among the wanted ones is small.

    Each decision stops candidates, the least likely first, while their chances to end among the `num_images` best add
    up to no more than its share of `risk`.
    """

    risk: float = 0.16
    """In [0, 1): the share of the wanted images that stopping may cost, expected over a whole race."""
    step_fractions: tuple[float, ...] = (0.3, 0.4, 0.55, 0.7)
    """In (0, 1), ascending: when to ask. Each time gets an equal part of the risk."""
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
        if not 0 <= self.risk < 1:
            raise InputError(f"risk must be in [0, 1), got {self.risk}")
        if not self.prior_weight > 0:
            raise InputError(f"prior_weight must be above 0, got {self.prior_weight}")
        check_fractions(self.step_fractions)

    def informed(self, profile: PreviewProfile | None, run: RunFacts = NOTHING_KNOWN) -> "RacingPolicy":
        """The policy that knows more.

        Finished scores and the threshold of `run` count once its levels tell where previews of this race end.
        """
        return replace(self, profile=profile, run=run)

    def keeps_at_least(self, num_started: int, num_images: int) -> int:
        """How many of a wave go on whatever their previews: those still missing from the finished, and one."""
        return max(1, num_images - len(self.run.finished))

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """See `StoppingPolicy`. A higher preview is never stopped while a lower one goes on; equal ones share a fate.

        As many as are still missing from `num_images` finished candidates always go on, and at least one.
        """
        scores = preview_scores.double()
        going = ~scores.isnan()
        ranked = scores[going].sort(descending=True).values
        at_least = self.keeps_at_least(len(scores), num_images)
        if len(ranked) <= at_least:
            return going  # type: ignore[return-value]
        chances = self.chances(step_fraction, ranked, len(scores), num_images)
        allowed = self.risk * num_images / len(self.step_fractions)
        stopped = int((chances.flip(0).cumsum(0) < allowed).sum())
        return going & (scores >= ranked[max(at_least, len(ranked) - stopped) - 1])  # type: ignore[return-value]

    def chances(self, step_fraction: float, previews: Tensor, num_started: int, num_images: int) -> Tensor:
        """Chance `[n]` of those still going, `previews` `[n]`, of `num_started`, to end among the wanted ones."""
        known = self.profile.at((step_fraction,)) if self.profile else None
        correlation, scale = self.relation(step_fraction, known)
        spread, sample = full_spread(previews, num_started), len(previews)
        preview_level, final_level = float(previews.mean()), 0.0
        finished, threshold = self.run.finished, self.run.threshold
        level = self.run.levels.get(step_fraction)
        if finished and level is not None and level.is_known:
            preview_level, final_level = level.preview, level.final
            # A batch after the first may be too small to tell its spread
            spread = math.sqrt((spread**2 + level.spread**2) / 2) if sample > 2 else level.spread
            sample += len(finished)
        else:
            finished, threshold = (), None
        if not spread > 0:
            return torch.ones(len(previews), dtype=torch.float64)
        expected = final_level + correlation * scale * (previews - preview_level)
        # few candidates tell their own spread badly: the error is widened as a Student variable is
        error = scale * spread * math.sqrt((1 - correlation**2) * (sample + 1) / max(1, sample - 1))
        return chance_among_best(expected, error, num_images, finished, threshold)

    def relation(self, step_fraction: float, known: PreviewProfile | None) -> tuple[float, float]:
        """Correlation in [0, 1) and scale > 0 at a fraction: prior and profile, each by its weight in candidates."""
        fractions, correlations = zip((0.0, 0.0), *self.prior, (1.0, 1.0))
        believed = float(np.interp(step_fraction, fractions, correlations))
        seen = known.relation(0) if known else Relation(0.0, 1.0, 0.0)
        share = seen.weight / (seen.weight + self.prior_weight)
        correlation = (1 - share) * believed + share * seen.correlation
        return min(max(correlation, 0.0), 0.9999), seen.scale**share


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
