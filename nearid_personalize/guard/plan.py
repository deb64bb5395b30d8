"""A race planned from recorded races: when to ask, how readily to stop, how many to begin. Pure.

Letters: G recorded groups (a subject and a prompt each), M recorded candidates of a group, N of them begun, R races
replayed of each group, S step fractions, L margins.

There are two steps. First, plans are put in an order from careful to cheap. The order sees of the records only how
previews and final scores correlate: it tries plans on races drawn at random with these correlations. Then conformal
risk control (Angelopoulos et al. 2022, arXiv 2208.02814) follows that order on the recorded groups. It takes the last
plan whose loss is within the limit after one more group is added, the worst that was seen. So `max_loss` holds on
average for new groups that come from where the recorded ones came from.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.guard.policy import RacingPolicy, reach_of, within_reach
from nearid_personalize.guard.profile import PreviewProfile, checked_table, levels_of, rows_by_group, spread_factor

PREVIEW_COST = 0.0125
"""Of one preview, in candidates run to the end: measured on the mini-world, 30 steps."""
BEGUN = (0.75, 1.0, 1.25, 1.5, 2.0)
"""How many may begin, in units of `baseline_candidates`."""
MARGINS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
"""Of `RacingPolicy`, what plans may have."""
GAINS = (1.08, 1.06, 1.05, 1.04, 1.03, 1.02, 1.01, 1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Expected gains of the plans that are tried in turn."""
NUM_DRAWN = 160
"""Races drawn at random to order plans by."""
LATEST_FIRST_LOOK = 0.6
"""A race that is first asked later than this fraction of the steps saves little."""
WORTH_RACING = 0.97
"""A plan must cost less than this share of running the baseline's candidates to the end."""


@dataclass(frozen=True)
class RacePlan:
    """How to race on one base model, and what that keeps and costs."""

    policy: RacingPolicy | None
    """For `IdentityGuard` and `replay`; None: do not race, previews do not save enough here."""
    num_candidates: int
    """How many to begin."""
    cost: float
    """Mean compute of the recorded races under this plan, previews counted; 1: `baseline_candidates` run to the end.
    NaN: not measured."""
    gain: float
    """Mean gain in final score over a random candidate; 1: that of the best of `baseline_candidates`. NaN: not
    measured."""
    num_images: int
    baseline_candidates: int
    max_loss: float
    """Share of the baseline's gain that may be lost."""
    num_groups: int
    """Recorded groups that it rests on."""
    groups_needed: int | None
    """Groups that a plan with this `max_loss` takes; None: no number of groups like these is enough."""
    is_certified: bool
    """Whether there were groups enough for `max_loss` to hold for new ones; False: this is a careful plan."""

    @property
    def advice(self) -> str:
        """One sentence for people."""
        to_the_end = f"run {self.num_candidates} candidates to the end"
        needed = "" if self.groups_needed is None else f", it takes {self.groups_needed}"
        too_few = f"{self.num_groups} recorded prompts are too few to state a loss of {self.max_loss:g}{needed}"
        if self.policy is None and self.is_certified:
            return f"do not race: previews save too little here; {to_the_end}"
        if self.policy is None:
            return f"do not race yet: {too_few}, and a careful race saves too little; {to_the_end}"
        asked_at = ", ".join(f"{fraction:g}" for fraction in self.policy.step_fractions)
        figures = f"begin {self.num_candidates}, ask at {asked_at}"
        if not math.isnan(self.cost):
            baseline = f"best of {self.baseline_candidates}"
            figures = f"{figures}: {self.gain:.3f} of what {baseline} gains, at {self.cost:.3f} of its compute"
        if self.is_certified:
            return f"{figures}; a loss of at most {self.max_loss:g} holds for new prompts ({self.num_groups} recorded)"
        return f"{figures}; a careful plan: {too_few}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        policy = None
        if self.policy is not None:
            policy = {
                "margin": self.policy.margin,
                "step_fractions": list(self.policy.step_fractions),
                "profile": self.policy.profile.to_dict() if self.policy.profile else None,
            }
        values = {name: getattr(self, name) for name in PLAIN_FIELDS}
        for name in MEASURED:
            values[name] = None if math.isnan(values[name]) else values[name]
        return values | {"policy": policy}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RacePlan":
        """The inverse of `to_dict`. Raises InputError naming what is missing or wrong."""
        if not isinstance(values, Mapping):
            raise InputError(f"race plan: must be an object, got {type(values).__name__}")
        if missing := sorted({*PLAIN_FIELDS, "policy"} - values.keys()):
            raise InputError(f"race plan: missing {missing}")
        for name in PLAIN_FIELDS:
            is_unset = name in ("groups_needed", *MEASURED) and values[name] is None
            if not is_unset and not isinstance(values[name], (int, float)):
                raise InputError(f"race plan: {name} must be a number, got {values[name]!r}")
        plain = {name: values[name] for name in PLAIN_FIELDS}
        for name in MEASURED:
            plain[name] = math.nan if plain[name] is None else plain[name]
        return cls(policy=_policy_from(values["policy"]), **plain)


