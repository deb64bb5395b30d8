"""What is known of a base model's previews: how well they foretell the final score. Pure."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.errors import InputError


def checked_table(
    preview_scores: Tensor, final_scores: Tensor, step_fractions: Sequence[float]
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Float64 previews `[M, S]` and finals `[M]`, and fractions `[S]`, or InputError."""
    previews, finals = torch.as_tensor(preview_scores).double(), torch.as_tensor(final_scores).double()
    fractions = tuple(map(float, step_fractions))
    if previews.shape != (*finals.shape, len(fractions)) or finals.ndim != 1:
        raise InputError(
            "preview_scores must be [M, S], final_scores [M] and step_fractions [S], "
            f"got {list(previews.shape)}, {list(finals.shape)} and [{len(fractions)}]"
        )
    check_fractions(fractions)
    return previews, finals, fractions


def check_fractions(fractions: Sequence[float]) -> None:
    if not fractions or not all(a < b for a, b in itertools.pairwise((0.0, *fractions))) or fractions[-1] > 1:
        raise InputError(f"step_fractions must ascend within (0, 1], got {list(fractions)}")


class Relation(NamedTuple):
    """How previews at one fraction go with final scores."""

    correlation: float
    """In [-1, 1]."""
    scale: float
    """Spread of finals over spread of previews."""
    weight: float
    """How many finished candidates that rests on."""


class Level(NamedTuple):
    """Where the previews of one race lie at one fraction: raw scores; NaN where unknown."""

    preview: float
    """Mean preview of its finished candidates."""
    final: float
    """Mean final score of the same."""
    spread: float
    """Standard deviation of the previews of all its candidates."""

    @property
    def is_known(self) -> bool:
        """Whether nothing of it is NaN."""
        return all(map(math.isfinite, self))


@dataclass(frozen=True)
class RunFacts:
    """What is known of the race at hand alone, which says nothing of other races."""

    finished: tuple[float, ...] = ()
    """Final scores of finished candidates that compete for the wanted places."""
    threshold: float | None = None
    """Only scores at or above it are wanted; None: any."""
    levels: Mapping[float, Level] = field(default_factory=dict)
    """By step fraction."""


NOTHING_KNOWN = RunFacts()
"""Of a race that begins."""


class _Sums(NamedTuple):
    """What one race tells at one fraction, in units of the spread of its previews."""

    freedom: float
    preview_squares: float
    products: float
    final_squares: float


@dataclass(frozen=True)
class PreviewProfile:
    """How preview scores foretell final ones, learnt from finished candidates.

    Everything is within groups (one subject and prompt each, as scores of different subjects sit at different levels)
    and in units of the group's own preview spread, so that groups of any scale add up; one entry per fraction of the
    steps, ascending.
    """

    step_fractions: tuple[float, ...]
    freedom: tuple[float, ...]
    """Finished candidates less groups."""
    preview_squares: tuple[float, ...]
    """Sums of squared deviations of previews from their group's mean."""
    products: tuple[float, ...]
    """Sums of products of the deviations of previews and finals."""
    final_squares: tuple[float, ...]
    """Sums of squared deviations of finals."""

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
        previews, finals, fractions = checked_table(preview_scores, final_scores, step_fractions)
        per_fraction = []
        rows_of = rows_by_group(groups, len(finals)).values()
        for column in range(len(fractions)):
            sums = torch.zeros(len(_Sums._fields), dtype=torch.float64)
            for rows in rows_of:
                sums += torch.tensor(_sums(previews[rows, column], finals[rows]), dtype=torch.float64)
            per_fraction.append(_Sums(*sums.tolist()))
        return cls._of(fractions, per_fraction)

    @classmethod
    def _of(cls, step_fractions: Sequence[float], sums: Sequence[_Sums]) -> "PreviewProfile":
        return cls(
            step_fractions=tuple(step_fractions),
            freedom=tuple(at.freedom for at in sums),
            preview_squares=tuple(at.preview_squares for at in sums),
            products=tuple(at.products for at in sums),
            final_squares=tuple(at.final_squares for at in sums),
        )

    def at(self, step_fractions: Sequence[float]) -> "PreviewProfile":
        """The same knowledge at other fractions: linear between the recorded ones, the nearest beyond them.

        Before the first recorded one the products, hence the correlation, fall linearly to 0 at the start.
        """
        early = np.minimum(1.0, np.asarray(step_fractions) / self.step_fractions[0])
        values: dict[str, np.ndarray] = {}
        for name in _Sums._fields:
            values[name] = np.interp(step_fractions, self.step_fractions, getattr(self, name))
        values["products"] = values["products"] * early
        return PreviewProfile(tuple(step_fractions), **{name: tuple(v.tolist()) for name, v in values.items()})

    def joined(self, other: "PreviewProfile") -> "PreviewProfile":
        """What both know together, at the fractions of either; `other` counts at its own fractions alone."""
        fractions = tuple(sorted({*self.step_fractions, *other.step_fractions}))
        place_of = {fraction: place for place, fraction in enumerate(other.step_fractions)}
        sums: dict[str, tuple[float, ...]] = {}
        for name, mine in self.at(fractions)._sums().items():
            theirs = getattr(other, name)
            both = [m + (theirs[place_of[f]] if f in place_of else 0.0) for f, m in zip(fractions, mine, strict=True)]
            sums[name] = tuple(both)
        return PreviewProfile(fractions, **sums)

    def _sums(self) -> dict[str, tuple[float, ...]]:
        return {name: getattr(self, name) for name in _Sums._fields}

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
        """Plain values, for JSON."""
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
        check_fractions(values["step_fractions"])
        return cls(**{name: tuple(map(float, values[name])) for name in SAVED_FIELDS})


