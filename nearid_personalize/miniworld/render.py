"""The renderer: subjects as shaded 3-D ellipsoids and boxes, orthographic, one view at a time.

Coordinates: x right, y up, z towards the viewer; the ground is y = -1, a head's top about y = 0.75. Every part is a
linear map from space to a unit sphere or cube, intersected in closed form per pixel of its bounding box. As in
`scene`, only exactly rounded operations touch pixels, so a seed gives the same picture on every machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .scene import IMAGE_SIZE, SUPERSAMPLING, TINTS, Array, View, background, pixel_grid
from .subjects import Pet

RGB = tuple[float, float, float]
Vec = tuple[float, float, float]

COLOR_VALUES: dict[str, RGB] = {
    "brown": (134, 80, 42),
    "red": (216, 40, 38),
    "orange": (244, 140, 30),
    "yellow": (250, 208, 48),
    "green": (46, 164, 70),
    "blue": (40, 108, 236),
    "purple": (146, 54, 184),
    "pink": (246, 142, 184),
    "white": (246, 244, 238),
    "black": (38, 38, 44),
    "grey": (150, 154, 162),
    "dark": (24, 24, 28),
}


@dataclass(frozen=True)
class Part:
    """An ellipsoid or box. `coat` parts wear the subject's pattern over their own colour."""

    center: Vec
    radii: Vec
    color: str
    coat: bool = False
    tilt: float = 0.0
    """Degrees about z, counter-clockwise."""
    shape: Literal["ellipsoid", "box"] = "ellipsoid"


@dataclass(frozen=True)
class Anatomy:
    """Where a category wears what all categories have."""

    eye_y: float
    eye_z: float
    eye_dx: float
    top_y: float
    """Height where a hat sits."""
    neck: Vec
    """Centre of a scarf; its z is also where a bow sits in front."""
    neck_radius: float
    tail: tuple[float, float]
    """Root of the tail (x, y)."""
    ear: tuple[float, float]
    """Where an upright ear sits (x, y)."""


ANATOMY = {
    "dog": Anatomy(0.42, 0.40, 0.20, 0.68, (0, -0.10, 0.10), 0.36, (0.36, -0.72), (0.34, 0.68)),
    "cat": Anatomy(0.38, 0.38, 0.21, 0.64, (0, -0.10, 0.08), 0.33, (0.34, -0.76), (0.33, 0.64)),
    "bear": Anatomy(0.42, 0.40, 0.17, 0.70, (0, -0.10, 0.12), 0.42, (0.46, -0.72), (0.36, 0.68)),
    "robot": Anatomy(0.44, 0.38, 0.20, 0.72, (0, -0.08, 0.08), 0.40, (0.42, -0.62), (0.34, 0.70)),
    "teapot": Anatomy(0.10, 0.46, 0.22, 0.56, (0, -0.32, 0.04), 0.66, (0.56, -0.46), (0.0, 0.62)),
    "backpack": Anatomy(0.16, 0.30, 0.21, 0.48, (0, -0.16, -0.16), 0.52, (0.52, -0.30), (0.0, 0.46)),
}


def build(pet: Pet) -> list[Part]:
    """All parts of a subject, in subject coordinates."""
    a = ANATOMY[pet.category]
    return [*_BODIES[pet.category](pet), *_ears(pet, a), *_tail(pet, a), *_eyes(pet, a), *_accessory(pet, a)]


def _mirrored(parts: list[Part]) -> list[Part]:
    """Each part and its mirror image in x."""
    flipped = [
        Part((-p.center[0], p.center[1], p.center[2]), p.radii, p.color, p.coat, -p.tilt, p.shape) for p in parts
    ]
    return [*parts, *flipped]


