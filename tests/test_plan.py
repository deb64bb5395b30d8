"""A race planned from recorded races: the stated loss holds, and the plan is what replay races."""

import json

import pytest
import torch

from nearid_personalize.errors import InputError
from nearid_personalize.guard.plan import (
    RacePlan,
    _careful_to_cheap,
    _certified,
    _Outcomes,
    _outcomes,
    _Records,
    _Setting,
    _who_finishes,
    plan_race,
)
from nearid_personalize.guard.policy import RacingPolicy
from nearid_personalize.guard.profile import PreviewProfile
from nearid_personalize.guard.replays import replay

NAN = float("nan")
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7)
CURVES = {
    "early": (0.45, 0.72, 0.85, 0.95, 0.98),
    "late": (0.05, 0.10, 0.20, 0.60, 0.85),
    "heavy-tailed": (0.22, 0.42, 0.55, 0.70, 0.88),
    "useless": (0.0, 0.02, 0.0, 0.03, 0.02),
}


def draw_groups(name, num_groups, num_rows=24, seed=0):
    """Previews `[G, M, S]` and finals `[G, M]`: each group at a level and of a spread of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    finals = normal(num_groups, num_rows)
    if name == "heavy-tailed":  # Student, 3 degrees of freedom
        finals = finals / normal(3, num_groups, num_rows).square().mean(0).sqrt()
    curve = torch.tensor(CURVES[name], dtype=torch.float64)
    standard = (finals - finals.mean()) / finals.std()
    previews = curve * standard[..., None] + (1 - curve**2).sqrt() * normal(num_groups, num_rows, len(curve))
    spread, level = (0.4 * normal(num_groups, 1)).exp(), normal(num_groups, 1)
    return 0.05 * spread[..., None] * previews + level[..., None], 0.06 * spread * standard + level


def plan_of(previews, finals, **options):
    groups = [group for group in range(len(finals)) for _ in finals[group]]
    return plan_race(previews.flatten(0, 1), finals.flatten(), FRACTIONS, groups, **options)


@pytest.fixture(scope="module")
def early_plan():
    return plan_of(*draw_groups("early", 60))


def test_races_many_at_once_are_replays():
    """Winners and cost of every race, margin and hole in the previews, as `replay` has them one by one."""
    previews, finals = draw_groups("heavy-tailed", 6, 16, seed=1)
    profile = PreviewProfile.fit(previews.flatten(0, 1), finals.flatten(), FRACTIONS, [g // 16 for g in range(96)])
    previews[0, 3, 1], previews[1, :, 2] = NAN, NAN
    previews[2] = 0.3  # nothing to tell apart
    setting = _Setting(2, 16, 0.02, 0.01, FRACTIONS)
    margins, columns = (0.3, 1.0), (1, 2, 3)
    going, costs = _who_finishes(previews, columns, margins, RacingPolicy(profile=profile), setting)
    for place, margin in enumerate(margins):
        policy = RacingPolicy(margin, tuple(FRACTIONS[column] for column in columns), profile=profile)
        for group in range(6):
            raced = replay(previews[group], finals[group], FRACTIONS, 16, 2, policy, preview_cost=0.01)
            best = torch.where(going[place, group], finals[group], -torch.inf).topk(2).indices
            assert raced.winners == tuple(best.tolist())
            assert raced.cost == pytest.approx(float(costs[place, group]))


@pytest.mark.parametrize("max_loss", [0.02, 0.06])
@pytest.mark.parametrize("name", CURVES)
def test_the_stated_loss_holds_over_many_splits(name, max_loss):
    """200 splits of recorded groups: planned on 60, measured on the other 100."""
    previews, finals = draw_groups(name, 160, seed=2)
    labels = [row // 24 for row in range(finals.numel())]
    policy = RacingPolicy(profile=PreviewProfile.fit(previews.flatten(0, 1), finals.flatten(), FRACTIONS, labels))
    records, setting = _Records(previews, finals, finals.mean(1)), _Setting(1, 16, max_loss, 0.0125, FRACTIONS)
    order = _careful_to_cheap(records, policy, setting)
    outcomes = [_outcomes(records, plan.columns, plan.begun, [plan.margin], policy, setting) for plan in order]
    generator, losses, costs = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        shuffled = torch.randperm(160, generator=generator)
        place, _ = _certified([of_groups(outcome, shuffled[:60]) for outcome in outcomes], setting)
        if place is None:
            losses.append(0.0)  # nobody is stopped
            costs.append(1.0)
            continue
        new = of_groups(outcomes[place], shuffled[60:])
        losses.append(float((new.baseline - new.score[0]).mean() / (new.baseline - new.random).mean()))
        costs.append(float(new.cost.mean()))
    assert sum(losses) / 200 <= max_loss
    mean_cost = sum(costs) / 200
    assert mean_cost > 0.97 if name == "useless" else mean_cost < {"early": 0.6, "late": 1.0, "heavy-tailed": 0.9}[name]


def of_groups(outcome, groups):
    """What plans came to on some of the groups."""
    return _Outcomes(
        outcome.score[:, groups], outcome.cost[:, groups], outcome.baseline[groups], outcome.random[groups]
    )


@pytest.mark.parametrize("name", CURVES)
def test_a_whole_plan_holds_on_new_groups(name):
    """The order of plans and what is known of previews come from the recorded groups alone, too."""
    losses = []
    for seed in range(3):
        previews, finals = draw_groups(name, 460, seed=10 + seed)
        plan = plan_of(previews[:60], finals[:60])
        if plan.policy is None:
            continue
        for group in range(60, 460, 4):
            raced = replay(previews[group], finals[group], FRACTIONS, plan.num_candidates, policy=plan.policy)
            best, random = finals[group, :16].max(), finals[group].mean()
            losses.append((float(best - finals[group, list(raced.winners)].mean()), float(best - random)))
    if name == "useless":
        assert not losses, "there is nothing to race by"
    else:
        assert sum(lost for lost, _ in losses) <= 0.02 * sum(gain for _, gain in losses)


def test_the_plan_is_what_replay_races(early_plan):
    previews, finals = draw_groups("early", 60)
    costs = []
    for group in range(60):
        raced = replay(
            previews[group],
            finals[group],
            FRACTIONS,
            early_plan.num_candidates,
            1,
            early_plan.policy,
            preview_cost=0.0125,
        )
        costs.append(raced.cost / 16)
    assert early_plan.is_certified and early_plan.num_groups == 60 and early_plan.groups_needed <= 60
    assert sum(costs) / 60 == pytest.approx(early_plan.cost, rel=0.05)  # the plan averages over more races
    assert early_plan.cost < 0.6 and early_plan.gain > 0.98
    assert "holds for new prompts (60 recorded)" in early_plan.advice


def test_more_loss_costs_less(early_plan):
    bold = plan_of(*draw_groups("early", 60), max_loss=0.15)
    assert bold.cost < early_plan.cost and bold.gain >= 0.85


def test_a_plan_goes_through_json(early_plan):
    assert RacePlan.from_dict(json.loads(json.dumps(early_plan.to_dict()))) == early_plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"margin": 1.0}}, "policy is damaged"),
        ({"policy": {"margin": -1.0, "step_fractions": [0.5], "profile": None}}, "margin must be 0 or more"),
        ({"cost": "cheap"}, "cost must be a number, got 'cheap'"),
    ],
)
def test_a_damaged_plan_is_refused_by_name(early_plan, change, message):
    with pytest.raises(InputError, match=message):
        RacePlan.from_dict(early_plan.to_dict() | change)
    with pytest.raises(InputError, match=r"missing \['cost'\]"):
        RacePlan.from_dict({name: value for name, value in early_plan.to_dict().items() if name != "cost"})


def test_too_few_groups_give_a_careful_plan_and_say_how_many_it_takes():
    plan = plan_of(*draw_groups("early", 3))
    assert not plan.is_certified and plan.num_candidates == 16 and plan.policy.margin == RacingPolicy().margin
    assert plan.groups_needed > 3 and f"it takes {plan.groups_needed}" in plan.advice


def test_several_images_may_be_wanted():
    previews, finals = draw_groups("early", 60)
    plan = plan_of(previews, finals, num_images=4)
    assert plan.policy is not None and plan.num_images == 4
    raced = replay(previews[0], finals[0], FRACTIONS, plan.num_candidates, 4, plan.policy)
    assert len(raced.winners) == 4 and raced.cost < 16


def test_holes_in_the_records_change_little(early_plan):
    """Previews that could not be scored, candidates that were stopped, and a group that is too short."""
    previews, finals = draw_groups("early", 60)
    previews[0, 2:5, 1], previews[1, :, 0] = NAN, NAN
    for group in range(20):
        stopped = previews[group, :, 2] < previews[group, :, 2].quantile(0.3)
        previews[group, stopped, 3:], finals[group, stopped] = NAN, NAN
    finals[30, 4] = NAN
    previews[30, 4] = NAN
    labels = [group for group in range(60) for row in range(24)]
    labels[-10:] = ["another"] * 10  # leaves 14: neither part is long enough
    plan = plan_race(previews.flatten(0, 1), finals.flatten(), FRACTIONS, labels)
    assert plan.num_groups == 59 and plan.is_certified
    assert plan.cost == pytest.approx(early_plan.cost, abs=0.1) and plan.gain == pytest.approx(
        early_plan.gain, abs=0.03
    )


def test_scores_that_are_all_the_same_are_not_raced():
    plan = plan_of(torch.full((5, 16, 5), 0.3), torch.full((5, 16), 0.7))
    assert plan.policy is None and plan.gain == plan.cost == 1.0 and "do not race" in plan.advice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline_candidates": 30}, "none has the 30 candidates"),
        ({"num_images": 17}, "got 17 and 16"),
        ({"max_loss": 0.0}, "max_loss must be between 0 and 1"),
        ({"preview_cost": -1.0}, "preview_cost"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        plan_of(*draw_groups("early", 2), **options)
