import json
import math

import pytest
import torch

from nearid_personalize.calibration import Calibration, calibrate

GENUINE = torch.tensor([0.9, 0.8, 0.7, 0.3])
IMPOSTOR = torch.tensor([0.75, 0.5, 0.4, 0.2, 0.1])


def scores(seed, count, shift):
    return shift + 0.2 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_worked_values():
    result = calibrate(GENUINE, IMPOSTOR, false_accept_rate=0.2)
    # One of five impostors may pass, so the threshold lies just above the second largest, 0.5.
    assert 0.5 < result.threshold < 0.5 + 1e-6
    assert (result.false_accept_rate, result.false_reject_rate) == (0.2, 0.25)
    assert (result.num_genuine, result.num_impostor, result.aggregation) == (4, 5, "mean")


@pytest.mark.parametrize("rate", [0, 0.01, 0.05, 0.29, 0.5, 0.999, 1])
def test_no_smaller_threshold_keeps_the_rate(rate):
    genuine, impostor = scores(0, 80, 0.7), scores(1, 100, 0.4)
    result = calibrate(genuine, impostor, rate)
    assert sum(s >= result.threshold for s in impostor.tolist()) / 100 == result.false_accept_rate <= rate
    assert sum(s < result.threshold for s in genuine.tolist()) / 80 == result.false_reject_rate
    # Every candidate threshold that could accept more breaks the rate, or accepts nobody else.
    for candidate in torch.cat([genuine, impostor]).tolist():
        if candidate < result.threshold:
            assert sum(s >= candidate for s in impostor.tolist()) / 100 > rate


def test_a_looser_rate_never_raises_the_threshold():
    genuine, impostor = scores(0, 80, 0.7), scores(1, 100, 0.4)
    results = [calibrate(genuine, impostor, rate) for rate in (0, 0.05, 0.2, 0.6, 1)]
    for name, reverse in (("threshold", True), ("false_reject_rate", True), ("false_accept_rate", False)):
        values = [getattr(result, name) for result in results]
        assert values == sorted(values, reverse=reverse)


def test_better_separated_scores_reject_fewer():
    rates = [calibrate(scores(0, 200, 0.4 + gap), scores(1, 200, 0.4)).false_reject_rate for gap in (0, 0.3, 0.6, 2)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0


def test_ties_at_the_threshold_are_refused_together():
    result = calibrate(torch.tensor([0.5, 0.9]), torch.tensor([0.5] * 10), false_accept_rate=0.3)
    assert result.false_accept_rate == 0 and result.false_reject_rate == 0.5


def test_accepting_everyone():
    result = calibrate(GENUINE, IMPOSTOR, false_accept_rate=1)
    assert result.threshold == pytest.approx(0.1) and result.false_reject_rate == 0


def test_threshold_acts_alike_on_tensors_and_floats():
    result = calibrate(GENUINE, IMPOSTOR, false_accept_rate=0.2)
    assert (result.threshold <= IMPOSTOR).tolist() == [s >= result.threshold for s in IMPOSTOR.tolist()]


def test_json_round_trip_is_exact():
    result = calibrate(scores(0, 80, 0.7), scores(1, 100, 0.4))
    assert Calibration.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_wrong_input_is_named():
    for genuine, impostor, match in (
        ([], IMPOSTOR, "genuine scores: none"),
        (GENUINE, [math.nan, 0.1], "impostor scores: 1 of 2 are NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            calibrate(torch.as_tensor(genuine), torch.as_tensor(impostor))
    with pytest.raises(ValueError, match="false_accept_rate"):
        calibrate(GENUINE, IMPOSTOR, false_accept_rate=5)
    values = calibrate(GENUINE, IMPOSTOR).to_dict()
    with pytest.raises(ValueError, match=r"missing \['threshold'\], unknown \['treshold'\]"):
        Calibration.from_dict({("treshold" if k == "threshold" else k): v for k, v in values.items()})
    with pytest.raises(ValueError, match="threshold is 'high'"):
        Calibration.from_dict({**values, "threshold": "high"})
