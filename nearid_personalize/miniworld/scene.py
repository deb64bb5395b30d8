"""Where subjects stand: views and the eight contexts, each one drawing that a view shifts and mirrors.

Only operations that IEEE 754 rounds exactly (+, -, *, /, sqrt, comparisons) touch pixels, so that a seed gives the
same picture on every machine; no BLAS, no vectorised sines.

Lengths are pixels of a 64-pixel picture, whatever the size that is drawn: the scene is the same at every size.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .subjects import uniform

Array = npt.NDArray[np.float32]

IMAGE_SIZE = 64
"""Side of the pictures that the packaged models know, and unit of every length here."""
SUPERSAMPLING = 2
CONTEXTS = ("park", "beach", "space", "snow", "city", "kitchen", "desert", "sea")

# Light of a place: multiplies the subject's colours.
TINTS: dict[str, tuple[float, float, float]] = {
    "park": (1.0, 1.0, 1.0),
    "beach": (1.03, 1.0, 0.96),
    "space": (0.86, 0.86, 0.98),
    "snow": (0.97, 1.0, 1.04),
    "city": (0.96, 0.96, 0.98),
    "kitchen": (1.04, 1.0, 0.94),
    "desert": (1.06, 0.98, 0.9),
    "sea": (0.8, 0.96, 1.06),
}

_MARGIN = 14  # pixels of drawing beyond the picture on every side: room for shifts


def samples_per_pixel(image_size: int) -> int:
    """Samples along one pixel of the 64-pixel picture when `image_size` pixels are drawn.

    Raises:
        InputError: not a positive multiple of 64.
    """
    if image_size <= 0 or image_size % IMAGE_SIZE:
        raise InputError(f"image_size must be a multiple of {IMAGE_SIZE}, got {image_size}")
    return SUPERSAMPLING * image_size // IMAGE_SIZE


@dataclass(frozen=True)
class View:
    """How a picture is taken: pixels are of a 64-pixel picture, angles in degrees."""

    yaw: float = 0.0
    pitch: float = 8.0
    scale: float = 1.0
    """1 = the subject fills 77 % of the height."""
    shift_x: float = 0.0
    shift_y: float = 0.0
    light: float = -0.45
    """Sideways position of the light, -1 (left) to 1 (right)."""
    background_x: int = 0
    """Background shift in half pixels, at most 28 either way."""
    background_y: int = 0
    brightness: float = 1.0


def sample_view(rng: random.Random, wide: bool = False) -> View:
    """A random view: modest (what the denoiser draws) or wide (what the scorer must not mind)."""
    if wide:
        return View(
            yaw=uniform(rng, -42, 42),
            pitch=uniform(rng, 2, 16),
            scale=uniform(rng, 0.82, 1.04),
            shift_x=uniform(rng, -5, 5),
            shift_y=uniform(rng, -2.5, 2.5),
            light=uniform(rng, -0.8, 0.8),
            background_x=int(uniform(rng, -26, 27)),
            background_y=int(uniform(rng, -6, 7)),
            brightness=uniform(rng, 0.88, 1.08),
        )
    return View(
        yaw=uniform(rng, -32, 32),
        shift_x=uniform(rng, -1.6, 1.6),
        shift_y=uniform(rng, -0.8, 0.8),
        background_x=int(uniform(rng, -8, 9)),
        background_y=int(uniform(rng, -2, 3)),
    )


def background(context: str, view: View, image_size: int = IMAGE_SIZE, rich: bool = False) -> Array:
    """The empty context under a view, float32 `[S, S, 3]` in [0, 255], contact shadow included.

    S is the supersampled side, `SUPERSAMPLING * image_size`. The shadow depends on the view alone, so that two
    subjects in one view share every background pixel.

    Raises:
        InputError: unknown context, or a size that is no multiple of 64.
    """
    if context not in CONTEXTS:
        raise InputError(f"unknown context {context!r}; choose one of: {', '.join(CONTEXTS)}")
    dense = samples_per_pixel(image_size)
    size, half_pixel = SUPERSAMPLING * image_size, dense // SUPERSAMPLING
    top = _MARGIN * dense + view.background_y * half_pixel
    left = _MARGIN * dense + view.background_x * half_pixel
    pixels = _drawing(context, image_size)[top : top + size, left : left + size] * np.float32(view.brightness)
    return pixels * _contact_shadow(view, image_size, rich)[:, :, None]


def _contact_shadow(view: View, image_size: int, rich: bool) -> Array:
    """What the ground's light is multiplied by, float32 `[S, S]`."""
    x, y = pixel_grid(view, image_size)
    radius = (x / np.float32(0.72)) ** 2 + ((y + np.float32(0.98)) / np.float32(0.16)) ** 2
    strength = np.clip(np.float32(1.15) - radius, np.float32(0), np.float32(1))
    if not rich:
        return np.float32(1) - np.float32(0.42) * strength
    # Dark where the subject touches the ground, fading smoothly into a wide penumbra
    wide = np.clip(np.float32(1) - np.float32(0.55) * radius, np.float32(0), np.float32(1))
    core = strength * strength * (np.float32(3) - np.float32(2) * strength)
    return np.float32(1) - np.float32(0.34) * core - np.float32(0.22) * wide * wide


