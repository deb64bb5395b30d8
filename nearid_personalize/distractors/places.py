"""The views that distractors are built for: what they are called, and what is known of them before one is drawn.

A built set is a folder of subjects' folders, as `data.load_rows` reads it: the views, their masks beside them, and
`distractors/`. What the run itself remembers is in the folder `.distractors`.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from nearid_personalize.data import Row, Rows
from nearid_personalize.data.rows import SPLITS
from nearid_personalize.data.sources import CATEGORY_FILE, DISTRACTORS, PART_SUFFIX
from nearid_personalize.distractors.masks import MaskFinder, as_mask, mask_fault, part_fault, random_part
from nearid_personalize.distractors.options import BuildOptions
from nearid_personalize.distractors.regions import Mask, dilated
from nearid_personalize.errors import InputError
from nearid_personalize.files import safe_name, write_atomically
from nearid_personalize.images import MASK_SUFFIX, load_image
from nearid_personalize.metrics import edit_oracle

Describe: TypeAlias = Callable[[Image.Image, Mask, str], str]
"""(photo, mask, category) -> a caption of the subject, to be contradicted."""


@dataclass(frozen=True)
class Place:
    """One view of one row, and where its files lie."""

    row: int
    """Position among the rows."""
    slot: int
    """Which view, from 0."""
    folder: Path
    """The subject's folder of the built set."""
    key: str
    """subject/view: names the place in the run's own files, and decides its seeds."""
    file: str
    """The view's file name in `folder`."""

    @property
    def stem(self) -> str:
        """The name that the view, its masks and its distractor share."""
        return Path(self.file).stem

    @property
    def view_file(self) -> Path:
        """The copy of the view."""
        return self.folder / self.file

    @property
    def mask_file(self) -> Path:
        """The subject in the view."""
        return self.folder / f"{self.stem}{MASK_SUFFIX}.png"

    @property
    def part_file(self) -> Path:
        """The part of the subject that is edited."""
        return self.folder / f"{self.stem}{PART_SUFFIX}.png"

    @property
    def distractor_file(self) -> Path:
        """The distractor that is kept."""
        return self.folder / DISTRACTORS / f"{self.stem}.png"

    @property
    def painted_file(self) -> Path:
        """Where the distractor may differ from the view."""
        return self.folder / DISTRACTORS / f"{self.stem}{MASK_SUFFIX}.png"

    def seed(self, seed: int, number: int) -> int:
        """The seed of try number `number`: the same on every machine, and in every order of the views."""
        digest = hashlib.sha256(f"{seed}/{self.key}/{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A view that can be repainted."""

    place: Place
    photo: Image.Image
    subject: Mask
    painted: Mask
    """Where it is repainted: the subject, or a part of it, dilated."""
    part: Mask | None
    category: str
    caption: str | None

    @cached_property
    def oracle(self) -> float | None:
        """1 - |part| / |subject|; None where the whole subject is repainted."""
        if self.part is None:
            return None
        return edit_oracle(torch.from_numpy(self.part), torch.from_numpy(self.subject))


def list_places(rows: Rows, out: Path, limit: int = 0) -> list[Place]:
    """A place for each view; no picture is decoded. limit: of the first so many rows only; 0: of all.

    Raises InputError when two rows would share a folder, or the rows' splits cannot be told by folders.
    """
    told = set(rows.splits)
    if told != {None} and not told <= set(SPLITS):
        unknown = ", ".join(sorted("none" if split is None else split for split in told - set(SPLITS)))
        raise InputError(f"{rows.name}: rows of split {unknown}; --split train, val or test takes one")
    places: list[Place] = []
    used: dict[str, str] = {}
    for number in range(min(limit, len(rows)) if limit else len(rows)):
        row = rows[number]
        name = safe_name(row.id, "subject")
        if used.setdefault(name.casefold(), row.id) != row.id:
            raise InputError(
                f"{rows.name}: the ids {used[name.casefold()]!r} and {row.id!r} become one folder; rename one"
            )
        folder = out / row.split / name if row.split else out / name
        places += _places_of(row, number, folder)
    return places


def _places_of(row: Row, number: int, folder: Path) -> Iterator[Place]:
    taken: set[str] = set()
    for slot, view in enumerate(row.views):
        if view is None:
            continue
        path = Path(view) if isinstance(view, str | Path) else None
        stem = safe_name(path.stem, f"view-{slot + 1}") if path else f"view-{slot + 1}"
        if stem.casefold() in taken:
            stem = f"{stem}-{slot + 1}"
        taken.add(stem.casefold())
        suffix = path.suffix if path else ".png"
        key = f"{row.split}/{folder.name}/{stem}" if row.split else f"{folder.name}/{stem}"
        yield Place(row=number, slot=slot, folder=folder, key=key, file=stem + suffix)


# --- preparing -------------------------------------------------------------------------------------------------------
def prepare(
    place: Place,
    row: Row,
    options: BuildOptions,
    find_mask: MaskFinder | None = None,
    describe: Describe | None = None,
    caption: str | None = None,
) -> Prepared:
    """Read a view and its masks, and put copies of them where the built set has them.

    Raises InputError when the view cannot be read, has no usable mask, or no usable part.
    """
    photo = row.view(place.slot)
    assert photo is not None, "places are made of views that there are"
    place.folder.mkdir(parents=True, exist_ok=True)
    _copy_view(row, place, photo, options.link)
    category = options.category or row.category or ""
    if category:
        write_atomically(place.folder / CATEGORY_FILE, category + "\n")
    subject = _subject_mask(row, place, photo, category, find_mask)
    part = _part_mask(row, place, photo, subject, options)
    if caption is None and describe is not None:
        caption = describe(photo, subject, category)
    return Prepared(
        place=place,
        photo=photo,
        subject=subject,
        painted=dilated(subject if part is None else part, round(options.dilate * max(photo.size))),
        part=part,
        category=category,
        caption=caption,
    )


def _copy_view(row: Row, place: Place, photo: Image.Image, link: bool) -> None:
    """The view's own file where it has one, so that it decodes to the same pixels; else a PNG."""
    view = row.views[place.slot]
    if not isinstance(view, str | Path):
        write_picture(photo, place.view_file)
        return
    if place.view_file.is_file() and _facts(place.view_file) == _facts(Path(view)):
        return
    if link:
        with suppress(OSError):  # another disk, or a file system without links
            place.view_file.unlink(missing_ok=True)
            os.link(view, place.view_file)
            return
    temporary = place.view_file.with_name(f".{place.file}.tmp")
    shutil.copy2(view, temporary)
    os.replace(temporary, place.view_file)


def _facts(path: Path) -> tuple[int, int]:
    """Size and time: the same of a file and its copy."""
    return path.stat().st_size, path.stat().st_mtime_ns


def _subject_mask(row: Row, place: Place, photo: Image.Image, category: str, find_mask: MaskFinder | None) -> Mask:
    given = row.mask(place.slot)
    if given is not None:
        mask = as_mask(given.numpy(), photo, place.key)
    elif place.mask_file.is_file():  # found by an earlier run
        mask = as_mask(load_image(place.mask_file), photo, str(place.mask_file))
    elif find_mask is not None:
        mask = as_mask(find_mask(photo, category), photo, place.key)
    else:
        raise InputError(f"{place.key}: no mask; put {place.stem}{MASK_SUFFIX}.png beside it, or give --mask-model")
    if fault := mask_fault(mask):
        raise InputError(f"{place.key}: {fault}")
    write_mask(mask, place.mask_file)
    return mask


def _part_mask(row: Row, place: Place, photo: Image.Image, subject: Mask, options: BuildOptions) -> Mask | None:
    if options.parts == "none":
        return None
    given = row.part_mask(place.slot)
    if options.parts == "given" and given is None:
        raise InputError(f"{place.key}: no part; put {place.stem}{PART_SUFFIX}.png beside it, or give --parts random")
    if options.parts == "given" and given is not None:
        part = as_mask(given.numpy(), photo, f"{place.key}, part") & subject
    else:
        part = random_part(subject, f"{options.seed}/{place.key}")
    if fault := part_fault(part, subject):
        raise InputError(f"{place.key}: {fault}")
    write_mask(part, place.part_file)
    return part


def write_mask(mask: Mask, path: Path) -> None:
    """Write a mask as a PNG of 0 and 255, unless the file holds just that."""
    write_picture(Image.fromarray(mask.astype(np.uint8) * 255), path)


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, losslessly, whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
