"""Open-set search: which score is high enough that it is not a stranger's. Pure.

A query is compared with every subject of the gallery, so what must be calibrated is a stranger's *largest* score over
the whole gallery. A threshold for one comparison at 1 % accepts up to 1 - 0.99**M of the strangers of M subjects.

Shape letters: N pictures of one query, n known strangers, K scores of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.scorer.calibration import (
    DEFAULT_FALSE_ACCEPT_RATE,
    ROUNDING,
    KnownScores,
    Source,
    ThresholdOrigin,
    combined,
    conformal_threshold,
    p_values,
    smallest_rate,
)


@dataclass(frozen=True, eq=False)
class StrangerScores:
    """Scores that strangers are known to reach.

    scores [n,K]: rows exchangeable with one another and with the strangers to come. factor: a stranger reaches a score
    at most this many times as often as the known ones do.
    """

    source: Source
    scores: Tensor
    factor: float = 1.0
    guaranteed: bool = True

    @property
    def least(self) -> float:
        """The smallest false-accept rate that these can state; above 1 where they can state none."""
        return self.factor * smallest_rate(len(self.scores))

    def rate_of(self, scores: Tensor) -> float:
        """Largest scores [N] of the pictures of one query -> the smallest rate in (0, 1] at which they are accepted."""
        return combined((self.factor * p_values(scores, self.scores)).clamp(max=1), self.least)

    def threshold(self, false_accept_rate: float) -> float:
        """The smallest score of one picture that is accepted at a rate, or at the smallest that these can state."""
        rate = max(false_accept_rate, self.least) / self.factor
        return conformal_threshold(self.scores, rate) if rate < 1 else -1.0


def by_negatives(largest: Tensor) -> StrangerScores:
    """Largest scores [n], over the whole gallery, of pictures that show none of it."""
    return StrangerScores("negatives", largest[:, None])


def by_the_gallery(largest: Tensor, size: int) -> StrangerScores:
    """Largest score [n] of a photo of each of n subjects, over the other size - 1 subjects.

    A stranger is compared with one subject more. Of `size` exchangeable subjects each is as likely to hold the largest
    score, so leaving one out loses it with probability 1 / size: hence the factor. Photos of the gallery stand for
    queries here, so nothing is guaranteed.
    """
    return StrangerScores("gallery", largest[:, None], factor=size / (size - 1), guaranteed=False)


def by_the_bank(known: KnownScores, comparisons: int) -> StrangerScores:
    """The encoder's near-identities: each of so many comparisons may err, and the rate is spent over all of them."""
    return StrangerScores("bank", known.impostor, factor=float(comparisons), guaranteed=known.guaranteed)


@dataclass(frozen=True, eq=False)
class AcceptRule:
    """When a query is one of the gallery's subjects.

    size: subjects searched. rate: the false-accept rate that holds, None where nothing is known. stated_by: what that
    rests on. floors: further strangers, who are let through at `floor_rate` at most, or at the smallest that they can
    state.
    """

    size: int
    rate: float | None
    threshold: float
    """Smallest score, in [-1, 1], of a query of one picture that is accepted."""
    stated_by: StrangerScores | None = None
    floors: tuple[StrangerScores, ...] = ()
    floor_rate: float | None = None

    def accepts(self, score: float, largest: Tensor) -> bool:
        """Whether a query with this score, whose pictures have these largest scores [N], is accepted."""
        if self.stated_by is None or self.rate is None or len(largest) == 1:
            return score >= self.threshold
        bars = [(self.stated_by, self.rate), *((floor, self.floor_rate or self.rate) for floor in self.floors)]
        return all(strangers.rate_of(largest) <= max(rate, strangers.least) for strangers, rate in bars)

    def rate_of(self, largest: Tensor) -> float | None:
        """The smallest rate at which such a query would be accepted: of strangers, or where that is more, of
        near-identities of a single subject."""
        if self.stated_by is None:
            return None
        return max(strangers.rate_of(largest) for strangers in (self.stated_by, *self.floors))

    @property
    def origin(self) -> ThresholdOrigin:
        """What the rate rests on, in words and figures."""
        if self.stated_by is None:
            return ThresholdOrigin()
        return ThresholdOrigin(
            source=self.stated_by.source,
            false_accept_rate=self.rate,
            guaranteed=self.stated_by.guaranteed,
            num_negatives=len(self.stated_by.scores),
        )


def accept_rule(
    size: int,
    false_accept_rate: float | None,
    negatives: Tensor,
    own: Tensor,
    bank: KnownScores | None,
    uncalibrated: float,
) -> AcceptRule:
    """The rule for a gallery of `size` subjects.

    Args:
        false_accept_rate: share in (0, 1) of strangers that may be taken for a subject. None: 0.01, or the smallest
            that can be stated.
        negatives, own: largest scores [n], as `by_negatives` and `by_the_gallery` take them; may be empty.
        bank: the encoder's known scores of near-identities, None without.
        uncalibrated: the threshold where nothing is known and no rate was asked for.

    What states the rate: the negatives where there are any, else the gallery's own photos, else the bank's rate spent
    over all comparisons. The bank is a floor too: no near-identity of a single subject passes more often than asked, or
    where nothing was asked than at 0.01.

    Raises InputError where the rate cannot be stated; the message says how many negatives that takes.
    """
    candidates = []
    if len(negatives):
        candidates.append(by_negatives(negatives))
    elif size > 1:
        candidates.append(by_the_gallery(own, size))
    if bank is not None and not len(negatives) and (size == 1 or false_accept_rate is not None):
        candidates.append(by_the_bank(bank, size))
    candidates = [strangers for strangers in candidates if strangers.least < 1]
    rate, floor_rate = false_accept_rate, false_accept_rate
    if rate is None:
        if not candidates:
            return AcceptRule(size=size, rate=None, threshold=uncalibrated)
        rate, floor_rate = max(DEFAULT_FALSE_ACCEPT_RATE, candidates[0].least), DEFAULT_FALSE_ACCEPT_RATE
    stated_by = _first_to_state(candidates, rate, size, len(negatives))
    threshold = stated_by.threshold(rate)
    floors: tuple[StrangerScores, ...] = ()
    if bank is not None:
        floors = (by_the_bank(bank, 1),)
        threshold = max(threshold, floors[0].threshold(floor_rate or rate))
    return AcceptRule(
        size=size, rate=rate, threshold=threshold, stated_by=stated_by, floors=floors, floor_rate=floor_rate
    )


def _first_to_state(candidates: Sequence[StrangerScores], rate: float, size: int, num_negatives: int) -> StrangerScores:
    for strangers in candidates:
        if strangers.least <= rate * (1 + ROUNDING):
            return strangers
    needed = math.ceil(1 / rate - 1 - ROUNDING)
    least = min((strangers.least for strangers in candidates), default=None)
    ask = "" if least is None else f", or ask for {math.ceil(1e4 * least) / 1e4:g} or more"
    raise InputError(
        f"false_accept_rate {rate:g}: for a gallery of {size} it takes {needed} negatives, pictures that show none of "
        f"its subjects, and here are {num_negatives}; give more (nearid gallery add --negatives){ask}"
    )
