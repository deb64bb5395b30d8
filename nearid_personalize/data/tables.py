"""Tables of pictures -> rows: the layouts of NearID and Mind-the-Glitch, from parquet, the Hub or `save_to_disk`.

A record is one row of a table as Arrow holds it: its pictures' bytes are not touched before a picture is decoded.
Needs the optional dependency `datasets`; import this module only where a table is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile, zip_longest
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from nearid_personalize.errors import InputError
from nearid_personalize.hub import HUB_ERRORS, download_fault, split_revision
from nearid_personalize.images import ImageSource

from .rows import NEARID, NEARID_SPLITS, Picture, Row, Rows, RowStream, Slots, file_versions, refuse_repeated

_SPLIT_NAMES = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
_UNSPLIT = "unsplit"  # the part of files whose names tell no split

# Columns of each kind of picture, by the number of the view from 1: NearID's spellings, then Mind-the-Glitch's.
_VIEWS = ("images{}", "img{}", "image_{}_original")
_MASKS = ("masks{}", "image_{}_object_mask")
_PART_MASKS = ("image_{}_part_mask",)
_DISTRACTORS = ("nimg{}", "image_{}_inpainted")

Record = Any
"""A `pyarrow.Table` of one row."""


@dataclass(frozen=True, eq=False)
class Table:
    """One table, its parts formatted as Arrow with encoded pictures; the tuples hold column names, by view."""

    place: str
    """Path or Hub id, for messages."""
    source: str
    """What its distractors are called."""
    parts: Mapping[str, Any]
    """Split as stored -> `datasets.Dataset` or, in a stream, `IterableDataset`."""
    columns: tuple[str, ...]
    num_rows: int | None
    """None: a stream does not say."""
    views: tuple[str, ...]
    masks: tuple[str, ...]
    part_masks: tuple[str, ...]
    distractors: tuple[str, ...]

    def stored_split(self, part: str) -> str | None:
        """The split a part stands for. A lone "train" is what things are called that were never split."""
        if part == _UNSPLIT or set(self.parts) == {"train"}:
            return None
        return _SPLIT_NAMES.get(part, part)

    def row_id(self, value: object, part: str, position: int) -> str:
        """A row's id: the column's, or made of its place where the table has no such column."""
        if "id" not in self.columns:
            return f"{self.source}-{part}-{position:06d}"
        if value is None:
            raise InputError(f"{self.place}: row {position} of {part} has no id; give every row one")
        return str(value)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_tables(place: str | Path, streaming: bool) -> list[Table]:
    """The tables in a parquet file, a folder of parquet files, a `save_to_disk` folder, or under a Hub id (@revision).

    All parquet files of views are one table; those of distractors alone are one per name. A file's name leaves shards
    (`-00000-of-00004`) aside; a Hub copy's (`NearID-Flux/data/train-00000-of-00001.parquet`) is its folder's.

    Raises:
        InputError: nothing readable there, or columns of neither layout.
    """
    path = Path(place)
    if path.is_file() or any(path.rglob("*.parquet")):
        return [_parquet_table(where, parts, streaming) for where, parts in _parquet_sets(path)]
    name, revision = split_revision(str(place))
    hub = partial(datasets.load_dataset, revision=revision, streaming=streaming)
    parts = _loaded(place, partial(_load_from_disk if path.is_dir() else hub, name))
    return [_table(str(place), source_name(place), parts, _num_rows(parts))]


def _loaded(place: str | Path, load: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return load()
    except (*HUB_ERRORS, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = download_fault(error)
        raise InputError(
            f"{place}: cannot be loaded ({reason}); give a local file or folder, or a Hub id that can be reached"
        ) from None


def source_name(place: str | Path) -> str:
    """What a set of distractors is called: "Aleksandar/NearID-Flux" and "NearID-Flux.parquet" are "Flux"."""
    name = Path(split_revision(str(place))[0]).absolute().name.removesuffix(".parquet")
    return re.sub(r"-\d{5}-of-\d{5}$", "", name).removeprefix("NearID-")


def _load_from_disk(folder: str) -> Mapping[str, Any]:
    loaded = datasets.load_from_disk(folder)
    return loaded if isinstance(loaded, datasets.DatasetDict) else {_UNSPLIT: loaded}


def _parquet_table(place: Path, files: Mapping[str, list[Path]], streaming: bool) -> Table:
    """The table of some files, by the split that their names tell."""
    first = next(iter(files.values()))[0]
    names = {split: [str(file) for file in paths] for split, paths in files.items()}
    parts = _loaded(place, partial(datasets.load_dataset, "parquet", data_files=names, streaming=streaming))
    # Counted here because a stream does not know, and the published splits are recognised by it.
    count = sum(pyarrow.parquet.read_metadata(file).num_rows for paths in files.values() for file in paths)
    return _table(str(place), _set_name(first), parts, count)


def _parquet_sets(path: Path) -> list[tuple[Path, dict[str, list[Path]]]]:
    """Per table: its path for messages, and its files by the split that their names tell."""
    places: dict[str | None, Path] = {}
    sets: dict[str | None, dict[str, list[Path]]] = {}
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        try:
            columns = pyarrow.parquet.read_schema(file).names
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: no parquet file that can be read ({str(error).splitlines()[0]})") from None
        name = None if _series(columns, _VIEWS) else _set_name(file)
        places.setdefault(name, path if name is None else file)
        stored = (split for split in _SPLIT_NAMES if re.match(rf"{split}(?![a-z])", file.stem))
        sets.setdefault(name, {}).setdefault(next(stored, _UNSPLIT), []).append(file)
    return [(places[name], files) for name, files in sets.items()]


def _set_name(file: Path) -> str:
    """The name of the set that a file belongs to: its own, or its folder's where it is named after a split."""
    name = source_name(file)
    if name not in _SPLIT_NAMES:
        return name
    folder = file.absolute().parent
    return source_name(folder.parent if folder.name == "data" else folder)


