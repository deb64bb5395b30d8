"""Copies: of a reference photo, and among the candidates themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.floors.base import _short
from nearid_personalize.images import to_square

# --- copies ----------------------------------------------------------------------------------------------------------
COPY_LIMIT = 0.9
"""From this similarity on a picture counts as a copy; benchmarks/quality_floor.py measures what it misses."""


_KEPT = 0.8  # share of a picture's side that is compared: its centre, against windows of the other picture


_COMPARED = 24  # pixels a side


_THUMBNAIL = round(_COMPARED / _KEPT)


_SIZES = (0.66, 0.7, 0.75, 0.8, 0.85, 0.91, 0.96)  # of the windows, as shares of the side: for crops both ways


_REACH, _STEPS = 0.1, 9  # how far windows are shifted, as a share of the side, and in how many steps


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any sizes -> float32 [N,3,S,S] in [0, 1], all that `copy_similarity` looks at."""
    if not images:
        raise InputError("images: an empty sequence; give at least one picture")
    return torch.stack([to_square(image, _THUMBNAIL) for image in images]).float() / 255


def copy_similarity(images: Tensor, originals: Tensor) -> Tensor:
    """Thumbnails [N,3,S,S], [M,3,S,S] -> [N,M] in [-1, 1]: how well a picture is explained as a copy of an original.

    The largest normalised correlation of the picture's centre with windows of the original of seven sizes, shifted
    and mirrored. High only for the whole picture up to a small crop, a mirror, brightness, contrast and compression,
    and for two cut-outs on the same plain ground.
    """
    centre = F.affine_grid(torch.tensor([[[_KEPT, 0, 0], [0, _KEPT, 0]]]), [1, 3, _COMPARED, _COMPARED], False)
    grid = F.affine_grid(_window_placements(), [2 * len(_SIZES) * _STEPS**2, 3, _COMPARED, _COMPARED], False)
    queries = torch.cat([_pattern(image, centre) for image in images])  # [N,D]
    # One original at a time: its windows take 8 MB.
    return torch.stack([(queries @ _pattern(original, grid).T).amax(dim=1) for original in originals], dim=1)


def _window_placements() -> Tensor:
    """[W,2,3] for `affine_grid`: every size at every shift, as it is and mirrored."""
    shifts = (2 * torch.linspace(-_REACH, _REACH, _STEPS)).tolist()  # grid coordinates span 2
    return torch.tensor(
        [[[m * s, 0, x], [0, s, y]] for s in _SIZES for x in shifts for y in shifts for m in (1, -1)],
    )


def _pattern(image: Tensor, grid: Tensor) -> Tensor:
    """[3,S,S] seen through grids [W,24,24,2] -> [W,D] of unit length, channels less their means; near 0 where flat."""
    seen = F.grid_sample(image.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=False)
    return F.normalize((seen - seen.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=1, eps=1e-2)


@dataclass(frozen=True, eq=False)
class CopyFloor:
    """Refuses pictures that repeat a reference photo. limit: the smallest similarity, in [-1, 1], that is a copy."""

    originals: Tensor
    limit: float = COPY_LIMIT

    @classmethod
    def from_references(cls, references: Sequence[Image.Image], limit: float = COPY_LIMIT) -> "CopyFloor":
        """Raises InputError without references."""
        return cls(thumbnails(references), limit)

    def similarities(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> [N,R], see `copy_similarity`."""
        return copy_similarity(thumbnails(images), self.originals)

    def judge(self, images: Sequence[Image.Image], prompt: str = "") -> list[str]:
        """ "copies reference 2 (.98)", references counted from 1 in the order given. The prompt plays no part."""
        nearest, which = self.similarities(images).max(dim=1)
        return [
            f"copies reference {index + 1} ({_short(value)})" if value >= self.limit else ""
            for value, index in zip(nearest.tolist(), which.tolist())
        ]


def copy_rate(images: Sequence[Image.Image], references: Sequence[Image.Image], limit: float = COPY_LIMIT) -> float:
    """The share of pictures, 0 to 1, that copy a reference."""
    similarity = copy_similarity(thumbnails(images), thumbnails(references))  # [N,R]
    return float((similarity.amax(dim=1) >= limit).double().mean())


def near_duplicates(images: Sequence[Image.Image], order: Sequence[int], limit: float = COPY_LIMIT) -> list[int | None]:
    """For each picture the better one that it repeats, or None. order: indices, best first; others are no copies."""
    small = thumbnails(images)
    copies = copy_similarity(small, small) >= limit  # [N,N]
    kept: list[int] = []
    repeats: list[int | None] = [None] * len(images)
    for index in order:
        repeats[index] = next((better for better in kept if copies[index, better]), None)
        if repeats[index] is None:
            kept.append(index)
    return repeats


def diversity(images: Sequence[Image.Image]) -> float:
    """Mean of 1 - `copy_similarity` over pairs of pictures: 0 when all are copies of one; NaN for a lone picture."""
    small = thumbnails(images)
    between = ~torch.eye(len(small), dtype=torch.bool)
    return float((1 - copy_similarity(small, small))[between].mean()) if len(small) > 1 else nan
