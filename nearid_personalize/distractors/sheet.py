"""Pictures of a run to look at: views beside what became of them, and where the limits lie."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nearid_personalize.distractors.nearness import Limits, Scores
from nearid_personalize.report import TILE, fitted

SHEET_VIEWS = 40
"""Views on a contact sheet, at most."""
_COLUMNS = 6
_GAP = 12
_LABEL = 40
_PAPER, _INK, _FAINT = (250, 250, 248), (32, 33, 36), (112, 116, 122)
_KEPT, _REFUSED, _MARK = (22, 138, 66), (200, 40, 40), (230, 60, 200)
_PLOT = (360, 150)
_BINS = 40


@dataclass(frozen=True, eq=False)
class SheetRow:
    """One view of a contact sheet."""

    name: str
    view: Image.Image
    mask: Image.Image
    """White where it was repainted."""
    kept: Image.Image | None
    prompt: str
    refused: Sequence[tuple[Image.Image, str]]
    """Refused tries and their reasons."""


def contact_sheet(rows: Sequence[SheetRow], title: str) -> Image.Image:
    """A row for each view: the view, its mask, the distractor that is kept, and refused ones with their reasons."""
    width = _GAP + _COLUMNS * (TILE + _GAP)
    row_height = TILE + _LABEL + _GAP
    sheet = Image.new("RGB", (width, 60 + max(len(rows), 1) * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (_GAP, 8), title, 22, _INK, width - 2 * _GAP)
    for column, heading in enumerate(("view", "repainted", "kept", "refused")):
        _text(draw, (_GAP + column * (TILE + _GAP), 38), heading, 14, _FAINT)
    for number, row in enumerate(rows):
        tiles: list[tuple[Image.Image | None, str, tuple[int, int, int]]] = [
            (row.view, row.name, _FAINT),
            (marked(row.view, row.mask), "", _FAINT),
            (row.kept, row.prompt or "none", _KEPT if row.kept else _FAINT),
            *((picture, reason, _REFUSED) for picture, reason in row.refused[: _COLUMNS - 3]),
        ]
        for column, (picture, words, color) in enumerate(tiles):
            corner = (_GAP + column * (TILE + _GAP), 60 + number * row_height)
            _tile(sheet, corner, picture, words, color)
    return sheet


def marked(view: Image.Image, mask: Image.Image) -> Image.Image:
    """A view, pale, with the masked region in colour."""
    pale = Image.blend(view.convert("RGB"), Image.new("RGB", view.size, "white"), 0.5)
    color = Image.blend(view.convert("RGB"), Image.new("RGB", view.size, _MARK), 0.55)
    return Image.composite(color, pale, mask)


def _tile(
    sheet: Image.Image, corner: tuple[int, int], picture: Image.Image | None, words: str, color: tuple[int, int, int]
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), fill=color)
    if picture is None:
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=(226, 227, 229))
    else:
        sheet.paste(fitted(picture), corner)
    for line, text in enumerate(textwrap.wrap(words, 28)[:3]):
        _text(draw, (left, top + TILE + 4 + 12 * line), text, 11, _INK, TILE)


def limits_plot(scores: Sequence[Scores], limits: Limits) -> Image.Image:
    """A histogram of each measure over the first tries, and the limits; refused values are red."""
    measures = [field.name for field in fields(Scores)]
    shown = [name for name in measures if any(not math.isnan(getattr(score, name)) for score in scores)]
    width, height = _PLOT
    plot = Image.new("RGB", (2 * _GAP + width, _GAP + max(len(shown), 1) * (height + 34)), _PAPER)
    draw = ImageDraw.Draw(plot)
    for number, name in enumerate(shown):
        values = np.array([value for value in (getattr(score, name) for score in scores) if not math.isnan(value)])
        low, high = (getattr(limits, f"{end}_{name}", None) for end in ("min", "max"))
        _histogram(draw, (_GAP, _GAP + number * (height + 34)), name.replace("_", " "), values, low, high)
    return plot


def _histogram(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    name: str,
    values: np.ndarray,
    low: float | None,
    high: float | None,
) -> None:
    left, top = corner
    width, height = _PLOT
    limits = [limit for limit in (low, high) if limit is not None]
    start, end = min([float(values.min()), *limits]), max([float(values.max()), *limits])
    span = (end - start) or 1.0
    counts, edges = np.histogram(values, bins=_BINS, range=(start, start + span))
    floor = top + height - 16
    for count, edge in zip(counts, edges, strict=False):
        middle = edge + span / _BINS / 2
        refused = (low is not None and middle < low) or (high is not None and middle > high)
        x = left + round((edge - start) / span * width)
        bar = round((floor - top - 20) * count / max(counts.max(), 1))
        if bar:
            draw.rectangle((x, floor - bar, x + width // _BINS - 1, floor), fill=_REFUSED if refused else _KEPT)
    for limit in limits:
        x = left + round((limit - start) / span * width)
        draw.line((x, top + 18, x, floor), fill=_INK, width=2)
    told = "".join(f", {word} {limit:.3f}" for word, limit in (("from", low), ("to", high)) if limit is not None)
    _text(draw, (left, top), f"{name} (n {len(values)}){told}", 14, _INK)
    _text(draw, (left, floor + 3), f"{start:.3f}", 11, _FAINT)
    _text(draw, (left + width - 40, floor + 3), f"{start + span:.3f}", 11, _FAINT)


def _text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    color: tuple[int, int, int],
    max_width: int | None = None,
) -> None:
    font = ImageFont.load_default(size)
    while max_width is not None and len(text) > 4 and draw.textlength(text, font) > max_width:
        text = text[:-4] + "..."
    draw.text(corner, text, fill=color, font=font)