SAVED_FIELDS = ("step_fractions", *_Sums._fields)


# How well two previews in a row agree: stopped candidates were the lowest by the earlier one (measured previews of
# diffusion models: .75 to .9).
PREVIEW_AGREEMENT = 0.8


def full_spread(scores: Tensor, num_started: int) -> float:
    """Standard deviation that the previews `[n]` of those still going would have, had none of `num_started` stopped.

    NaN for fewer than two scores.
    """
    if len(scores) < 2:
        return math.nan
    return float(scores.double().std()) * spread_factor(len(scores) / num_started)


def spread_factor(share: float) -> float:
    """What the spread of the best `share` in (0, 1], by an earlier preview, is multiplied by to be that of all.

    Survivors of a selection lie closer together: for the best share p by a normal trait of correlation r with this
    one, the variance is 1 - r^2 (1 - v), where v = 1 + z h - h^2 is that of a normal variable above z, the
    (1 - p)-quantile, with h = pdf(z) / p (Cohen 1959, singly truncated samples).
    """
    if share >= 1:
        return 1.0
    z = NormalDist().inv_cdf(1 - share)
    hazard = NormalDist().pdf(z) / share
    return 1 / math.sqrt(1 - PREVIEW_AGREEMENT**2 * (hazard**2 - z * hazard))


def rows_by_group(groups: Sequence[Hashable] | None, num_rows: int) -> dict[Hashable, list[int]]:
    """Row numbers of each group, in order of first appearance; None: all rows are one group.

    Raises InputError where there is not one label for each row.
    """
    labels = [None] * num_rows if groups is None else list(groups)
    if len(labels) != num_rows:
        raise InputError(f"groups must name one group for each of the {num_rows} candidates, got {len(labels)}")
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return rows


def levels_of(previews: Tensor, finals: Tensor, step_fractions: Sequence[float]) -> dict[float, Level]:
    """Where one race lies: previews `[M, S]`, finals `[M]`; NaN where one was stopped."""
    levels = {}
    for column, fraction in enumerate(step_fractions):
        seen = previews[:, column].double()
        both = ~(seen.isnan() | finals.isnan())
        spread = full_spread(seen[~seen.isnan()], len(seen))
        levels[fraction] = Level(float(seen[both].mean()), float(finals[both].double().mean()), spread)
    return levels


def _sums(previews: Tensor, finals: Tensor) -> _Sums:
    """One group at one fraction: previews and finals `[M]`, NaN where one was stopped."""
    previewed = previews[~previews.isnan()]
    both = ~(previews.isnan() | finals.isnan())
    spread, n = full_spread(previewed, len(previews)), len(previewed)
    if not spread > 0 or n < 4 or not both.any():
        return _Sums(0.0, 0.0, 0.0, 0.0)
    x, y = previews[both], finals[both]
    # An estimated variance is on average (n - 1) / (n - 3) too large in its inverse, and so would the errors be
    unit = spread * math.sqrt((n - 1) / (n - 3))
    dx, dy = (x - x.mean()) / unit, (y - y.mean()) / unit
    return _Sums(
        freedom=len(x) - 1.0,
        preview_squares=float(dx @ dx),
        products=float(dx @ dy),
        final_squares=float(dy @ dy),
    )