def _table(place: str, source: str, parts: Mapping[str, Any], num_rows: int | None) -> Table:
    first = next(iter(parts.values()))
    columns = first.column_names or list(
        next(iter(first), ())
    )  # a stream may not know its columns before its first row
    pictures = [_series(columns, spellings) for spellings in (_VIEWS, _MASKS, _PART_MASKS, _DISTRACTORS)]
    if not pictures[0] and not pictures[3]:
        raise InputError(
            f"{place}: columns {', '.join(columns)}; it needs images1, images2, … (views) or nimg1, nimg2, … "
            "(distractors), or Mind-the-Glitch's image_1_original, image_1_inpainted, …"
        )
    facts = [name for name in ("id", "category", "split") if name in columns]
    kept = [*facts, *(name for names in pictures for name in names)]
    encoded = {name: _encoded(part, kept, kept[len(facts) :], place) for name, part in parts.items()}
    return Table(place, source, encoded, tuple(columns), num_rows, *pictures)


def _series(columns: Sequence[str], spellings: Sequence[str]) -> tuple[str, ...]:
    """Columns numbered from 1, without a gap, in the first spelling that occurs."""
    numbered = ([spelling.format(number) for number in range(1, len(columns) + 1)] for spelling in spellings)
    found = (tuple(takewhile(columns.__contains__, names)) for names in numbered)
    return next(filter(None, found), ())


def _encoded(part: Any, kept: list[str], pictures: list[str], place: str) -> Any:
    """The columns that are read, as Arrow; pictures stay encoded, whatever a cell holds: picture, bytes or path."""
    missing = set(kept) - set(part.column_names or kept)
    if missing:
        raise InputError(f"{place}: column {min(missing)} is not in all its files; give files of one layout")
    for name in pictures:
        kind = (part.features or {}).get(name, datasets.Image())
        if not _may_hold_pictures(kind):
            raise InputError(f"{place}: column {name} holds {kind}, where pictures are needed")
        part = part.cast_column(name, datasets.Image(decode=False))
    return part.select_columns(kept).with_format("arrow")


def _may_hold_pictures(kind: Any) -> bool:
    """Whether a column of some kind can be cast to pictures: paths, bytes, or a struct of them."""
    stored = getattr(kind, "dtype", None) in ("string", "large_string", "binary", "large_binary")
    return (
        stored or isinstance(kind, datasets.Image) or (isinstance(kind, dict) and bool({"bytes", "path"} & set(kind)))
    )


def _num_rows(parts: Mapping[str, Any]) -> int | None:
    """Rows in all, as far as a stream's declaration says."""
    if all(isinstance(part, datasets.Dataset) for part in parts.values()):
        return sum(len(part) for part in parts.values())
    declared = [(part.info.splits or {}).get(name) for name, part in parts.items()]
    counts = [split.num_examples for split in declared if split is not None]
    return sum(counts) if len(counts) == len(declared) else None


# --- rows ------------------------------------------------------------------------------------------------------------


def table_rows(views: Table, others: Sequence[Table]) -> Rows:
    """Rows of a table of views joined with tables of distractors, whose ids must be the same in the same order.

    Raises:
        InputError: ids differ, repeat or are missing, or two tables have one name.
    """
    ids = _ids(views)
    for other in others:
        _check_joinable(views, other)
        for position, (mine, theirs) in enumerate(zip_longest(ids, _ids(other))):
            _check_same_ids(views, mine, other, theirs, position)
    tables = (views, *others)
    wholes = [datasets.concatenate_datasets(list(table.parts.values())).with_format("arrow") for table in tables]
    files = [Path(file["filename"]) for whole in wholes for file in whole.cache_files]
    read = partial(_read, tables, wholes, ids)
    return Rows(views.place, ids, _splits(views), _sources(tables), read, version=file_versions(files))


def table_stream(views: Table, others: Sequence[Table]) -> RowStream:
    """The same, one after another; ids are compared as they come."""
    for other in others:
        _check_joinable(views, other)
    tables = (views, *others)
    return RowStream(views.place, _sources(tables), partial(_stream, tables))


