"""Races replayed from recorded scores, without any model. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.guard.policy import DEFAULT_POLICY, StoppingPolicy, needs_previews, next_wave
from nearid_personalize.guard.profile import PreviewProfile, _table
from nearid_personalize.scorer.ranking import best_accepted, rank_candidates


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
