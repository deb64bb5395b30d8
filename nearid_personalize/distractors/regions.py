"""Where a photo is repainted: the crop that a model sees, and the paste that leaves all other pixels as they were.

A mask is bool [H,W] at the photo's own size, True = repaint. A photo is RGB, upright, 8 bits a channel: what
`images.load_image` reads of any file, and hence what training and scoring see of it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Region:
    """A rectangle of a photo and the size at which a model repaints it, pixels."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in the photo."""
    size: tuple[int, int]
    """Width and height that the model works at."""

    def crop(self, photo: Image.Image, mask: Mask) -> tuple[Image.Image, Image.Image]:
        """The picture and the mask (0 or 255) that the model is given.

        A pixel of the shrunken mask is white when any of the pixels that it stands for is.
        """
        picture = photo.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)
        share = Image.fromarray(mask.astype(np.float32)).crop(self.box).resize(self.size, Image.Resampling.BOX)
        return picture, Image.fromarray(np.where(np.asarray(share) > 0, 255, 0).astype(np.uint8))

    def restore(self, painted: Image.Image, photo: Image.Image) -> Image.Image:
        """The photo with the whole rectangle replaced by what the model painted, whatever size that has."""
        left, top, right, bottom = self.box
        whole = photo.copy()
        whole.paste(painted.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return whole


def bounding_box(mask: Mask) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the True pixels; there must be some."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def region_around(mask: Mask, model_size: int, multiple: int, padding: float) -> Region:
    """The crop around a mask: square where the photo has room for it.

    Args:
        model_size: the longer side that the model works at, pixels.
        multiple: what both sides of its pictures must be a multiple of.
        padding: added on each side, as a share of the mask's longer side.
    """
    height, width = mask.shape
    left, top, right, bottom = bounding_box(mask)
    side = round(max(right - left, bottom - top) * (1 + 2 * padding))
    # A small subject is enlarged twice at most: larger crops have too little detail to look like the photo.
    side = max(side, model_size // 2)
    spans = [_span(left, right, side, width), _span(top, bottom, side, height)]
    longest = max(end - start for start, end in spans)
    sizes = [max(round((end - start) * model_size / longest / multiple), 1) * multiple for start, end in spans]
    return Region(box=(spans[0][0], spans[1][0], spans[0][1], spans[1][1]), size=(sizes[0], sizes[1]))


def _span(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of `length` around [start, end), moved into [0, limit), and shortened where that is too short."""
    length = min(length, limit)
    first = min(max((start + end - length) // 2, 0), limit - length)
    return first, first + length


def dilated(mask: Mask, radius: int) -> Mask:
    """The mask grown by `radius` pixels in every direction."""
    if radius <= 0:
        return mask
    values = torch.from_numpy(mask).float()[None, None]
    values = F.max_pool2d(values, (2 * radius + 1, 1), stride=1, padding=(radius, 0))  # one axis after the other: fast
    values = F.max_pool2d(values, (1, 2 * radius + 1), stride=1, padding=(0, radius))
    return values[0, 0].numpy() > 0


def paste(photo: Image.Image, painted: Image.Image, mask: Mask, feather: int = 0) -> Image.Image:
    """The photo, and inside the mask what was painted; both have one size.

    feather: pixels, counted from the mask's border inwards, over which the photo passes into what was painted. No
    pixel outside the mask changes.
    """
    inside = _weights(mask, feather)[..., None]
    blended = np.rint(inside * np.asarray(painted, np.float32) + (1 - inside) * np.asarray(photo, np.float32))
    return Image.fromarray(np.where(mask[..., None], blended.astype(np.uint8), np.asarray(photo)))


def _weights(mask: Mask, feather: int) -> npt.NDArray[np.float32]:
    """How much of the painted picture counts, [H,W] in [0, 1]: 0 outside, rising over `feather` pixels to 1."""
    if feather <= 0:
        return mask.astype(np.float32)
    values = torch.from_numpy(mask).float()[None, None]
    padded = F.pad(values, (feather,) * 4, mode="replicate")
    mean = F.avg_pool2d(padded, 2 * feather + 1, stride=1)[0, 0].numpy()  # a half at a straight border
    return np.clip(2 * mean - 1, 0, 1) * mask


def changed_outside(photo: Image.Image, picture: Image.Image, mask: Mask) -> int:
    """How many pixels outside the mask differ; all of them when the sizes do."""
    if photo.size != picture.size:
        return int((~mask).sum())
    return int(((np.asarray(photo) != np.asarray(picture)).any(axis=-1) & ~mask).sum())