def _dog(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    return [
        Part((0, -0.48, 0), (0.40, 0.48, 0.36), body, True),
        Part((0, -0.44, 0.16), (0.24, 0.34, 0.26), second),
        *_mirrored(
            [
                Part((0.19, -0.68, 0.30), (0.12, 0.28, 0.13), body, True),
                Part((0.20, -0.92, 0.40), (0.14, 0.08, 0.16), second),
                Part((0.38, -0.78, 0.06), (0.18, 0.20, 0.26), body, True),
                Part((0.44, -0.93, 0.24), (0.13, 0.07, 0.16), second),
            ]
        ),
        Part((0, 0.34, 0.06), (0.48, 0.42, 0.40), body, True),
        Part((0, 0.17, 0.46), (0.21, 0.16, 0.24), second),
        Part((0, 0.26, 0.66), (0.10, 0.07, 0.07), "dark"),
        Part((0, 0.02, 0.56), (0.07, 0.10, 0.05), "red"),
    ]


def _cat(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    return [
        Part((0, -0.50, 0), (0.33, 0.48, 0.32), body, True),
        Part((0, -0.46, 0.14), (0.19, 0.32, 0.22), second),
        *_mirrored(
            [
                Part((0.14, -0.68, 0.27), (0.10, 0.28, 0.11), body, True),
                Part((0.15, -0.93, 0.34), (0.12, 0.07, 0.13), second),
                Part((0.34, -0.80, 0.04), (0.17, 0.19, 0.26), body, True),
                Part((0.10, 0.16, 0.38), (0.12, 0.09, 0.10), second),
                Part((0.36, 0.19, 0.42), (0.16, 0.018, 0.018), "dark", tilt=12, shape="box"),
                Part((0.36, 0.11, 0.42), (0.16, 0.018, 0.018), "dark", tilt=-8, shape="box"),
            ]
        ),
        Part((0, 0.30, 0.04), (0.50, 0.38, 0.38), body, True),
        Part((0, 0.22, 0.47), (0.06, 0.045, 0.05), "pink"),
    ]


def _bear(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    return [
        Part((0, -0.46, 0), (0.50, 0.50, 0.42), body, True),
        Part((0, -0.46, 0.20), (0.32, 0.36, 0.28), second),
        *_mirrored(
            [
                Part((0.50, -0.34, 0.14), (0.14, 0.28, 0.15), body, True, 32),
                Part((0.62, -0.52, 0.18), (0.12, 0.11, 0.12), second),
                Part((0.34, -0.84, 0.24), (0.20, 0.16, 0.26), body, True),
                Part((0.35, -0.84, 0.46), (0.14, 0.13, 0.06), second),
            ]
        ),
        Part((0, 0.34, 0.06), (0.46, 0.42, 0.40), body, True),
        Part((0, 0.18, 0.40), (0.22, 0.17, 0.16), second),
        Part((0, 0.25, 0.55), (0.09, 0.06, 0.06), "dark"),
    ]


def _robot(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    return [
        Part((0, -0.46, 0), (0.40, 0.38, 0.30), body, True, shape="box"),
        Part((0, -0.44, 0.30), (0.26, 0.20, 0.04), second, shape="box"),
        Part((-0.12, -0.40, 0.34), (0.05, 0.05, 0.03), "red"),
        Part((0.02, -0.40, 0.34), (0.05, 0.05, 0.03), "yellow"),
        Part((0.14, -0.40, 0.34), (0.05, 0.05, 0.03), "green"),
        *_mirrored(
            [
                Part((0.22, -0.92, 0.06), (0.15, 0.09, 0.24), second, shape="box"),
                Part((0.50, -0.40, 0.04), (0.10, 0.28, 0.12), body, True, 8),
                Part((0.54, -0.68, 0.06), (0.12, 0.11, 0.12), second),
            ]
        ),
        Part((0, -0.06, 0), (0.16, 0.08, 0.16), "grey"),
        Part((0, 0.36, 0.02), (0.44, 0.36, 0.34), body, True, shape="box"),
        Part((0, 0.14, 0.36), (0.24, 0.075, 0.03), second, shape="box"),
        Part((0, 0.14, 0.39), (0.18, 0.03, 0.03), "dark", shape="box"),
    ]


def _teapot(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    # The handle: beads on a half circle behind the left side.
    beads = (
        (-0.60, 0.10),
        (-0.76, 0.08),
        (-0.88, -0.04),
        (-0.92, -0.22),
        (-0.86, -0.40),
        (-0.72, -0.52),
        (-0.56, -0.58),
    )
    return [
        Part((0, -0.30, 0), (0.66, 0.62, 0.54), body, True),
        Part((0, -0.90, 0), (0.38, 0.10, 0.34), second),
        Part((0, 0.24, 0), (0.42, 0.20, 0.38), second),
        Part((0, 0.30, 0), (0.36, 0.20, 0.33), body, True),
        Part((0, -0.14, 0.52), (0.12, 0.045, 0.06), "dark"),
        *_mirrored([Part((0.34, -0.10, 0.44), (0.09, 0.06, 0.06), second)]),
        *[Part((x, y, 0), (0.10, 0.10, 0.10), second) for x, y in beads],
    ]


def _backpack(pet: Pet) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    return [
        Part((0, -0.44, 0), (0.50, 0.52, 0.30), body, True, shape="box"),
        Part((0, 0.08, 0), (0.50, 0.40, 0.30), body, True),
        Part((0, -0.22, 0.31), (0.40, 0.022, 0.02), "grey", shape="box"),
        Part((0.34, -0.26, 0.33), (0.03, 0.06, 0.02), "yellow", shape="box"),
        Part((0, -0.62, 0.30), (0.36, 0.28, 0.12), second, shape="box"),
        Part((0, -0.40, 0.31), (0.38, 0.13, 0.13), second),
        Part((0, -0.52, 0.44), (0.07, 0.06, 0.02), "yellow", shape="box"),
        Part((0, -0.03, 0.29), (0.10, 0.04, 0.05), "dark"),
        *_mirrored([Part((0.53, -0.68, 0.02), (0.08, 0.24, 0.20), second, shape="box")]),
    ]


_BODIES: dict[str, Callable[[Pet], list[Part]]] = {
    "dog": _dog,
    "cat": _cat,
    "bear": _bear,
    "robot": _robot,
    "teapot": _teapot,
    "backpack": _backpack,
}


def _ears(pet: Pet, a: Anatomy) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    x, y = a.ear
    if pet.category == "teapot":  # the lid's knob
        return {
            "pointy": [Part((0, y, 0), (0.09, 0.28, 0.09), second)],
            "round": [Part((0, y - 0.02, 0), (0.17, 0.16, 0.16), second)],
            "floppy": [Part((0, y - 0.10, 0), (0.30, 0.07, 0.26), second)],
        }[pet.ears]
    if pet.category == "backpack":  # the handle on top
        arch = ((0.17, 0.02), (0.16, 0.11), (0.11, 0.18), (0.04, 0.22))
        return {
            "pointy": _mirrored([Part((0.09, y + 0.12, 0), (0.05, 0.24, 0.06), second, tilt=24)]),
            "round": _mirrored([Part((dx, y + dy, 0), (0.055, 0.055, 0.06), second) for dx, dy in arch]),
            "floppy": [Part((0, y + 0.02, 0.02), (0.34, 0.06, 0.20), second)],
        }[pet.ears]
    return _mirrored(
        {
            "pointy": [
                Part((x, y + 0.06, 0), (0.14, 0.32, 0.10), body, True, -16),
                Part((x, y + 0.05, 0.07), (0.075, 0.22, 0.06), second, tilt=-16),
            ],
            "round": [
                Part((x + 0.04, y - 0.01, 0), (0.19, 0.19, 0.10), body, True),
                Part((x + 0.04, y - 0.01, 0.07), (0.11, 0.11, 0.06), second),
            ],
            "floppy": [Part((x + 0.17, y - 0.42, 0.06), (0.13, 0.36, 0.14), second, tilt=12)],
        }[pet.ears]
    )


def _tail(pet: Pet, a: Anatomy) -> list[Part]:
    body, second = pet.body_color, pet.second_color
    x, y = a.tail
    if pet.category == "teapot":  # the spout
        return {
            "long": [
                Part((x + 0.12, y + 0.06, 0), (0.22, 0.12, 0.12), body, True, 45),
                Part((x + 0.26, y + 0.26, 0), (0.10, 0.26, 0.10), body, True, -14),
                Part((x + 0.34, y + 0.52, 0), (0.11, 0.08, 0.10), second),
            ],
            "short": [
                Part((x + 0.12, y + 0.10, 0), (0.20, 0.13, 0.13), body, True, 30),
                Part((x + 0.26, y + 0.20, 0), (0.09, 0.12, 0.11), second, tilt=-30),
            ],
            "bushy": [
                Part((x + 0.14, y + 0.16, 0), (0.26, 0.22, 0.20), body, True, 40),
                Part((x + 0.28, y + 0.34, 0), (0.20, 0.13, 0.18), second, tilt=-20),
            ],
        }[pet.tail]
    if pet.category == "backpack":  # the strap at the side; a bushy one is a rolled mat
        drop = ((0.05, 0.30), (0.13, 0.18), (0.18, 0.04), (0.20, -0.10), (0.19, -0.24), (0.16, -0.38))
        return {
            "long": [Part((x + dx, y + dy, 0.06), (0.075, 0.085, 0.06), second) for dx, dy in drop],
            "short": [Part((x + 0.10, y + 0.20, 0.06), (0.15, 0.06, 0.06), second, tilt=-35)],
            "bushy": [
                Part((x + 0.17, y + 0.02, 0.04), (0.15, 0.34, 0.15), body, True),
                Part((x + 0.17, y + 0.02, 0.04), (0.165, 0.07, 0.165), second),
            ],
        }[pet.tail]
    if pet.tail == "long":
        curve = ((0.06, -0.08), (0.18, -0.07), (0.29, 0.0), (0.36, 0.11), (0.39, 0.24), (0.39, 0.37))
        beads = [Part((x + dx, y + dy, -0.12), (0.095, 0.095, 0.095), body, True) for dx, dy in curve]
        return [*beads, Part((x + 0.37, y + 0.52, -0.12), (0.11, 0.13, 0.11), second)]
    if pet.tail == "short":
        return [Part((x + 0.14, y + 0.02, -0.12), (0.16, 0.15, 0.15), second)]
    return [
        Part((x + 0.24, y + 0.12, -0.12), (0.20, 0.36, 0.20), body, True, -38),
        Part((x + 0.42, y + 0.36, -0.12), (0.15, 0.20, 0.16), second, tilt=-38),
    ]


def _eyes(pet: Pet, a: Anatomy) -> list[Part]:
    return _mirrored(
        [
            Part((a.eye_dx, a.eye_y, a.eye_z), (0.145, 0.155, 0.07), "white"),
            Part((a.eye_dx, a.eye_y, a.eye_z + 0.055), (0.105, 0.115, 0.04), pet.eye_color),
            Part((a.eye_dx, a.eye_y, a.eye_z + 0.085), (0.05, 0.06, 0.03), "dark"),
        ]
    )


def _accessory(pet: Pet, a: Anatomy) -> list[Part]:
    color = pet.accessory_color
    neck_x, neck_y, neck_z = a.neck
    front = neck_z + a.neck_radius
    if pet.accessory == "hat":
        return [
            Part((0, a.top_y, 0.02), (0.46, 0.07, 0.42), color),
            Part((0, a.top_y + 0.12, 0.02), (0.30, 0.24, 0.28), color),
        ]
    if pet.accessory == "crown":
        spikes = [Part((x, a.top_y + 0.20, z), (0.065, 0.17, 0.06), color) for x, z in _CROWN]
        return [Part((0, a.top_y + 0.06, 0.02), (0.30, 0.11, 0.28), color), *spikes]
    if pet.accessory == "scarf":
        return [
            Part((neck_x, neck_y, neck_z), (a.neck_radius + 0.08, 0.11, a.neck_radius), color),
            Part((neck_x - 0.20, neck_y - 0.22, front - 0.06), (0.10, 0.20, 0.05), color, tilt=-8, shape="box"),
        ]
    if pet.accessory == "bow":
        wings = _mirrored([Part((0.17, neck_y - 0.04, front + 0.02), (0.17, 0.12, 0.06), color, tilt=14)])
        return [*wings, Part((0, neck_y - 0.04, front + 0.06), (0.07, 0.08, 0.06), color)]
    frames = _mirrored([Part((a.eye_dx, a.eye_y, a.eye_z - 0.01), (0.205, 0.215, 0.07), color)])
    return [*frames, Part((0, a.eye_y, a.eye_z + 0.04), (0.10, 0.04, 0.04), color, shape="box")]


_CROWN = ((-0.24, 0.06), (-0.12, 0.22), (0.0, 0.28), (0.12, 0.22), (0.24, 0.06))


# Patterns are functions of the point in subject coordinates: they turn with the pet. [N] arrays -> bool [N].
_SPOTS = (
    (-0.30, 0.52, 0.30), (0.30, 0.16, 0.34), (0.05, 0.66, 0.26), (-0.40, 0.10, 0.16), (0.42, 0.50, 0.10),
    (-0.34, -0.30, 0.26), (0.34, -0.36, 0.24), (-0.30, -0.66, 0.28), (0.26, -0.62, 0.38), (0.44, -0.80, 0.16),
    (-0.46, -0.80, 0.10), (0.62, -0.40, -0.06), (0.72, -0.70, -0.06), (-0.56, -0.10, 0.16), (0.56, -0.06, 0.16),
)  # fmt: skip


def _spots(x: Array, y: Array, z: Array) -> npt.NDArray[np.bool_]:
    inside = np.zeros(x.shape, bool)
    for sx, sy, sz in _SPOTS:
        inside |= (x - np.float32(sx)) ** 2 + (y - np.float32(sy)) ** 2 + (z - np.float32(sz)) ** 2 < np.float32(0.0225)
    return inside


def _stripes(x: Array, y: Array, z: Array) -> npt.NDArray[np.bool_]:
    phase = y * np.float32(3.1) + np.float32(0.2)
    return phase - np.floor(phase) < np.float32(0.42)


def _halves(x: Array, y: Array, z: Array) -> npt.NDArray[np.bool_]:
    return np.where(y > np.float32(-0.06), x, -x) > 0


def _patches(x: Array, y: Array, z: Array) -> npt.NDArray[np.bool_]:
    eye = (x + np.float32(0.26)) ** 2 + (y - np.float32(0.42)) ** 2 < np.float32(0.075)
    side = (x - np.float32(0.36)) ** 2 + (y + np.float32(0.46)) ** 2 < np.float32(0.09)
    return eye | side


_PATTERNS = {"spots": _spots, "stripes": _stripes, "halves": _halves, "patches": _patches}


def _rounded(value: float) -> np.float32:
    # Trigonometry differs between C libraries in the last digit; rounding it away keeps pictures identical.
    return np.float32(round(value, 6))


def _rotation(yaw: float, pitch: float) -> npt.NDArray[np.float64]:
    """Subject to camera coordinates, `[3, 3]`."""
    cy, sy = _rounded(math.cos(math.radians(yaw))), _rounded(math.sin(math.radians(yaw)))
    cp, sp = _rounded(math.cos(math.radians(pitch))), _rounded(math.sin(math.radians(pitch)))
    # pitch about x after yaw about y
    return np.array(
        [[cy, 0, sy], [sp * sy, cp, -sp * cy], [-cp * sy, sp, cp * cy]],
        dtype=np.float64,
    )


@dataclass(frozen=True)
class Rendering:
    """One picture of one subject, R pixels wide and high."""

    image: npt.NDArray[np.uint8]
    """`[R, R, 3]`"""
    mask: npt.NDArray[np.bool_]
    """`[R, R]`, true where the subject covers any part of the pixel"""


def render(pet: Pet, context: str, view: View, image_size: int = IMAGE_SIZE, rich: bool = False) -> Rendering:
    """A subject in a context under a view. Pixels outside the mask depend on context and view alone.

    Args:
        image_size: side in pixels, a multiple of 64; every size shows the same scene.
        rich: soft shadows, rim light and materials (fur, metal, glaze, cloth). The packaged models were trained
            without.

    Raises:
        InputError: unknown context, or a size that is no multiple of 64.
    """
    scene = background(context, view, image_size, rich)
    color, inside = draw_subject(pet, view, TINTS[context], image_size, rich)
    pixels = np.where(inside[:, :, None], color, scene)
    return Rendering(to_uint8(downsample(pixels)), downsample(inside[:, :, None].astype(np.float32))[:, :, 0] > 0)


def downsample(pixels: Array) -> Array:
    """The mean of each 2 x 2 block, `[2H, 2W, C]` to `[H, W, C]`."""
    quarter = pixels[0::2, 0::2] + pixels[0::2, 1::2] + pixels[1::2, 0::2] + pixels[1::2, 1::2]
    return quarter * np.float32(0.25)


def to_uint8(pixels: Array) -> npt.NDArray[np.uint8]:
    """Round to the nearest byte."""
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def draw_subject(
    pet: Pet, view: View, tint: RGB, image_size: int = IMAGE_SIZE, rich: bool = False
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The subject alone: shaded colours `[S, S, 3]` in [0, 255] and coverage `[S, S]`, supersampled."""
    parts = build(pet)
    size = image_size * SUPERSAMPLING
    rotation = _rotation(view.yaw, view.pitch)
    grid_x, grid_y = pixel_grid(view, image_size)
    depth = np.full((size, size), -1e9, np.float32)
    index = np.full((size, size), -1, np.int16)
    normal = np.zeros((3, size, size), np.float32)
    for number, part in enumerate(parts):
        _intersect(part, number, rotation, grid_x, grid_y, depth, index, normal)
    rows, columns = np.nonzero(index >= 0)
    which = index[rows, columns]
    point = (grid_x[0, columns], grid_y[rows, 0], depth[rows, columns])
    # camera -> subject coordinates: the transpose of the rotation, written out to stay exactly rounded
    r = rotation.astype(np.float32)
    px, py, pz = (r[0, i] * point[0] + r[1, i] * point[1] + r[2, i] * point[2] for i in range(3))
    palette = np.array([COLOR_VALUES[part.color] for part in parts], np.float32)
    albedo = palette[which]
    if pet.pattern in _PATTERNS:
        coat = np.array([part.coat for part in parts])[which]
        second = coat & _PATTERNS[pet.pattern](px, py, pz)
        albedo[second] = np.array(COLOR_VALUES[pet.second_color], np.float32)
    nx, ny, nz = normal[:, rows, columns]
    color = np.zeros((size, size, 3), np.float32)
    if rich:
        albedo = albedo * _grain(MATERIALS[pet.category], px, py, pz)[:, None]
        color[rows, columns] = _shade_richly(albedo, nx, ny, nz, view, tint, _GLOSS[MATERIALS[pet.category]])
    else:
        color[rows, columns] = _shade(albedo, nx, ny, nz, view, tint)
    return color, index >= 0


def _intersect(
    part: Part,
    number: int,
    rotation: npt.NDArray[np.float64],
    grid_x: Array,
    grid_y: Array,
    depth: Array,
    index: npt.NDArray[np.int16],
    normal: Array,
) -> None:
    """Draw one part into the depth, part-index and normal buffers, within its own bounding box."""
    ct, st = _rounded(math.cos(math.radians(part.tilt))), _rounded(math.sin(math.radians(part.tilt)))
    frame = ((ct, st, 0.0), (-st, ct, 0.0), (0.0, 0.0, 1.0))  # rows: the part's own axes in subject coordinates
    # to_unit[i, j]: camera offset j -> unit coordinate i.  Python floats: exactly rounded, no BLAS.
    to_unit = [
        [sum(float(frame[i][k]) * float(rotation[j, k]) for k in range(3)) / part.radii[i] for j in range(3)]
        for i in range(3)
    ]
    center = [sum(float(rotation[j, k]) * part.center[k] for k in range(3)) for j in range(3)]
    reach = [_reach(part, frame, rotation, j) for j in range(2)]
    step = float(grid_x[0, 1] - grid_x[0, 0])
    x0, x1 = _span((center[0] - reach[0] - float(grid_x[0, 0])) / step, 2 * reach[0] / step, grid_x.size)
    y0, y1 = _span((float(grid_y[0, 0]) - center[1] - reach[1]) / step, 2 * reach[1] / step, grid_y.size)
    if x0 >= x1 or y0 >= y1:
        return
    dx = grid_x[:, x0:x1] - np.float32(center[0])
    dy = grid_y[y0:y1] - np.float32(center[1])
    offsets = [np.float32(u[0]) * dx + np.float32(u[1]) * dy for u in to_unit]
    slopes = [np.float32(u[2]) for u in to_unit]
    hit, z, unit_normal = (_sphere if part.shape == "ellipsoid" else _cube)(offsets, slopes)
    z = z + np.float32(center[2])
    window = (slice(y0, y1), slice(x0, x1))
    nearer = hit & (z > depth[window])
    depth[window][nearer] = z[nearer]
    index[window][nearer] = number
    for j in range(3):
        u = [np.float32(to_unit[i][j]) for i in range(3)]
        component = u[0] * unit_normal[0] + u[1] * unit_normal[1] + u[2] * unit_normal[2]
        normal[j][window][nearer] = component[nearer]


def _reach(part: Part, frame: tuple, rotation: npt.NDArray[np.float64], axis: int) -> float:
    """Half the part's extent along a camera axis."""
    axes = [part.radii[i] * sum(float(frame[i][k]) * float(rotation[axis, k]) for k in range(3)) for i in range(3)]
    return sum(abs(a) for a in axes) if part.shape == "box" else math.sqrt(sum(a * a for a in axes))


def _span(start: float, length: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(start)), min(size, math.ceil(start + length) + 1)


def _sphere(offsets: list[Array], slopes: list[np.float32]) -> tuple[npt.NDArray[np.bool_], Array, list[Array]]:
    """The nearer hit of rays `offset + slope * z` with the unit sphere."""
    a, b = offsets, slopes
    bb = b[0] * b[0] + b[1] * b[1] + b[2] * b[2]
    ab = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    aa = a[0] * a[0] + a[1] * a[1] + a[2] * a[2]
    discriminant = ab * ab - bb * (aa - np.float32(1))
    z = (np.sqrt(np.maximum(discriminant, 0)) - ab) / bb
    return discriminant > 0, z, [a[i] + b[i] * z for i in range(3)]


def _cube(offsets: list[Array], slopes: list[np.float32]) -> tuple[npt.NDArray[np.bool_], Array, list[Array]]:
    """The nearer hit of rays `offset + slope * z` with the cube [-1, 1]^3."""
    enter, leave = [], []
    for a, slope in zip(offsets, slopes, strict=True):
        b = slope if abs(slope) > 1e-6 else np.float32(1e-6)
        sign = np.float32(1 if b > 0 else -1)
        enter.append((-sign - a) / b)
        leave.append((sign - a) / b)
    near = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
    far = np.maximum(np.maximum(enter[0], enter[1]), enter[2])
    face = [
        np.where(leave[i] == near, np.float32(1 if slopes[i] > 0 else -1), np.float32(0)).astype(np.float32)
        for i in range(3)
    ]
    return far < near, near, face


def _shade(albedo: Array, nx: Array, ny: Array, nz: Array, view: View, tint: RGB) -> Array:
    """Lambert, a small highlight and a darker rim; `[N, 3]` in [0, 255]."""
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx / length, ny / length, nz / length
    lx, ly, lz = view.light, 0.62, 0.72
    norm = math.sqrt(lx * lx + ly * ly + lz * lz)
    lx32, ly32, lz32 = np.float32(lx / norm), np.float32(ly / norm), np.float32(lz / norm)
    lambert = np.maximum(nx * lx32 + ny * ly32 + nz * lz32, 0)
    # Half-way vector between the light and the viewer, for the highlight.
    half = math.sqrt(lx * lx + ly * ly + (lz + norm) ** 2)
    highlight = nx * np.float32(lx / half) + ny * np.float32(ly / half) + nz * np.float32((lz + norm) / half)
    highlight = np.maximum(highlight, 0)
    for _ in range(5):  # to the 32nd power by squaring
        highlight = highlight * highlight
    light = np.float32(0.42) + np.float32(0.66) * lambert
    light = light * (np.float32(0.72) + np.float32(0.28) * np.minimum(nz * np.float32(1.8), np.float32(1)))
    shaded = albedo * light[:, None] + np.float32(46) * highlight[:, None]
    return shaded * np.asarray(tint, np.float32) * np.float32(view.brightness)


MATERIALS = {"dog": "fur", "cat": "fur", "bear": "fur", "robot": "metal", "teapot": "glaze", "backpack": "cloth"}

_GLOSS = {"fur": 22.0, "metal": 88.0, "glaze": 120.0, "cloth": 8.0}  # height of the highlight in grey levels


def _hash(*cells: npt.NDArray[np.int64]) -> Array:
    """Noise in [-1, 1) from integer cell numbers: the same on every machine, since integers do not round."""
    mixed = np.zeros(cells[0].shape, np.uint32)
    for cell, prime in zip(cells, (73856093, 19349663, 83492791)):
        mixed ^= cell.astype(np.uint32) * np.uint32(prime)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    return (mixed >> np.uint32(8)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def _cells(values: Array, length: float) -> npt.NDArray[np.int64]:
    return np.floor(values / np.float32(length)).astype(np.int64)


def _grain(material: str, x: Array, y: Array, z: Array) -> Array:
    """What a material multiplies its colour by, `[N]` near 1; it turns with the subject."""
    if material == "fur":  # strokes that hang down
        return np.float32(1) + np.float32(0.055) * _hash(_cells(x, 0.05), _cells(y, 0.13), _cells(z, 0.05))
    if material == "metal":  # brushed sideways
        return np.float32(1) + np.float32(0.035) * _hash(_cells(y, 0.035))
    if material == "cloth":  # woven: light and dark squares
        weave = (_cells(x + z, 0.045) + _cells(y, 0.045)) % 2
        return np.float32(1) + np.float32(0.03) * (np.float32(2) * weave.astype(np.float32) - np.float32(1))
    return np.ones(x.shape, np.float32)


def _shade_richly(albedo: Array, nx: Array, ny: Array, nz: Array, view: View, tint: RGB, gloss: float) -> Array:
    """Lambert under a brighter sky than ground, a highlight as glossy as the material, and light on the rim."""
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx / length, ny / length, nz / length
    lx, ly, lz = view.light, 0.62, 0.72
    norm = math.sqrt(lx * lx + ly * ly + lz * lz)
    lambert = np.maximum(nx * np.float32(lx / norm) + ny * np.float32(ly / norm) + nz * np.float32(lz / norm), 0)
    half = math.sqrt(lx * lx + ly * ly + (lz + norm) ** 2)
    highlight = nx * np.float32(lx / half) + ny * np.float32(ly / half) + nz * np.float32((lz + norm) / half)
    highlight = np.maximum(highlight, 0)
    for _ in range(5):  # to the 32nd power by squaring
        highlight = highlight * highlight
    sky = np.float32(0.40) + np.float32(0.12) * ny
    edge = np.float32(1) - np.clip(nz, np.float32(0), np.float32(1))
    light = (sky + np.float32(0.62) * lambert) * (np.float32(1) - np.float32(0.30) * edge * edge)
    # The rim catches the sky from behind, on the side away from the light and from above
    behind = np.clip(np.float32(0.45) * ny - np.float32(0.8 * lx / norm) * nx + np.float32(0.25), 0, 1)
    rim = np.float32(70) * behind * edge * edge * edge
    shaded = albedo * light[:, None] + (np.float32(gloss) * highlight + rim)[:, None]
    return shaded * np.asarray(tint, np.float32) * np.float32(view.brightness)
