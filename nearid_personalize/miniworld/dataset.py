"""The mini-world as data: captioned pictures, identity rows with near-identity distractors, part edits.

`rows` and `part_edits` speak the row type of every data set (`nearid_personalize.data`).

Everything is a pure function of (split, index, seed): nothing is stored, and no two splits share an identity.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.rows import Row, Rows, Slots
from ..errors import InputError
from .render import Rendering, render
from .scene import CONTEXTS, IMAGE_SIZE, View, sample_view
from .subjects import (
    ATTRIBUTES,
    CATEGORIES,
    Pet,
    Split,
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


def _cast(
    split: Split, index: int, seed: int, categories: Sequence[str] = CATEGORIES
) -> tuple[Pet, str, random.Random]:
    rng = random.Random(f"picture/{seed}/{split}/{index}")
    return sample_pet(split, index, seed=seed, categories=categories), pick(rng, CONTEXTS), rng


def picture_facts(split: Split, index: int, seed: int = 0, categories: Sequence[str] = CATEGORIES) -> tuple[Pet, str]:
    """Who and where picture number `index` of a split shows, without rendering it."""
    return _cast(split, index, seed, categories)[:2]


def picture(
    split: Split,
    index: int,
    wide: bool = False,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    rich: bool = False,
    categories: Sequence[str] = CATEGORIES,
) -> Picture:
    """Picture number `index` of a split: every picture another identity, context and view."""
    pet, context, rng = _cast(split, index, seed, categories)
    return Picture(render(pet, context, sample_view(rng, wide), image_size, rich), pet, context)


def photos(pet: Pet, num_photos: int, seed: int = 0, wide: bool = False) -> list[tuple[Rendering, str]]:
    """Pictures of one subject in different contexts (up to eight) under different views, with the contexts' names."""
    rng = random.Random(f"photos/{seed}/{pet}")
    places = list(CONTEXTS)
    chosen = [places.pop(int(rng.random() * len(places))) for _ in range(num_photos)]
    return [(render(pet, context, sample_view(rng, wide)), context) for context in chosen]


@dataclass(frozen=True)
class IdentityRow:
    """Views of one identity and, per view, another similar subject on exactly that view's background.

    Drawn when they are first asked for.
    """

    pet: Pet
    contexts: tuple[str, ...]
    poses: tuple[View, ...]
    distractor_pets: tuple[Pet, ...]

    @cached_property
    def views(self) -> tuple[Rendering, ...]:
        return tuple(render(self.pet, context, pose) for context, pose in zip(self.contexts, self.poses, strict=True))

    @cached_property
    def distractors(self) -> tuple[Rendering, ...]:
        cast = zip(self.distractor_pets, self.contexts, self.poses, strict=True)
        return tuple(render(other, context, pose) for other, context, pose in cast)


def identity_row(
    split: Split, index: int, num_views: int = 3, changes: tuple[int, int] = (2, 4), wide: bool = True, seed: int = 0
) -> IdentityRow:
    """Row number `index` of a split: the same subject in the same views whatever `changes` are.

    Args:
        changes: smallest and largest number of the eight attributes in which a distractor differs.
    """
    rng = random.Random(f"row/{seed}/{split}/{index}")
    pet = sample_pet(split, index, seed=seed)
    places = list(CONTEXTS)
    contexts = tuple(places.pop(int(rng.random() * len(places))) for _ in range(num_views))
    poses = tuple(sample_view(rng, wide) for _ in contexts)
    others = tuple(similar_pet(pet, rng, changes[0] + int(rng.random() * (changes[1] - changes[0] + 1))) for _ in poses)
    return IdentityRow(pet, contexts, poses, others)


SIMILAR = {"similar": (2, 4)}
"""Distractor source -> smallest and largest number of attributes in which its distractors differ."""


def rows(
    split: Split,
    num_subjects: int,
    num_views: int = 3,
    sources: Mapping[str, tuple[int, int]] = SIMILAR,
    wide: bool = True,
    seed: int = 0,
) -> Rows:
    """The identity rows of a split, with subject masks and any number of distractor sources; a row's views, and each
    of its sources, are drawn when a picture of them is first asked for.

    Raises:
        InputError: unknown split.
    """
    check_split(split)
    ids = tuple(_row_id(split, seed, index) for index in range(num_subjects))
    read = partial(_row, split, num_views, dict(sources), wide, seed)
    version = repr((num_views, dict(sources), wide))
    return Rows(f"mini-world {split}", ids, (split,) * num_subjects, tuple(sources), read, version)


def _row(
    split: Split, num_views: int, sources: Mapping[str, tuple[int, int]], wide: bool, seed: int, index: int
) -> Row:
    drawn = {name: identity_row(split, index, num_views, changes, wide, seed) for name, changes in sources.items()}
    subject = next(iter(drawn.values()), None) or identity_row(split, index, num_views, wide=wide, seed=seed)
    return Row(
        id=_row_id(split, seed, index),
        views=_slots(subject, "views", "image"),
        distractors={name: _slots(row, "distractors", "image") for name, row in drawn.items()},
        category=subject.pet.category,
        masks=_slots(subject, "views", "mask"),
        distractor_masks={name: _slots(row, "distractors", "mask") for name, row in drawn.items()},
    )


def _slots(row: IdentityRow, kind: str, what: str) -> Slots:
    return tuple(partial(_drawing, row, kind, what, slot) for slot in range(len(row.poses)))


def _drawing(row: IdentityRow, kind: str, what: str, slot: int) -> npt.NDArray[Any]:
    """The image `[64,64,3]` or mask `[64,64]` of a view or distractor."""
    return getattr(getattr(row, kind)[slot], what)


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


def part_edits(split: Split, num_edits: int, attribute: str | None = None, wide: bool = True, seed: int = 0) -> Rows:
    """`part_edit` as rows: two views, the edited ones as distractors of the source "edit", part masks, and hence an
    oracle. As an inpainting mask does, a subject's mask covers it before and after the edit.

    Raises:
        InputError: unknown split; unknown attribute, when a row is read.
    """
    check_split(split)
    ids = tuple(_edit_id(split, seed, attribute, index) for index in range(num_edits))
    read = partial(_edit_row, split, attribute, wide, seed)
    return Rows(f"mini-world part edits {split}", ids, (split,) * num_edits, ("edit",), read, repr(wide))


def _edit_row(split: Split, attribute: str | None, wide: bool, seed: int, index: int) -> Row:
    edit = part_edit(split, index, attribute, wide, seed)
    return Row(
        id=_edit_id(split, seed, attribute, index),
        views=tuple(r.image for r in edit.originals),
        distractors={"edit": tuple(r.image for r in edit.edited)},
        category=edit.pet.category,
        masks=tuple(a.mask | b.mask for a, b in zip(edit.originals, edit.edited, strict=True)),
        part_masks=edit.part_masks,
    )


def _edit_id(split: Split, seed: int, attribute: str | None, index: int) -> str:
    return f"{split}-{seed}-edit-{attribute or 'any'}-{index:06d}"


def _row_id(split: Split, seed: int, index: int) -> str:
    return f"{split}-{seed}-{index:06d}"