def pixel_grid(view: View, image_size: int = IMAGE_SIZE) -> tuple[Array, Array]:
    """Subject coordinates (x right, y up; the ground is y = -1) of the supersampled pixels, `[1, S]`, `[S, 1]`."""
    dense = samples_per_pixel(image_size)
    unit = np.float32(24.6 * dense * view.scale)
    centre_x = np.float32((IMAGE_SIZE / 2 + view.shift_x) * dense - 0.5)
    # The feet stay where they are when the scale changes: a small subject must not float.
    ground = np.float32((IMAGE_SIZE * 0.925 + view.shift_y) * dense - 0.5)
    steps = np.arange(SUPERSAMPLING * image_size, dtype=np.float32)
    return ((steps - centre_x) / unit)[None, :], ((ground - steps) / unit - np.float32(1))[:, None]


@functools.lru_cache(maxsize=2 * len(CONTEXTS))
def _drawing(context: str, image_size: int) -> Array:
    """The whole drawing of a context, with margins, float32 in [0, 255]."""
    canvas = _Canvas(samples_per_pixel(image_size))
    _PAINTERS[context](canvas)
    return canvas.pixels


class _Canvas:
    """A supersampled picture with a few shapes; coordinates are pixels of the unshifted 64-pixel picture."""

    def __init__(self, dense: int) -> None:
        side = (IMAGE_SIZE + 2 * _MARGIN) * dense
        steps = np.arange(side, dtype=np.float32) / np.float32(dense) - np.float32(_MARGIN)
        self.x, self.y = steps[None, :], steps[:, None]
        self.pixels: Array = np.zeros((side, side, 3), np.float32)

    def paint(self, where: npt.NDArray[np.bool_], color: tuple[float, float, float]) -> None:
        self.pixels[np.broadcast_to(where, self.pixels.shape[:2])] = np.asarray(color, np.float32)

    def gradient(self, top: tuple[float, float, float], bottom: tuple[float, float, float], end: float) -> None:
        part = np.clip((self.y + np.float32(_MARGIN)) / np.float32(end + _MARGIN), 0, 1)[:, :, None]
        low, high = np.asarray(top, np.float32), np.asarray(bottom, np.float32)
        self.pixels[:] = low + (high - low) * part

    def below(self, height: float, color: tuple[float, float, float], slope: float = 0.0) -> None:
        self.paint(self.y > np.float32(height) + np.float32(slope) * self.x, color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: tuple[float, float, float]) -> None:
        self.paint((self.x >= x0) & (self.x < x1) & (self.y >= y0) & (self.y < y1), color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple[float, float, float]) -> None:
        self.paint(((self.x - x) / np.float32(rx)) ** 2 + ((self.y - y) / np.float32(ry)) ** 2 < 1, color)

    def triangle(self, x: float, y: float, half_width: float, height: float, color: tuple[float, float, float]) -> None:
        """An upright triangle with its base's middle at (x, y)."""
        up = (np.float32(y) - self.y) / np.float32(height)
        self.paint((up >= 0) & (np.abs(self.x - x) <= np.float32(half_width) * (1 - up)), color)


def _park(c: _Canvas) -> None:
    c.gradient((105, 175, 235), (205, 232, 250), 40)
    c.ellipse(22, 8, 8, 3.2, (250, 252, 255))
    c.ellipse(28, 10, 7, 2.8, (250, 252, 255))
    for x in (-6, 8, 57, 71):
        c.box(x - 1.5, 22, x + 1.5, 40, (110, 75, 45))
        c.ellipse(x, 19, 8, 9, (52, 130, 60))
        c.ellipse(x - 2, 16, 4, 4, (72, 152, 74))
    c.below(38, (104, 172, 74))
    c.below(54, (92, 158, 66))


def _beach(c: _Canvas) -> None:
    c.gradient((120, 190, 245), (215, 238, 252), 28)
    c.ellipse(10, 9, 6, 6, (255, 236, 140))
    c.below(28, (38, 130, 190))
    c.below(34, (66, 168, 208))
    c.below(39, (236, 214, 164))
    c.below(54, (224, 198, 146))
    c.box(56, 14, 58.5, 42, (140, 100, 60))
    for dx, dy in ((-6, 1), (6, 1), (-4, -4), (4, -4)):
        c.ellipse(57 + dx, 14 + dy, 6, 2.2, (58, 150, 72))


