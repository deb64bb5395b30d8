"""Which distractors are near enough, and different enough: what is measured, where the limits lie, what is refused.

Every measure compares a view and a distractor on its background. The subject's similarities are of both pictures with
everything but the subject in grey, cropped to the subject: the background, which both share, plays no part.
Similarities are cosines in [-1, 1], larger = more alike.

Shape letters: N pictures, T tokens, P patches, D width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isqrt, nan

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nearid_personalize.distractors.regions import Mask, bounding_box
from nearid_personalize.encoder.trunks import has_class_token
from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.floors.quality import QualityFloor
from nearid_personalize.scorer.scorer import IdentityScorer

OTHER_CATEGORIES = (
    *("bag", "ball", "bear", "bicycle", "bird", "book", "bottle", "bowl", "box", "camera", "car", "cat", "chair"),
    *("clock", "cup", "dog", "doll", "flower", "fruit", "furniture", "hat", "horse", "lamp", "person", "plant"),
    *("rabbit", "robot", "shoe", "sunglasses", "teapot", "toy", "tree", "vase"),
)
"""What a distractor might show in place of its category, where the data names no others."""


@dataclass(frozen=True)
class Scores:
    """What is measured of one distractor; NaN: not measured."""

    trunk_similarity: float = nan
    """Of the masked subjects, by the mean patch token of the frozen trunk."""
    identity_similarity: float = nan
    """Of the masked subjects, by the identity head."""
    visible_change: float = nan
    """Mean of 1 - cosine between the trunk's tokens at the same places inside the mask, in [0, 2]; 0: not changed."""
    category_lead: float = nan
    """How much better the place of the subject fits its category's name than any other's, difference of cosines."""
    quality: float = nan
    """In [0, 1], larger = more of a picture."""
    seam: float = nan
    """Mean step across the mask's border against the photo's own steps there: 1 = as in the photo."""


@dataclass(frozen=True)
class Limits:
    """The smallest or largest value that passes; None: not asked for."""

    min_trunk_similarity: float | None = None
    max_identity_similarity: float | None = None
    max_trunk_similarity: float | None = None
    """In place of the identity similarity's where there is no identity head."""
    min_visible_change: float | None = None
    min_category_lead: float | None = None
    min_quality: float | None = None
    max_seam: float | None = None


_REASONS = {
    "min_category_lead": "not of the category",
    "min_quality": "not a good picture",
    "min_trunk_similarity": "not near enough",
    "max_identity_similarity": "too much the same subject",
    "max_trunk_similarity": "too much the same subject",
    "min_visible_change": "hardly changed",
    "max_seam": "a seam shows",
}
"""Limit -> what is said of a distractor that misses it, the plainest first."""


def refusal(scores: Scores, limits: Limits) -> str:
    """Why a distractor is refused, "" where it passes. A measure that was not taken refuses nothing."""
    for name, reason in _REASONS.items():
        limit, value = getattr(limits, name), getattr(scores, name[4:])
        if limit is None or math.isnan(value):
            continue
        if value < limit if name.startswith("min_") else value > limit:
            return f"{reason} ({name[4:].replace('_', ' ')} {value:.3f}, limit {limit:.3f})"
    return ""


# --- limits ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Quantiles:
    """Which share of the first tries each limit refuses, 0 to 1; 0: that limit is left out."""

    not_near: float = 0.1
    """By the trunk's similarity."""
    too_alike: float = 0.1
    """By the identity's similarity; the trunk's where there is no identity head."""
    unchanged: float = 0.05
    """By the visible change."""
    seam: float = 0.05
    """By the seam."""

    def __post_init__(self) -> None:
        for field in fields(self):
            share = getattr(self, field.name)
            if not 0 <= share < 1:
                raise InputError(f"--{field.name.replace('_', '-')} {share:g}: give a share from 0 to below 1")


