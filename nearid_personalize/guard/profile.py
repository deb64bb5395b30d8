"""What is known of a base model's previews: how well they foretell the final score. Pure."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.errors import InputError


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
