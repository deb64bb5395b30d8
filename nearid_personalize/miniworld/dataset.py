"""The mini-world as data: captioned pictures, identity rows with near-identity distractors, part edits, parquet.

Everything is a pure function of (split, index, seed): nothing is stored, and no two splits share an identity.
"""

import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from .render import Rendering, render
from .scene import CONTEXTS, sample_view
from .subjects import (
    ATTRIBUTES,
    Pet,
    Split,
    caption,
    check_split,
    oracle_distance,
    pick,
    sample_pet,
    similar_pet,
    single_edits,
)


@dataclass(frozen=True)
class Picture:
    """One captionable picture: a rendering and what it shows."""

    rendering: Rendering
    pet: Pet
    context: str


def _cast(split: Split, index: int, seed: int) -> tuple[Pet, str, random.Random]:
    rng = random.Random(f"picture/{seed}/{split}/{index}")
    return sample_pet(split, index, seed=seed), pick(rng, CONTEXTS), rng


def picture_facts(split: Split, index: int, seed: int = 0) -> tuple[Pet, str]:
    """Who and where picture number `index` of a split shows, without rendering it."""
    return _cast(split, index, seed)[:2]


def picture(split: Split, index: int, wide: bool = False, seed: int = 0) -> Picture:
    """Picture number `index` of a split: every picture another identity, context and view."""
    pet, context, rng = _cast(split, index, seed)
    return Picture(render(pet, context, sample_view(rng, wide)), pet, context)


def photos(pet: Pet, num_photos: int, seed: int = 0, wide: bool = False) -> list[tuple[Rendering, str]]:
    """Pictures of one subject in different contexts (up to eight) under different views, with the contexts' names."""
    rng = random.Random(f"photos/{seed}/{pet}")
    places = list(CONTEXTS)
    chosen = [places.pop(int(rng.random() * len(places))) for _ in range(num_photos)]
    return [(render(pet, context, sample_view(rng, wide)), context) for context in chosen]


@dataclass(frozen=True)
class IdentityRow:
    """Views of one identity and, per view, another similar subject on exactly that view's background."""

    pet: Pet
    contexts: tuple[str, ...]
    views: tuple[Rendering, ...]
    distractor_pets: tuple[Pet, ...]
    distractors: tuple[Rendering, ...]


def identity_row(
    split: Split, index: int, num_views: int = 3, changes: tuple[int, int] = (2, 4), wide: bool = True, seed: int = 0
) -> IdentityRow:
    """Row number `index` of a split.

    Args:
        changes: smallest and largest number of the eight attributes in which a distractor differs.
    """
    rng = random.Random(f"row/{seed}/{split}/{index}")
    pet = sample_pet(split, index, seed=seed)
    places = list(CONTEXTS)
    contexts = tuple(places.pop(int(rng.random() * len(places))) for _ in range(num_views))
    views = [sample_view(rng, wide) for _ in contexts]
    others = tuple(similar_pet(pet, rng, changes[0] + int(rng.random() * (changes[1] - changes[0] + 1))) for _ in views)
    return IdentityRow(
        pet,
        contexts,
        tuple(render(pet, context, view) for context, view in zip(contexts, views, strict=True)),
        others,
        tuple(render(other, context, view) for other, context, view in zip(others, contexts, views, strict=True)),
    )


class MiniWorldDataset(Dataset[dict[str, torch.Tensor]]):
    """Identity rows as tensors, one row an identity.

    Each item has `views` and `distractors` (float `[V, 3, 64, 64]` in [0, 1]), `view_mask` and `distractor_mask`
    (bool `[V]`, all true here), and the subject masks `view_subjects`, `distractor_subjects` (bool `[V, 64, 64]`).

    Raises:
        InputError: unknown split.
    """

    def __init__(
        self,
        split: Split,
        num_subjects: int,
        num_views: int = 3,
        seed: int = 0,
        changes: tuple[int, int] = (2, 4),
        wide: bool = True,
    ) -> None:
        check_split(split)
        self.split, self.num_subjects, self.num_views = split, num_subjects, num_views
        self.seed, self.changes, self.wide = seed, changes, wide

    def __len__(self) -> int:
        return self.num_subjects

    def row(self, index: int) -> IdentityRow:
        """The row behind item `index`, with its subjects' attributes."""
        if not 0 <= index < self.num_subjects:
            raise IndexError(index)
        return identity_row(self.split, index, self.num_views, self.changes, self.wide, self.seed)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.row(index)
        valid = torch.ones(self.num_views, dtype=torch.bool)
        return {
            "views": _stack(row.views),
            "distractors": _stack(row.distractors),
            "view_mask": valid,
            "distractor_mask": valid.clone(),
            "view_subjects": torch.from_numpy(np.stack([r.mask for r in row.views])),
            "distractor_subjects": torch.from_numpy(np.stack([r.mask for r in row.distractors])),
        }


def _stack(renderings: tuple[Rendering, ...]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([r.image for r in renderings]))
    return pixels.permute(0, 3, 1, 2).float().div_(255)


