"""One race of candidates, whoever drives the denoising: who begins, who is asked, who goes on, what is spent. Pure.

Three drivers share it: `IdentityGuard` (a diffusers pipeline), `replay` (recorded scores) and the modular blocks.
Candidates are numbered from 0 in the order they begin. A `row` is a place in the batch as that batch began.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nearid_personalize.guard.policy import StoppingPolicy, check_policy
from nearid_personalize.guard.profile import PreviewProfile, RunFacts, levels_of

# Fractions of the denoising that differ by less are one
SAME_FRACTION = 1e-6


@dataclass
class Race:
    """The candidates of one prompt and their scores.

    A driver takes `next_batch`, calls `begin` with it, asks `due` after every step and `decide` where it says so, and
    ends the batch with `finish`.
    """

    policy: StoppingPolicy | None
    """None: every candidate runs to the end."""
    num_images: int = 1
    """Wanted images."""
    num_candidates: int = 16
    """Candidates to begin; a budget may begin more."""
    budget: float | None = None
    """Compute that may be spent, in candidates run to the end."""
    threshold: float | None = None
    """No batch begins once `num_images` finished candidates reached it; None: all batches run."""
    max_batch_size: int | None = None
    """The most candidates of a batch."""
    profile: PreviewProfile | None = None
    """What is known of previews before the race; None: what the policy knows."""
    preview_cost: float = 0.0
    """Of one preview, in candidates run to the end."""

    previews: dict[int, dict[float, float]] = field(default_factory=dict, init=False)
    """Preview scores of every candidate that began, by candidate and step fraction."""
    finals: dict[int, float] = field(default_factory=dict, init=False)
    """Final score of every finished candidate; NaN where nothing could be scored."""
    rivals: list[float] = field(default_factory=list, init=False)
    """Final scores that compete for the wanted places."""
    spent: float = field(default=0.0, init=False)
    """In candidates run to the end."""
    batch: Sequence[int] = field(default=(), init=False)
    """The candidates of the batch under way."""
    asked: StoppingPolicy | None = field(default=None, init=False)
    """The policy as it knows things in this batch; None: no previews are worth their cost."""
    is_last: bool = field(default=False, init=False)
    """Whether no batch can follow the one under way."""

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if self.profile is None and self.policy is not None:
            self.profile = self.policy.profile

    def next_batch(self, num_accepted: int | None = None) -> range:
        """The candidates to begin now; empty: the race is over.

        num_accepted: finished candidates that count for `threshold`; default: the rivals that reach it.
        """
        started = len(self.previews)
        if self.threshold is not None:
            reached = sum(score >= self.threshold for score in self.rivals)
            if (reached if num_accepted is None else num_accepted) >= self.num_images:
                return range(started, started)
        looks = len(self.policy.step_fractions) if self.policy else 0
        size = next_batch_size(
            self.num_candidates,
            started=started,
            spent=self.spent,
            budget=self.budget,
            max_batch_size=self.max_batch_size,
            candidate_cost=1 + self.preview_cost * looks,
        )
        self.is_last = self.budget is None and started + size >= self.num_candidates
        return range(started, started + size)

    def begin(self, batch: Sequence[int], watched: bool = False) -> None:
        """Begin a batch, or a part of one that failed. `watched`: somebody wants to see previews in any case."""
        self.previews = {number: seen for number, seen in self.previews.items() if number < batch[0]}
        policy = self.policy
        if policy is not None:
            policy = policy.informed(self.learnt(), self.facts())
            if not watched and not needs_previews(policy, len(batch), self.num_images, self.is_last):
                policy = None
        self.previews |= {number: {} for number in batch}
        self.batch, self.asked = batch, policy

    def due(self, progress: float, before: float) -> bool:
        """Whether the policy is asked now that the denoising went from `before` to `progress`, fractions in [0, 1]."""
        # At the end there is nothing left to decide
        if self.asked is None or progress > 1 - SAME_FRACTION:
            return False
        return any(before < fraction - SAME_FRACTION <= progress for fraction in self.asked.step_fractions)

    def decide(self, progress: float, rows: Sequence[int], scores: Tensor) -> list[int]:
        """Which of `rows` go on, by their preview scores `[n]` at `progress`.

        A NaN is a preview that could not be scored: it stops nobody.
        """
        assert self.asked is not None, "the policy is asked where `due` says so"
        of_batch = torch.full((len(self.batch),), math.nan)
        of_batch[list(rows)] = scores.float()
        kept = self.asked.decide(progress, of_batch, self.num_images)  # type: ignore[arg-type]
        going_on = []
        for row, score in zip(rows, of_batch[list(rows)].tolist(), strict=True):
            if not math.isnan(score):
                self.previews[self.batch[row]][progress] = score
            # To a policy NaN means stopped already
            if kept[row] or math.isnan(score):
                going_on.append(row)
        self.spent += len(rows) * self.preview_cost + (len(rows) - len(going_on)) * progress
        return going_on

    def finish(self, rows: Sequence[int], scores: Sequence[float], competing: Sequence[bool] | None = None) -> None:
        """End the batch: `rows` ran to the end with final `scores` `[n]`; NaN: nothing could be scored.

        competing: `[n]`, whether each is a rival of the others; one that failed a floor is not. Default: all are.
        """
        self.spent += len(rows)
        for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
            self.finals[self.batch[row]] = score
            if not math.isnan(score) and (competing is None or competing[place]):
                self.rivals.append(score)

    def table(self) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Previews `[M, S]`, finals `[M]` and fractions `[S]` of all candidates so far; NaN where there is no score."""
        fractions = tuple(sorted({fraction for seen in self.previews.values() for fraction in seen}))
        previews = [[seen.get(fraction, math.nan) for fraction in fractions] for seen in self.previews.values()]
        finals = [self.finals.get(number, math.nan) for number in self.previews]
        return torch.tensor(previews, dtype=torch.float64), torch.tensor(finals, dtype=torch.float64), fractions

    def learnt(self) -> PreviewProfile | None:
        """What is known of previews by now: `profile`, and this race as soon as candidates finished."""
        run = self.learnt_here()
        if self.profile is None or run is None:
            return run or self.profile
        return self.profile.joined(run)

    def learnt_here(self) -> PreviewProfile | None:
        """What this race alone tells of previews; None: nothing yet."""
        previews, finals, fractions = self.table()
        if not fractions or finals.isnan().all():
            return None
        return PreviewProfile.fit(previews, finals, fractions)

    def facts(self) -> RunFacts:
        """What is known of this race besides."""
        previews, finals, fractions = self.table()
        levels = levels_of(previews, finals, fractions) if self.rivals and fractions else {}
        return RunFacts(finished=tuple(self.rivals), threshold=self.threshold, levels=levels)


def next_batch_size(
    num_candidates: int,
    started: int = 0,
    spent: float = 0.0,
    budget: float | None = None,
    max_batch_size: int | None = None,
    candidate_cost: float = 1.0,
) -> int:
    """How many new candidates may begin now; 0 ends the race.

    Without a budget, what is left of `num_candidates`. With a `budget` (in candidates run to the end, like `spent`), as
    many as could all run to the end within what is left of it, also beyond `num_candidates`: so it is never exceeded,
    whatever the policy does. `candidate_cost`: one that runs to the end. `max_batch_size`: the largest batch.
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
    # Batches of one size: 8, 8, 1 would leave a last candidate that has nobody to race
    return math.ceil(left / math.ceil(left / max_batch_size))


def needs_previews(policy: StoppingPolicy, num_started: int, num_images: int, is_last: bool) -> bool:
    """Whether previews of a batch can change anything: stop somebody, or teach the policy for a later batch."""
    if num_started > policy.keeps_at_least(num_started, num_images):
        return True
    # A batch of one is the last one, or one of many that can stop nobody either
    return not is_last and num_started > 1
