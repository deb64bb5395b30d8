"""What a run leaves beside its pictures: a contact sheet to look at and a `report.json` to read on."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from nearid_personalize.files import write_atomically
from nearid_personalize.images import save_image

if TYPE_CHECKING:
    from nearid_personalize.guard.result import Candidate, GuardResult

Color: TypeAlias = tuple[int, int, int]

UNREADABLE = "unreadable"
"""Status of a file that is no picture, or a damaged one."""

TILE = 168
"""Side of a picture on the sheet, pixels; smaller pictures are enlarged to it."""
COLUMNS = 8

_FRAME = 5
_GAP = 14
_LABEL_HEIGHT = 44
_PAPER: Color = (250, 250, 248)
_INK: Color = (32, 33, 36)
_FAINT: Color = (112, 116, 122)
_STATUS_COLOR: dict[str, Color] = {
    "accepted": (22, 138, 66),
    "rejected": (200, 40, 40),
    "stopped": (112, 116, 122),
    "duplicate": (190, 122, 0),
    "copy": (190, 122, 0),
    UNREADABLE: (112, 116, 122),
}
_WARM, _HOT = np.array((255.0, 205.0, 60.0)), np.array((200.0, 20.0, 30.0))
_PACKAGES = ("nearid-personalize", "torch", "transformers", "diffusers", "peft", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class Tile:
    """One scored picture of a contact sheet.

    `name` is what to call it ("seed 7", a file name), `score` a cosine in [-1, 1] or NaN, `image` None where there is
    no picture; a stopped candidate's is its last preview. `reason` says why there is no score, where that is known.
    """

    image: Image.Image | None
    name: str
    score: float
    status: str
    reason: str = ""


# --- contact sheet ---------------------------------------------------------------------------------------------------


def candidate_tiles(result: "GuardResult") -> list[Tile]:
    """Every candidate of a guarded generation, best first."""
    return [Tile(c.image or c.last_preview, _name(c), c.score, c.status) for c in result.ranked]


def _name(candidate: "Candidate") -> str:
    stopped = f", step {candidate.stopped_at_step}" if candidate.stopped_at_step else ""
    return f"seed {candidate.seed}{stopped}"


def contact_sheet(
    references: Sequence[Image.Image],
    tiles: Sequence[Tile],
    title: str,
    threshold: float,
    columns: int = COLUMNS,
    heading: str = "Most alike first",
) -> Image.Image:
    """References on top, below them the scored pictures in the order given, `columns` to a row.

    heading: what the order is. Accepted pictures are framed green and ticked; rejected ones are framed red, crossed and
    paled. The references that do not fit in one row beside the legend are counted, not shown.
    """
    columns = max(columns, 4)
    shown = references[: columns - 2]  # two tiles' width is left for the legend
    reference_top = 2 * _GAP + 58
    candidate_top = reference_top + TILE + _GAP + 40
    rows = math.ceil(len(tiles) / columns)
    width = _GAP + columns * (TILE + _GAP)
    sheet = Image.new("RGB", (width, candidate_top + rows * (TILE + _LABEL_HEIGHT + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    _text(draw, (_GAP, _GAP), title, 24, _INK, width - 2 * _GAP)
    more = f", {len(shown)} shown" if len(shown) < len(references) else ""
    _text(draw, (_GAP, reference_top - 22), f"References ({len(references)}{more})", 16, _FAINT)
    for position, image in enumerate(shown):
        sheet.paste(fitted(image), (_column(position), reference_top))
    _draw_legend(draw, (_column(len(shown)) + _GAP, reference_top), tiles, threshold)

    _text(draw, (_GAP, candidate_top - 26), heading, 16, _FAINT)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        _draw_tile(sheet, (_column(column), candidate_top + row * (TILE + _LABEL_HEIGHT + _GAP)), position + 1, tile)
    return sheet


def fitted(image: Image.Image, side: int = TILE) -> Image.Image:
    """The whole picture scaled to fit a square of `side` pixels, enlarged where it is smaller, centred on the paper."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), _PAPER)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


def _column(index: int) -> int:
    return _GAP + index * (TILE + _GAP)