def _sources(tables: Sequence[Table]) -> tuple[str, ...]:
    """Names of the distractor sources; raises `InputError` when two sets have one name."""
    places: dict[str, str] = {}
    for table in (table for table in tables if table.distractors):
        if table.source in places:
            raise InputError(
                f"{table.place}: distractors called {table.source!r} as those of {places[table.source]}; rename one"
            )
        places[table.source] = table.place
    return tuple(places)


def _check_joinable(views: Table, other: Table) -> None:
    """Raise `InputError` unless both tables have ids to join on."""
    for table in (views, other):
        if "id" not in table.columns:
            raise InputError(f"{table.place}: no column id, by which {views.place} and {other.place} are joined")


def _check_same_ids(views: Table, mine: str | None, other: Table, theirs: str | None, position: int) -> None:
    """Raise `InputError` unless both tables have the same id at a position; None: the table has ended."""
    if mine != theirs:
        told = [f"has id {row_id!r}" if row_id is not None else "has ended" for row_id in (mine, theirs)]
        raise InputError(
            f"row {position}: {views.place} {told[0]}, {other.place} {told[1]}; "
            "both must list the same ids in the same order"
        )


def _column(table: Table, name: str) -> list[Any]:
    """Values of a column over all parts; all None where the table lacks it."""
    if name not in table.columns:
        return [None] * (table.num_rows or 0)
    return [value for part in table.parts.values() for value in part.with_format(None)[name][:]]


def _places(table: Table) -> Iterator[tuple[str, int]]:
    """(Part, position in the part) of every row."""
    return ((name, position) for name, part in table.parts.items() for position in range(len(part)))


def _ids(table: Table) -> tuple[str, ...]:
    values = _column(table, "id")
    return tuple(table.row_id(value, *place) for value, place in zip(values, _places(table), strict=True))


def _splits(table: Table) -> tuple[str | None, ...]:
    values = _column(table, "split")
    by_position = _split_by_position(table) and not set(NEARID_SPLITS) <= {_canonical(value) for value in values}
    rows = enumerate(zip(values, _places(table), strict=True))
    return tuple(_split_of(table, by_position, position, value, part) for position, (value, (part, _)) in rows)


def _split_by_position(table: Table) -> bool:
    """Whether this is the published NearID as a whole, whose splits are row positions."""
    if table.num_rows is None:
        return table.place.partition("@")[0] == NEARID
    return table.num_rows == sum(NEARID_SPLITS.values())


def _split_of(table: Table, by_position: bool, position: int, value: object, part: str) -> str | None:
    if by_position:
        ends = zip(NEARID_SPLITS, accumulate(NEARID_SPLITS.values()), strict=True)
        return next((name for name, end in ends if position < end), None)
    return _canonical(value) or table.stored_split(part)


def _canonical(value: object) -> str | None:
    """A split's name as we spell it; one that we do not know stays what it is, so that it never passes for train."""
    return None if value in (None, "") else _SPLIT_NAMES.get(str(value).lower(), str(value))


def _read(tables: Sequence[Table], wholes: Sequence[Any], ids: Sequence[str], index: int) -> Row:
    return _row(ids[index], tables, [whole[index] for whole in wholes])


def _stream(tables: Sequence[Table]) -> Iterator[Row]:
    views, by_position, seen = tables[0], _split_by_position(tables[0]), set[str]()
    for position, entries in enumerate(zip_longest(*(_entries(table) for table in tables))):
        ids = [entry and entry[0] for entry in entries]
        for other, theirs in zip(tables[1:], ids[1:], strict=True):
            _check_same_ids(views, ids[0], other, theirs, position)
        row_id, part, record = entries[0]
        refuse_repeated(row_id, seen, views.place)
        value = record.column("split")[0].as_py() if "split" in views.columns else None
        row = _row(row_id, tables, [entry[2] for entry in entries])
        yield replace(row, split=_split_of(views, by_position, position, value, part))


def _entries(table: Table) -> Iterator[tuple[str, str, Record]]:
    """(Id, part, record) of every row of a stream."""
    for part, records in table.parts.items():
        for position, record in enumerate(records):
            value = record.column("id")[0].as_py() if "id" in table.columns else None
            yield table.row_id(value, part, position), part, record


def _row(row_id: str, tables: Sequence[Table], records: Sequence[Record]) -> Row:
    views, record = tables[0], records[0]
    category = record.column("category")[0].as_py() if "category" in views.columns else None
    return Row(
        id=row_id,
        views=_pictures(record, views.views),
        distractors={
            table.source: _pictures(other, table.distractors)
            for table, other in zip(tables, records, strict=True)
            if table.distractors
        },
        category=category,
        masks=_pictures(record, views.masks),
        part_masks=_pictures(record, views.part_masks),
    )


def _pictures(record: Record, columns: Sequence[str]) -> Slots:
    return tuple(_picture(record.column(name)[0]) for name in columns)


def _picture(cell: Any) -> Picture | None:
    """A cell of an `Image` column, a struct of bytes and path, as a picture; its bytes are read when it is decoded."""
    for name in ("bytes", "path"):
        if cell.is_valid and cell[name].is_valid:
            return partial(_value, cell[name], name)
    return None


def _value(cell: Any, name: str) -> ImageSource:
    return cell.as_py() if name == "bytes" else Path(cell.as_py())
