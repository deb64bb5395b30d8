"""Ranking and accepting candidates by score; racing them on their previews."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from nearid_personalize.errors import InputError
from nearid_personalize.guard.policy import (
    DEFAULT_POLICY,
    FixedSchedule,
    RacingPolicy,
    StoppingPolicy,
)
from nearid_personalize.guard.profile import PreviewProfile, RunFacts, full_spread, levels_of
from nearid_personalize.guard.race import Race, needs_previews, next_batch_size
from nearid_personalize.guard.replays import Limits, Replay, replay
from nearid_personalize.scorer.ranking import best_accepted, rank_candidates

NAN = float("nan")


def test_a_better_score_ranks_higher():
    ranked = rank_candidates(torch.tensor([0.2, 0.9, 0.5]), threshold=0.4)
    assert [verdict.index for verdict in ranked] == [1, 2, 0]
    assert [verdict.accepted for verdict in ranked] == [True, True, False]


def test_a_score_at_the_threshold_is_accepted():
    assert rank_candidates([0.5], 0.5)[0].accepted


def test_reasons_tell_score_and_threshold():
    accepted, rejected, unscored = rank_candidates([0.25, NAN, 0.75], 0.5)
    assert accepted.reason == ""
    assert rejected.reason == "score 0.250 below threshold 0.500"
    assert unscored.reason == "not scored" and math.isnan(unscored.score)


def test_equal_scores_keep_their_order():
    assert [verdict.index for verdict in rank_candidates([0.3, 0.7, 0.3, 0.7], 0.5)] == [1, 3, 0, 2]


@pytest.mark.parametrize("scores", list(itertools.permutations([0.1, 0.4, 0.8, NAN])))
def test_order_of_candidates_changes_nothing_but_the_index(scores):
    ranked = rank_candidates(scores, 0.3)
    assert [verdict.score for verdict in ranked[:3]] == [0.8, 0.4, 0.1] and math.isnan(ranked[3].score)
    assert all(scores[verdict.index] == verdict.score for verdict in ranked[:3])


def test_raising_the_threshold_never_accepts_more():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    accepted = [
        {verdict.index for verdict in rank_candidates(scores, threshold) if verdict.accepted}
        for threshold in torch.linspace(-0.1, 1.1, 25).tolist()
    ]
    assert all(higher <= lower for lower, higher in itertools.pairwise(accepted))


def test_best_accepted_takes_at_most_what_was_asked():
    ranked = rank_candidates([0.9, 0.1, 0.8, 0.7], 0.5)
    assert [verdict.index for verdict in best_accepted(ranked, 2)] == [0, 2]
    assert [verdict.index for verdict in best_accepted(ranked, 9)] == [0, 2, 3]
    assert best_accepted(rank_candidates([], 0.5), 3) == ()


def test_guard_and_selection_import_no_pipeline_library():
    code = "import sys, nearid_personalize.guard; sys.exit(any(m in sys.modules for m in ('diffusers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Racing. The tables here are drawn as plainly as can be: final + noise, a fresh noise for every preview.

FRACTIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CURVES = {
    "early": (0.50, 0.70, 0.80, 0.88, 0.92, 0.96, 0.98),
    "middling": (0.22, 0.42, 0.55, 0.68, 0.77, 0.85, 0.91),
    "late": (0.07, 0.10, 0.20, 0.30, 0.45, 0.60, 0.75),
}


def draw_tables(correlations, num_tables=1, num_rows=16, seed=0):
    """Previews `[T, R, S]` and finals `[T, R]`, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    finals = torch.randn(num_tables, num_rows, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_tables, num_rows, len(correlations), generator=generator, dtype=torch.float64)
    rho = torch.tensor(correlations, dtype=torch.float64)
    return rho * finals[..., None] + (1 - rho**2).sqrt() * noise, finals


