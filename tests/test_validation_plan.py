"""How often and how much is validated: plain numbers, beside a search over everything that could be drawn."""

import itertools
from dataclasses import replace

import pytest

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.validation_plan import (
    Cost,
    Size,
    ValidationPlan,
    Wanted,
    asked_steps,
    describe,
    duration,
    evenly,
    ever_less,
    least_before,
    plan_validations,
    spaced,
    spread,
)

PROMPTS = tuple("abcdefgh")
WANTED = Wanted(steps=asked_steps(50, 400), prompts=PROMPTS, seeds=2, denoising_steps=25, budget=0.1, patience=3)
# In passes of one picture through the denoiser: guidance takes two a step, a backward pass as much as two forward
SDXL = Cost(fixed=15.0, picture=3.0, denoising_step=2.0, training_step=24.0)
MINI_WORLD = Cost(fixed=0.30, picture=0.15, denoising_step=0.038, training_step=0.21)  # core seconds, measured


def total(plan: ValidationPlan, cost: Cost, spent: float = 0.0) -> float:
    """What all validations take, the base model's among them."""
    return spent + (len(plan.steps) + 1) * cost.of(Size(len(plan.prompts), plan.seeds, plan.denoising_steps))


def test_at_sdxl_defaults_the_whole_run_is_validated_and_patience_can_fire():
    """Before, one validation took 7 % of the run, so that step 50 alone of 400 was ever measured."""
    plan = plan_validations(WANTED, SDXL, spent=30.0)
    assert SDXL.of(WANTED.size) > 0.07 * 400 * SDXL.training_step
    assert len(plan.steps) >= WANTED.patience + 2 and plan.steps[-1] == 400
    assert len(plan.prompts) >= 2 and plan.seeds == 2 and plan.denoising_steps == 10
    assert plan.share == pytest.approx(total(plan, SDXL, 30) / (total(plan, SDXL, 30) + 400 * 24)) and plan.share <= 0.1
    assert max(b - a for a, b in zip((0, *plan.steps), plan.steps)) <= 400 / len(plan.steps) + 1


def test_in_the_mini_world_patience_can_fire_at_the_default_length_and_a_short_run_measures_its_last_step():
    plan = plan_validations(WANTED, MINI_WORLD, spent=0.6)
    assert len(plan.steps) >= 3 and plan.steps[-1] == 400 and plan.share <= 0.1
    short = plan_validations(replace(WANTED, steps=asked_steps(10, 80)), MINI_WORLD, spent=0.6)
    assert short.steps == (80,) and short.share > 0.1
    assert (len(short.prompts), short.seeds, short.denoising_steps) == (2, 1, 10)


def test_what_fits_is_drawn_as_asked_for():
    cheap = replace(SDXL, training_step=1e4)
    for wanted, cost in ((WANTED, cheap), (replace(WANTED, budget=1.0), SDXL)):
        plan = plan_validations(wanted, cost)
        assert plan.steps == wanted.steps and plan.prompts == PROMPTS
        assert (plan.seeds, plan.denoising_steps) == (2, 25)


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("training_step", [0.5, 5.0, 24.0, 200.0])
@pytest.mark.parametrize(("fixed", "picture"), [(0.0, 0.0), (15.0, 3.0), (100.0, 1.0)])
def test_the_budget_is_kept_wherever_anything_comparable_fits_it(budget, training_step, fixed, picture):
    cost = Cost(fixed=fixed, picture=picture, denoising_step=2.0, training_step=training_step)
    wanted = replace(WANTED, budget=budget)
    plan = plan_validations(wanted, cost, spent=10.0)
    smallest = Size(prompts=2, seeds=1, denoising_steps=10)
    possible = 10.0 + 2 * cost.of(smallest) <= budget / (1 - budget) * 400 * training_step
    assert (plan.share <= budget + 1e-9) == possible
    assert plan.steps[-1] == 400 and plan.steps == tuple(sorted(set(plan.steps)))
    if possible:  # not one validation more could be paid, unless there are all that were asked for
        more = total(plan, cost, 10.0) + cost.of(Size(len(plan.prompts), plan.seeds, plan.denoising_steps))
        assert len(plan.steps) == 8 or more > budget / (1 - budget) * 400 * training_step


