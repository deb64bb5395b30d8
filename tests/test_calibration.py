import math
import re

import pytest
import torch
import torch.nn.functional as F

from nearid_personalize import InputError
from nearid_personalize.scorer.calibration import (
    CalibrationBank,
    KnownScores,
    ThresholdOrigin,
    conformal_threshold,
    leave_one_out_scores,
    smallest_rate,
)
from nearid_personalize.scorer.subject import identity_scores

AGGREGATIONS = ("mean", "max", "centroid")


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subjects(count, pictures, seed=0):
    """[count, pictures]: scores that differ far more between subjects than within one."""
    return scores(count, 1, seed=seed) + 0.1 * scores(count, pictures, seed=seed + 1)


def unit(*shape, seed=0):
    return F.normalize(scores(*shape, seed=seed), dim=-1)


def bank(num_subjects=20, num_references=4, rate=0.05, aggregation="mean", spread=0.3):
    """A bank whose genuine pictures and references lie about the subject's own direction."""
    own = unit(num_subjects, 1, 16)
    genuine = F.normalize(own + spread * unit(num_subjects, 2, 16, seed=1), dim=-1)
    references = F.normalize(own + spread * unit(num_subjects, num_references, 16, seed=2), dim=-1)
    impostor = F.normalize(own + unit(num_subjects, 3, 16, seed=3), dim=-1)
    parts = references, genuine, impostor
    return CalibrationBank.from_embeddings(*parts, rate, aggregation), parts


# --- thresholds


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (39, 0.05), (40, 0.05), (99, 0.01), (99, 0.29), (9, 0.9)])
def test_the_threshold_is_just_above_the_conformal_quantile(count, rate):
    impostor = scores(count, 1)
    nth = math.ceil(round((1 - rate) * (count + 1), 6))
    quantile = sorted(impostor.flatten().tolist())[nth - 1]
    threshold = conformal_threshold(impostor, rate)
    assert quantile < threshold <= quantile + 1e-6


@pytest.mark.parametrize("pictures", [1, 2, 5])
@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.33, 0.5, 0.98])
def test_leaving_out_each_subject_in_turn_keeps_the_rate(pictures, rate):
    """Exchangeability makes the left-out one as good as new; this is the guarantee itself, exactly."""
    known = subjects(50, pictures)
    accepted = 0.0
    for i in range(50):
        threshold = conformal_threshold(torch.cat([known[:i], known[i + 1 :]]), rate)
        accepted += sum(score >= threshold for score in known[i].tolist()) / pictures
    assert accepted <= rate * 50
    assert accepted >= rate * 50 - 1 - 1 / pictures  # nor is it needlessly strict


def test_pooling_dependent_scores_as_if_independent_would_break_the_rate():
    known = subjects(20, 50)
    pooled = sum(
        float(
            (known[i] >= conformal_threshold(torch.cat([known[:i], known[i + 1 :]]).reshape(-1, 1), 0.02))
            .float()
            .mean()
        )
        for i in range(20)
    )
    assert pooled > 0.02 * 20
    with pytest.raises(InputError, match="takes 49 negatives"):
        conformal_threshold(known, 0.02)


def test_stricter_rates_and_nearer_impostors_raise_the_threshold():
    impostor = scores(200, 1)
    thresholds = [conformal_threshold(impostor, rate) for rate in (0.5, 0.2, 0.05, 0.01)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[-1]
    assert conformal_threshold(impostor + 0.1, 0.05) > conformal_threshold(impostor, 0.05)
    assert conformal_threshold(impostor[torch.randperm(200)], 0.05) == conformal_threshold(impostor, 0.05)


def test_ties_are_refused_together():
    threshold = conformal_threshold(torch.full((100, 1), 0.5), 0.3)
    assert 0.5 < threshold < 0.5 + 1e-6


def test_the_threshold_acts_alike_on_tensors_and_floats():
    impostor = scores(50, 1).flatten()
    threshold = conformal_threshold(impostor[:, None], 0.2)
    assert (impostor >= threshold).tolist() == [score >= threshold for score in impostor.tolist()]


@pytest.mark.parametrize(("count", "rate", "needed"), [(98, 0.01, 99), (18, 0.05, 19), (5, 0.01, 99), (2, 0.3, 3)])
def test_too_few_negatives_say_how_many_and_which_rate_would_do(count, rate, needed):
    with pytest.raises(InputError, match=f"takes {needed} negatives .* here are {count};") as refused:
        conformal_threshold(scores(count, 1), rate)
    assert "\n" not in str(refused.value)
    offered = float(re.search(r"ask for ([\d.]+)", str(refused.value))[1])
    assert offered == pytest.approx(1 / (count + 1), abs=1e-4)
    for possible, number in ((offered, count), (rate, needed), (smallest_rate(count), count)):
        assert math.isfinite(conformal_threshold(scores(number, 1), possible))
    assert conformal_threshold(scores(needed, 1), rate) > scores(needed, 1).max()


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, math.nan])
def test_rates_that_cannot_be_are_refused(rate):
    with pytest.raises(InputError, match="false_accept_rate"):
        conformal_threshold(scores(50, 1), rate)


