"""What a finished run leaves beside its pictures: `report.json`, a contact sheet, a plot of the limits, and parquet."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nearid_personalize.data import Rows
from nearid_personalize.distractors.nearness import Limits, to_fields
from nearid_personalize.distractors.places import Place
from nearid_personalize.distractors.records import Records
from nearid_personalize.distractors.sheet import SHEET_VIEWS, SheetRow, contact_sheet, limits_plot
from nearid_personalize.errors import InputError
from nearid_personalize.images import load_image, save_image
from nearid_personalize.report import versions, write_report

ROWS_AT_ONCE = 64
"""Rows of parquet that are held in memory."""


def write_outputs(rows: Rows, places: Sequence[Place], records: Records, models: Mapping[str, Any]) -> dict[str, Any]:
    """Write `contact_sheet.png`, `limits.png` and, last, `report.json`; returns the report."""
    report = build_report(rows, places, records, models)
    limits = records.limits() or Limits()
    first = [found.scores for place in places if (found := records.read_try(place, 0)) is not None]
    save_image(contact_sheet(_sheet_rows(places, records), rows.name), records.out / "contact_sheet.png")
    save_image(limits_plot(first, limits), records.out / "limits.png")
    write_report(report, records.out / "report.json")
    return report


def build_report(rows: Rows, places: Sequence[Place], records: Records, models: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, limits, the proof, and what became of every view."""
    views = [_view_report(place, records) for place in places]
    refusals = [reason.split(" (")[0] for view in views for reason in view["refused"]]
    kept = [view for view in views if view["status"] == "kept"]
    return {
        "data": rows.name,
        "counts": {
            **{status: sum(view["status"] == status for view in views) for status in ("kept", "refused", "skipped")},
            "tries": sum(len(view["tries"]) for view in views),
            "refusals": dict(Counter(refusals).most_common()),
        },
        "background": {
            "files": len(kept),
            "pixels_compared": sum(view["background_pixels"] for view in kept),
            # A run with any other number ends in an error before there is a report.
            "pixels_changed": 0,
        },
        "limits": to_fields(records.limits() or Limits()),
        "seconds_drawing": round(sum(tried["seconds"] for view in views for tried in view["tries"]), 3),
        "models": dict(models),
        "views": views,
        "versions": versions(),
    }


def _view_report(place: Place, records: Records) -> dict[str, Any]:
    tries = [{**asdict(found), "scores": to_fields(found.scores)} for found in records.tries(place)]
    found: dict[str, Any] = {"view": place.key, "tries": tries, "refused": []}
    skipped, outcome = records.skipped(place), records.outcome(place)
    if skipped is not None or outcome is None:
        return {**found, "status": "skipped", "reason": skipped}
    found |= {"refused": list(outcome.refusals), "status": "refused" if outcome.kept is None else "kept"}
    if outcome.kept is not None:
        found |= {"kept_try": outcome.kept, "background_pixels": outcome.background_pixels, "oracle": outcome.oracle}
    return found


def _sheet_rows(places: Sequence[Place], records: Records) -> list[SheetRow]:
    """The first views, each with its mask, what is kept and what was refused; views that could not be read are left
    out."""
    shown: list[SheetRow] = []
    for place in places:
        outcome = records.outcome(place)
        if len(shown) == SHEET_VIEWS or outcome is None or not place.view_file.is_file():
            continue
        tries = records.tries(place)
        kept = None if outcome.kept is None else load_image(place.distractor_file)
        refused = []
        for found, reason in zip(tries, outcome.refusals, strict=False):
            picture = records.picture_file(place, found.number)
            if picture.is_file():
                refused.append((load_image(picture), reason))
        mask = place.painted_file if place.painted_file.is_file() else place.mask_file
        shown.append(
            SheetRow(
                name=place.key,
                view=load_image(place.view_file),
                mask=load_image(mask).convert("L"),
                kept=kept,
                prompt=tries[outcome.kept].prompt if outcome.kept is not None else "",
                refused=refused,
            )
        )
    return shown


