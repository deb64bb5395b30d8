"""Some rows of a large set on the Hub, without the rest: the 500 test rows of NearID are one in 39 of its pictures.

Parquet files tell in their footers which rows lie where, so that only the groups of rows that are wanted are read, over
HTTP ranges. They are kept as one local file, and are not fetched again.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from huggingface_hub import HfFileSystem, cached_assets_path
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.hub import HUB_ERRORS, download_fault

SPLIT_COLUMN = "split"


def published_part(repository: str, split: str, start: int, stop: int, expected_rows: int, show: bool = False) -> Path:
    """A local folder with rows [start, stop) of a Hub data set, as its split `split`, fetched unless it is there.

    The column `split` is left out: the rows are chosen by position, whatever it says.

    Raises:
        InputError: the Hub cannot be reached, has no such set, or the set has not the expected number of rows.
    """
    name = repository.rpartition("/")[2]
    home = cached_assets_path("nearid-personalize", namespace=repository, subfolder=f"rows-{start}-{stop}") / name
    target = home / "data" / f"{split}-00000-of-00001.parquet"
    if target.is_file():
        return home
    try:
        files = HfFileSystem()
        paths = sorted(files.glob(f"datasets/{repository}/**/*.parquet"))
        if not paths:
            raise InputError(f"{repository}: no parquet files there; give the id of the published set, or a local copy")
        copy_rows(files, paths, start, stop, target, expected_rows, f"{repository}, {split} rows", show)
    except HUB_ERRORS as error:
        raise InputError(f"{repository}: {download_fault(error)}") from None
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{repository}: a file there is no parquet that can be read ({reason}); run it again"
        ) from None
    return home


def copy_rows(
    files: Any,
    paths: Sequence[str],
    start: int,
    stop: int,
    target: Path,
    expected_rows: int,
    label: str = "rows",
    show: bool = False,
) -> None:
    """Write rows [start, stop) of all the parquet files together to one file, whole or not at all.

    Args:
        files: a file system of fsspec, on which `paths` are opened.

    Raises:
        InputError: the files do not have `expected_rows` rows.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.partial")
    writer: Any = None
    try:
        with tqdm(total=stop - start, desc=label, unit="row", disable=not show, leave=False) as progress:
            for table in _wanted(files, paths, start, stop, expected_rows):
                writer = writer or pyarrow.parquet.ParquetWriter(unfinished, table.schema)
                writer.write_table(table)
                progress.update(len(table))
            writer.close()
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _wanted(files: Any, paths: Sequence[str], start: int, stop: int, expected_rows: int) -> Iterator[Any]:
    """The wanted rows, one group of rows of a file at a time."""
    footers = []
    for path in paths:
        with files.open(path, "rb") as handle:
            footers.append(pyarrow.parquet.read_metadata(handle))
    count = sum(footer.num_rows for footer in footers)
    if count != expected_rows:
        raise InputError(
            f"{paths[0]}: {count} rows, where {expected_rows} were published; its splits are positions among "
            "those, so give a local copy whose rows tell their split"
        )
    first = 0
    for path, footer in zip(paths, footers, strict=True):
        groups = []
        for number in range(footer.num_row_groups):
            last = first + footer.row_group(number).num_rows
            if first < stop and last > start:
                groups.append((number, max(start - first, 0), min(stop, last) - max(start, first)))
            first = last
        if groups:
            with files.open(path, "rb") as handle:
                opened = pyarrow.parquet.ParquetFile(handle)
                columns = [name for name in opened.schema_arrow.names if name != SPLIT_COLUMN]
                for number, offset, length in groups:
                    yield opened.read_row_group(number, columns=columns).slice(offset, length)