PLAIN_FIELDS = (
    "num_candidates",
    "cost",
    "gain",
    "num_images",
    "baseline_candidates",
    "max_loss",
    "num_groups",
    "groups_needed",
    "is_certified",
)
MEASURED = ("cost", "gain")


def _policy_from(values: Any) -> RacingPolicy | None:
    if values is None:
        return None
    try:
        profile = None if values["profile"] is None else PreviewProfile.from_dict(values["profile"])
        return RacingPolicy(float(values["margin"]), tuple(map(float, values["step_fractions"])), profile=profile)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"race plan: policy is damaged ({error})") from None


@dataclass(frozen=True)
class _Records:
    """Races of M candidates each: of recorded groups, or drawn at random."""

    previews: Tensor
    """[G, M, S]; NaN: there is none."""
    finals: Tensor
    """[G, M]."""
    random: Tensor
    """[G], mean final score of a candidate."""


@dataclass(frozen=True)
class _Setting:
    """What a plan is for."""

    num_images: int
    baseline: int
    max_loss: float
    preview_cost: float
    step_fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= self.baseline:
            raise InputError(
                f"num_images must be at least 1, and baseline_candidates at least that, got {self.num_images} and "
                f"{self.baseline}"
            )
        if not 0 < self.max_loss < 1:
            raise InputError(f"max_loss must be between 0 and 1, such as 0.02, got {self.max_loss}")
        if not 0 <= self.preview_cost < 1:
            raise InputError(f"preview_cost must be in [0, 1), got {self.preview_cost}")


@dataclass(frozen=True)
class _Try:
    """A plan before it is certified."""

    columns: tuple[int, ...]
    """Of the step fractions, when to ask."""
    margin: float
    begun: int


class _Outcomes(NamedTuple):
    """What plans that differ by their margin come to: [L] margins, [G] groups, means over races."""

    score: Tensor
    """[L, G], mean score of the winners."""
    cost: Tensor
    """[L, G], in units of the baseline's compute."""
    baseline: Tensor
    """[G], mean score of the winners among the baseline's candidates."""
    random: Tensor
    """[G], mean score of a candidate."""


def plan_race(
    preview_scores: Tensor,
    final_scores: Tensor,
    step_fractions: Sequence[float],
    groups: Sequence[Hashable],
    num_images: int = 1,
    baseline_candidates: int = 16,
    max_loss: float = 0.02,
    preview_cost: float = PREVIEW_COST,
) -> RacePlan:
    """The cheapest plan that gains what best-of-`baseline_candidates` does on new prompts, less `max_loss`.

    Args:
        preview_scores: `[M, S]` of M recorded candidates; NaN where there was no preview, or it could not be scored.
        final_scores: `[M]`; NaN for one that was stopped (its score is estimated from its last preview) or that could
            not be scored.
        step_fractions: `[S]`, of the previews, ascending in (0, 1].
        groups: `[M]` labels, one for each subject and prompt. A group with fewer than `baseline_candidates` counts only
            for how previews foretell final scores.
        num_images: wanted images; the gain is that of their mean score.
        max_loss: in (0, 1): share of the baseline's gain over a random candidate.
        preview_cost: of one preview, in candidates run to the end.

    Raises InputError for tables that do not fit, or without a group of `baseline_candidates`.
    """
    previews, finals, fractions = checked_table(preview_scores, final_scores, step_fractions)
    setting = _Setting(num_images, baseline_candidates, max_loss, preview_cost, fractions)
    profile = PreviewProfile.fit(previews, finals, fractions, groups)
    records = _records(previews, finals, setting, groups, profile)
    policy = RacingPolicy(profile=profile)
    order = _careful_to_cheap(records, policy, setting)
    outcomes = [_outcomes(records, plan.columns, plan.begun, [plan.margin], policy, setting) for plan in order]
    place, groups_needed = _certified(outcomes, setting)
    if place is not None:
        chosen = _plan(order[place], outcomes[place], policy, setting)
    else:
        careful = _careful(policy, setting)
        outcome = _outcomes(records, careful.columns, careful.begun, [careful.margin], policy, setting)
        chosen = _plan(careful, outcome, policy, setting)
    chosen = replace(chosen, groups_needed=groups_needed, is_certified=place is not None)
    gain = float((records.finals.amax(1) - records.random).mean())
    if chosen.cost < WORTH_RACING and gain > 1e-6:
        return chosen
    # To run the baseline's candidates to the end loses nothing, whatever the records are
    return replace(chosen, policy=None, num_candidates=setting.baseline, cost=1.0, gain=1.0)


