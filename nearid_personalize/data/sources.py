"""Where rows come from: a Hub id, parquet, a `save_to_disk` folder, or plain folders of pictures; one entry for all.

Plain folders: `subject/*.jpg` are the views of a row whose id is the folder's name, `subject/distractors/*.jpg` its
distractors. A distractor lies on the background of the view of the same file name (suffix aside); when no name is
shared, the sorted distractors belong to the sorted views. `train/subject/…`, `val/…`, `test/…` tell splits.

Beside a view may lie `photo.mask.png` (the subject) and `photo.part.mask.png` (the part that its distractor changes),
beside a distractor its own mask, and in a subject's folder `category.txt`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from nearid_personalize.errors import InputError
from nearid_personalize.hub import is_hub_id
from nearid_personalize.images import MASK_SUFFIX, list_images

from .rows import NO_SPLITS, SPLITS, Row, Rows, RowStream, Slots, check_split_name, file_versions, hash_split

DISTRACTORS = "distractors"
"""Name of the folder of a subject's distractors, and of that source."""

CATEGORY_FILE = "category.txt"

PART_SUFFIX = ".part" + MASK_SUFFIX


def load_rows(
    data: str | Path, distractors: Sequence[str | Path] = (), split: str | None = None, hash_splits: bool = False
) -> Rows:
    """Rows of identities, indexable; no picture is decoded before it is asked for.

    Hub and parquet data pass through the cache of `datasets` (under HF_HOME): as much disk again, once. `stream_rows`
    needs none.

    Args:
        data: a Hub id (`Aleksandar/NearID`, or with a revision `Aleksandar/NearID@main`), a parquet file or folder, a
            `save_to_disk` folder, or a folder of subjects' folders (see the module). Parquet files of distractors
            beside the views are read with them.
        distractors: further sets (`Aleksandar/NearID-Flux`, or local), each one a source named after its last part
            ("Flux"). They must list the same ids in the same order as `data`.
        split: train, val or test; None: all rows. A row's split is, in this order: its position in the published
            NearID (unless the column `split` names all three), the column `split`, the Hub split or file name
            (`test-00000-of-00001.parquet`; a lone "train" says nothing), the folder.
        hash_splits: rows whose split is not told get one by a hash of their id, 80 / 10 / 10 %.

    Raises:
        InputError: nothing readable there, ids that differ or repeat, no rows of that split.
    """
    _check_wanted(split)
    if _is_folder_of_subjects(data):
        rows = _folder_rows(Path(data), distractors)
    else:
        rows = _tables().table_rows(*_open(data, distractors, streaming=False))
    rows = rows.hash_splits() if hash_splits else rows
    return rows if split is None else rows.split(split)


def split_repeats(data: str) -> tuple[str, int]:
    """A data set as a flag names it, "PLACE" or "PLACE:N" -> the place, and how often an epoch shows it.

    What follows the last colon counts only where it is a number: `C:\\photos` and `C:\\photos:4` are both places on
    Windows, `owner/name@v1.0:4` is revision v1.0 four times. A folder of that very name goes first.

    Raises InputError when N is 0.
    """
    place, colon, times = data.rpartition(":")
    drive_alone = len(place) == 1
    if not colon or not times.isdecimal() or drive_alone or Path(data).exists():
        return data, 1
    if int(times) == 0:
        raise InputError(f"--data {data}: shown 0 times; leave it out, or give a number from 1")
    return place, int(times)


def stream_rows(
    data: str | Path, distractors: Sequence[str | Path] = (), split: str | None = None, hash_splits: bool = False
) -> RowStream:
    """As `load_rows`, one row after another, without a download first; what is wrong with a row shows when it comes.

    A stream of the published NearID is split by position whatever its columns say.
    """
    _check_wanted(split)
    if _is_folder_of_subjects(data):
        rows = load_rows(data, distractors, split, hash_splits)
        return RowStream(rows.name, rows.sources, rows.__iter__)
    stream = _tables().table_stream(*_open(data, distractors, streaming=True))
    return replace(stream, read=partial(_chosen, stream, split, hash_splits))


def _chosen(stream: RowStream, split: str | None, hash_splits: bool) -> Iterator[Row]:
    found: set[str] = set()
    for row in stream:
        if hash_splits and row.split is None:
            row = replace(row, split=hash_split(row.id))
        if split is not None and row.split is None:
            raise InputError(f"{stream.name}: row {row.id!r} has no split; {NO_SPLITS}")
        found.update([row.split] if row.split else [])
        if split is None or row.split == split:
            yield row
    if split is not None and split not in found:
        raise InputError(f"{stream.name}: no rows of split {split!r}; it has {', '.join(sorted(found)) or 'no rows'}")


