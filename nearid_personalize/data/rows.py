"""One row of identity data, whatever it was read from: views of a subject and, on their backgrounds, distractors.

Every picture stays as it is stored (a path, encoded bytes, or a function that gives it) until it is asked for.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.images import ImageSource, load_image
from nearid_personalize.metrics import edit_oracle

Picture: TypeAlias = ImageSource | Callable[[], ImageSource]
Slots: TypeAlias = tuple[Picture | None, ...]
"""One picture per view; None: absent. May be shorter than the views: the rest is absent."""

SPLITS = ("train", "val", "test")

NEARID = "Aleksandar/NearID"
NEARID_SPLITS = {"train": 18_786, "val": 100, "test": 500}
"""The published splits are row positions, in this order; the Hub stores all of them as "train"."""


@dataclass(frozen=True, eq=False)
class Row:
    """One identity: its views and, by source, a distractor on each view's background.

    The methods decode one picture each and return None where it is absent. They raise an `InputError` that names the
    row and the slot (counted from 1) when the picture cannot be read.
    """

    id: str
    views: Slots
    distractors: Mapping[str, Slots] = field(default_factory=dict)
    """Source (the generator that drew them) -> distractors; slot k lies on view k's background."""
    category: str | None = None
    split: str | None = None
    """train, val, test, or None: the data does not say."""
    masks: Slots = ()
    """The subject in each view, pixels > 0."""
    distractor_masks: Mapping[str, Slots] = field(default_factory=dict)
    """Source -> the subject in each distractor, where it is known to differ from the view's mask."""
    part_masks: Slots = ()
    """The part of each view's subject that its distractor changes, pixels > 0 (Mind-the-Glitch)."""

    def view(self, slot: int) -> Image.Image | None:
        """A view, RGB."""
        return self._decode(self.views, slot, "view")

    def distractor(self, source: str, slot: int) -> Image.Image | None:
        """The distractor of a source on a view's background, RGB."""
        return self._decode(self.distractors.get(source, ()), slot, f"{source} distractor")

    def mask(self, slot: int) -> Tensor | None:
        """Bool [H,W]: the subject in a view."""
        return _positive(self._decode(self.masks, slot, "mask"))

    def distractor_mask(self, source: str, slot: int) -> Tensor | None:
        """Bool [H,W]: the subject in a distractor. Without one of its own it is the view's, since distractors are
        painted inside that."""
        own = self._decode(self.distractor_masks.get(source, ()), slot, f"{source} mask")
        return self.mask(slot) if own is None else _positive(own)

    def part_mask(self, slot: int) -> Tensor | None:
        """Bool [H,W]: the part of a view's subject that is edited."""
        return _positive(self._decode(self.part_masks, slot, "part mask"))

    @property
    def oracle(self) -> tuple[float, ...] | None:
        """Per view 1 - |part| / |subject|, NaN where a mask is absent; None for rows without part masks.

        Decodes the masks.
        """
        if not self.part_masks:
            return None
        masks = [(self.part_mask(slot), self.mask(slot)) for slot in range(len(self.views))]
        return tuple(
            float("nan") if part is None or subject is None else edit_oracle(part, subject) for part, subject in masks
        )

    def _decode(self, slots: Slots, slot: int, what: str) -> Image.Image | None:
        picture = slots[slot] if slot < len(slots) else None
        if picture is None:
            return None
        try:
            return load_image(picture() if callable(picture) else picture)
        except InputError as error:
            raise InputError(f"row {self.id!r}, {what} {slot + 1}: {error}") from None