# --- the records -----------------------------------------------------------------------------------------------------


def _records(
    previews: Tensor, finals: Tensor, setting: _Setting, groups: Sequence[Hashable], profile: PreviewProfile
) -> _Records:
    """The groups that are long enough, cut to one length: candidates are in the order of their seeds."""
    rows_of = [rows for rows in rows_by_group(groups, len(finals)).values() if len(rows) >= setting.baseline]
    if not rows_of:
        raise InputError(
            f"groups: none has the {setting.baseline} candidates that baseline_candidates asks for; record more of "
            "each, or lower baseline_candidates"
        )
    length = min(map(len, rows_of))
    kept_previews, kept_finals, random = [], [], []
    for rows in rows_of:
        filled = _filled(previews[rows], finals[rows], profile)
        kept_previews.append(previews[rows[:length]])
        kept_finals.append(filled[:length])
        random.append(filled.mean())
    return _Records(torch.stack(kept_previews), torch.stack(kept_finals), torch.stack(random))


def _filled(previews: Tensor, finals: Tensor, profile: PreviewProfile) -> Tensor:
    """Final scores `[M]` of a group without NaN: stopped candidates get what their last preview foretells.

    Those without a preview could not be scored; they count as the worst.
    """
    if not finals.isnan().any():
        return finals
    filled = finals.clone()
    levels = levels_of(previews, finals, profile.step_fractions)
    for column in reversed(range(len(profile.step_fractions))):
        level, relation = levels[profile.step_fractions[column]], profile.relation(column)
        if level.is_known:
            expected = level.final + relation.correlation * relation.scale * (previews[:, column] - level.preview)
            filled = torch.where(filled.isnan(), expected, filled)
    worst = filled[~filled.isnan()].min() if not filled.isnan().all() else 0.0
    return filled.nan_to_num(float(worst))


def _drawn_races(records: _Records, profile: PreviewProfile, num_candidates: int) -> _Records:
    """Normal races whose previews and finals correlate as the recorded ones do, within groups."""
    columns = torch.cat([records.previews, records.finals[..., None]], dim=-1)  # [G, M, S + 1]
    centred = columns - columns.nanmean(dim=1, keepdim=True)
    spread = centred.square().nanmean(dim=1, keepdim=True).sqrt()
    scores = torch.where(spread > 0, centred / spread, 0.0).nan_to_num(0.0).flatten(0, 1)
    squares = scores.square().sum(0).clamp(min=1e-12)
    correlations = scores.T @ scores / (squares[:, None] * squares).sqrt()
    # The profile's are right where candidates were stopped, too
    correlations[-1, :-1] = correlations[:-1, -1] = torch.tensor(profile.correlation(), dtype=torch.float64)
    correlations.fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(correlations)
    root = vectors * values.clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(0)
    size = (NUM_DRAWN, num_candidates, len(values))
    drawn = torch.randn(size, generator=generator, dtype=torch.float64) @ root.T
    return _Records(drawn[..., :-1], drawn[..., -1], torch.zeros(NUM_DRAWN, dtype=torch.float64))


# --- races, many at once ---------------------------------------------------------------------------------------------


