"""The tab "Who is it?": a gallery of the visitor's own, and which of its subjects a picture shows, if any."""

import hashlib
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from nearid_personalize.demo import pictures, words
from nearid_personalize.demo.api import PHOTO_FILES
from nearid_personalize.demo.handlers import SAMPLE_PETS, Shown, Visit, answering
from nearid_personalize.demo.studio import Studio
from nearid_personalize.errors import InputError
from nearid_personalize.images import load_image, save_image
from nearid_personalize.miniworld import example_references

if TYPE_CHECKING:
    from nearid_personalize.gallery import Finding

MAX_SUBJECTS = 200


class Who:
    """The handlers; a visitor's gallery lies in their folder, with one photo of each subject to show."""

    def __init__(self, studio: Studio, max_photos: int) -> None:
        self.studio, self.max_photos = studio, max_photos

    def add(self, visit: Visit, who_name: str, who_photos: list[str] | None) -> Shown:
        """Photos of one subject were given."""
        photos = pictures.uploaded(who_photos, self.max_photos)
        if not photos:
            raise InputError("no photos; give one or more of the one that you name")
        self._add(visit, {(who_name or "").strip(): photos})
        return {"who_name": "", "who_photos": None, **self._family(visit)}

    def borrow(self, visit: Visit) -> Shown:
        """The toy world's sample pets move in."""
        pets = {}
        for category, number in SAMPLE_PETS:
            pets[f"{category} {number + 1}"] = example_references(number, category=category)[0]
        self._add(visit, pets)
        return self._family(visit)

    def ask(self, visit: Visit, who_files: list[str] | None) -> Shown:
        """Pictures were shown: each is a question."""
        asked = pictures.uploaded(who_files, self.max_photos)
        if not asked:
            raise InputError("no picture; give one to ask about")
        if not self._folder(visit).is_dir():
            raise InputError("nobody is known yet; add a subject first")
        with self.studio.gallery(self._folder(visit)) as gallery:
            found = gallery.search(asked, false_accept_rate=None)
        rows = []
        for picture, finding in zip(asked, found):
            best = finding.matches[0]
            figures = pictures.side_by_side(
                pictures.figure(picture, "Your picture"),
                pictures.figure(load_image(self._face(visit, best.name)), f"Most like it: {best.name}"),
            )
            rows.append(answer(finding) + figures)
        return {"who_answer": "".join(rows)}

    def _add(self, visit: Visit, subjects: dict[str, list]) -> None:
        visit.visitor.require_room()
        self._folder(visit).parent.mkdir(parents=True, exist_ok=True)
        with self.studio.gallery(self._folder(visit)) as gallery:
            if len(gallery) + len(subjects) > MAX_SUBJECTS:
                raise InputError(f"{MAX_SUBJECTS} subjects are the most that this page keeps")
            for name, photos in subjects.items():
                gallery.add(name, photos)
                face = self._face(visit, name)
                if not face.exists():
                    save_image(pictures.fitted(photos[0].convert("RGB"), pictures.THUMBNAIL), face)

    def _family(self, visit: Visit) -> Shown:
        with self.studio.gallery(self._folder(visit)) as gallery:
            known = list(gallery.subjects())
        tiles = []
        for name, count, _ in known:
            caption = f"{name}, {count} photo{'s' if count > 1 else ''}"
            tiles.append(pictures.Tile(load_image(self._face(visit, name)), caption))
        return {"who_family": pictures.tiles(tiles, clickable=False)}

    def _folder(self, visit: Visit) -> Path:
        return visit.visitor.folder / "gallery"

    def _face(self, visit: Visit, name: str) -> Path:
        """The photo that stands for a subject."""
        return visit.visitor.folder / f"face-{hashlib.sha256(name.encode()).hexdigest()[:16]}.png"


def answer(found: "Finding") -> str:
    """Who it is, with the numbers that say so."""
    best, after = found.matches[0], found.runner_up
    nearest = f"Likeness to {escape(best.name)} {words.score(best.score)}"
    if after is not None:
        nearest += f", to {escape(after.name)} {words.score(after.score)}"
    if found.false_accept_rate is None:
        basis = "Nothing is known of this encoder's errors, so the verdict follows a rule of thumb."
    else:
        basis = f"Of strangers {found.false_accept_rate:.1%} or fewer would score as high."
    if found.name is None:
        return words.note(f"<b>None of yours.</b> {nearest}. {basis}", "bad")
    return words.note(f"<b>It is {escape(found.name)}.</b> {nearest}. {basis}", "good")


def who_tab(studio: Studio, max_photos: int, visit: gr.State) -> None:
    """The widgets."""
    gr.Markdown("## Who is it?\nName a few, each with some photos. Then ask who is in a picture: one of them, or none.")
    if find_spec("lancedb") is None:
        gr.Markdown("This tab needs LanceDB on the machine that shows this page: `pip install lancedb`.")
        return
    handlers = Who(studio, max_photos)
    widgets: dict[str, Any] = {"visit": visit}
    with gr.Row(equal_height=False):
        with gr.Column():
            widgets["who_name"] = gr.Textbox(label="A name", max_lines=1, elem_id="who-name")
            widgets["who_photos"] = gr.File(
                label="Photos of it", file_count="multiple", file_types=PHOTO_FILES, height=150, elem_id="who-photos"
            )
            with gr.Row():
                add = gr.Button("Add", variant="primary", elem_id="who-add")
                borrow = gr.Button("Borrow the toy world's pets", elem_id="who-borrow")
        with gr.Column():
            widgets["who_files"] = gr.File(
                label="A picture to ask about, or several",
                file_count="multiple",
                file_types=PHOTO_FILES,
                height=150,
                elem_id="who-files",
            )
            ask = gr.Button("Who is it?", variant="primary", elem_id="who-ask")
    widgets["who_answer"] = gr.HTML(elem_id="who-answer")
    widgets["who_family"] = gr.HTML(elem_id="who-family", elem_classes="grid")

    def on(button: gr.Button, handler: Any, inputs: Sequence[str], busy: str) -> None:
        asked = {widgets[name] for name in ("visit", *inputs)}
        button.click(
            answering(handler, widgets),
            asked,
            [*widgets.values()],
            api_visibility="private",
            concurrency_limit=None,
            show_progress="minimal",
            show_progress_on=widgets[busy],
        )

    on(add, handlers.add, ["who_name", "who_photos"], "who_family")
    on(borrow, handlers.borrow, [], "who_family")
    on(ask, handlers.ask, ["who_files"], "who_answer")
