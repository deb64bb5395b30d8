"""Who is accepted, and in which order: pure functions of scores.

Scores are identity similarities: cosine in [-1, 1], larger = more alike. NaN stands for "never scored".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import BoolTensor, FloatTensor, Tensor
from torch.nn.functional import pad

from nearid_personalize.errors import InputError
from nearid_personalize.guard.profile import PreviewProfile, Relation, _check_fractions, full_spread


class StoppingPolicy(Protocol):
    """Decides in the middle of denoising which candidates go on."""

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """Return `[N]`, True = goes on, from previews `[N]` (NaN = already stopped) at `step_fraction` in (0, 1)."""
        ...


def next_wave(
    num_candidates: int,
    started: int = 0,
    spent: float = 0.0,
    budget: float | None = None,
    max_batch_size: int | None = None,
    candidate_cost: float = 1.0,
) -> int:
    """How many new seeds may start now; 0 ends the run.

    Without a budget, what is left of `num_candidates`: what stopped candidates save stays saved. With a `budget` (in
    full candidates, like `spent`), as many as could all run to the end within what is left of it, also beyond
    `num_candidates`: so it is never exceeded, whatever the policy does. `candidate_cost`: one that runs to the end.
    `max_batch_size`: the largest wave; waves are of one size, as far as that goes: 17 candidates are 6, 6 and 5.
    """
    limits = [math.inf]
    if budget is None or started < num_candidates:
        limits.append(num_candidates - started)
    if budget is not None:
        # The small addition keeps 16 - 13.000000000000002 at three candidates.
        limits.append((budget - spent) / candidate_cost + 1e-9)
    left = math.floor(max(0, min(*limits, sys.maxsize)))  # a budget may be infinite
    if max_batch_size is None or left <= max_batch_size:
        return left
    # Waves of one size: 8, 8, 1 would leave a last candidate that has nobody to race
    return math.ceil(left / math.ceil(left / max_batch_size))


def needs_previews(policy: StoppingPolicy, num_started: int, num_images: int, is_last: bool) -> bool:
    """Whether previews of a wave can change anything: stop somebody, or teach the policy for a later wave.

    A wave of one is the last one, or one of many that can stop nobody either. A policy that does not say how many it
    keeps (`keeps_at_least`) may stop anybody.
    """
    keeps_at_least = getattr(policy, "keeps_at_least", None)
    if keeps_at_least is None or num_started > keeps_at_least(num_started, num_images):
        return True
    return not is_last and num_started > 1


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
class RacingPolicy:
    """Stops candidates whose chance to end among the wanted ones is small.

    risk: in [0, 1), the share of the wanted images that stopping may cost, expected over a whole run. Each of the
    decisions gets an equal part of it and stops candidates, the least likely first, while their chances to end among
    the `num_images` best add up to no more than that part of `num_images`.
    step_fractions: in (0, 1), when to ask.
    prior: (fraction, correlation of preview with final score), linear in between and from (0, 0) to (1, 1): what is
    believed before anyone has finished, between what was measured on SDXL, FLUX.1 and the mini-world.
    prior_weight: how many finished candidates it counts as, > 0.
    profile, finished, threshold: what is known, see `informed`.
    """

    risk: float = 0.16
    step_fractions: tuple[float, ...] = (0.3, 0.4, 0.55, 0.7)
    prior: tuple[tuple[float, float], ...] = ((0.2, 0.22), (0.3, 0.42), (0.5, 0.68), (0.7, 0.85), (0.9, 0.975))
    prior_weight: float = 16.0
    profile: PreviewProfile | None = None
    finished: tuple[float, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.risk < 1:
            raise InputError(f"risk must be in [0, 1), got {self.risk}")
        if not self.prior_weight > 0:
            raise InputError(f"prior_weight must be above 0, got {self.prior_weight}")
        _check_fractions(self.step_fractions)

    def informed(
        self, profile: PreviewProfile | None, finished: Sequence[float] = (), threshold: float | None = None
    ) -> RacingPolicy:
        """The policy that knows more.

        profile: of this base model; as soon as candidates of this run have finished, theirs, or the saved one
        `.joined` with theirs, so that its last group is this run.
        finished: final scores of this run's finished candidates, who compete for the wanted places at no more cost.
        threshold: accept threshold in "until accepted" mode: only scores at or above it are wanted.
        Finished scores and the threshold count once the profile tells at what level previews of this run end.
        """
        return replace(self, profile=profile, finished=tuple(finished), threshold=threshold)

    def keeps_at_least(self, num_started: int, num_images: int) -> int:
        """How many of a wave go on whatever their previews: those still missing from the finished, and one."""
        return max(1, num_images - len(self.finished))

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
        finished, threshold = self.finished, self.threshold
        if finished and known and known.knows_level:
            (preview_level,), (final_level,) = known.preview_level, known.final_level
            # a wave after the first may be too small to tell its spread
            spread = (
                math.sqrt((spread**2 + known.preview_spread[0] ** 2) / 2) if sample > 2 else known.preview_spread[0]
            )
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
class FixedSchedule:
    """Keeps a fixed share at fixed fractions, the best by preview.

    share_kept: {fraction of the steps in (0, 1): share in (0, 1] of those still going that goes on, rounded up};
    {0.5: 0.5} halves the candidates half-way. Fractions in between change nothing; `num_images` always go on.
    """

    share_kept: Mapping[float, float] = field(default_factory=lambda: {0.5: 0.5})

    def __post_init__(self) -> None:
        _check_fractions(self.step_fractions)
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


STEP_FRACTIONS = (0.3, 0.5, 0.7)
"""When a policy that does not say is asked."""
