"""The mini-world: a procedural world with ground truth, and the small models trained on it.

Subjects (`subjects`) are rendered (`render`) in contexts under views (`scene`); `dataset` makes training and test data
of them; `judge` tells, for evaluation only, which attributes a picture shows. `weights_dir` finds the packaged models.
"""

from pathlib import Path

from PIL import Image

from ..errors import InputError
from .dataset import identity_row, part_edit, part_edits, photos, picture, rows
from .render import Rendering, render
from .scene import CONTEXTS, View, sample_view
from .subjects import CATEGORIES, Pet, Split, caption, oracle_distance, sample_pet, similar_pet, single_edits

__all__ = [
    "CATEGORIES",
    "CONTEXTS",
    "Pet",
    "Rendering",
    "Split",
    "View",
    "caption",
    "context_prompts",
    "example_references",
    "identity_row",
    "oracle_distance",
    "part_edit",
    "part_edits",
    "photos",
    "picture",
    "render",
    "rows",
    "sample_pet",
    "sample_view",
    "similar_pet",
    "single_edits",
    "weights_dir",
]

MODELS = ("siglip", "nearid", "nearid-reward", "pipeline")


def weights_dir(name: str) -> Path:
    """Folder of a packaged model: `siglip` (the frozen backbone), `nearid` (the scorer), `nearid-reward` (a
    second head, alone, to train on what the scorer then judges), `pipeline` (text to image).

    Raises:
        InputError: unknown name, or an installation without the weights.
    """
    if name not in MODELS:
        raise InputError(f"unknown mini-world model {name!r}; choose one of: {', '.join(MODELS)}")
    folder = Path(__file__).parent / "weights" / name
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; reinstall nearid-personalize with its package data")
    return folder


def example_references(
    index: int = 0, split: Split = "test", num_references: int = 4, category: str | None = None
) -> tuple[list[Image.Image], str, Pet]:
    """Photos of a subject that no packaged model was trained on, its category, and the subject itself.

    The contexts of the photos never include space, so that "in space" is always somewhere new.
    """
    pet = sample_pet(split, index, category)
    shots = [rendering for rendering, context in photos(pet, len(CONTEXTS)) if context != "space"]
    return [Image.fromarray(shot.image) for shot in shots[:num_references]], pet.category, pet


def context_prompts(name: str) -> tuple[str, ...]:
    """Prompts that the packaged pipeline understands: the subject in each of the eight contexts.

    name: the subject's token and category, e.g. "sks dog".
    """
    return tuple(f"a photo of {name} in {context}" for context in CONTEXTS)
