"""Races replayed from recorded scores, without any model. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.guard.policy import DEFAULT_POLICY, StoppingPolicy
from nearid_personalize.guard.profile import PreviewProfile, checked_table
from nearid_personalize.guard.race import Race
from nearid_personalize.scorer.ranking import best_accepted, rank_candidates


@dataclass(frozen=True)
class Replay:
    """What a race of recorded candidates came to."""

    winners: tuple[int, ...]
    """Row numbers of the table, best final score first, at most `num_images`."""
    cost: float
    """Compute, in candidates run to the end: one stopped at fraction f costs f."""
    cost_best_of_n: float
    """Compute of running all `num_candidates` to the end."""
    started: int
    """How many began."""


@dataclass(frozen=True)
class Limits:
    """What ends a replayed race, and how many candidates run together."""

    budget: float | None = None
    """Compute that may be spent, in candidates run to the end; what stopped ones leave of it begins later rows."""
    threshold: float | None = None
    """No batch begins once `num_images` candidates reached it, and only those that did can win."""
    max_batch_size: int | None = None
    """Candidates that run together; None: all of them."""


NO_LIMITS = Limits()


def replay(
    preview_scores: Tensor,
    final_scores: Tensor,
    step_fractions: Sequence[float],
    num_candidates: int = 16,
    num_images: int = 1,
    policy: StoppingPolicy | None = DEFAULT_POLICY,
    profile: PreviewProfile | None = None,
    *,
    preview_cost: float = 0.0,
    limits: Limits = NO_LIMITS,
) -> Replay:
    """Race the recorded candidates of one subject and prompt.

    Args:
        preview_scores: `[M, S]`; NaN is a preview that could not be scored, which stops nobody.
        final_scores: `[M]`; NaN is a picture that could not be scored, which cannot win.
        step_fractions: `[S]`, of the previews. The policy is asked at the first one at or after each of its own.
        num_candidates: rows 0 ... num_candidates - 1 begin; a budget may begin later ones.
        policy: None runs every candidate to the end.
        profile: what is known of previews before the race.
        preview_cost: of one preview, in candidates run to the end.

    Raises InputError for tables that do not fit, or that are shorter than `num_candidates`.
    """
    previews, finals, fractions = checked_table(preview_scores, final_scores, step_fractions)
    if not 1 <= num_images <= num_candidates <= len(finals):
        raise InputError(
            "num_images must be at least 1, num_candidates at least that, and the table at least as long, "
            f"got {num_images}, {num_candidates} and {len(finals)} rows"
        )
    race = Race(
        policy=policy,
        num_images=num_images,
        num_candidates=num_candidates,
        budget=limits.budget,
        threshold=limits.threshold,
        max_batch_size=limits.max_batch_size,
        profile=profile,
        preview_cost=preview_cost,
    )
    recorded = range(len(finals))
    # A budget may ask for more candidates than were recorded
    while batch := [number for number in race.next_batch() if number in recorded]:
        _run_recorded(race, batch, previews[batch], finals[batch], fractions)
    ended = torch.full_like(finals, math.nan)
    ended[list(race.finals)] = torch.tensor(list(race.finals.values()), dtype=finals.dtype)
    ranked = rank_candidates(ended, -math.inf if limits.threshold is None else limits.threshold)
    return Replay(
        winners=tuple(verdict.index for verdict in best_accepted(ranked, num_images)),
        cost=race.spent,
        cost_best_of_n=float(num_candidates),
        started=len(race.previews),
    )


def _run_recorded(
    race: Race, batch: Sequence[int], previews: Tensor, finals: Tensor, fractions: Sequence[float]
) -> None:
    """Run a batch of n recorded candidates, previews `[n, S]` and finals `[n]`, to its end."""
    race.begin(batch)
    rows, before = list(range(len(batch))), 0.0
    for column, fraction in enumerate(fractions):
        if rows and race.due(fraction, before):
            rows = race.decide(fraction, rows, previews[rows, column])
        before = fraction
    race.finish(rows, finals[rows].tolist())
