"""Accept thresholds with stated error rates, measured on scores of known pairs.

Scores are identity similarities: larger = more alike. A picture is accepted when score >= threshold.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """A threshold and how often it errs on the pairs it was measured on.

    threshold: the smallest accepted score. false_accept_rate: share in [0, 1] of impostor pairs (another subject)
    that it accepts; false_reject_rate: share of genuine pairs (the same subject) that it rejects. num_genuine,
    num_impostor: how many pairs. aggregation: how the scores were formed from several references.
    """

    threshold: float
    false_accept_rate: float
    false_reject_rate: float
    num_genuine: int
    num_impostor: int
    aggregation: str = "mean"

    def to_dict(self) -> dict[str, float | int | str]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Calibration":
        """The inverse of `to_dict`. Raises ValueError naming what is missing, unknown, or of the wrong type."""
        kinds = {field.name: field.type for field in fields(cls)}
        missing, unknown = sorted(kinds.keys() - values.keys()), sorted(values.keys() - kinds.keys())
        if missing or unknown:
            raise ValueError(f"calibration: missing {missing}, unknown {unknown}")
        for name, kind in kinds.items():
            accepted = (int, float) if kind is float else kind
            if not isinstance(values[name], accepted) or isinstance(values[name], bool):  # type: ignore[arg-type]
                raise ValueError(f"calibration: {name} is {values[name]!r}, not {getattr(kind, '__name__', kind)}")
        return cls(**values)  # type: ignore[arg-type]


def calibrate(
    genuine: Tensor, impostor: Tensor, false_accept_rate: float = 0.05, aggregation: str = "mean"
) -> Calibration:
    """The smallest threshold whose measured false-accept rate is at most the one asked for.

    genuine [N], impostor [M]: scores of pictures of the same and of another subject. The result states the rates
    that the threshold has on them; with few pairs the true ones are uncertain (0 errors of M: up to about 3 / M).

    Raises ValueError for empty or NaN scores, or a rate outside [0, 1].
    """
    genuine, impostor = _scores("genuine", genuine), _scores("impostor", impostor)
    if not 0 <= false_accept_rate <= 1:
        raise ValueError(f"false_accept_rate must be in [0, 1], got {false_accept_rate}")
    # The small addition keeps 0.29 * 100 = 28.999... at 29.
    allowed = math.floor(false_accept_rate * len(impostor) + 1e-9)
    if allowed >= len(impostor):
        threshold = torch.minimum(genuine.min(), impostor.min())
    else:
        # Just above the largest score that must be refused; float32's next number, as scores are float32.
        refused = impostor.sort(descending=True).values[allowed]
        threshold = torch.nextafter(refused, torch.tensor(math.inf))
    return Calibration(
        threshold=float(threshold),
        false_accept_rate=float((impostor >= threshold).double().mean()),
        false_reject_rate=float((genuine < threshold).double().mean()),
        num_genuine=len(genuine),
        num_impostor=len(impostor),
        aggregation=aggregation,
    )


def _scores(name: str, values: Tensor) -> Tensor:
    scores = torch.as_tensor(values).float().flatten()
    if len(scores) == 0:
        raise ValueError(f"{name} scores: none given, at least one is needed")
    if scores.isnan().any():
        raise ValueError(f"{name} scores: {int(scores.isnan().sum())} of {len(scores)} are NaN")
    return scores