def _space(c: _Canvas) -> None:
    c.gradient((10, 10, 34), (26, 20, 60), 50)
    rng = random.Random("stars")
    for _ in range(110):
        x, y, r = uniform(rng, -14, 78), uniform(rng, -14, 50), uniform(rng, 0.4, 0.85)
        c.ellipse(x, y, r, r, (235, 235, 255))
    c.ellipse(54, 9, 7, 7, (226, 178, 96))
    c.ellipse(54, 9, 11, 1.6, (246, 214, 150))
    c.ellipse(8, 16, 3.4, 3.4, (150, 190, 240))
    c.ellipse(32, 96, 74, 46, (122, 122, 136))
    for x, y, r in ((6, 58, 4), (54, 60, 5), (24, 62, 3)):
        c.ellipse(x, y, r, r * 0.35, (98, 98, 112))


def _snow(c: _Canvas) -> None:
    c.gradient((176, 204, 232), (224, 236, 248), 40)
    for x, h in ((0, 26), (26, 20), (62, 30)):
        c.triangle(x, 42, 22, h, (150, 172, 204))
        c.triangle(x, 42 - h * 0.62, 22 * 0.38, h * 0.38, (246, 250, 255))
    for x in (-5, 7, 58):
        for level in range(3):
            c.triangle(x, 44 - 6 * level, 6.5 - 1.4 * level, 9, (52, 112, 92))
    c.below(42, (240, 246, 252))
    c.below(56, (226, 234, 246))


def _city(c: _Canvas) -> None:
    c.gradient((148, 170, 200), (214, 222, 232), 40)
    for x, top, color in ((-14, 10, 92), (0, 2, 118), (14, 16, 98), (42, 12, 110), (55, 0, 90), (69, 8, 120)):
        c.box(x, top, x + 13, 44, (color, color + 6, color + 16))
        for wx in (2, 6, 10):
            for wy in range(top + 3, 40, 6):
                c.box(x + wx - 1, wy, x + wx + 1, wy + 3, (250, 226, 130))
    c.below(44, (82, 84, 92))
    c.below(46, (96, 98, 106))
    for x in (-10, 8, 26, 44, 62):
        c.box(x, 59, x + 9, 60.5, (238, 216, 110))


def _kitchen(c: _Canvas) -> None:
    c.gradient((246, 226, 190), (250, 236, 208), 40)
    c.box(22, -14, 42, 14, (150, 110, 70))
    c.box(24, -14, 40, 12, (164, 214, 246))
    for x in (-14, 2, 50, 66):
        c.box(x, -14, x + 12, 10, (176, 116, 66))
        c.box(x + 5, 6, x + 7, 8, (230, 210, 170))
    for x in range(-14, 80, 8):
        c.box(x, 26, x + 7, 33, (232, 240, 242))
    c.below(36, (206, 158, 108))
    c.below(39, (168, 112, 68))
    c.below(50, (154, 100, 60))


def _desert(c: _Canvas) -> None:
    c.gradient((250, 178, 96), (255, 226, 168), 36)
    c.ellipse(50, 10, 6.5, 6.5, (255, 244, 196))
    c.ellipse(4, 50, 34, 18, (222, 152, 88))
    c.ellipse(66, 52, 36, 20, (214, 142, 80))
    c.below(46, (230, 166, 98))
    c.below(57, (218, 150, 86))
    for x, h in ((7, 18), (60, 14)):
        c.box(x - 1.8, 44 - h, x + 1.8, 46, (66, 134, 72))
        c.box(x - 5.5, 44 - h * 0.7, x - 3, 44 - h * 0.3, (66, 134, 72))
        c.box(x - 5.5, 44 - h * 0.42, x, 44 - h * 0.3, (66, 134, 72))
        c.box(x + 3, 44 - h * 0.8, x + 5.5, 44 - h * 0.45, (66, 134, 72))
        c.box(x, 44 - h * 0.57, x + 5.5, 44 - h * 0.45, (66, 134, 72))


def _sea(c: _Canvas) -> None:
    c.gradient((40, 140, 210), (16, 70, 140), 60)
    for x, y, r in ((8, 12, 2.2), (11, 20, 1.4), (7, 27, 1.7), (56, 30, 2), (58, 22, 1.4), (36, 4, 1.6)):
        c.ellipse(x, y, r, r, (172, 220, 246))
    c.ellipse(54, 12, 5, 2.6, (250, 166, 50))
    c.triangle(59.5, 14, 2.4, 5, (250, 166, 50))
    for x, h in ((-8, 26), (4, 22), (9, 14), (55, 16), (61, 26), (72, 20)):
        c.ellipse(x, 58 - h / 2, 1.6, h / 2, (44, 150, 92))
    c.below(53, (206, 190, 140))
    c.below(60, (190, 172, 122))


_PAINTERS = {
    "park": _park,
    "beach": _beach,
    "space": _space,
    "snow": _snow,
    "city": _city,
    "kitchen": _kitchen,
    "desert": _desert,
    "sea": _sea,
}
