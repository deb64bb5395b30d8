"""Who is accepted, and in which order: pure functions of scores.

Scores are identity similarities: cosine in [-1, 1], larger = more alike. NaN stands for "never scored".
"""

import itertools
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import BoolTensor, FloatTensor, Tensor
from torch.nn.functional import pad

from nearid_personalize.errors import InputError


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


def _table(preview_scores: Tensor, final_scores: Tensor, step_fractions: Sequence[float]) -> tuple:
    """Float64 previews `[M, S]` and finals `[M]`, and fractions `[S]`, or InputError."""
    previews, finals = torch.as_tensor(preview_scores).double(), torch.as_tensor(final_scores).double()
    fractions = tuple(map(float, step_fractions))
    if previews.shape != (*finals.shape, len(fractions)) or finals.ndim != 1:
        raise InputError(
            "preview_scores must be [M, S], final_scores [M] and step_fractions [S], "
            f"got {list(previews.shape)}, {list(finals.shape)} and [{len(fractions)}]"
        )
    _check_fractions(fractions)
    return previews, finals, fractions


def _check_fractions(fractions: Sequence[float]) -> None:
    if not fractions or not all(a < b for a, b in itertools.pairwise((0.0, *fractions))) or fractions[-1] > 1:
        raise InputError(f"step_fractions must ascend within (0, 1], got {list(fractions)}")


class Relation(NamedTuple):
    """Correlation in [-1, 1], spread of finals over spread of previews, and how many candidates that rests on."""

    correlation: float
    scale: float
    weight: float


