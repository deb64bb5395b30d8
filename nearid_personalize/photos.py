"""Do these photos belong together: what to look at before a subject is enrolled or a LoRA trained on them.

Scores are cosines in [-1, 1], larger = more alike: each photo's against all the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from PIL import Image
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.floors.base import Floor
from nearid_personalize.floors.copies import near_duplicates
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import identity_scores

ENOUGH_PHOTOS = 3
"""From this many on an odd one out can be told, and one bad photo does not decide."""

ODD_MARGIN = 0.05
"""How far below the accept threshold of the other photos' subject an odd one out scores."""

FLAT_DEVIATION = 0.02
"""Standard deviation of the pixels, in [0, 1], below which a photo shows nothing at all."""


@dataclass(frozen=True)
class PhotoNote:
    """One photo among the others.

    score: its likeness to the others in [-1, 1], NaN for a lone one. problems: sentences, none for a good photo.
    """

    score: float
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhotoCheck:
    """A note per photo, in the order given, and what is to be said of them all."""

    photos: tuple[PhotoNote, ...]
    warnings: tuple[str, ...]

    @property
    def consistency(self) -> float:
        """Mean likeness of each photo to the others; NaN for a lone one."""
        return sum(photo.score for photo in self.photos) / len(self.photos)

    @property
    def good(self) -> tuple[int, ...]:
        """Places of the photos without a problem."""
        return tuple(place for place, photo in enumerate(self.photos) if not photo.problems)


def check_photos(
    scorer: IdentityScorer, photos: Sequence[Image.Image], floors: Sequence[Floor] = (), margin: float = ODD_MARGIN
) -> PhotoCheck:
    """Look at photos of one subject: how alike they are, and which of them had better go.

    floors: what a photo must pass, e.g. `QualityFloor`. margin: see `ODD_MARGIN`.

    Raises InputError without photos.
    """
    if not photos:
        raise InputError("photos: none given; three to five of the same subject are best")
    embeddings = scorer.embed(photos)
    scores = _others_scores(scorer, embeddings)
    problems: list[list[str]] = [[] for _ in photos]
    for place, (photo, first) in enumerate(zip(photos, near_duplicates(photos, range(len(photos))))):
        if min(photo.size) < scorer.image_size:
            problems[place].append(f"too small: {photo.width} x {photo.height}, best {scorer.image_size} or more")
        if _deviation(photo) < FLAT_DEVIATION:
            problems[place].append("shows nothing: all of one colour")
        if first is not None:
            problems[place].append(f"nearly the same picture as photo {first + 1}")
    for floor in floors:
        for own, reason in zip(problems, floor.judge(photos, "")):
            own += [f"not a good picture ({reason})"] if reason else []
    for place in odd_ones_out(embeddings, scorer, margin):
        problems[place].append("does not look like the others: another subject, or it can hardly be seen")
    notes = tuple(PhotoNote(score, tuple(own)) for score, own in zip(scores, problems))
    strangers = len(photos) == 2 and _disowns(scorer, embeddings[:1], embeddings[1], margin)
    return PhotoCheck(notes, tuple(_warnings(notes, strangers)))


def odd_ones_out(embeddings: Tensor, scorer: IdentityScorer, margin: float = ODD_MARGIN) -> list[int]:
    """Embeddings [R,D] of photos -> places of those that the others disown, most clearly disowned first.

    The photo least like the others goes when it scores `margin` below the threshold of a subject enrolled on the
    others alone; then the next, as long as `ENOUGH_PHOTOS` are left to judge it by.
    """
    kept, odd = list(range(len(embeddings))), []
    while len(kept) >= ENOUGH_PHOTOS:
        place = min(kept, key=dict(zip(kept, _others_scores(scorer, embeddings[kept]))).__getitem__)
        others = embeddings[[other for other in kept if other != place]]
        if not _disowns(scorer, others, embeddings[place], margin):
            break
        kept.remove(place)
        odd.append(place)
    return odd


def _disowns(scorer: IdentityScorer, others: Tensor, photo: Tensor, margin: float) -> bool:
    """Whether a subject enrolled on the others [R,D] would clearly refuse the photo [D]."""
    subject = scorer.enroll_embeddings(others)
    return float(identity_scores(photo[None], others, subject.aggregation)) < subject.threshold - margin


def _others_scores(scorer: IdentityScorer, embeddings: Tensor) -> list[float]:
    return scorer.enroll_embeddings(embeddings).reference_scores.tolist() if len(embeddings) > 1 else [nan]


def _deviation(photo: Image.Image) -> float:
    pixels = torch.frombuffer(bytearray(photo.convert("L").resize((32, 32)).tobytes()), dtype=torch.uint8)
    return float(pixels.float().std()) / 255


def _warnings(notes: Sequence[PhotoNote], strangers: bool) -> list[str]:
    found = []
    if len(notes) < ENOUGH_PHOTOS:
        found.append(
            f"Only {len(notes)} photo{'s' * (len(notes) > 1)}: three to five, in different places, work better."
        )
    bad = [place + 1 for place, note in enumerate(notes) if note.problems]
    if bad:
        found.append(f"Look at photo{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}.")
    if strangers:
        found.append("The two photos do not look like the same subject.")
    return found
