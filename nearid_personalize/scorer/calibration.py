"""Scores against several references, and accept thresholds with a stated false-accept rate.

Scores are cosines in [-1, 1], larger = more alike; a picture is accepted when score >= threshold. Genuine scores are of
the subject itself, impostor scores of others. Letters: N pictures, R references, D width, B subjects of a bank, G
genuine and K impostor pictures of each.

Thresholds are set by split conformal prediction, which holds for any distribution of exchangeable scores. The rate
holds on average over the known impostors and the new one, not for each single threshold.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nearid_personalize.errors import InputError

Aggregation = Literal["mean", "max", "centroid"]


Source = Literal["negatives", "gallery", "bank", "uncalibrated"]


DEFAULT_FALSE_ACCEPT_RATE = 0.01
"""What is asked for when nobody asks: share in [0, 1] of near-identities accepted."""


FALSE_ACCEPT_RATES = {"lenient": 0.1, "balanced": 0.03, "strict": 0.01}
"""Strictness in words -> share of near-identities that may be accepted."""


ROUNDING = 1e-9
"""Added before rounding down a product with a rate, so that 0.29 * 100 = 28.999... counts 29."""


def aggregate(cosines: Tensor, likeness: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Cosines of pictures with references [...,N,R], of references with each other [...,R,R] -> scores [...,N].

    centroid: the cosine with the references' mean.
    """
    if aggregation == "max":
        scores = cosines.amax(dim=-1)
    elif aggregation == "centroid":
        length = likeness.mean(dim=(-2, -1)).clamp_min(1e-12).sqrt()
        scores = cosines.mean(dim=-1) / length[..., None]
    else:
        scores = cosines.mean(dim=-1)
    return scores.clamp(-1, 1)  # rounding can carry a cosine of equal vectors past 1


