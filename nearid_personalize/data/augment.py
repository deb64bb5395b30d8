"""The paper's augmentations (arXiv 2604.01973): background blacked out, colour jitter, flip, shift, scale.

Every choice comes from the generator that is passed in, and the same number of draws is made whatever is switched off,
so that one strength does not change another's draws.
"""

import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from nearid_personalize.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """How strongly pictures are varied; 0 switches a kind off.

    A picture's background is blacked out where its mask is known. The paper does so more often to the anchor than to
    the positives, but which view is the anchor is drawn anew in every epoch, while variants are made (and their tokens
    stored) once for all. So each variant is made for one anchor of its row, drawn evenly, and training draws anchors
    by how likely each is to be that one, given which views are black (`IdentityDataset.anchor_weights`): anchors and
    positives are black exactly as often as the paper says, whichever view is drawn.
    """

    anchor_blackout: float = 0.5
    """Probability that the anchor's background is black."""
    positive_blackout: float = 0.2
    """The same for the anchor's positives."""
    distractor_blackout: float = 0.6
    """The same for distractors."""
    jitter: float = 0.2
    """Brightness, contrast and saturation are each multiplied by 1 ± this. The paper does not give its strength; hue
    stays, because colour is part of an identity."""
    flip: float = 0.5
    """Probability of a mirror image."""
    shift: float = 0.1
    """Largest move sideways and up or down, as a share of the side."""
    scale: float = 0.1
    """Size is multiplied by 1 ± this."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise InputError(f"--{field.name.replace('_', '-')} must be in [0, 1], got {value}")
        if self.scale == 1:
            raise InputError("--scale must be below 1, or a picture may shrink to nothing")


OFF = Augmentation(anchor_blackout=0, positive_blackout=0, distractor_blackout=0, jitter=0, flip=0, shift=0, scale=0)
"""Pictures as they are, to the bit."""


def augment(image: Tensor, mask: Tensor | None, strength: Augmentation, rng: random.Random) -> Tensor:
    """One variant of a picture.

    Args:
        image: float `[3,H,W]` in [0, 1].
        mask: bool `[H,W]`, the subject; it moves with the picture, and what is outside becomes black. None: the
            background stays. (Whether it stays is the caller's draw, which spares reading most masks.)
    """
    flip = rng.random() < strength.flip
    spreads = (strength.scale, strength.jitter, strength.jitter, strength.jitter)
    scale, brightness, contrast, saturation = (1 + spread * _signed(rng) for spread in spreads)
    shift = (strength.shift * _signed(rng), strength.shift * _signed(rng))

    if flip or scale != 1 or shift != (0, 0):
        # The outermost pixels go on where a move opens a gap: no contour that was not there (a constant colour), no
        # second copy of a subject near the edge (a reflection). Gaps are never subject.
        image = _move(image, flip, scale, shift, "bilinear", "border").clamp(0, 1)
        mask = None if mask is None else _move(mask[None].float(), flip, scale, shift, "nearest", "zeros")[0] > 0
    if (brightness, contrast, saturation) != (1, 1, 1):
        image = _jitter(image, brightness, contrast, saturation)
    return image if mask is None else image * mask


def _signed(rng: random.Random) -> float:
    """Uniform in [-1, 1)."""
    return 2 * rng.random() - 1


def _move(image: Tensor, flip: bool, scale: float, shift: tuple[float, float], mode: str, padding: str) -> Tensor:
    """[C,H,W] mirrored and scaled about its centre, then moved right and down by shares of its sides."""
    across, down = (-1 if flip else 1) / scale, 1 / scale
    # From where in the old picture, in [-1, 1], each new pixel comes.
    theta = torch.tensor([[[across, 0, -2 * shift[0] * across], [0, down, -2 * shift[1] * down]]])
    grid = affine_grid(theta, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, mode=mode, padding_mode=padding, align_corners=False)[0]


def _jitter(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    image = (image * brightness).clamp(0, 1)
    grey = image.new_tensor([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
    mean = (image.mean(dim=(1, 2)) * grey).sum()
    image = torch.lerp(mean, image, contrast).clamp(0, 1)
    return torch.lerp(torch.einsum("chw,c->hw", image, grey), image, saturation).clamp(0, 1)