@dataclass(frozen=True)
class PartEdit:
    """Two views of one subject, and the same two with a single part changed, as in Mind-the-Glitch."""

    pet: Pet
    edited_pet: Pet
    attribute: str
    originals: tuple[Rendering, Rendering]
    edited: tuple[Rendering, Rendering]
    part_masks: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
    """Pixels that the edit changed, `[64, 64]`."""

    @property
    def distance(self) -> float:
        """Attribute-weighted distance of the two subjects in [0, 1]."""
        return oracle_distance(self.pet, self.edited_pet)

    @property
    def oracle(self) -> tuple[float, float]:
        """Per view 1 - |part| / |object|: the similarity that Mind-the-Glitch correlates scores with."""
        return tuple(  # type: ignore[return-value]
            1 - float(part.sum()) / float((original.mask | edited.mask).sum())
            for part, original, edited in zip(self.part_masks, self.originals, self.edited, strict=True)
        )


def part_edit(split: Split, index: int, attribute: str | None = None, wide: bool = True, seed: int = 0) -> PartEdit:
    """Part edit number `index` of a split, both subjects of that split; `attribute` picks which of the eight changes.

    Raises:
        InputError: unknown split or attribute.
    """
    check_split(split)
    if attribute not in (None, *ATTRIBUTES):
        raise InputError(f"unknown attribute {attribute!r}; choose one of: {', '.join(ATTRIBUTES)}")
    rng = random.Random(f"edit/{seed}/{split}/{index}/{attribute}")
    # A few subjects have no single-attribute neighbour in their own split: take the next draw for those.
    for attempt in itertools.count():
        pet = sample_pet(split, index, seed=f"{seed}/edit/{attempt}")
        neighbours = [(n, p) for n, p in single_edits(pet) if p.split == split and attribute in (None, n)]
        if neighbours:
            break
    name, changed = pick(rng, neighbours)
    places = list(CONTEXTS)
    contexts = [places.pop(int(rng.random() * len(places))) for _ in range(2)]
    views = [sample_view(rng, wide) for _ in contexts]
    originals = [render(pet, c, v) for c, v in zip(contexts, views, strict=True)]
    edited = [render(changed, c, v) for c, v in zip(contexts, views, strict=True)]
    parts = [(a.image != b.image).any(axis=2) for a, b in zip(originals, edited, strict=True)]
    return PartEdit(
        pet, changed, name, (originals[0], originals[1]), (edited[0], edited[1]), (parts[0], parts[1])
    )  # fmt: skip


def export_parquet(dataset: MiniWorldDataset, folder: str | Path) -> tuple[Path, Path]:
    """Write a data set in the layout of the Hub's NearID sets: `views.parquet` and `distractors.parquet`.

    Views carry `id, category, category_description, images1..V, masks1..V, n_images, prompts1..V, quality, split`;
    distractors carry `id, nimg1..V`. Join them on `id`.
    """
    import datasets  # an optional dependency ([train])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(1, dataset.num_views + 1)
    image = datasets.Image()
    text, count = datasets.Value("string"), datasets.Value("int32")
    view_features = datasets.Features(
        {"id": text, "category": text, "category_description": text, "n_images": count, "split": text}
        | {"quality": datasets.Value("float32")}
        | {
            f"{name}{i}": kind
            for i in numbers
            for name, kind in (("images", image), ("masks", image), ("prompts", text))
        }
    )
    distractor_features = datasets.Features({"id": text} | {f"nimg{i}": image for i in numbers})
    paths = folder / "views.parquet", folder / "distractors.parquet"
    for path, features, rows in zip(
        paths, (view_features, distractor_features), (_view_rows, _distractor_rows), strict=True
    ):
        table = datasets.Dataset.from_list(list(rows(dataset)), features=features)
        partial = path.with_suffix(".partial")
        table.to_parquet(partial)
        partial.replace(path)
    return paths


def _row_id(dataset: MiniWorldDataset, index: int) -> str:
    return f"{dataset.split}-{dataset.seed}-{index:06d}"


def _png(pixels: npt.NDArray[Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _view_rows(dataset: MiniWorldDataset) -> Iterator[dict[str, Any]]:
    for index in range(len(dataset)):
        row = dataset.row(index)
        columns: dict[str, Any] = {
            "id": _row_id(dataset, index),
            "category": row.pet.category,
            "category_description": caption(row.pet, row.contexts[0]).removesuffix(f" in {row.contexts[0]}"),
            "n_images": len(row.views),
            "split": dataset.split,
            "quality": 1.0,
        }
        for i, (view, context) in enumerate(zip(row.views, row.contexts, strict=True), start=1):
            columns[f"images{i}"] = _png(view.image)
            columns[f"masks{i}"] = _png(view.mask.astype(np.uint8) * 255)
            columns[f"prompts{i}"] = caption(row.pet, context)
        yield columns


def _distractor_rows(dataset: MiniWorldDataset) -> Iterator[dict[str, Any]]:
    for index in range(len(dataset)):
        pictures = enumerate(dataset.row(index).distractors, start=1)
        yield {"id": _row_id(dataset, index)} | {f"nimg{i}": _png(r.image) for i, r in pictures}