def limits_from(
    first_tries: Sequence[Scores],
    same_subject: Sequence[float] = (),
    quantiles: Quantiles = Quantiles(),
    min_quality: float | None = None,
    given: Limits = Limits(),
) -> Limits:
    """Limits at quantiles of the data at hand.

    Args:
        first_tries: scores of the first try for every view.
        same_subject: identity similarities of masked views of one subject. A distractor may be no more alike than
            the lowest twentieth of them, even where more of the first tries are refused by that.
        min_quality: the quality floor's own measured threshold.
        given: limits that are set, and go before the quantiles.
    """
    found: dict[str, float | None] = {
        "min_trunk_similarity": _quantile(first_tries, "trunk_similarity", quantiles.not_near),
        "max_identity_similarity": _quantile(first_tries, "identity_similarity", quantiles.too_alike, top=True),
        "min_visible_change": _quantile(first_tries, "visible_change", quantiles.unchanged),
        "max_seam": _quantile(first_tries, "seam", quantiles.seam, top=True),
        "min_category_lead": 0.0,
        "min_quality": min_quality,
    }
    alike = found["max_identity_similarity"]
    if alike is None:
        found["max_trunk_similarity"] = _quantile(first_tries, "trunk_similarity", quantiles.too_alike, top=True)
    elif same_subject:
        found["max_identity_similarity"] = min(alike, float(np.quantile(same_subject, 0.05)))
    chosen = {name: value for name, value in asdict(given).items() if value is not None}
    return Limits(**{**found, **chosen})


def _quantile(scores: Sequence[Scores], name: str, share: float, top: bool = False) -> float | None:
    """The value that a share of the scores lies below, or above for `top`; None without a share or a score."""
    values = [value for value in (getattr(score, name) for score in scores) if not math.isnan(value)]
    if not values or share == 0:
        return None
    # Of few values none is refused rather than one too many
    return float(np.quantile(values, 1 - share, method="higher") if top else np.quantile(values, share, method="lower"))


# --- measures --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Pair:
    """A view, and a distractor on its background."""

    view: Image.Image
    distractor: Image.Image
    subject: Mask
    """Where the subject is; the distractor's may be larger by the dilation."""
    painted: Mask
    """Where the distractor differs from the view."""
    category: str = ""


@dataclass(frozen=True, eq=False)
class Measuring:
    """Measures pairs by the models at hand.

    Args:
        scorer: NearID model; its trunk gives the trunk's measures. None: neither similarity is measured.
        has_identity: whether its head tells identities; False: a bare trunk.
        text_image: tells categories; None: not measured.
        categories: what else a distractor might show.
        quality: the quality floor; None: not measured.
    """

    scorer: IdentityScorer | None = None
    has_identity: bool = True
    text_image: TextImageEncoder | None = None
    categories: tuple[str, ...] = ()
    quality: QualityFloor | None = None

    @property
    def tells_identity(self) -> bool:
        """Whether identity similarities are measured."""
        return self.scorer is not None and self.has_identity

    def __call__(self, pairs: Sequence[Pair]) -> list[Scores]:
        """The scores of each pair."""
        near = self._similarities(pairs)
        leads = self._category_leads(pairs)
        quality = self.quality.scores([pair.distractor for pair in pairs]).tolist() if self.quality else _unknown(pairs)
        return [
            Scores(
                trunk_similarity=trunk,
                identity_similarity=identity,
                visible_change=change,
                category_lead=lead,
                quality=good,
                seam=seam_ratio(pair.view, pair.distractor, pair.painted),
            )
            for pair, (trunk, identity, change), lead, good in zip(pairs, near, leads, quality, strict=True)
        ]

    @torch.no_grad()
    def embed_subjects(self, pictures: Sequence[tuple[Image.Image, Mask]]) -> Tensor:
        """Masked subjects -> identity embeddings, float32 [N,D] of unit length."""
        assert self.scorer is not None, "asked only where there is one"
        return self.scorer.embed([subject_alone(picture, mask) for picture, mask in pictures])

    @torch.no_grad()
    def _similarities(self, pairs: Sequence[Pair]) -> list[tuple[float, float, float]]:
        """(Trunk similarity, identity similarity, visible change) of each pair."""
        if self.scorer is None:
            return [(nan, nan, nan)] * len(pairs)
        model, found = self.scorer.model, []
        for pair in pairs:
            pictures = [subject_alone(image, pair.painted) for image in (pair.view, pair.distractor)]
            tokens = model.tokens(self.scorer.preprocessing(pictures, model.device)).float()
            trunk, identity = model.mean_pool(tokens), model.pool(tokens)
            inside = subject_alone(Image.fromarray(pair.painted.astype(np.uint8) * 255), pair.painted)
            first = 1 if has_class_token(model.config.vision_config) else 0
            found.append(
                (
                    float(trunk[0] @ trunk[1]),
                    float(identity[0] @ identity[1]) if self.has_identity else nan,
                    token_change(tokens[0, first:], tokens[1, first:], inside),
                )
            )
        return found

    def _category_leads(self, pairs: Sequence[Pair]) -> list[float]:
        """How much better each distractor's subject fits its category than the best other one."""
        if self.text_image is None:
            return _unknown(pairs)
        names = sorted({*self.categories, *(pair.category for pair in pairs if pair.category)})
        texts = self.text_image.embed_texts([f"a photo of a {name}" for name in names] or ["a photo"])
        # With its surroundings: a cut-out on grey is no photo of anything, and text-image models know photos.
        shown = [surroundings(pair.distractor, pair.painted) for pair in pairs]
        fits = self.text_image.embed_images(shown) @ texts.T  # [N, names]
        return [_lead(row, names, pair.category) for row, pair in zip(fits.tolist(), pairs, strict=True)]