@dataclass(frozen=True)
class PreviewProfile:
    """How preview scores foretell final ones, learnt from finished candidates.

    Everything is within groups (one subject and prompt each, as scores of different subjects sit at different levels)
    and in units of the group's own preview spread, so that groups of any scale add up; one entry per fraction of the
    steps, ascending. `freedom`: finished candidates less groups. `preview_squares`, `products`, `final_squares`: sums
    of squares and products of deviations from the group's means. The last three, absent from what is saved, describe
    the last group alone, the run at hand: mean preview and mean final score of its finished candidates, and the
    standard deviation of the previews of all its candidates; NaN where unknown.
    """

    step_fractions: tuple[float, ...]
    freedom: tuple[float, ...]
    preview_squares: tuple[float, ...]
    products: tuple[float, ...]
    final_squares: tuple[float, ...]
    preview_level: tuple[float, ...] = ()
    final_level: tuple[float, ...] = ()
    preview_spread: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls,
        preview_scores: Tensor,
        final_scores: Tensor,
        step_fractions: Sequence[float],
        groups: Sequence[Hashable] | None = None,
    ) -> "PreviewProfile":
        """Learn from previews `[M, S]` at `step_fractions[S]` and final scores `[M]`; NaN where one was stopped.

        groups: which of the M belong to one subject and prompt, in any order; default: all of them.
        Stopped candidates tell how widely previews spread; the relation is learnt from the finished ones.
        Raises InputError for shapes that do not fit, or fractions that do not ascend within (0, 1].
        """
        previews, finals, fractions = _table(preview_scores, final_scores, step_fractions)
        labels = [None] * len(finals) if groups is None else list(groups)
        if len(labels) != len(finals):
            raise InputError(f"groups must name one group for each of the {len(finals)} candidates, got {len(labels)}")
        rows: dict[Hashable, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        per_group = [[_moments(previews[r, s], finals[r]) for s in range(len(fractions))] for r in rows.values()]
        sums = torch.tensor(per_group, dtype=torch.float64).reshape(-1, len(fractions), 7)[..., :4].sum(0)
        level = [m[4:] for m in per_group[-1]] if per_group else [(math.nan,) * 3] * len(fractions)
        return cls(fractions, *map(tuple, sums.T.tolist()), *zip(*level, strict=True))

    def at(self, step_fractions: Sequence[float]) -> "PreviewProfile":
        """The same knowledge at other fractions: linear between the recorded ones, the nearest beyond them.

        Before the first recorded one the products, hence the correlation, fall linearly to 0 at the start.
        """

        def interpolated(values: Sequence[float]) -> np.ndarray:
            return np.interp(step_fractions, self.step_fractions, values) if values else np.array([])

        early = np.minimum(1.0, np.asarray(step_fractions) / self.step_fractions[0])
        values = {f.name: interpolated(getattr(self, f.name)) for f in fields(self) if f.name != "step_fractions"}
        values["products"] = values["products"] * early
        return PreviewProfile(tuple(step_fractions), **{name: tuple(v.tolist()) for name, v in values.items()})

    def joined(self, run: "PreviewProfile") -> "PreviewProfile":
        """What this profile and the run at hand know together, at the run's fractions; the last group is the run's."""
        mine = self.at(run.step_fractions)
        sums = {
            name: tuple(a + b for a, b in zip(getattr(mine, name), getattr(run, name), strict=True))
            for name in SAVED_FIELDS[1:]
        }
        return replace(run, **sums)

    @property
    def knows_level(self) -> bool:
        """Whether it tells at what scores the run at hand ends and how widely its previews spread."""
        levels = (*self.preview_level, *self.final_level, *self.preview_spread)
        return bool(levels) and all(map(math.isfinite, levels))

    def correlation(self) -> tuple[float, ...]:
        """Correlation of preview with final score, in [-1, 1], for a group that nobody was stopped in; 0: unknown."""
        return tuple(r.correlation for r in map(self.relation, range(len(self.step_fractions))))

    def relation(self, index: int) -> Relation:
        """Correlation, scale and weight at fraction number `index`, by least squares of final on preview."""
        weight, product = self.preview_squares[index], self.products[index]
        if self.freedom[index] < 0.5 or weight <= 0:
            return Relation(0.0, 1.0, 0.0)
        slope = product / weight
        unexplained = max(0.0, self.final_squares[index] - slope * product) / max(1.0, self.freedom[index] - 1)
        scale = math.sqrt(slope**2 + unexplained)
        # deviations of finished, hence chosen, candidates are smaller: their squares are what they can tell
        return Relation(slope / scale, scale, weight) if scale > 0 else Relation(0.0, 1.0, 0.0)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain values, for JSON; the run at hand, which means nothing elsewhere, is left out."""
        return {name: list(getattr(self, name)) for name in SAVED_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreviewProfile":
        """The inverse of `to_dict`. Raises InputError naming what is missing, unknown or not a list of numbers."""
        missing, unknown = sorted(set(SAVED_FIELDS) - values.keys()), sorted(values.keys() - set(SAVED_FIELDS))
        if missing or unknown:
            raise InputError(f"preview profile: missing {missing}, unknown {unknown}")
        for name in SAVED_FIELDS:
            numbers = values[name]
            if not isinstance(numbers, list) or not all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in numbers
            ):
                raise InputError(f"preview profile: {name} must be a list of finite numbers, got {numbers!r}")
            if len(numbers) != len(values["step_fractions"]):
                raise InputError(f"preview profile: {name} has {len(numbers)} entries, step_fractions another number")
        _check_fractions(values["step_fractions"])
        return cls(**{name: tuple(map(float, values[name])) for name in SAVED_FIELDS})


SAVED_FIELDS = ("step_fractions", "freedom", "preview_squares", "products", "final_squares")


# How well two previews in a row agree: stopped candidates were the lowest by the earlier one (measured previews of
# diffusion models: .75 to .9).
PREVIEW_AGREEMENT = 0.8


def full_spread(scores: Tensor, num_started: int) -> float:
    """Standard deviation that the previews `[n]` of those still going would have, had none of `num_started` stopped.

    Survivors of a selection lie closer together: for the best share p by a normal trait of correlation r with this
    one, the variance is 1 - r^2 (1 - v), where v = 1 + z h - h^2 is that of a normal variable above z, the
    (1 - p)-quantile, with h = pdf(z) / p (Cohen 1959, singly truncated samples). NaN for fewer than two scores.
    """
    if len(scores) < 2:
        return math.nan
    spread, share = float(scores.double().std()), len(scores) / num_started
    if share >= 1:
        return spread
    z = NormalDist().inv_cdf(1 - share)
    hazard = NormalDist().pdf(z) / share
    return spread / math.sqrt(1 - PREVIEW_AGREEMENT**2 * (hazard**2 - z * hazard))


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
    ) -> "RacingPolicy":
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


@dataclass(frozen=True)
class Replay:
    """What a race of recorded candidates came to.

    winners: row numbers, best final score first, at most `num_images`. cost: compute, in full candidates (one stopped
    at fraction f costs f). cost_best_of_n: that of running all `num_candidates` to the end. started: how many began.
    """

    winners: tuple[int, ...]
    cost: float
    cost_best_of_n: float
    started: int


DEFAULT_POLICY = RacingPolicy()


def replay(
    preview_scores: Tensor,
    final_scores: Tensor,
    step_fractions: Sequence[float],
    num_candidates: int = 16,
    num_images: int = 1,
    policy: StoppingPolicy = DEFAULT_POLICY,
    profile: PreviewProfile | None = None,
    seed: int = 0,
    *,
    budget: float | None = None,
    threshold: float | None = None,
    max_batch_size: int | None = None,
    preview_cost: float = 0.0,
) -> Replay:
    """Race recorded candidates: previews `[M, S]` at `step_fractions[S]`, final scores `[M]`, without any model.

    Rows 0 ... num_candidates - 1 start, together or in even waves of up to `max_batch_size`; later rows are the
    seeds that freed compute may begin under a `budget` (see `next_wave`). A policy with `step_fractions` is asked
    at the first recorded fraction at or after each of them, any other at all recorded ones. A policy with
    `informed` is told before each wave what finished and what previews foretold, `profile` included; one with
    `seeded(seed)` draws from `seed`.

    threshold: until accepted: no new wave starts once `num_images` reached it, and only those that did can win.
    preview_cost: of one preview, in full candidates.

    Raises InputError for tables that do not fit, that hold NaN, or that are shorter than `num_candidates`.
    """
    previews, finals, fractions = _table(preview_scores, final_scores, step_fractions)
    if previews.isnan().any() or finals.isnan().any():
        raise InputError("preview_scores and final_scores must be complete: a stopped candidate cannot be replayed")
    if not 1 <= num_images <= num_candidates <= len(finals):
        raise InputError(
            "num_images must be at least 1, num_candidates at least that, and the table at least as long, "
            f"got {num_images}, {num_candidates} and {len(finals)} rows"
        )
    if hasattr(policy, "seeded"):
        policy = policy.seeded(seed)
    columns = asked_columns(fractions, getattr(policy, "step_fractions", None))
    asked = [fractions[column] for column in columns]
    seen = torch.full((len(finals), len(asked)), math.nan)
    ended = torch.full_like(finals, math.nan)
    started, cost = 0, 0.0
    while wave := next_wave(num_candidates, started, cost, budget, max_batch_size, 1 + preview_cost * len(asked)):
        rows = torch.arange(started, min(started + wave, len(finals)))
        finished = ended[~ended.isnan()].tolist()
        if len(rows) == 0 or (threshold is not None and sum(score >= threshold for score in finished) >= num_images):
            break
        informed = policy
        if hasattr(policy, "informed"):
            known = profile
            if finished and asked:
                run = PreviewProfile.fit(seen[:started], ended[:started], asked)
                known = profile.joined(run) if profile else run
            informed = policy.informed(known, finished, threshold)
        going, before = torch.ones(len(rows), dtype=torch.bool), 0.0
        is_last = budget is None and started + len(rows) >= num_candidates
        looks = len(asked) if needs_previews(informed, len(rows), num_images, is_last) else 0
        for number, (column, fraction) in enumerate(zip(columns[:looks], asked[:looks])):
            cost += int(going.sum()) * (fraction - before + preview_cost)
            before = fraction
            seen[rows[going], number] = previews[rows[going], column].float()
            going = going & informed.decide(fraction, seen[rows, number], num_images)  # type: ignore[arg-type]
        cost += int(going.sum()) * (1 - before)
        ended[rows[going]] = finals[rows[going]]
        started += len(rows)
    ranked = rank_candidates(ended, -math.inf if threshold is None else threshold)
    winners = best_accepted(ranked, num_images)
    return Replay(tuple(verdict.index for verdict in winners), cost, float(num_candidates), started)


def asked_columns(recorded: Sequence[float], wanted: Sequence[float] | None) -> list[int]:
    """Which of the `recorded` fractions a policy is asked at: the first at or after each `wanted` one; None: all.

    At the very end (fraction 1) there is nothing left to decide.
    """
    columns = [column for column, fraction in enumerate(recorded) if fraction < 1]
    if wanted is None:
        return columns
    firsts = (next((c for c in columns if recorded[c] >= fraction - 1e-6), None) for fraction in wanted)
    return sorted({column for column in firsts if column is not None})


def _moments(previews: Tensor, finals: Tensor) -> tuple[float, ...]:
    """One group at one fraction: freedom, squares and products in units of its spread; then its levels and spread."""
    previewed = previews[~previews.isnan()]
    both = ~(previews.isnan() | finals.isnan())
    spread, n = full_spread(previewed, len(previews)), len(previewed)
    if not spread > 0 or n < 4 or not both.any():
        return (0.0, 0.0, 0.0, 0.0, math.nan, math.nan, spread)
    x, y = previews[both], finals[both]
    # an estimated variance is on average (n - 1) / (n - 3) too large in its inverse, and so would the errors be
    unit = spread * math.sqrt((n - 1) / (n - 3))
    dx, dy = (x - x.mean()) / unit, (y - y.mean()) / unit
    sums = (dx @ dx, dx @ dy, dy @ dy)
    return (len(x) - 1.0, *map(float, sums), float(x.mean()), float(y.mean()), spread)
