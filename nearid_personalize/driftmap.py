"""Where on the subject it drifted: the places of a picture that keep its identity score down.

A place has drifted if the score would rise were it as the references show it. So each patch token in turn is replaced
by the one most like it among all the references' patch tokens, the head pools again, and the rise of the score is that
patch's drift. The trunk is not run again for that. What is the same in picture and references, and what the head does
not look at, as the background, changes nothing.

Patches are coarse, so the grid is laid over the picture several times, displaced by parts of a patch, and the map is
the one that explains the rises of all the grids. The class token, where there is one, stays as it is.

Shape letters: N pictures, R references, S pixels of the model's square input, P patches, T tokens, D width.
"""

from dataclasses import dataclass
from math import isqrt
from typing import TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.trunks import has_class_token
from nearid_personalize.errors import InputError
from nearid_personalize.images import check_pixel_range, iterate_sources, load_image, to_square
from nearid_personalize.scorer.scorer import Aggregation, IdentityScorer, Images
from nearid_personalize.scorer.subject import identity_scores

SHIFTS = 4
"""Positions of the patch grid along each axis; their square is how often the trunk runs on a picture."""

RESOLVING_STEPS = 16
"""Iterations of `resolve_grids`. On 600 mini-world validation subjects 8, 16, 32 and 64 pointed about equally well."""

Offsets: TypeAlias = list[tuple[int, int]]
"""By how many pixels (down, right) a picture was moved."""

_ROUNDING = 1e-5
"""Rises of the score up to this are rounding, which a map relative to its peak would blow up to heat."""