def profile_of(correlations, num_tables=40, seed=99):
    previews, finals = draw_tables(correlations, num_tables, seed=seed)
    groups = [row // 16 for row in range(16 * num_tables)]
    return PreviewProfile.fit(previews.flatten(0, 1), finals.flatten(), FRACTIONS, groups)


def race(tables, num_candidates=16, num_images=1, policy=DEFAULT_POLICY, **options):
    """Mean over tables of the winners' score, and of the cost."""
    results = [replay(p, f, FRACTIONS, num_candidates, num_images, policy, **options) for p, f in zip(*tables)]
    scores = [final[list(result.winners)].mean() for result, final in zip(results, tables[1])]
    return float(torch.stack(scores).mean()), sum(result.cost for result in results) / len(results)


class KeepAll(StoppingPolicy):
    """Somebody's own policy: it stops nobody, and writes down when it was asked."""

    step_fractions = FRACTIONS

    def __init__(self):
        self.asked = []

    def decide(self, step_fraction, preview_scores, num_images):
        self.asked.append(step_fraction)
        return ~preview_scores.isnan()


def slow_relation(previews, finals):
    """Correlation, scale and weight by plain loops, in units of the previews' spread (its inverse square unbiased)."""
    n = len(previews)
    spread = statistics.stdev(previews) * math.sqrt((n - 1) / (n - 3))
    x = [(p - statistics.mean(previews)) / spread for p in previews]
    y = [(f - statistics.mean(finals)) / spread for f in finals]
    slope = sum(a * b for a, b in zip(x, y)) / sum(a * a for a in x)
    unexplained = sum((b - slope * a) ** 2 for a, b in zip(x, y)) / (n - 2)
    scale = math.sqrt(slope**2 + unexplained)
    return slope / scale, scale, n - 3


def test_a_profile_is_a_least_squares_fit():
    previews, finals = draw_tables(CURVES["middling"], seed=3)
    profile = PreviewProfile.fit(previews[0], finals[0], FRACTIONS)
    for column in range(len(FRACTIONS)):
        slow = slow_relation(previews[0, :, column].tolist(), finals[0].tolist())
        assert tuple(profile.relation(column)) == pytest.approx(slow, rel=1e-9)


def test_a_profile_learns_the_curve_it_was_drawn_from():
    for curve in CURVES.values():
        assert profile_of(curve, 400).correlation() == pytest.approx(curve, abs=0.025)


def test_level_and_scale_of_a_group_change_no_profile():
    previews, finals = draw_tables(CURVES["middling"], 2)
    shifted = torch.stack([previews[0], 0.1 * previews[1] + 7]), torch.stack([finals[0], 0.1 * finals[1] - 3])
    groups = [0] * 16 + [1] * 16
    plain, moved = (
        PreviewProfile.fit(p.flatten(0, 1), f.flatten(), FRACTIONS, groups) for p, f in ((previews, finals), shifted)
    )
    assert moved.correlation() == pytest.approx(plain.correlation(), abs=1e-9)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    mixed = PreviewProfile.fit(
        previews.flatten(0, 1)[order], finals.flatten()[order], FRACTIONS, [groups[i] for i in order]
    )
    assert mixed.correlation() == pytest.approx(plain.correlation(), abs=1e-9)


def test_a_profile_of_survivors_still_tells_the_correlation_of_all():
    previews, finals = draw_tables((0.6,), 1, 4000, seed=5)
    previews, finals = previews[0], finals[0].clone()
    finals[previews[:, 0] < previews[:, 0].quantile(0.75)] = math.nan
    profile = PreviewProfile.fit(previews, finals, (0.5,))
    among_survivors = torch.corrcoef(torch.stack([previews[:, 0], finals])[:, ~finals.isnan()])[0, 1]
    assert among_survivors < 0.4
    assert profile.correlation()[0] == pytest.approx(0.6, abs=0.05)
    assert profile.relation(0).weight < 0.4 * 1000  # and that they tell less than as many drawn at random


def test_spread_is_put_right_for_who_was_stopped():
    generator = torch.Generator().manual_seed(0)
    earlier, noise = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
    present = 0.8 * earlier + 0.6 * noise
    for share in (0.5, 0.25):
        survivors = present[earlier >= earlier.quantile(1 - share)]
        assert survivors.std() < 0.85
        assert full_spread(survivors, len(present)) == pytest.approx(1.0, abs=0.03)
    assert full_spread(present, len(present)) == float(present.std())


def test_joined_profiles_know_what_one_fit_of_all_knows():
    previews, finals = draw_tables(CURVES["middling"], 3)
    parts = [PreviewProfile.fit(p, f, FRACTIONS) for p, f in zip(previews, finals)]
    whole = PreviewProfile.fit(previews.flatten(0, 1), finals.flatten(), FRACTIONS, [i // 16 for i in range(48)])
    joined = parts[0].joined(parts[1]).joined(parts[2])
    for name in ("freedom", "preview_squares", "products", "final_squares"):
        assert getattr(joined, name) == pytest.approx(getattr(whole, name))


def test_joining_keeps_what_is_known_at_other_fractions():
    previews, finals = draw_tables(CURVES["middling"], 2)
    saved = PreviewProfile.fit(previews[0], finals[0], FRACTIONS)
    run = PreviewProfile.fit(previews[1, :, 1:2], finals[1], (0.35,))
    joined = saved.joined(run)
    assert joined.step_fractions == (0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert joined.freedom == pytest.approx((15, 15, 30, 15, 15, 15, 15, 15))
    assert joined.at(FRACTIONS) == saved


def test_a_profile_goes_through_json():
    profile = profile_of(CURVES["middling"], 3)
    assert PreviewProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize(
    "change, message",
    [
        ({"products": None}, "products"),
        ({"products": [1.0]}, "products has 1"),
        ({"products": ["x"] * 7}, "products must be"),
        ({"step_fractions": [0.5] * 7}, "ascend"),
        ({"slopes": []}, "unknown .'slopes'"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        PreviewProfile.from_dict(profile_of(CURVES["middling"], 3).to_dict() | change)


def test_between_recorded_fractions_a_profile_interpolates_and_before_them_it_trusts_less():
    profile = PreviewProfile.fit(*(t[0] for t in draw_tables((0.4, 0.8), 1, 400)), (0.4, 0.8))
    early, middle, late = profile.at((0.2, 0.6, 0.9)).correlation()
    first, last = profile.correlation()
    assert early < 0.6 * first and first < middle < last and late == pytest.approx(last)
    assert profile.at(profile.step_fractions) == profile


def decide(policy, scores, num_images=1, fraction=0.5):
    return policy.decide(fraction, torch.tensor(scores), num_images).tolist()


def policies():
    """A policy in each state of knowledge."""
    previews, finals = draw_tables(CURVES["early"], seed=7)
    run = PreviewProfile.fit(previews[0], finals[0], FRACTIONS)
    levels = levels_of(previews[0], finals[0], FRACTIONS)
    some = RunFacts(finished=tuple(finals[0, :3].tolist()), threshold=0.5, levels=levels)
    yield RacingPolicy()
    yield RacingPolicy().informed(profile_of(CURVES["early"]))
    yield RacingPolicy().informed(run, RunFacts(finished=tuple(finals[0].tolist()), levels=levels))
    yield RacingPolicy(margin=0.6).informed(profile_of(CURVES["late"]).joined(run), some)


@pytest.mark.parametrize("num_images", [1, 3])
def test_a_higher_preview_is_never_stopped_while_a_lower_one_goes_on(num_images):
    for policy, seed in itertools.product(policies(), range(8)):
        scores = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        scores[3], scores[5], scores[6:8] = math.nan, scores[4], scores[8]
        for fraction in (0.05, 0.3, 0.6, 0.95):
            goes_on = policy.decide(fraction, scores, num_images)
            assert not goes_on[3] and goes_on[4] == goes_on[5] and goes_on[6] == goes_on[7] == goes_on[8]
            assert not (scores[~goes_on] >= scores[goes_on].min()).any()  # a comparison with NaN is false
            assert goes_on.sum() >= max(1, num_images - len(policy.run.finished))


def test_order_of_candidates_changes_no_decision():
    for policy, seed in itertools.product(policies(), range(8)):
        generator = torch.Generator().manual_seed(seed)
        scores, order = torch.randn(16, generator=generator), torch.randperm(16, generator=generator)
        assert torch.equal(policy.decide(0.4, scores, 2)[order], policy.decide(0.4, scores[order], 2))


def test_level_and_scale_of_all_scores_change_no_race():
    previews, finals = draw_tables(CURVES["middling"], 10, 40)
    for p, f in zip(previews, finals):
        plain = replay(p, f, FRACTIONS, limits=Limits(budget=16))
        for scale, level in ((1, 3.0), (0.05, -0.4)):
            assert replay(scale * p + level, scale * f + level, FRACTIONS, limits=Limits(budget=16)) == plain


def test_later_decisions_and_smaller_margins_stop_more():
    scores = torch.linspace(-2, 2, 16)
    going = [int(RacingPolicy().decide(f, scores, 1).sum()) for f in (0.05, 0.2, 0.4, 0.6, 0.8, 0.99)]
    assert going == sorted(going, reverse=True) and going[0] == 16 and going[-1] == 1
    by_margin = [int(RacingPolicy(margin=m).decide(0.5, scores, 1).sum()) for m in (9, 2, 1, 0.5, 0)]
    assert by_margin == sorted(by_margin, reverse=True) and by_margin[0] == 16 and by_margin[-1] == 1


@pytest.mark.parametrize("num_images", [1, 3])
def test_the_rule_by_hand(num_images):
    """Whoever's expected final score is within margin * sqrt(2) * residual deviations of the wanted-th best's."""
    policy = RacingPolicy(margin=0.8).informed(profile_of(CURVES["middling"]))
    scores = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rho, scale = policy.relation(0.5)
    spread = statistics.stdev(scores.tolist())
    expected = [rho * scale * score for score in scores.tolist()]
    residual = scale * spread * math.sqrt(1 - rho**2) * math.sqrt(17 / 15)
    limit = sorted(expected, reverse=True)[num_images - 1] - 0.8 * math.sqrt(2) * residual
    assert policy.decide(0.5, scores, num_images).tolist() == [value >= limit for value in expected]


def test_who_has_nothing_to_tell_apart_goes_on():
    assert decide(RacingPolicy(), [0.5] * 8) == [True] * 8
    assert decide(RacingPolicy(), [NAN, 0.1, NAN]) == [False, True, False]
    assert decide(RacingPolicy(), [NAN, NAN]) == [False, False]
    assert decide(RacingPolicy(), [0.3, 0.1, 0.2], num_images=3, fraction=0.95) == [True] * 3


def test_finished_candidates_and_a_threshold_out_of_reach_stop_more():
    previews, finals = draw_tables(CURVES["early"], seed=7)
    run = PreviewProfile.fit(previews[0], finals[0], FRACTIONS)
    scores = torch.linspace(-1, 1, 8)
    levels = levels_of(previews[0], finals[0], FRACTIONS)
    better, unreachable = RunFacts((*finals[0].tolist(), 2.0), None, levels), RunFacts((-1.0,), 9.0, levels)
    alone = RacingPolicy().informed(run).decide(0.5, scores, 1)
    against = RacingPolicy().informed(run, better).decide(0.5, scores, 1)
    hopeless = RacingPolicy().informed(run, unreachable).decide(0.5, scores, 1)
    assert alone.sum() > against.sum() >= hopeless.sum() == 1


def test_perfect_previews_once_known_cost_little_and_lose_nothing():
    perfect = (1.0,) * len(FRACTIONS)
    tables = draw_tables(perfect, 20)
    score, cost = race(tables, profile=profile_of(perfect))
    assert score == float(tables[1].max(1).values.mean())
    assert cost <= 16 * 0.3 + 2  # hardly anyone but the winner goes on after the first decision
    assert race(tables)[0] == score  # unknown, they cost more but lose nothing either


@pytest.mark.parametrize(
    ("family", "known"),
    # Where previews tell later than the prior believes, only a known profile helps
    [("early", False), ("middling", False), ("early", True), ("middling", True), ("late", True)],
)
def test_racing_beats_halving_at_equal_cost(family, known):
    tables = draw_tables(CURVES[family], 200, 24, seed=11)
    policy = RacingPolicy(margin=1.2)
    score, cost = race(tables, policy=policy, profile=profile_of(CURVES[family]) if known else None)
    # Halving half-way costs three quarters of its candidates; between two even numbers of them, linear in cost
    fewer = 2 * math.floor(cost / 1.5)
    (low, low_cost), (high, high_cost) = (race(tables, n, policy=FixedSchedule()) for n in (fewer, fewer + 2))
    assert low_cost <= cost <= high_cost
    assert score >= low + (high - low) * (cost - low_cost) / (high_cost - low_cost)


def test_racing_with_a_profile_keeps_the_gain_of_best_of_16_for_less():
    tables = draw_tables(CURVES["early"], 300, 16, seed=12)
    score, cost = race(tables, policy=RacingPolicy(margin=1.5), profile=profile_of(CURVES["early"]))
    assert score >= 0.98 * float(tables[1].max(1).values.mean()) and cost <= 0.55 * 16


def test_a_fixed_schedule_keeps_its_share_of_the_best():
    assert decide(FixedSchedule(), [0.1, 0.4, 0.2, 0.3, 0.0]) == [False, True, True, True, False]
    assert decide(FixedSchedule(), [0.1, 0.4, 0.2, 0.3], num_images=3) == [False, True, True, True]
    thrice = FixedSchedule({0.25: 0.5, 0.5: 0.5, 0.75: 0.5})
    assert thrice.step_fractions == (0.25, 0.5, 0.75)
    scores = torch.randperm(16, generator=torch.Generator().manual_seed(0)).float()
    for fraction, kept in ((0.1, 16), (0.25, 8), (0.4, 8), (0.5, 4), (0.75, 2)):
        goes_on = thrice.decide(fraction, scores, 1)
        assert goes_on.sum() == kept
        assert torch.equal(thrice.decide(fraction, scores.masked_fill(~goes_on, NAN), 1), goes_on)


def slow_halving(previews, finals, column, num_candidates):
    """Halving half-way, by hand: the winner and the cost."""
    by_preview = sorted(range(num_candidates), key=lambda row: -previews[row][column])
    survivors = by_preview[: math.ceil(num_candidates / 2)]
    cost = sum(1.0 if row in survivors else 0.5 for row in range(num_candidates))
    return max(survivors, key=lambda row: finals[row]), cost


@pytest.mark.parametrize("num_candidates", [1, 7, 16])
def test_replay_of_halving_is_halving(num_candidates):
    for previews, finals in zip(*draw_tables(CURVES["middling"], 10, 20)):
        result = replay(previews, finals, FRACTIONS, num_candidates, policy=FixedSchedule())
        winner, cost = slow_halving(previews.tolist(), finals.tolist(), FRACTIONS.index(0.5), num_candidates)
        assert result == Replay((winner,), pytest.approx(cost), num_candidates, num_candidates)


def test_a_policy_that_stops_nobody_is_best_of_n_and_is_asked_everywhere():
    previews, finals = draw_tables((*CURVES["middling"], 1.0), 1, 20)
    policy = KeepAll()
    result = replay(previews[0], finals[0], (*FRACTIONS, 1.0), 12, 3, policy)
    assert result.winners == tuple(finals[0, :12].argsort(descending=True)[:3].tolist())
    assert result.cost == pytest.approx(12) and result.cost_best_of_n == 12
    assert policy.asked == list(FRACTIONS)  # at the end nothing is left to decide


def test_a_policy_is_asked_at_the_first_recorded_fraction_at_or_after_its_own():
    assert asked_at((0.2, 0.3, 0.5, 1.0), (0.3, 0.4, 0.55, 0.7)) == [0.3, 0.5]
    assert asked_at((0.25, 0.5, 0.75), (0.3, 0.4, 0.55, 0.7)) == [0.5, 0.75]
    assert asked_at((0.5,), (0.7,)) == []
    assert asked_at(torch.tensor([0.3, 0.7]).tolist(), (0.3, 0.7)) == pytest.approx([0.3, 0.7])


def asked_at(recorded, wanted):
    """The recorded fractions at which a policy that wants others is asked."""
    policy = KeepAll()
    policy.step_fractions = wanted
    replay(torch.rand(4, len(recorded)), torch.rand(4), recorded, 4, policy=policy)
    return policy.asked


def test_a_candidate_costs_what_it_ran_and_its_previews():
    previews, finals = draw_tables(CURVES["middling"], 1, 16)
    free = replay(previews[0], finals[0], FRACTIONS, policy=FixedSchedule())
    paid = replay(previews[0], finals[0], FRACTIONS, policy=FixedSchedule(), preview_cost=0.01)
    assert free.cost == pytest.approx(12) and paid.cost == pytest.approx(12 + 16 * 0.01)


@pytest.mark.parametrize("budget", [0.9, 1, 7.5, 16, 23])
@pytest.mark.parametrize("max_batch_size", [None, 5])
def test_a_budget_is_spent_and_never_exceeded(budget, max_batch_size):
    for policy in (RacingPolicy(), FixedSchedule({0.3: 0.2}), KeepAll()):
        for previews, finals in zip(*draw_tables(CURVES["middling"], 4, 120)):
            result = replay(
                previews,
                finals,
                FRACTIONS,
                policy=policy,
                preview_cost=0.005,
                limits=Limits(budget=budget, max_batch_size=max_batch_size),
            )
            assert budget - 1.1 < result.cost <= budget + 1e-9
            assert len(result.winners) == (budget > 1)


def test_compute_that_was_freed_begins_new_seeds_under_a_budget_alone():
    tables = draw_tables(CURVES["early"], 30, 60)
    results = [replay(p, f, FRACTIONS) for p, f in zip(*tables)]
    assert all(result.started == 16 and result.winners[0] < 16 for result in results)
    bold = RacingPolicy(margin=1.0)
    refilled = [replay(p, f, FRACTIONS, policy=bold, limits=Limits(budget=16)) for p, f in zip(*tables)]
    assert all(result.started > 20 for result in refilled)
    best_of_16 = float(tables[1][:, :16].max(1).values.mean())
    assert race(tables, policy=bold, limits=Limits(budget=16))[0] > best_of_16 + 0.1


def test_until_accepted_ends_with_the_wave_that_brings_enough():
    previews, finals = draw_tables(CURVES["middling"], 1, 120, seed=2)
    run = (previews[0], finals[0], FRACTIONS, 16, 2, RacingPolicy())
    result = replay(*run, limits=Limits(budget=40, threshold=1.0, max_batch_size=4))
    assert len(result.winners) == 2 and all(finals[0, row] >= 1.0 for row in result.winners)
    assert (finals[0, : result.started - 4] >= 1.0).sum() < 4 and result.cost < 40
    nothing = replay(*run, limits=Limits(budget=40, threshold=99.0, max_batch_size=4))
    assert nothing.winners == () and 38 < nothing.cost <= 40


def test_what_finished_is_told_before_the_next_batch_size():
    told = []

    @dataclass(frozen=True)
    class Listening(RacingPolicy):
        def informed(self, profile, run):
            told.append((profile, run))
            return super().informed(profile, run)

    previews, finals = draw_tables(CURVES["middling"], 1, 30)
    saved = profile_of(CURVES["middling"], 4)
    replay(previews[0], finals[0], FRACTIONS, 16, policy=Listening(), profile=saved, limits=Limits(max_batch_size=8))
    (first, none), (second, some) = told
    assert first is saved and none == RunFacts()
    assert 1 <= len(some.finished) < 8 and set(some.finished) <= set(finals[0, :8].tolist())
    last = max(some.levels)
    assert some.levels[last].is_known
    assert second.freedom[second.step_fractions.index(last)] == pytest.approx(4 * 15 + len(some.finished) - 1)


def test_a_preview_that_could_not_be_scored_stops_nobody_and_a_final_one_cannot_win():
    previews, finals = draw_tables(CURVES["early"], 1, 16)
    best = int(finals[0].argmax())
    unseen, unscored = previews[0].clone(), finals[0].clone()
    unseen[best] = NAN
    assert replay(unseen, finals[0], FRACTIONS).winners == (best,)
    unscored[best] = NAN
    assert best not in replay(previews[0], unscored, FRACTIONS, 16, 8).winners


def test_a_batch_that_failed_is_begun_again_in_parts():
    race = Race(FixedSchedule({0.5: 0.5}), num_candidates=4)
    race.begin(race.next_batch())
    race.decide(0.5, range(4), torch.arange(4.0))  # and then memory ran out
    for part, scores in ((range(2), [0.1, 0.9]), (range(2, 4), [0.8, 0.2])):
        race.begin(part)
        (row,) = race.decide(0.5, (0, 1), torch.tensor(scores))
        race.finish([row], [scores[row]])
    assert race.finals == {1: pytest.approx(0.9), 2: pytest.approx(0.8)} and not race.next_batch()
    assert race.previews[0] == {0.5: pytest.approx(0.1)} and len(race.previews) == 4


def test_no_previews_are_paid_for_that_can_stop_nobody():
    previews, finals = draw_tables(CURVES["middling"], 1, 16)
    run = {"preview_scores": previews[0], "final_scores": finals[0], "step_fractions": FRACTIONS, "preview_cost": 0.1}
    for policy in (RacingPolicy(), FixedSchedule({0.5: 0.5})):
        alone = replay(**run, policy=policy, limits=Limits(max_batch_size=1))
        assert alone.cost == pytest.approx(16) and alone.winners == (int(finals[0].argmax()),)
        all_wanted = replay(**run, policy=policy, num_candidates=4, num_images=4)
        assert all_wanted.cost == pytest.approx(4)
    assert needs_previews(RacingPolicy(), 4, 4, is_last=False), "a later wave learns from them"
    assert not needs_previews(RacingPolicy(), 4, 4, is_last=True)
    assert needs_previews(RacingPolicy(run=RunFacts(finished=(0.9,))), 4, 4, is_last=True)


def test_a_wave_is_what_the_budget_can_bring_to_the_end():
    assert next_batch_size(16) == 16 and next_batch_size(16, started=16, spent=7.0) == 0
    assert next_batch_size(16, max_batch_size=6) == 6 and next_batch_size(16, started=12, max_batch_size=6) == 4
    assert next_batch_size(17, max_batch_size=8) == 6 and next_batch_size(17, started=12, max_batch_size=8) == 5
    assert next_batch_size(16, budget=math.inf) == 16
    assert next_batch_size(16, started=16, spent=9.0, budget=math.inf, max_batch_size=8) == 8
    assert next_batch_size(16, budget=10) == 10 and next_batch_size(16, started=10, spent=5.5, budget=10) == 4
    assert next_batch_size(16, started=16, spent=8.2, budget=16) == 7
    assert next_batch_size(16, started=16, spent=8.2, budget=16, candidate_cost=1.2) == 6
    assert next_batch_size(4, budget=9) == 4 and next_batch_size(4, started=4, spent=2.5, budget=9) == 6
    assert next_batch_size(4, started=9, spent=8.5, budget=9) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, f: replay(p[:, :3], f, FRACTIONS), r"got \[16, 3\], \[16\] and \[7\]"),
        (lambda p, f: replay(p, f, FRACTIONS, num_candidates=17), "17 and 16 rows"),
        (lambda p, f: replay(p, f, FRACTIONS, num_images=0), "got 0"),
        (lambda p, f: replay(p, f, FRACTIONS[::-1]), "ascend"),
        (lambda p, f: PreviewProfile.fit(p, f, FRACTIONS, groups=[1, 2]), "16 candidates, got 2"),
        (lambda p, f: replay(p, f, FRACTIONS, policy=object()), "derive it from nearid_personalize.guard.StoppingP"),
        (lambda p, f: RacingPolicy(margin=-1.0), "margin must be 0 or more, got -1.0"),
        (lambda p, f: RacingPolicy(prior_weight=0), "prior_weight"),
        (lambda p, f: RacingPolicy(step_fractions=(0.5, 0.4)), "ascend"),
        (lambda p, f: FixedSchedule({0.5: 0.0}), "share_kept at 0.5"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    previews, finals = draw_tables(CURVES["middling"])
    with pytest.raises(InputError, match=message):
        call(previews[0], finals[0])
