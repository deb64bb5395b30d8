"""Is it the same one? Same, different or unsure, each at a stated error rate.

Two questions are asked of a score. Could a near-identical stranger score as high? Could the subject itself score as
low? Each answer is a conformal p-value over known scores (the encoder's calibration bank, negatives of the user's): the
smallest error rate at which one would still say "same", and the smallest at which one would still say "different".

Shape letters: N pictures, B known subjects, K known scores of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, TypeAlias

from torch import Tensor

from nearid_personalize.driftmap import DriftMap, drift_map
from nearid_personalize.errors import InputError
from nearid_personalize.images import ImageSource
from nearid_personalize.scorer.calibration import combined, p_values, smallest_rate
from nearid_personalize.scorer.scorer import IdentityScorer, Images
from nearid_personalize.scorer.subject import Subject, identity_scores

Verdict: TypeAlias = Literal["same", "different", "unsure"]
Item: TypeAlias = "ImageSource | Sequence[ImageSource]"
"""What one question is asked about: a picture, or several pictures of one item."""


@dataclass(frozen=True, eq=False)
class Verification:
    """The answer to one question.

    `verdict` is "unsure" where the score fits both the subject and its near-identical strangers, or neither.
    """

    verdict: Verdict
    score: float
    """Mean cosine of the item's pictures with the subject, in [-1, 1]."""
    false_accept_rate: float | None
    """Smallest share of near-identical strangers that would have to be accepted to call this the same, in (0, 1]. None:
    nothing is known to tell it by."""
    false_reject_rate: float | None
    """Smallest share of the subject's own pictures that would have to be rejected to call this different, in (0, 1].
    None: nothing is known to tell it by."""
    nearest_reference: int
    """Place of the reference that one of the pictures is most alike to."""
    nearest_picture: int
    """Place of that picture among the item's."""
    _where: tuple[IdentityScorer, ImageSource, Images] | None = field(default=None, repr=False)

    @cached_property
    def where(self) -> DriftMap | None:
        """Where `nearest_picture` departs from the references, found when first asked for.

        None where `verify` was given a saved subject without its photos.
        """
        if self._where is None:
            return None
        scorer, picture, references = self._where
        return drift_map(scorer, picture, references)


def verify(
    scorer: IdentityScorer,
    subject: Subject | Images,
    images: Sequence[Item],
    false_accept_rate: float = 0.01,
    false_reject_rate: float = 0.05,
) -> list[Verification]:
    """For each item, whether it is the subject: same, different or unsure.

    Args:
        subject: what `scorer.enroll` gave, or the photos themselves, which `Verification.where` needs.
        images: the items. A sequence inside it is several pictures of one item, and one question.
        false_accept_rate: share in (0, 1) of near-identical strangers that may be called the same.
        false_reject_rate: share in (0, 1) of the subject's own pictures that may be called different.

    Where nothing is known of the encoder's scores, rates are None and the verdicts follow the subject's threshold by a
    rule of thumb.

    Raises InputError for a rate outside (0, 1) or smaller than what is known can state, for no items, for an item
    without pictures, and for a picture that cannot be read.
    """
    check_rate("false_accept_rate", false_accept_rate)
    check_rate("false_reject_rate", false_reject_rate)
    items: list[list[Any]] = []
    for item in images:
        items.append(list(item) if isinstance(item, (list, tuple)) else [item])
    if not items:
        raise InputError("images: empty; give at least one picture")
    for number, pictures in enumerate(items):
        if not pictures:
            raise InputError(f"images: item {number} has no pictures; give at least one of each item")
    references: Images | None = None
    if not isinstance(subject, Subject):
        references = subject
        subject = scorer.enroll(references)
    check_stated(subject, false_accept_rate, false_reject_rate)
    embeddings = scorer.embed(list(chain.from_iterable(items)))
    answers = []
    for pictures, embedded in zip(items, embeddings.split([len(pictures) for pictures in items])):
        answers.append(_answer(scorer, subject, references, pictures, embedded, false_accept_rate, false_reject_rate))
    return answers


def check_rate(name: str, rate: float) -> None:
    """Raise InputError unless a rate lies in (0, 1)."""
    if not 0 < rate < 1:
        raise InputError(f"{name} {rate}: give a share between 0 and 1, such as 0.01")


def check_stated(subject: Subject, false_accept_rate: float, false_reject_rate: float) -> None:
    """Raise InputError where what is known of the subject cannot state the rates."""
    known = {"false_accept_rate": [scores.impostor for scores in subject.known[:1]]}
    genuine = genuine_scores(subject)
    known["false_reject_rate"] = [] if genuine is None else [genuine]
    for name, rate in (("false_accept_rate", false_accept_rate), ("false_reject_rate", false_reject_rate)):
        for scores in known[name]:
            least = smallest_rate(len(scores))
            if rate < least:
                raise InputError(
                    f"{name} {rate:g}: {len(scores)} known subjects or negatives can state {least:.4f} or more; "
                    "ask for that, or enroll with more negatives"
                )


def genuine_scores(subject: Subject) -> Tensor | None:
    """Known scores of subjects' own pictures [B,K]; None where there are none."""
    for scores in subject.known:
        if scores.genuine.numel():
            return scores.genuine if scores.genuine.ndim == 2 else scores.genuine.reshape(-1, 1)
    return None


def error_rates(scores: Tensor, subject: Subject) -> tuple[float | None, float | None]:
    """Scores [N] of one item's pictures -> the smallest false-accept and false-reject rates, see `Verification`."""
    accepts = [_rate_of(scores, known.impostor) for known in subject.known]
    genuine = genuine_scores(subject)
    rejects = None if genuine is None else _rate_of(-scores, -genuine)
    return max(accepts, default=None), rejects


def _rate_of(scores: Tensor, known: Tensor) -> float:
    return combined(p_values(scores, known), smallest_rate(len(known)))


def judge(false_accept: float | None, false_reject: float | None, accept_rate: float, reject_rate: float) -> Verdict:
    """The verdict at the rates asked for; "unsure" where both sides would answer, or neither."""
    same = false_accept is not None and false_accept <= accept_rate
    different = false_reject is not None and false_reject <= reject_rate
    if same == different:
        return "unsure"
    return "same" if same else "different"


def judge_by_threshold(score: float, threshold: float) -> Verdict:
    """The rule of thumb of an encoder that is not calibrated: half the way from its threshold to a perfect match."""
    if score < threshold:
        return "different"
    return "same" if score >= (1 + threshold) / 2 else "unsure"


def _answer(
    scorer: IdentityScorer,
    subject: Subject,
    references: Images | None,
    item: list[Any],
    embedded: Tensor,
    false_accept_rate: float,
    false_reject_rate: float,
) -> Verification:
    scores = identity_scores(embedded, subject.embeddings, subject.aggregation)
    accept, reject = error_rates(scores, subject)
    score = float(scores.mean())
    cosines = embedded @ subject.embeddings.T
    picture, reference = divmod(int(cosines.argmax()), cosines.shape[1])
    return Verification(
        verdict=(
            judge(accept, reject, false_accept_rate, false_reject_rate)
            if subject.known
            else judge_by_threshold(score, subject.threshold)
        ),
        score=score,
        false_accept_rate=accept,
        false_reject_rate=reject,
        nearest_reference=reference,
        nearest_picture=picture,
        _where=None if references is None else (scorer, item[picture], references),
    )