@pytest.mark.parametrize("impostor", [torch.zeros(0, 1), torch.zeros(5), torch.full((5, 1), math.nan)])
def test_scores_that_cannot_be_are_refused(impostor):
    with pytest.raises(ValueError, match="impostor scores"):
        conformal_threshold(impostor, 0.5)


def test_what_to_expect_is_stated():
    known = KnownScores("negatives", scores(99, 1), torch.tensor([-9.0, 9, 9, 9]))
    threshold, origin = known.threshold_at(0.01)
    assert threshold == conformal_threshold(scores(99, 1), 0.01)
    assert origin == ThresholdOrigin("negatives", 0.01, True, 99, 0.25, 4)
    expected = (
        "accepts at most 1.00% of pictures like the 99 negatives given, expected to reject 25.00% of the subject's own"
    )
    assert str(origin) == f"{expected} (n = 4)"
    alone = KnownScores("negatives", scores(99, 1), torch.zeros(0)).threshold_at(0.01)[1]
    assert (alone.false_reject_rate, alone.num_genuine) == (None, 0) and "reject" not in str(alone)
    assert "unknown" in str(ThresholdOrigin())


# --- references against each other


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_leaving_one_reference_out_agrees_with_plain_loops(aggregation):
    references = unit(4, 8)
    expected = [
        float(
            identity_scores(
                references[i : i + 1], torch.stack([r for j, r in enumerate(references) if j != i]), aggregation
            )
        )
        for i in range(4)
    ]
    assert leave_one_out_scores(references, aggregation).tolist() == pytest.approx(expected, abs=1e-6)


def test_an_odd_reference_scores_least_and_a_lone_one_not_at_all():
    alike = F.normalize(unit(1, 8) + 0.1 * unit(3, 8, seed=1), dim=-1)
    own = leave_one_out_scores(torch.cat([alike, unit(1, 8, seed=5)]))
    assert own.argmin() == 3
    assert leave_one_out_scores(alike[:1]).isnan().tolist() == [True]


# --- the bank


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_references", [1, 2, 4])
def test_scores_of_the_bank_are_those_of_its_embeddings(aggregation, num_references):
    made, (references, genuine, impostor) = bank()
    for found, pictures in zip(made.scores(num_references, aggregation), (genuine, impostor)):
        pairs = zip(pictures, references[:, :num_references])
        expected = torch.stack([identity_scores(own, photos, aggregation) for own, photos in pairs])
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_bank_guarantees_for_as_many_references_as_it_has():
    made, _ = bank()
    for count, guaranteed in ((1, True), (4, True), (5, False)):
        threshold, origin = made.known_scores(count, "centroid").threshold_at(0.05)
        genuine, impostor = made.scores(min(count, 4), "centroid")
        assert threshold == conformal_threshold(impostor, 0.05)
        expected = ("bank", guaranteed, 20, float((genuine < threshold).double().mean()), 40)
        facts = (origin.source, origin.guaranteed, origin.num_negatives, origin.false_reject_rate, origin.num_genuine)
        assert facts == expected


def test_genuine_pictures_farther_from_the_photos_are_rejected_more():
    rates = [bank(spread=spread)[0].known_scores(4, "mean").threshold_at(0.05)[1] for spread in (0.2, 1, 3)]
    expected = [origin.false_reject_rate for origin in rates]
    assert expected == sorted(expected) and expected[0] < expected[-1]


def test_banks_that_cannot_be_are_refused():
    made, _ = bank()
    likeness, genuine, impostor = made.tensors().values()
    for parts, match in (
        ((likeness[:, :3], genuine, impostor), "need"),
        ((likeness, genuine[:9], impostor), "need"),
        ((likeness, genuine[..., :2], impostor), "need"),
        ((likeness, genuine[:, :0], impostor), "need"),
        ((likeness, genuine, impostor / 0), "finite"),
        ((likeness, genuine, impostor, 0.01), "20 subjects cannot state"),
        ((likeness, genuine, impostor, 0.05, "median"), "mean, max, centroid"),
    ):
        with pytest.raises(ValueError, match=match):
            CalibrationBank(*parts)
