"""Verdicts on finished pictures, wherever they come from: identity first, then the floors."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from nearid_personalize.floors.base import Floor
from nearid_personalize.scorer.ranking import Verdict, verdict_on
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject


def judge_pictures(
    scorer: IdentityScorer,
    subject: Subject,
    images: Sequence[Image.Image],
    floors: Sequence[Floor] = (),
    prompt: str = "",
) -> list[Verdict]:
    """One verdict for each picture, in the order given; the first floor that a picture fails is its reason."""
    scores = scorer.score(images, subject).tolist()
    verdicts = [verdict_on(index, score, subject.threshold) for index, score in enumerate(scores)]
    for floor in floors:
        passed = [verdict.index for verdict in verdicts if verdict.accepted]
        if not passed:
            break
        reasons = floor.judge([images[index] for index in passed], prompt)
        for index, reason in zip(passed, reasons, strict=True):
            if reason:
                verdicts[index] = replace(verdicts[index], accepted=False, reason=reason)
    return verdicts