def _positive(mask: Image.Image | None) -> Tensor | None:
    """Which pixels of a mask are > 0, bool [H,W]."""
    return None if mask is None else torch.from_numpy(np.asarray(mask.convert("L")) > 0)


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows that can be indexed; ids and splits are known without reading a row.

    Raises InputError when an id occurs twice.
    """

    name: str
    """What messages call the data: its path or Hub id."""
    ids: tuple[str, ...] = field(repr=False)
    splits: tuple[str | None, ...] = field(repr=False)
    sources: tuple[str, ...]
    """Names of the distractor sources that rows may have."""
    read: Callable[[int], Row] = field(repr=False)
    """Position in [0, len) -> row; its split is set from `splits`."""
    version: str = field(default="", repr=False)
    """Changes when pictures may have changed under the same names and ids: files' sizes, a world's settings."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for row_id in self.ids:
            refuse_repeated(row_id, seen, self.name)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        found = range(len(self))[index]
        return replace(self.read(found), split=self.splits[found]) if isinstance(found, int) else self.select(found)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what the rows are: version, sources, ids; the same wherever they lie."""
        return hashlib.sha256(repr((self.version, self.sources, self.ids)).encode()).hexdigest()

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that rows belong to, in order of first appearance."""
        return tuple(dict.fromkeys(name for name in self.splits if name is not None))

    def hash_splits(self) -> "Rows":
        """The same rows; those whose split is not known get one by `hash_split`."""
        known = zip(self.splits, self.ids, strict=True)
        return replace(self, splits=tuple(split or hash_split(row_id) for split, row_id in known))

    def select(self, positions: Sequence[int]) -> "Rows":
        """The rows at some positions."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in positions),
            splits=tuple(self.splits[i] for i in positions),
            read=partial(_read_at, self.read, positions),
        )

    def split(self, name: str) -> "Rows":
        """The rows of one split.

        Raises:
            InputError: `name` is none of train, val and test, or no row belongs to it.
        """
        check_split_name(name)
        rows = self.select([i for i, split in enumerate(self.splits) if split == name])
        if not rows:
            known = f"it has {', '.join(self.split_names)}" if self.split_names else NO_SPLITS
            raise InputError(f"{self.name}: no rows of split {name!r}; {known}")
        return rows


NO_SPLITS = "the data does not say; --hash-splits gives each identity one by a hash of its id"


def _read_at(read: Callable[[int], Row], positions: Sequence[int], index: int) -> Row:
    return read(positions[index])


@dataclass(frozen=True, eq=False)
class RowStream(Iterable[Row]):
    """Rows one after another, read as they come; every iteration starts afresh."""

    name: str
    sources: tuple[str, ...]
    read: Callable[[], Iterator[Row]] = field(repr=False)

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def file_versions(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files: changes when one of them is replaced. Reads none of them."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def check_split_name(name: str) -> None:
    """Raise `InputError` unless `name` is train, val or test."""
    if name not in SPLITS:
        raise InputError(f"unknown split {name!r}; choose one of: {', '.join(SPLITS)}")


def refuse_repeated(row_id: str, seen: set[str], name: str) -> None:
    """Raise `InputError` when an id was seen before, else remember it."""
    if row_id in seen:
        raise InputError(f"{name}: id {row_id!r} occurs twice; every row needs an id of its own")
    seen.add(row_id)


def hash_split(row_id: str) -> str:
    """train, val or test (80 / 10 / 10 %) by the SHA-256 of the id: the same in every order, subset and version."""
    bucket = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big") % 10
    return {8: "val", 9: "test"}.get(bucket, "train")


def check_disjoint(train: Rows, *held_out: Rows) -> None:
    """Raise `InputError` when `train` holds a row of a val or test split, or an id of the held-out rows."""
    for row_id, split in zip(train.ids, train.splits, strict=True):
        if split not in (None, "train"):
            raise InputError(f"{train.name}: row {row_id!r} is of split {split!r}; train on split 'train' only")
    for rows in held_out:
        shared = set(train.ids) & set(rows.ids)
        if shared:
            raise InputError(
                f"{train.name}: row {min(shared)!r} is held out in {rows.name} ({len(shared)} such); "
                "train on other rows than you measure"
            )