# --- parquet ---------------------------------------------------------------------------------------------------------
def write_parquet(rows: Rows, places: Sequence[Place], records: Records, folder: Path, model: str) -> tuple[Path, Path]:
    """Write the built set as `views.parquet` and `distractors.parquet`, in the columns of the Hub's NearID sets.

    Views: `id, category, category_description, images1..V, masks1..V, n_images, prompts1..V, quality, split`.
    Distractors, row for row the same ids: `id, nimg1..V`, and of each `nmasks`, `nprompts`, `nseeds`, `nscores` (JSON)
    and `noracles`; `model` is what drew them. A few rows at a time are held in memory.

    Raises:
        InputError: the package `datasets` is not installed.
    """
    try:
        import datasets
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(f"--parquet: needs {error.name}; pip install 'nearid-personalize[train]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    subjects: dict[int, list[Place]] = {}
    for place in places:
        if place.view_file.is_file() and records.skipped(place) is None:
            subjects.setdefault(place.row, []).append(place)
    count = max((len(found) for found in subjects.values()), default=0)
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "int": datasets.Value("int64"),
        "float": datasets.Value("float64"),
    }
    tables = (
        ("views.parquet", _view_columns(count), _view_row),
        ("distractors.parquet", _distractor_columns(count), _distractor_row),
    )
    written = []
    for name, columns, read in tables:
        schema = datasets.Features({column: kinds[kind] for column, kind in columns.items()}).arrow_schema
        path, unfinished = folder / name, folder / f".{name}.partial"
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            entries = (
                {**dict.fromkeys(columns), **read(rows[row].id, found, records, model)}
                for row, found in subjects.items()
            )
            for chunk in _chunks(entries, ROWS_AT_ONCE):
                writer.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))
        unfinished.replace(path)
        written.append(path)
    return written[0], written[1]


def _view_columns(count: int) -> dict[str, str]:
    columns = {"id": "text", "category": "text", "category_description": "text", "n_images": "int"}
    columns |= {"quality": "float", "split": "text"}
    for number in range(1, count + 1):
        columns |= {f"images{number}": "image", f"masks{number}": "image", f"prompts{number}": "text"}
        columns |= {f"image_{number}_part_mask": "image"}
    return columns


def _distractor_columns(count: int) -> dict[str, str]:
    columns = {"id": "text", "model": "text"}
    for number in range(1, count + 1):
        columns |= {f"nimg{number}": "image", f"nmasks{number}": "image", f"nprompts{number}": "text"}
        columns |= {f"nseeds{number}": "int", f"nscores{number}": "text", f"noracles{number}": "float"}
    return columns


def _view_row(row_id: str, places: Sequence[Place], records: Records, model: str) -> dict[str, Any]:
    category_file = places[0].folder / "category.txt"
    category = category_file.read_text(encoding="utf-8").strip() if category_file.is_file() else None
    split = places[0].key.split("/")[0] if places[0].key.count("/") == 2 else None
    entry: dict[str, Any] = {"id": row_id, "category": category, "n_images": len(places), "split": split}
    for number, place in enumerate(places, start=1):
        entry[f"images{number}"] = _encoded(place.view_file)
        entry[f"masks{number}"] = _encoded(place.mask_file)
        entry[f"image_{number}_part_mask"] = _encoded(place.part_file)
    return entry


def _distractor_row(row_id: str, places: Sequence[Place], records: Records, model: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": row_id, "model": model}
    for number, place in enumerate(places, start=1):
        outcome = records.outcome(place)
        if outcome is None or outcome.kept is None:
            continue
        found = records.read_try(place, outcome.kept)
        assert found is not None, "what is kept was tried"
        entry[f"nimg{number}"] = _encoded(place.distractor_file)
        entry[f"nmasks{number}"] = _encoded(place.painted_file)
        entry[f"nprompts{number}"], entry[f"nseeds{number}"] = found.prompt, found.seed
        entry[f"nscores{number}"] = json.dumps(to_fields(found.scores))
        entry[f"noracles{number}"] = outcome.oracle
    return entry


def _encoded(path: Path) -> dict[str, Any] | None:
    """A cell of an image column: the file's own bytes, so that what was proved of them holds."""
    return {"bytes": path.read_bytes(), "path": None} if path.is_file() else None


def _chunks(entries: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