def leave_one_out_scores(references: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Unit rows [R,D] -> [R]: each reference's score against the others; NaN for a lone one."""
    likeness = references @ references.T
    if len(likeness) == 1:
        return torch.full((1,), math.nan)
    others = ~torch.eye(len(likeness), dtype=torch.bool)
    own = [aggregate(row[kept][None], likeness[kept][:, kept], aggregation) for row, kept in zip(likeness, others)]
    return torch.cat(own)


def smallest_rate(num_subjects: int) -> float:
    """The smallest false-accept rate in (0, 1] that n exchangeable impostors, or bank subjects, can state."""
    return 1 / (num_subjects + 1)


def conformal_threshold(impostor: Tensor, false_accept_rate: float) -> float:
    """Impostor scores [B,K], K of each of B exchangeable subjects -> the smallest threshold that keeps the rate.

    Just above the ceil((1 - rate)(B + 1) K)-th smallest score. K = 1: split conformal. K > 1: hierarchical (Lee, Barber
    and Willett, arXiv 2306.06342): each score weighs 1 / K, and the new subject counts as K scores above all others.

    Raises InputError for a rate outside (0, 1) or below 1 / (B + 1); ValueError for scores that are not [B,K] or
    NaN.
    """
    if impostor.ndim != 2 or impostor.numel() == 0 or impostor.isnan().any():
        raise ValueError(f"impostor scores must be [B,K], at least one and none NaN, got {list(impostor.shape)}")
    if not 0 < false_accept_rate < 1:
        raise InputError(f"false_accept_rate {false_accept_rate}: give a share between 0 and 1, such as 0.01")
    count, each = impostor.shape
    above = math.floor(false_accept_rate * (count + 1) * each + ROUNDING) - each  # known impostors that may be accepted
    if above < 0:
        needed, stated = math.ceil(1 / false_accept_rate - 1 - ROUNDING), math.ceil(1e4 * smallest_rate(count)) / 1e4
        raise InputError(
            f"false_accept_rate {false_accept_rate:g}: takes {needed} negatives (or subjects in the calibration bank), "
            f"here are {count}; give more, or ask for {stated:g} or a larger rate"
        )
    refused = impostor.float().flatten().sort(descending=True).values[above]
    return float(torch.nextafter(refused, torch.tensor(math.inf)))  # the next float32, as scores are float32


def p_values(scores: Tensor, known: Tensor) -> Tensor:
    """Scores [N], known scores [B,K] of B exchangeable subjects -> share in (0, 1] that score as high or higher.

    The conformal p-value: one further subject, whose K scores all count as higher, is added to the known ones
    (`conformal_threshold` is its inverse). A picture of a further known-like subject has a p-value of at most r with
    probability <= r.
    """
    count, each = known.shape
    ordered = known.flatten().sort().values
    higher = ordered.numel() - torch.searchsorted(ordered, scores.to(ordered.dtype).contiguous())
    return (higher + each).double() / ((count + 1) * each)


def combined(p: Tensor, least: float) -> float:
    """P-values [N] of one item's pictures -> one for the item: twice their mean, at most 1.

    Valid however the pictures depend on each other (Rüschendorf, 1982; Vovk and Wang, Biometrika 107, 2020). So is the
    largest of them, which counts where all are `least`, the smallest that the known scores can give: otherwise two
    pictures could never state what one can.
    """
    if len(p) == 1 or float(p.max()) <= least * (1 + ROUNDING):
        return float(p.max())
    return min(1.0, 2 * float(p.mean()))


@dataclass(frozen=True)
class ThresholdOrigin:
    """How an accept threshold was set, and the error rates to expect."""

    source: Source = "uncalibrated"
    """"negatives" given, subjects of a "gallery" against each other, the "bank" of the encoder, or "uncalibrated" (a
    rule of thumb)."""
    false_accept_rate: float | None = None
    """Largest share in [0, 1] of impostors accepted; None: unknown."""
    guaranteed: bool = False
    """Whether that rate holds on average for impostors like those it was set on."""
    num_negatives: int = 0
    """Independent impostors it was set on: pictures given, or bank subjects."""
    false_reject_rate: float | None = None
    """Share in [0, 1] of the known genuine pictures that it rejects; None without any."""
    num_genuine: int = 0
    """How many those are."""

    def __str__(self) -> str:
        if self.false_accept_rate is None:
            return "not calibrated, error rates unknown"
        whose = {
            "negatives": f"pictures like the {self.num_negatives} negatives given",
            "gallery": f"strangers (by {self.num_negatives} subjects of the gallery, each against the others)",
            "bank": f"near-identities (by {self.num_negatives} subjects of the calibration bank)",
        }[self.source]
        line = f"accepts {'at most' if self.guaranteed else 'about'} {self.false_accept_rate:.2%} of {whose}"
        if self.false_reject_rate is None:
            return line
        return f"{line}, expected to reject {self.false_reject_rate:.2%} of the subject's own (n = {self.num_genuine})"


@dataclass(frozen=True, eq=False)
class KnownScores:
    """Scores that thresholds are set from."""

    source: Source
    """See `ThresholdOrigin`."""
    impostor: Tensor
    """[B,K], rows exchangeable with one another and with the impostors to come."""
    genuine: Tensor
    """Any shape, may be empty."""
    guaranteed: bool = True
    """See `ThresholdOrigin`."""

    def threshold_at(self, false_accept_rate: float) -> tuple[float, ThresholdOrigin]:
        """The threshold for a rate in (0, 1), and how it came about. Raises InputError, see `conformal_threshold`."""
        threshold = conformal_threshold(self.impostor, false_accept_rate)
        known = self.genuine.numel()
        return threshold, ThresholdOrigin(
            source=self.source,
            false_accept_rate=false_accept_rate,
            guaranteed=self.guaranteed,
            num_negatives=len(self.impostor),
            false_reject_rate=float((self.genuine < threshold).double().mean()) if known else None,
            num_genuine=known,
        )

    def threshold_near(self, false_accept_rate: float) -> tuple[float, ThresholdOrigin]:
        """`threshold_at` the rate, or at the smallest that so few impostors can state."""
        return self.threshold_at(max(false_accept_rate, smallest_rate(len(self.impostor))))


@dataclass(frozen=True, eq=False)
class CalibrationBank:
    """Known pairs of many subjects, shipped with an encoder, from which a new subject's threshold is set.

    Cosines, not scores: a bank serves every aggregation, and any number of references up to its own.
    """

    likeness: Tensor
    """[B,R,R], cosines among each subject's references."""
    genuine: Tensor
    """[B,G,R], of pictures of the subject with its references."""
    impostor: Tensor
    """[B,K,R], of near-identities with the subject's references."""
    false_accept_rate: float = DEFAULT_FALSE_ACCEPT_RATE
    """Used when none is asked for."""
    aggregation: Aggregation = "mean"
    """Used when none is asked for."""

    def __post_init__(self) -> None:
        shapes = [tensor.shape for tensor in self.tensors().values()]
        count, references = shapes[0][0], shapes[0][-1]
        fit = all(len(s) == 3 and (s[0], s[2]) == (count, references) and s.numel() for s in shapes)
        if not fit or shapes[0][1] != references:
            raise ValueError(f"bank: need [B,R,R], [B,G,R] and [B,K,R], none empty, got {[list(s) for s in shapes]}")
        if not all(tensor.isfinite().all() for tensor in self.tensors().values()):
            raise ValueError("bank: cosines must be finite")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"bank: aggregation {self.aggregation!r}; one of {', '.join(get_args(Aggregation))} works")
        if not smallest_rate(count) <= self.false_accept_rate < 1:
            raise ValueError(f"bank: {count} subjects cannot state a false-accept rate of {self.false_accept_rate}")

    @classmethod
    def from_embeddings(
        cls,
        references: Tensor,
        genuine: Tensor,
        impostor: Tensor,
        false_accept_rate: float = DEFAULT_FALSE_ACCEPT_RATE,
        aggregation: Aggregation = "mean",
    ) -> "CalibrationBank":
        """Unit embeddings, the same numbers for each subject: references [B,R,D], genuine [B,G,D], impostor [B,K,D]."""
        transposed = references.mT
        return cls(references @ transposed, genuine @ transposed, impostor @ transposed, false_accept_rate, aggregation)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"likeness": self.likeness, "genuine": self.genuine, "impostor": self.impostor}

    @property
    def num_references(self) -> int:
        """R: the largest number of references that the guarantee holds for."""
        return self.likeness.shape[-1]

    def scores(self, num_references: int, aggregation: Aggregation) -> tuple[Tensor, Tensor]:
        """Genuine [B,G] and impostor [B,K] scores against the first `num_references` references of each subject."""
        likeness = self.likeness[:, :num_references, :num_references]
        genuine, impostor = (
            aggregate(cosines[..., :num_references], likeness, aggregation) for cosines in (self.genuine, self.impostor)
        )
        return genuine, impostor

    def known_scores(self, num_references: int, aggregation: Aggregation) -> KnownScores:
        """What a new subject's threshold is set from; without a guarantee beyond the bank's own number of
        references.
        """
        genuine, impostor = self.scores(num_references, aggregation)
        return KnownScores("bank", impostor, genuine, guaranteed=num_references <= self.num_references)