def _draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], tiles: Sequence[Tile], threshold: float) -> None:
    left, top = corner
    statuses = [status for status in _STATUS_COLOR if any(tile.status == status for tile in tiles)]
    scored = sum(tile.status != UNREADABLE for tile in tiles)
    _text(draw, (left, top), f"{scored} pictures scored", 18, _INK)
    for line, status in enumerate(statuses, start=1):
        count = sum(tile.status == status for tile in tiles)
        _draw_badge(draw, (left + 11, top + 28 * line + 12), status)
        _text(draw, (left + 30, top + 28 * line), f"{count} {status}", 18, _STATUS_COLOR[status])
    below = top + 28 * (len(statuses) + 1) + 6
    _text(draw, (left, below), f"accepted from similarity {threshold:.3f} on", 15, _FAINT)


def _draw_tile(sheet: Image.Image, corner: tuple[int, int], rank: int, tile: Tile) -> None:
    left, top = corner
    color = _STATUS_COLOR.get(tile.status, _FAINT)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - _FRAME, top - _FRAME, left + TILE + _FRAME - 1, top + TILE + _FRAME - 1), fill=color)
    if tile.image is None:
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=(226, 227, 229))
        _text(draw, (left + 12, top + TILE // 2 - 10), "no picture", 16, _FAINT)
    else:
        picture = fitted(tile.image)
        paled = Image.blend(picture, Image.new("RGB", picture.size, _PAPER), 0.0 if tile.status == "accepted" else 0.3)
        sheet.paste(paled, corner)
    if tile.status == "rejected":
        draw.line((left, top + TILE - 1, left + TILE - 1, top), fill=color, width=2)
    _draw_badge(draw, (left + TILE - 16, top + 16), tile.status)
    score = "not scored" if math.isnan(tile.score) else f"{tile.score:.3f}"
    label_top = top + TILE + _FRAME + 2
    _text(draw, (left, label_top), score, 17, _INK)
    word_left = left + TILE - round(draw.textlength(tile.status, _font(15)))
    _text(draw, (word_left, label_top + 1), tile.status, 15, color)
    _text(draw, (left, label_top + 20), f"{rank}. {tile.name}", 14, _FAINT, TILE)


def _draw_badge(draw: ImageDraw.ImageDraw, centre: tuple[int, int], status: str) -> None:
    """A disc with a tick for accepted, a cross for rejected, a bar for the rest: readable without colours."""
    x, y = centre
    draw.ellipse((x - 11, y - 11, x + 11, y + 11), fill=_STATUS_COLOR.get(status, _FAINT), outline=_PAPER, width=2)
    if status == "accepted":
        draw.line([(x - 5, y), (x - 1, y + 4), (x + 5, y - 4)], fill="white", width=3)
    elif status == "rejected":
        draw.line((x - 4, y - 4, x + 4, y + 4), fill="white", width=3)
        draw.line((x - 4, y + 4, x + 4, y - 4), fill="white", width=3)
    else:
        draw.line((x - 5, y, x + 5, y), fill="white", width=3)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    color: Color,
    max_width: int | None = None,
) -> None:
    """One line of text, cut with dots where it is wider than `max_width` pixels."""
    text, font = " ".join(text.split()), _font(size)
    if max_width is not None and draw.textlength(text, font) > max_width:
        while text and draw.textlength(text + "...", font) > max_width:
            text = text[:-1]
        text += "..."
    draw.text(corner, text, fill=color, font=font)


# --- where it drifted ------------------------------------------------------------------------------------------------


def drift_sheet(image: Image.Image, reference: Image.Image, heat: npt.ArrayLike, side: int = 2 * TILE) -> Image.Image:
    """A picture, the reference nearest to it, and the picture again under its heat, beside each other.

    heat: [H,W] in [0, 1], see `heat_overlay`. side: of each of the three, pixels.
    """
    panels = {"this picture": image, "nearest reference": reference, "where it drifted": heat_overlay(image, heat)}
    sheet = Image.new("RGB", (_GAP + len(panels) * (side + _GAP), side + 2 * _GAP + 24), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for position, (title, panel) in enumerate(panels.items()):
        left = _GAP + position * (side + _GAP)
        sheet.paste(fitted(panel, side), (left, _GAP))
        _text(draw, (left, _GAP + side + 4), title, 16, _FAINT, side)
    return sheet


def heat_overlay(image: Image.Image, heat: npt.ArrayLike) -> Image.Image:
    """A picture, paled and without its colours, with heat painted over it: yellow where warm, red where hottest.

    heat: [H,W] in [0, 1] over the whole picture, of any size; cold places stay clear.
    """
    values = np.asarray(heat, np.float32)
    warmth = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    base = np.asarray(image.convert("L"), np.float32)[..., None] * 0.6 + 255 * 0.3
    color = _WARM + (_HOT - _WARM) * warmth
    return Image.fromarray(np.rint(base + (color - base) * 0.85 * warmth).astype(np.uint8))


# --- report.json -----------------------------------------------------------------------------------------------------


def generation_report(
    result: "GuardResult",
    image_names: Mapping[int, str],
    models: Mapping[str, str | None],
    extra_seconds: Mapping[str, float],
) -> dict:
    """The report of a guarded generation, candidates best first.

    Args:
        image_names: file name of each candidate's picture, by seed.
        models: what was loaded as "base", "lora" and "scorer"; None for none.
        extra_seconds: wall time of the stages around the guard, e.g. "train_lora", seconds.
    """
    return {
        "prompt": result.prompt,
        "seed": result.seed,
        "threshold": result.threshold,
        "candidates": [
            {
                "seed": candidate.seed,
                "score": finite_or_none(candidate.score),
                "status": candidate.status,
                "reason": candidate.reason,
                "stopped_at_step": candidate.stopped_at_step,
                "image": image_names.get(candidate.seed),
            }
            for candidate in result.ranked
        ],
        "cost": {
            "denoiser_rows": result.cost.denoiser_rows,
            "denoiser_rows_best_of_n": result.cost.denoiser_rows_best_of_n,
            "seconds": rounded({**extra_seconds, **result.cost.seconds}),
        },
        "models": dict(models),
        "versions": versions(),
    }


def write_generation(
    result: "GuardResult",
    references: Sequence[Image.Image],
    models: Mapping[str, str | None],
    extra_seconds: Mapping[str, float],
    out: Path,
) -> dict:
    """Write the pictures of a guarded generation, its contact sheet and, last, the `report.json` that names them.

    Returns the report; see `generation_report` for the arguments.
    """
    names = {c.seed: f"candidate-{c.seed}.png" for c in result.candidates if c.image is not None}
    for candidate in result.candidates:
        if candidate.image is not None:
            save_image(candidate.image, out / names[candidate.seed])
    sheet = contact_sheet(references, candidate_tiles(result), result.prompt, result.threshold)
    save_image(sheet, out / "contact_sheet.png")
    report = generation_report(result, names, models, extra_seconds)
    write_report(report, out / "report.json")
    return report


def score_report(tiles: Sequence[Tile], threshold: float, scorer: str, seconds: Mapping[str, float]) -> dict:
    """The report of scoring existing pictures, in the order of `tiles`; each tile's name is its file's."""
    return {
        "threshold": threshold,
        "images": [_scored(tile) for tile in tiles],
        "cost": {"seconds": rounded(seconds)},
        "models": {"scorer": scorer},
        "versions": versions(),
    }


def _scored(tile: Tile) -> dict:
    entry = {"image": tile.name, "score": finite_or_none(tile.score), "status": tile.status}
    return {**entry, "reason": tile.reason} if tile.reason else entry


def evaluation_report(
    data: str,
    split: str | None,
    results: Sequence[Mapping],
    encoders: Mapping[str, str],
    seconds: Mapping[str, float],
    intervals: str,
    benchmark: str | None = None,
) -> dict:
    """The report of measuring encoders: one result per encoder and distractor source; NaN becomes null.

    intervals: what the results' intervals are and over what they were taken.
    """
    return {
        "data": data,
        **({} if benchmark is None else {"benchmark": benchmark}),
        "split": split,
        "intervals": intervals,
        "results": [{name: _finite(value) for name, value in result.items()} for result in results],
        "cost": {"seconds": rounded(seconds)},
        "models": dict(encoders),
        "versions": versions(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return finite_or_none(value) if isinstance(value, float) else value


def write_report(report: Mapping, path: str | Path) -> None:
    """Write a report as JSON, whole or not at all."""
    write_atomically(path, to_json(report))


def to_json(report: Mapping) -> str:
    """A report as indented JSON that every parser reads: NaN and infinity are refused."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def versions() -> dict[str, str | None]:
    """Python and the packages that decide the pixels and scores; None for those not installed."""
    return {"python": platform.python_version(), **{name: _version_of(name) for name in _PACKAGES}}


def finite_or_none(score: float) -> float | None:
    """A score that JSON can hold: NaN, "not scored", becomes null."""
    return score if math.isfinite(score) else None


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Wall times to the millisecond."""
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