def _lead(fits: Sequence[float], names: Sequence[str], category: str) -> float:
    if category not in names or len(names) < 2:
        return nan
    own = fits[names.index(category)]
    return own - max(fit for fit, name in zip(fits, names, strict=True) if name != category)


def _unknown(pairs: Sequence[Pair]) -> list[float]:
    return [nan] * len(pairs)


def subject_alone(picture: Image.Image, mask: Mask) -> Image.Image:
    """The square around a mask, grey outside the mask and outside the picture."""
    left, top, right, bottom = bounding_box(mask)
    side = max(right - left, bottom - top)
    pixels = np.where(mask[..., None], np.asarray(picture.convert("RGB")), np.uint8(128))[top:bottom, left:right]
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(pixels), ((side - (right - left)) // 2, (side - (bottom - top)) // 2))
    return square


def surroundings(picture: Image.Image, mask: Mask, padding: float = 0.25) -> Image.Image:
    """The crop around a mask, padded by a share of its longer side as far as the picture goes."""
    left, top, right, bottom = bounding_box(mask)
    room = round(padding * max(right - left, bottom - top))
    box = (
        max(left - room, 0),
        max(top - room, 0),
        min(right + room, picture.width),
        min(bottom + room, picture.height),
    )
    return picture.convert("RGB").crop(box)


def token_change(before: Tensor, after: Tensor, inside: Image.Image) -> float:
    """Mean of 1 - cosine between patch tokens [P,D] at the same places, weighted by how much of a patch is inside.

    inside: a picture of the same square, white where it counts.
    """
    side = isqrt(len(before))
    share = np.asarray(inside.convert("L").resize((side, side), Image.Resampling.BOX), np.float32)
    weights = torch.from_numpy((share - share.min()) / max(float(np.ptp(share)), 1.0)).flatten().to(before)
    change = 1 - F.cosine_similarity(before, after, dim=-1)
    total = float(weights.sum())
    return float((change * weights).sum()) / total if total > 0 else float(change.mean())


def seam_ratio(view: Image.Image, distractor: Image.Image, painted: Mask) -> float:
    """Mean step of brightness across the mask's border against the view's own; NaN for a mask without a border.

    A step is the difference between two neighbouring pixels of which one is inside. The view's has its own subject's
    contour nowhere near, since masks are dilated; it is taken as one grey level at least.
    """
    steps, own = (_border_steps(picture, painted) for picture in (distractor, view))
    return float(steps.mean()) / max(float(own.mean()), 1.0) if len(steps) else nan


def _border_steps(picture: Image.Image, mask: Mask) -> np.ndarray:
    grey = np.asarray(picture.convert("L"), np.float32)
    across_rows = np.abs(np.diff(grey, axis=0))[mask[1:] != mask[:-1]]
    across_columns = np.abs(np.diff(grey, axis=1))[mask[:, 1:] != mask[:, :-1]]
    return np.concatenate([across_rows, across_columns])


# --- saving ----------------------------------------------------------------------------------------------------------
def to_fields(record: Scores | Limits) -> dict[str, float | None]:
    """Scores or limits for JSON, NaN as null."""
    return {
        name: None if value is None or math.isnan(value) else round(value, 6) for name, value in asdict(record).items()
    }


def scores_from(fields_of: Mapping[str, float | None]) -> Scores:
    """Scores from what `to_fields` made of them."""
    return Scores(**{name: nan if value is None else value for name, value in fields_of.items()})


def same_subject_similarities(embeddings: Iterable[Tensor]) -> list[float]:
    """Per subject its views' embeddings [V,D] -> the cosines of all pairs of views of one subject."""
    found: list[float] = []
    for views in embeddings:
        similarities = views @ views.T
        first, second = torch.triu_indices(len(views), len(views), offset=1)
        found += similarities[first, second].tolist()
    return found
