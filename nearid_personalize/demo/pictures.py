"""Pictures as HTML: tiles that can be clicked, and figures beside each other. Nothing here knows of gradio.

They travel inside the page, so that no picture of a visitor's lies in a folder that the server shows to others.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from nearid_personalize.demo import words
from nearid_personalize.errors import InputError
from nearid_personalize.guard.result import Candidate, RaceProgress
from nearid_personalize.images import load_upload
from nearid_personalize.photos import PhotoCheck
from nearid_personalize.report import fitted

THUMBNAIL, CLOSE_UP = 256, 640  # pixels


@dataclass(frozen=True)
class Tile:
    """A picture with a line below it. status: a class of the style sheet, with a sign that tells it without colours."""

    image: Image.Image | None
    caption: str
    status: str = "plain"


def source(image: Image.Image, side: int) -> str:
    """A picture as the address of an `img`; small ones keep their hard pixels until the browser smooths them."""
    buffer = BytesIO()
    scaled = image.convert("RGB")
    scaled = fitted(scaled, side) if max(scaled.size) != side else scaled
    scaled.save(buffer, "WEBP", quality=88)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"


def tiles(shown: Sequence[Tile], clickable: bool = True) -> str:
    """A grid of tiles, in HTML; those that can be clicked are buttons, and so reached by the keyboard."""
    return f'<div class="tiles">{"".join(_tile(t, i, clickable) for i, t in enumerate(shown))}</div>' if shown else ""


def _tile(tile: Tile, index: int, clickable: bool) -> str:
    text = escape(tile.caption)
    look = f'<img src="{source(tile.image, THUMBNAIL)}" alt="{text}">' if tile.image else '<i class="nothing"></i>'
    inside = f'<span class="look">{look}</span><span class="caption">{text}</span>'
    if clickable:
        return f'<button type="button" class="tile {tile.status}" data-index="{index}">{inside}</button>'
    return f'<div class="tile {tile.status}">{inside}</div>'


def figure(image: Image.Image, caption: str) -> str:
    """A large picture with its caption, which is also what is read out for it."""
    text = escape(caption)
    return f'<figure><img src="{source(image, CLOSE_UP)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def side_by_side(*figures: str) -> str:
    """Figures in a row that wraps on a narrow screen."""
    return f'<div class="figures">{"".join(figures)}</div>'


def enclosed(page: str, title: str) -> str:
    """A whole HTML page inside this one: its styles stay its own, and nothing in it runs."""
    return f'<iframe class="enclosed" sandbox="" title="{escape(title)}" srcdoc="{escape(page)}"></iframe>'


# --- whose pictures --------------------------------------------------------------------------------------------------


def photo_tiles(photos: Sequence[Image.Image], check: PhotoCheck) -> list[Tile]:
    """A visitor's photos, and how each does among the others."""
    statuses = ["duplicate" if note.problems else "accepted" for note in check.photos]
    return [Tile(*each) for each in zip(photos, words.photo_captions(check), statuses)]


def candidate_tiles(candidates: Sequence[Candidate], threshold: float, first_rank: int | None = None) -> list[Tile]:
    """Candidates, best first; first_rank: of the first of them, None while the ranks are not known."""
    ranks = [None if first_rank is None else first_rank + place for place in range(len(candidates))]
    return [
        Tile(picture_of(c), words.candidate_caption(c, threshold, rank), c.status) for c, rank in zip(candidates, ranks)
    ]


def tiles_under_way(progress: RaceProgress) -> list[Tile]:
    """The candidates still being drawn, as they looked last."""
    return [
        Tile(image, f"drawing… {words.score(score)}", "drawing") for image, score in progress.looks.values() if image
    ]


def picture_of(candidate: Candidate) -> Image.Image | None:
    """What there is to see of a candidate: its picture, or where it was stopped, its last preview."""
    return candidate.image or candidate.last_preview


def uploaded(files: Sequence[str] | None, limit: int) -> list[Image.Image]:
    """Uploaded files as pictures; the complaint about one names it as its owner does."""
    if len(files or ()) > limit:
        raise InputError(f"{len(files or ())} pictures are too many; at most {limit} are taken")
    return [load_upload(Path(file), Path(file).name) for file in files or ()]