def _check_wanted(split: str | None) -> None:
    if split is not None:
        check_split_name(split)


def _is_folder_of_subjects(data: str | Path) -> bool:
    path = Path(data)
    if path.exists():
        if path.is_file() and path.suffix != ".parquet":
            raise InputError(f"{data}: not a data set; give a parquet file, a folder, or a Hub id")
        return not any(found.suffix in (".parquet", ".arrow") for found in (path, *path.rglob("*")))
    if not is_hub_id(data):
        raise InputError(
            f"{data}: no such file or folder; give a parquet file, a folder, or a Hub id (owner/name, or "
            "owner/name@revision)"
        )
    return False


def _tables() -> ModuleType:
    """The module that reads tables; it needs an optional dependency."""
    try:
        from . import tables
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading tables of pictures needs {error.name}; pip install 'nearid-personalize[train]'"
        ) from None
    return tables


def _open(data: str | Path, distractors: Sequence[str | Path], streaming: bool) -> tuple[Any, list[Any]]:
    """The table of views and those of distractors."""
    found = _tables().open_tables(data, streaming)
    views = [table for table in found if table.views]
    if not views:
        raise InputError(f"{data}: distractors without views; give the data set of the views, and this one beside it")
    others = [table for table in found if not table.views]
    for place in distractors:
        more = [table for table in _tables().open_tables(place, streaming) if table.distractors]
        if not more:
            raise InputError(f"{place}: no distractors (columns nimg1, nimg2, …)")
        others += more
    return views[0], others


# --- plain folders ---------------------------------------------------------------------------------------------------


def _folder_rows(root: Path, distractors: Sequence[str | Path]) -> Rows:
    if distractors:
        raise InputError(f"{root}: plain folders hold their distractors themselves, in subject/{DISTRACTORS}")
    names = {folder.name for folder in _folders(root)}
    if names and names <= set(SPLITS):
        rows = [_subject(folder, split) for split in SPLITS if split in names for folder in _folders(root / split)]
    else:
        rows = [_subject(folder, None) for folder in _folders(root)]
    if not rows:
        raise InputError(f"{root}: no subjects; give a folder that holds one folder of pictures per subject")
    sources = (DISTRACTORS,) if any(row.distractors for row in rows) else ()
    pictures = [path for row in rows for path in _files_of(row)]
    return Rows(
        str(root),
        tuple(row.id for row in rows),
        tuple(row.split for row in rows),
        sources,
        rows.__getitem__,
        version=file_versions(pictures),
    )


def _files_of(row: Row) -> Iterator[Path]:
    """The files of a row that lies in a folder: pictures, and masks, by which pictures are varied."""
    slots = (row.views, *row.distractors.values(), row.masks, row.part_masks, *row.distractor_masks.values())
    return (path for pictures in slots for path in pictures if isinstance(path, Path))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _subject(folder: Path, split: str | None) -> Row:
    views = list_images(folder)
    found = folder / DISTRACTORS
    sources: dict[str, Slots] = {DISTRACTORS: _beside(views, list_images(found), found)} if found.is_dir() else {}
    own_masks = {name: _masks_of(distractors) for name, distractors in sources.items()}
    return Row(
        id=folder.name,
        views=tuple(views),
        distractors=sources,
        category=_category(folder / CATEGORY_FILE),
        split=split,
        masks=_masks_of(views),
        distractor_masks={name: masks for name, masks in own_masks.items() if masks},
        part_masks=_masks_of(views, PART_SUFFIX),
    )


def _masks_of(pictures: Sequence[Any], suffix: str = MASK_SUFFIX) -> Slots:
    """The mask beside each picture, None where it has none; () where none has."""
    places = [path and path.with_name(f"{path.stem}{suffix}.png") for path in pictures]
    masks = tuple(place if place is not None and place.is_file() else None for place in places)
    return masks if any(masks) else ()


def _category(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give the category's name as text") from None


def _beside(views: Sequence[Path], distractors: Sequence[Path], folder: Path) -> Slots:
    """The distractors in the order of the views that they belong to, None where a view has none."""
    stems = [view.stem for view in views]
    strays = [path for path in distractors if path.stem not in stems]
    if len(strays) == len(distractors) <= len(views):
        return tuple(distractors)
    by_stem = {path.stem: path for path in distractors}
    if strays or len(by_stem) < len(distractors) or len(set(stems)) < len(stems):
        raise InputError(
            f"{folder}: {len(distractors)} distractors for {len(views)} views do not match by name; "
            "name each as the view whose background it has, or give at most as many as views, none named as a view"
        )
    return tuple(by_stem.get(stem) for stem in stems)