@dataclass(frozen=True, eq=False)
class DriftMap:
    """What keeps one picture's score down.

    heat: float32 [S,S] in [0, 1], relative to the picture's own hottest place; all 0 where no repair would help.
    peak_rise: how much the score would rise were the patch that keeps it down the most repaired. Heat says where, this
        says how much: it is small for a picture of the subject, whose map has a hottest place as well.
    score: the picture's, as `IdentityScorer.score` gives it.
    reference_index: the reference whose cosine with the picture is largest.
    """

    heat: Tensor
    peak_rise: float
    score: float
    reference_index: int

    @property
    def peak(self) -> tuple[float, float]:
        """(x, y) of the hottest place as shares of width and height: the middle of its pixel."""
        side = self.heat.shape[-1]
        row, column = divmod(int(self.heat.argmax()), side)
        return (column + 0.5) / side, (row + 0.5) / side

    def at(self, width: int, height: int) -> Tensor:
        """The heat at a picture's own size, float32 [height,width] in [0, 1]."""
        return F.interpolate(self.heat[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


@torch.no_grad()
def drift_maps(
    scorer: IdentityScorer,
    images: Images,
    references: Images,
    aggregation: Aggregation | None = None,
    shifts: int = SHIFTS,
) -> list[DriftMap]:
    """Where each picture drifted from the subject of the references, in the order given.

    Args:
        references: the subject's photos themselves; a `Subject` keeps only their embeddings.
        aggregation: of the score that is explained; as `IdentityScorer.enroll` chooses unless given.
        shifts: positions of the patch grid along each axis: more of them resolve finer, and cost their square.

    Raises InputError when there is no picture or no reference, or one cannot be read, and for an option out of range.
    """
    patch_size = scorer.model.config.vision_config.patch_size
    if not 1 <= shifts <= patch_size:
        raise InputError(f"shifts: {shifts}; 1 to the trunk's patch size, {patch_size}, works")
    chosen = aggregation or (scorer.calibration.aggregation if scorer.calibration else "mean")
    if chosen not in get_args(Aggregation):
        raise InputError(f"aggregation: {chosen!r}; one of {', '.join(get_args(Aggregation))} works")
    reference_pixels = _pixels(scorer, references, "references")
    tokens = _tokens(scorer, reference_pixels)
    embeddings = scorer.model.pool(tokens)
    patches = _patch_tokens(scorer.model, tokens).flatten(0, 1)  # [R*P,D]
    return [
        _drift_map(scorer, pixels, patches, embeddings, chosen, shifts) for pixels in _pixels(scorer, images, "images")
    ]


def drift_map(
    scorer: IdentityScorer,
    image: Images,
    references: Images,
    aggregation: Aggregation | None = None,
    shifts: int = SHIFTS,
) -> DriftMap:
    """`drift_maps` of one picture."""
    (found,) = drift_maps(scorer, image, references, aggregation, shifts)
    return found


def repair_rises(
    model: NearIDModel, tokens: Tensor, patches: Tensor, references: Tensor, aggregation: Aggregation, batch_size: int
) -> Tensor:
    """How much one picture's score rises when a patch is replaced by its most alike among the references': [P].

    Args:
        tokens: [T,D] of the picture. patches: [Q,D] tokens of the references. references: their embeddings [R,D].
        batch_size: repaired pictures pooled at once.
    """
    first = int(has_class_token(model.config.vision_config))
    own = tokens[first:]
    nearest = patches[(F.normalize(own, dim=-1) @ F.normalize(patches, dim=-1).T).argmax(dim=1)]  # [P,D]
    rises = []
    for rows in torch.arange(len(own), device=tokens.device).split(batch_size):
        repaired = tokens.repeat(len(rows), 1, 1)
        repaired[rows - rows[0], first + rows] = nearest[rows]
        rises.append(identity_scores(model.pool(repaired), references, aggregation))
    return torch.cat(rises) - identity_scores(model.pool(tokens[None]), references, aggregation)


def shifted_grids(pixels: Tensor, patch_size: int, shifts: int) -> tuple[Tensor, Offsets]:
    """A picture [3,S,S] moved by parts of a patch -> [shifts**2,3,S,S] and by how many pixels each."""
    steps = [(2 * k + 1) * patch_size // (2 * shifts) - patch_size // 2 for k in range(shifts)]
    offsets = [(down, right) for down in steps for right in steps]
    return _moved(pixels, offsets, patch_size), offsets


def average_grids(grids: Tensor, offsets: Offsets, patch_size: int, side: int) -> Tensor:
    """Values of patches [K,P] of a picture moved by K offsets -> the mean at each of its own pixels [side,side].

    A pixel that no grid reaches, as at the edge of a trunk whose patches do not fill its input, gets 0.
    """
    count = _sum_at_pixels(torch.ones_like(grids), offsets, patch_size, side)
    return _sum_at_pixels(grids, offsets, patch_size, side) / count.clamp(min=1)


def resolve_grids(grids: Tensor, offsets: Offsets, patch_size: int, side: int, steps: int = RESOLVING_STEPS) -> Tensor:
    """As `average_grids`, but sharper: the values >= 0 of pixels whose means over patches are the grids'.

    Found by Richardson's and Lucy's iteration (W. H. Richardson, JOSA 62, 1972; L. B. Lucy, AJ 79, 1974), which is
    stopped early, before it fits noise; its first step gives the average. What is left of the grids' own pattern is
    smoothed over about a quarter of a patch. Negative values of patches count as 0.
    """
    measured = grids.clamp(min=0)
    rows = isqrt(grids.shape[1])
    values = grids.new_ones(side, side)
    for _ in range(steps):
        moved = _moved(values[None], offsets, patch_size)
        means = F.avg_pool2d(moved, patch_size)[:, :, :rows, :rows].flatten(1)  # [K,P]
        values = values * average_grids(measured / means.clamp(min=1e-9), offsets, patch_size, side)
    reach = max(patch_size // 8, 1)
    return F.avg_pool2d(values[None], 2 * reach + 1, 1, reach, count_include_pad=False)[0]


def _sum_at_pixels(grids: Tensor, offsets: Offsets, patch_size: int, side: int) -> Tensor:
    total = grids.new_zeros(side + 2 * patch_size, side + 2 * patch_size)
    rows = isqrt(grids.shape[1])
    extent = rows * patch_size
    blocks = grids.view(-1, rows, rows).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    for block, (down, right) in zip(blocks, offsets, strict=True):
        top, left = patch_size - down, patch_size - right
        total[top : top + extent, left : left + extent] += block
    return total[patch_size : patch_size + side, patch_size : patch_size + side]


def _moved(pixels: Tensor, offsets: Offsets, margin: int) -> Tensor:
    """[C,S,S] moved by each offset, none larger than the margin -> [K,C,S,S]; what moves in repeats the edge."""
    side, padded = pixels.shape[-1], F.pad(pixels[None], [margin] * 4, mode="replicate")[0]
    corners = [(margin - down, margin - right) for down, right in offsets]
    return torch.stack([padded[:, top : top + side, left : left + side] for top, left in corners])


def _drift_map(
    scorer: IdentityScorer,
    pixels: Tensor,
    patches: Tensor,
    references: Tensor,
    aggregation: Aggregation,
    shifts: int,
) -> DriftMap:
    """[3,S,S] normalised pixels; patches [R*P,D] and embeddings [R,D] of the references."""
    model, patch_size = scorer.model, scorer.model.config.vision_config.patch_size
    moved, offsets = shifted_grids(pixels, patch_size, shifts)
    rises = torch.stack(
        [
            repair_rises(model, tokens, patches, references, aggregation, scorer.batch_size)
            for tokens in _tokens(scorer, moved)
        ]
    )
    drift = resolve_grids(F.threshold(rises, _ROUNDING, 0.0), offsets, patch_size, pixels.shape[-1]).cpu()
    embedding = model.get_image_features(pixels[None])
    return DriftMap(
        heat=drift / drift.max().clamp(min=_ROUNDING),
        peak_rise=max(float(rises.max()), 0.0),
        score=float(identity_scores(embedding, references, aggregation)),
        reference_index=int((embedding @ references.T).argmax()),
    )


def _pixels(scorer: IdentityScorer, images: Images, name: str) -> Tensor:
    """Pictures as the model sees them, normalised [N,3,S,S] on its device."""
    if not isinstance(images, Tensor):
        squares = [to_square(load_image(i), scorer.image_size, scorer.resample) for i in iterate_sources(images)]
        images = torch.stack(squares) if squares else torch.empty(0)
    if len(images) == 0:
        raise InputError(f"{name}: empty; give at least one picture")
    check_pixel_range(images, name)
    return scorer.preprocessing(images if images.ndim == 4 else images[None], scorer.model.device)


def _tokens(scorer: IdentityScorer, pixels: Tensor) -> Tensor:
    """[N,3,S,S] -> float32 [N,T,D], `batch_size` pictures at a time."""
    return torch.cat([scorer.model.tokens(batch).float() for batch in pixels.split(scorer.batch_size)])


def _patch_tokens(model: NearIDModel, tokens: Tensor) -> Tensor:
    return tokens[:, int(has_class_token(model.config.vision_config)) :]
