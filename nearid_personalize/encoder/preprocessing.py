"""How a checkpoint wants its pictures: read from, and written as, transformers' `preprocessor_config.json`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json, write_atomically
from nearid_personalize.images import Resample, preprocess

MAX_SIDE = 8192
"""Pixels; no encoder sees larger pictures."""

FILE = "preprocessor_config.json"


_PILLOW_FILTERS: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """Pictures are squashed to size x size pixels, then (x - mean) / std per channel, for pixels in [0, 1].

    CLIP's and DINOv2's own processors crop the centre instead, which cuts off a subject at the side.
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: Resample = "bicubic"

    def __call__(
        self, images: Sequence[Image.Image] | torch.Tensor, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Pictures -> float32 [N,3,size,size], see `images.preprocess`."""
        return preprocess(images, self.size, self.mean, self.std, device, self.resample)

    @classmethod
    def from_folder(cls, folder: str | Path, default: "Preprocessing") -> "Preprocessing":
        """Read `preprocessor_config.json`; without the file, or for what it leaves out, `default`.

        Raises InputError when the file is no JSON object, its pictures are not square, or its filter is unknown.
        """
        path = Path(folder) / FILE
        try:
            fields = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path}: no JSON ({error}); get the file again, or remove it") from None
        if not isinstance(fields, dict):
            raise InputError(f"{path}: {type(fields).__name__}, where an object is needed; get the file again")
        resample = fields.get("resample")
        if resample is not None and not (isinstance(resample, int) and resample in _PILLOW_FILTERS):
            raise InputError(f"{path}: resample {resample}; 2 (bilinear) and 3 (bicubic) work")
        return cls(
            size=_side(fields, default.size, path),
            mean=_channels(fields, "image_mean", default.mean, path),
            std=_channels(fields, "image_std", default.std, path),
            resample=default.resample if resample is None else _PILLOW_FILTERS[resample],
        )

    def to_json(self) -> str:
        """The content of a `preprocessor_config.json` that transformers' image processors read too."""
        fields = {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": next(number for number, name in _PILLOW_FILTERS.items() if name == self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        return json.dumps(fields, indent=2) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, whole or not at all."""
        write_atomically(Path(folder) / FILE, self.to_json())


def _channels(fields: dict[str, Any], name: str, default: Sequence[float], path: Path) -> tuple[float, ...]:
    """A number for each channel; those that pixels are divided by are above 0."""
    values = fields.get(name) or list(default)
    known = isinstance(values, list) and len(values) == 3 and all(_is_number(value) for value in values)
    if not known or (name == "image_std" and min(values) <= 0):
        raise InputError(f"{path}: {name} {str(values)[:80]}; three numbers work, above 0 for image_std")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _side(fields: dict[str, Any], default: int, path: Path) -> int:
    """Pixels of the square that the model sees: the crop where the processor crops, else the size it resizes to."""
    if "max_num_patches" in fields:  # NaFlex: as many patches as fit, here in a square
        patch, count = fields.get("patch_size", 16), fields["max_num_patches"]
        side = patch * isqrt(count) if isinstance(patch, int) and isinstance(count, int) and count > 0 else None
    else:
        crop = fields.get("crop_size") if fields.get("do_center_crop", True) else None
        size = crop or fields.get("size") or default
        named = size if isinstance(size, dict) else {"height": size}
        sides = [named[name] for name in ("height", "width", "shortest_edge") if name in named]
        side = sides[0] if sides and all(other == sides[0] for other in sides) else None
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= MAX_SIDE:
        told = fields.get("crop_size") or fields.get("size") or fields.get("max_num_patches")
        raise InputError(f"{path}: size {str(told)[:80]}; one side of 1 to {MAX_SIDE} for height and width works")
    return side