def _outcomes(
    records: _Records,
    columns: Sequence[int],
    begun: int,
    margins: Sequence[float],
    policy: RacingPolicy,
    setting: _Setting,
) -> _Outcomes:
    """Race every group under each margin, several times where there are candidates enough; means over these races."""
    previews, finals = _windows(records, max(begun, setting.baseline), begun)
    num_races = finals.shape[1]
    previews, finals = previews.flatten(0, 1), finals.flatten(0, 1)  # [G * R, W, S], [G * R, W]
    going, cost = _who_finishes(previews[:, :begun], columns, margins, policy, setting)
    ended = torch.where(going, finals[:, :begun], -math.inf)
    score = _mean_of_best(ended, setting.num_images)  # [L, G * R]
    baseline = _mean_of_best(finals[:, : setting.baseline], setting.num_images)
    return _Outcomes(
        score=score.unflatten(1, (-1, num_races)).mean(-1),
        cost=cost.unflatten(1, (-1, num_races)).mean(-1) / setting.baseline,
        baseline=baseline.unflatten(0, (-1, num_races)).mean(-1),
        random=records.random,
    )


def _windows(records: _Records, width: int, begun: int) -> tuple[Tensor, Tensor]:
    """Races of `width` candidates out of each group's M: previews [G, R, W, S] and finals [G, R, W]."""
    length = records.finals.shape[1]
    # Where every race would begin the same candidates, one is enough
    num_races = 1 if begun == length else min(8, max(4, length // width))
    starts = torch.arange(num_races) * length // num_races
    rows = (starts[:, None] + torch.arange(width)) % length  # [R, W]
    return records.previews[:, rows], records.finals[:, rows]


def _who_finishes(
    previews: Tensor, columns: Sequence[int], margins: Sequence[float], policy: RacingPolicy, setting: _Setting
) -> tuple[Tensor, Tensor]:
    """Who runs to the end `[L, B, N]`, and the cost `[L, B]` in candidates, of B races with previews `[B, N, S]`.

    As `Race` and `RacingPolicy.decide` have it, for one batch; a test holds that they agree.
    """
    num_races, num_started, _ = previews.shape
    margin = torch.tensor(list(margins), dtype=torch.float64)[:, None]  # [L, 1]
    factors = torch.tensor([math.nan] * 2 + [spread_factor(n / num_started) for n in range(2, num_started + 1)])
    going = torch.ones(len(margin), num_races, num_started, dtype=torch.bool)
    cost = torch.zeros(len(margin), num_races, dtype=torch.float64)
    for column in columns:
        fraction = setting.step_fractions[column]
        unseen = previews[..., column].isnan()
        scores = torch.where(going & ~unseen, previews[..., column], math.nan)
        num_seen = (going & ~unseen).sum(-1)
        centred = (scores - scores.nanmean(-1, keepdim=True)).nan_to_num(0.0)
        spread = (centred.square().sum(-1) / (num_seen - 1)).sqrt() * factors[num_seen]
        best = _nth_best(scores.nan_to_num(-math.inf), setting.num_images)
        correlation, _ = policy.relation(fraction)
        reach = reach_of(margin, correlation, spread, num_seen.double())
        kept = within_reach(scores, best, reach) | (going & unseen)
        cost += going.sum(-1) * setting.preview_cost + (going.sum(-1) - kept.sum(-1)) * fraction
        going = kept
    return going, cost + going.sum(-1)


def _mean_of_best(scores: Tensor, number: int) -> Tensor:
    """Mean of the `number` largest of the last dimension."""
    return scores.amax(-1) if number == 1 else scores.topk(number).values.mean(-1)


def _nth_best(scores: Tensor, number: int) -> Tensor:
    """The `number`-th largest of the last dimension."""
    return scores.amax(-1) if number == 1 else scores.topk(number).values[..., -1]


# --- the order of plans, and the last one that holds -----------------------------------------------------------------


def _careful_to_cheap(records: _Records, policy: RacingPolicy, setting: _Setting) -> list[_Try]:
    """For each of `GAINS` in turn the cheapest plan that is expected to reach it; drawn races tell."""
    assert policy.profile is not None, "a plan is made with a profile"
    longest = records.finals.shape[1]
    begun = sorted({round(share * setting.baseline) for share in BEGUN})
    begun = [number for number in begun if setting.num_images < number <= longest]
    drawn = _drawn_races(records, policy.profile, max(*begun, setting.baseline))
    middle = begun[len(begun) // 2]
    tried = _tried(drawn, _schedules(setting.step_fractions), [middle], policy, setting)
    schedules = list(dict.fromkeys(plan.columns for plan in _cheapest_by_gain(tried)))
    return _cheapest_by_gain(_tried(drawn, schedules, begun, policy, setting))


def _schedules(step_fractions: Sequence[float]) -> list[tuple[int, ...]]:
    """When plans may ask: one to four columns, evenly spaced between a first and a last one."""
    columns = [column for column, fraction in enumerate(step_fractions) if fraction < 1 - 1e-6]
    if len(columns) > 9:
        columns = [columns[round(place * (len(columns) - 1) / 8)] for place in range(9)]
    schedules: dict[tuple[int, ...], None] = {}
    for first, last in itertools.combinations_with_replacement(range(len(columns)), 2):
        if step_fractions[columns[first]] > LATEST_FIRST_LOOK:
            continue
        for looks in (1, 2, 3, 4):
            places = {round(first + (last - first) * look / max(1, looks - 1)) for look in range(looks)}
            schedules[tuple(columns[place] for place in sorted(places))] = None
    return list(schedules)


def _tried(
    drawn: _Records, schedules: Sequence[tuple[int, ...]], begun: Sequence[int], policy: RacingPolicy, setting: _Setting
) -> list[tuple[float, float, _Try]]:
    """Gain, cost and plan for every schedule, number begun and margin."""
    tried = []
    for columns, number in itertools.product(schedules, begun):
        outcomes = _outcomes(drawn, columns, number, MARGINS, policy, setting)
        gains = outcomes.score.mean(1) / outcomes.baseline.mean()
        for margin, gain, cost in zip(MARGINS, gains.tolist(), outcomes.cost.mean(1).tolist(), strict=True):
            tried.append((gain, cost, _Try(columns=columns, margin=margin, begun=number)))
    return tried


def _cheapest_by_gain(tried: Sequence[tuple[float, float, _Try]]) -> list[_Try]:
    """The cheapest plan of each wanted gain, from the highest gain on, each plan once."""
    cheapest: dict[_Try, None] = {}
    for wanted in GAINS:
        reaching = [(cost, plan) for gain, cost, plan in tried if gain >= wanted]
        if reaching:
            cheapest[min(reaching, key=lambda found: found[0])[1]] = None
    return list(cheapest)


def _certified(outcomes: Sequence[_Outcomes], setting: _Setting) -> tuple[int | None, int | None]:
    """Which of the plans, in order, is the cheapest whose loss is certified, and how many groups a plan takes."""
    passed: list[int] = []
    needed: list[int] = []
    failed = False
    for place, outcome in enumerate(outcomes):
        excess, allowance = _excess_loss(outcome, setting)
        if excess < 0:
            needed.append(math.ceil(allowance / -excess))
        failed = failed or len(outcome.baseline) * excess + allowance > 0
        if not failed:
            passed.append(place)
    cheapest = min(passed, key=lambda place: float(outcomes[place].cost.mean()), default=None)
    return cheapest, min(needed, default=None)


def _excess_loss(outcome: _Outcomes, setting: _Setting) -> tuple[float, float]:
    """Mean over groups of (loss - max_loss * baseline's gain), and the most that one more group may add to their sum.

    A plan keeps `max_loss` where the first, over all groups there are, is 0 or less. The most that a group can lose is
    its gain: of the next group that is not known, so the largest one seen stands for it.
    """
    gain = outcome.baseline - outcome.random
    excess = outcome.baseline - outcome.score[0] - setting.max_loss * gain
    return float(excess.mean()), float((1 - setting.max_loss) * gain.max())


def _careful(policy: RacingPolicy, setting: _Setting) -> _Try:
    """The default policy, asked where something was recorded."""
    early = [column for column, fraction in enumerate(setting.step_fractions) if fraction < 1 - 1e-6]
    columns = set()
    for wanted in policy.step_fractions:
        columns |= set([c for c in early if setting.step_fractions[c] >= wanted - 1e-6][:1])
    return _Try(columns=tuple(sorted(columns)), margin=policy.margin, begun=setting.baseline)


def _plan(plan: _Try, outcome: _Outcomes, policy: RacingPolicy, setting: _Setting) -> RacePlan:
    fractions = tuple(setting.step_fractions[column] for column in plan.columns)
    gain = outcome.baseline.mean() - outcome.random.mean()
    reached = outcome.score[0].mean() - outcome.random.mean()
    return RacePlan(
        policy=replace(policy, margin=plan.margin, step_fractions=fractions) if fractions else None,
        num_candidates=plan.begun,
        cost=float(outcome.cost.mean()),
        gain=float(reached / gain) if gain > 0 else 1.0,
        num_images=setting.num_images,
        baseline_candidates=setting.baseline,
        max_loss=setting.max_loss,
        num_groups=len(outcome.random),
        groups_needed=None,
        is_certified=False,
    )