def test_what_is_given_up_costs_ever_less():
    steps = list(ever_less(WANTED))
    for (size, count), (smaller, fewer) in itertools.pairwise(steps):
        assert SDXL.of(smaller) * (fewer + 1) < SDXL.of(size) * (count + 1)
    assert steps[0] == (WANTED.size, 8) and steps[-1] == (Size(2, 1, 10), 1)
    assert min(count for size, count in steps if size.seeds == 2) == 5  # patience 3
    few = replace(WANTED, prompts=("a",), seeds=1, denoising_steps=4)
    assert {size for size, _ in ever_less(few)} == {few.size}


def test_what_the_base_model_took_says_how_many_follow():
    plan = plan_validations(WANTED, SDXL)
    slower = spaced(plan, WANTED, SDXL.training_step, 2 * plan.seconds, 2 * plan.seconds)
    assert slower.prompts == plan.prompts and slower.denoising_steps == plan.denoising_steps
    assert len(slower.steps) < len(plan.steps) and slower.steps[-1] == 400 and slower.share <= 0.1
    hopeless = spaced(plan, WANTED, SDXL.training_step, 1e6, 1e6)
    assert hopeless.steps == (400,)


def test_a_reward_is_measured_before_it_begins():
    wanted = replace(WANTED, least=least_before(101, 400), patience=0)
    plan = plan_validations(wanted, replace(SDXL, training_step=0.1))
    assert plan.steps == (100, 200, 300, 400)
    for first, steps in itertools.product(range(2, 40), range(1, 40)):
        assert evenly(0, steps, least_before(first, steps))[0] < max(first, 2) or first > steps


def test_evenly_spaced_steps_end_with_the_last():
    assert evenly(0, 400, 5) == (80, 160, 240, 320, 400)
    assert evenly(0, 2, 5) == (1, 2) and evenly(398, 400, 1) == (400,)
    for done, last, count in itertools.product((0, 7), (8, 30), (1, 3, 8, 50)):
        steps = evenly(done, last, count)
        assert steps[-1] == last and done < steps[0] and len(steps) == min(count, last - done)
        gaps = [b - a for a, b in zip((done, *steps), steps)]
        assert max(gaps) - min(gaps) <= 1


def test_prompts_are_taken_from_all_over_the_list():
    assert spread(PROMPTS, 8) == PROMPTS and spread(PROMPTS, 2) == ("a", "h") and spread(PROMPTS, 1) == ("a",)
    for count in range(1, 9):
        assert len(set(spread(PROMPTS, count))) == count


def test_the_plan_says_when_and_how_much_and_what_it_defeats():
    text = describe(plan_validations(WANTED, SDXL), WANTED)
    assert "2 of 8 prompts × 2 seeds × 10 of 25 denoising steps" in text and "step" in text and "\n" not in text
    wanted = replace(WANTED, steps=(80,))
    lines = describe(plan_validations(wanted, MINI_WORLD), wanted).splitlines()
    assert "base model and step 80, each" in lines[0] and "exceeds --validation-budget 0.1" in lines[1]
    assert "--patience 3 cannot end" in lines[2]


def test_durations_are_told_in_units_that_fit():
    assert [duration(seconds) for seconds in (0.423, 9.4, 95.2, 720)] == ["0.42 s", "9.4 s", "95 s", "12 min"]


def test_a_plan_survives_its_journal():
    plan = plan_validations(WANTED, SDXL)
    assert ValidationPlan.from_dict(plan.to_dict()) == plan
    for broken in (None, {}, {"steps": [1], "prompts": ["a"], "other": 1}):
        with pytest.raises(InputError, match="start without --resume"):
            ValidationPlan.from_dict(broken)
