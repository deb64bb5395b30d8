"""Who answers the widgets of the tab "Personalize": each handler says, by the widgets' names, what they show now."""

import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from nearid_personalize.demo import pictures, words
from nearid_personalize.demo.jobs import Job
from nearid_personalize.demo.studio import (
    TOKEN,
    CardRequest,
    DrawingProgress,
    DrawingRequest,
    DrawingResult,
    Studio,
    TrainingProgress,
    TrainingRequest,
    whole_prompt,
    zipped,
)
from nearid_personalize.demo.visitors import Visitor, Visitors
from nearid_personalize.errors import InputError
from nearid_personalize.files import safe_name
from nearid_personalize.guard.result import Candidate, RaceProgress
from nearid_personalize.images import load_image
from nearid_personalize.miniworld import CATEGORIES, example_references
from nearid_personalize.photos import PhotoCheck

log = logging.getLogger(__name__)

Shown: TypeAlias = dict[str, Any]
"""What widgets show from now on, by name; the others stay as they are."""

SAMPLE_PETS = tuple((category, number) for number in range(2) for category in CATEGORIES)
HIDDEN, VISIBLE = {"visible": False}, {"visible": True}


@dataclass
class Visit:
    """What one open page has come to.

    lora: learnt here, or given to all. uploaded: goes before it. shown: the accepted and the other candidates, in the
    order of their tiles.
    """

    visitor: Visitor
    check: PhotoCheck | None = None
    selected: int | None = None
    lora: Path | None = None
    uploaded: Path | None = None
    outcome: DrawingResult | None = None
    job: Job | None = None
    shown: tuple[tuple[Candidate, ...], tuple[Candidate, ...]] = ((), ())

    @property
    def lora_in_use(self) -> Path | None:
        """What pictures and report cards are drawn with."""
        return self.uploaded or self.lora


def answering(handler: Callable, widgets: Mapping[str, Any]) -> Callable:
    """A handler as gradio calls it where an event's inputs are a set: with the widgets' values in one dict.

    The handler gets the values under the widgets' names, and the event if it takes one. Errors reach the visitor as one
    sentence. It is a warning: of an error gradio would make a veil over every widget that the handler may change.
    """
    names = {widget: name for name, widget in widgets.items()}
    takes_event = "event" in inspect.signature(handler).parameters
    nothing_new = {[*widgets.values()][-1]: gr.skip()}  # no widget at all would not do for gradio

    def by_name(values: Mapping[Any, Any], event: gr.EventData) -> dict[str, Any]:
        given = {names[widget]: value for widget, value in values.items()}
        return {**given, "event": event} if takes_event else given

    def updates(answer: Shown) -> dict:
        shown = {name: gr.update(**value) if isinstance(value, dict) else value for name, value in answer.items()}
        return {widgets[name]: value for name, value in shown.items()} or nothing_new

    def call(values: dict, event: gr.EventData) -> Any:
        try:
            return updates(handler(**by_name(values, event)))
        except Exception as error:  # noqa: BLE001 - told and logged
            gr.Warning(sentence(error), title="That does not work")
            return nothing_new

    def generate(values: dict, event: gr.EventData) -> Any:
        try:
            for answer in handler(**by_name(values, event)):
                yield updates(answer)
        except Exception as error:  # noqa: BLE001 - told and logged
            gr.Warning(sentence(error), title="That does not work")
            yield nothing_new

    return generate if inspect.isgeneratorfunction(handler) else call


def sentence(error: Exception) -> str:
    """What the visitor is told; what is not their fault is logged in full."""
    if isinstance(error, InputError):
        text = str(error)
        return escape(text[:1].upper() + text[1:])
    log.error("a request failed", exc_info=error)
    return "Something went wrong here; it has been logged. Please try again."


class Handlers:
    """The handlers. lora: what every visit begins with. card_places: where a report card's pictures are set."""

    def __init__(
        self, studio: Studio, visitors: Visitors, lora: Path | None = None, card_places: Sequence[str] = ("in space",)
    ) -> None:
        self.studio, self.visitors, self.lora, self.card_places = studio, visitors, lora, tuple(card_places)

    def welcome(self, visit: Visit | None = None) -> Shown:
        """A visit begins; nothing is known of it yet."""
        return {"visit": Visit(self.visitors.new(), lora=self.lora)}

    # Photos

    def add(self, visit: Visit, drop: list[str] | None) -> Shown:
        """Photos were dropped."""
        refused = visit.visitor.add_photos(Path(file) for file in drop or [])
        return {"drop": None, **self._looked_at(visit, refused)}

    def borrow(self, visit: Visit, event: gr.EventData) -> Shown:
        """A sample pet was chosen: its photos take the place of those there are."""
        category, number = SAMPLE_PETS[place_in(event, SAMPLE_PETS)]
        visit.visitor.remove_photos(range(len(visit.visitor.photos)))
        folder = visit.visitor.new_folder("sample")
        for place, photo in enumerate(example_references(number, category=category)[0]):
            photo.save(folder / f"{place}.png")
        visit.visitor.add_photos(sorted(folder.iterdir()))
        return {"drop": None, "word": category, **self._looked_at(visit)}

    def select(self, visit: Visit, event: gr.EventData) -> Shown:
        """A photo was clicked."""
        visit.selected = place_in(event, visit.visitor.photos)
        return {"remove": {"value": f"Remove photo {visit.selected + 1}", "visible": True}}

    def remove_selected(self, visit: Visit) -> Shown:
        """The clicked photo goes."""
        visit.visitor.remove_photos([] if visit.selected is None else [visit.selected])
        return self._looked_at(visit)

    def remove_doubtful(self, visit: Visit) -> Shown:
        """The photos with a problem go."""
        good = visit.check.good if visit.check else ()
        visit.visitor.remove_photos(set(range(len(visit.visitor.photos))) - set(good))
        return self._looked_at(visit)

    def _looked_at(self, visit: Visit, refused: Sequence[str] = ()) -> Shown:
        visit.selected = visit.check = None
        photos = [load_image(path) for path in visit.visitor.photos]
        if not photos:
            told = words.note("<br>".join(map(escape, refused)), "bad") if refused else ""
            return {"photos": "", "photo_note": told, "remove": HIDDEN, "tidy": HIDDEN, "forget": HIDDEN}
        check = visit.check = self.studio.check(photos)
        return {
            "photos": pictures.tiles(pictures.photo_tiles(photos, check)),
            "photo_note": words.photo_summary(check, refused),
            "remove": HIDDEN,
            "forget": VISIBLE,
            "tidy": {"visible": 0 < len(check.good) < len(photos)},
        }

    # Training

    def train(self, visit: Visit, base_model: str, word: str, lora_steps: float) -> Iterator[Shown]:
        """Train a LoRA."""
        visitor = need_photos(visit.visitor)
        request = TrainingRequest(
            base_model=base_model,
            photos=photo_folder(visitor),
            word=checked_word(word),
            output=visitor.new_folder("lora"),
            steps=int(lora_steps),
        )
        visit.lora = visit.uploaded = None
        job = visit.job = self.studio.training(request)
        yield {
            "train": HIDDEN,
            "cancel": VISIBLE,
            "lora_file": None,
            "train_note": "",
            "samples": "",
            "progress": words.bar(0, "…"),
        }
        looks = 0
        try:
            with visitor.at_work():
                for news in job.news():
                    if news is None:
                        yield waiting(job, "progress")
                        continue
                    visit.lora = news.lora
                    answer = {"progress": words.training_progress(news)}
                    if len(news.curve) != looks:
                        answer["samples"] = pictures.tiles(sample_tiles(news), clickable=False)
                    looks = len(news.curve)
                    yield answer
        except Exception:
            yield {"train": VISIBLE, "cancel": HIDDEN, "progress": ""}
            raise
        done = words.note("Learnt. Now make pictures, below.", "good")
        told = done if visit.lora else words.note("Cancelled; nothing is kept of it.", "plain")
        yield {"train": VISIBLE, "cancel": HIDDEN, "train_note": told}

    def take_lora(self, visit: Visit, lora_file: str) -> Shown:
        """A LoRA was uploaded. One that is refused leaves the box free for another, and what was used in use."""
        try:
            visit.uploaded = taken_lora(visit.visitor, Path(lora_file))
        except InputError as error:
            return {"lora_file": None, "train_note": words.note(sentence(error), "bad")}
        return {"train_note": words.note(f"{escape(safe_name(Path(lora_file).name))} will be used.", "good")}

    def drop_lora(self, visit: Visit) -> Shown:
        """The uploaded LoRA was taken out again: the one it went before is used."""
        visit.uploaded = None
        return {"train_note": ""}

    # Pictures

    def draw(
        self,
        visit: Visit,
        base_model: str,
        word: str,
        prompt: str,
        wanted: float,
        candidates: float,
        strictness: str,
        spending: str,
        seed: float,
        steps: float,
        guidance: float,
        race: bool,
        copies: bool,
    ) -> Iterator[Shown]:
        """Draw pictures, which come as they are finished."""
        visitor = need_photos(visit.visitor)
        request = DrawingRequest(
            base_model=base_model,
            photos=tuple(visitor.photos),
            prompt=whole_prompt(checked_prompt(prompt), checked_word(word)),
            output=visitor.new_folder("my-pet"),
            lora=visit.lora_in_use,
            num_images=int(wanted),
            num_candidates=max(int(candidates), int(wanted)),
            strictness=strictness,
            spend=spending,  # type: ignore[arg-type]
            race=race,
            seed=int(seed),
            steps=int(steps),
            guidance_scale=guidance or None,
            reject_copies=not copies,
        )
        visit.outcome, visit.shown = None, ((), ())
        job = visit.job = self.studio.drawing(request)
        blank = dict.fromkeys(("headline", "accepted", "others", "details", "saving", "without"), "")
        busy = {"draw": HIDDEN, "stop": VISIBLE, "results": VISIBLE, "take_home": HIDDEN}
        yield {**blank, **busy, "draw_progress": words.bar(0, "…"), "accepted_title": HIDDEN, "others_title": HIDDEN}
        try:
            with visitor.at_work():
                yield from self._streamed(visit, job, request)
        except Exception:
            yield {"draw": VISIBLE, "stop": HIDDEN, "draw_progress": ""}
            raise
        ended = {"draw": VISIBLE, "stop": HIDDEN, "draw_progress": ""}
        told = finished(visit.outcome, word) if visit.outcome else {"headline": words.note("Stopped.", "plain")}
        yield {**ended, **told}

    def _streamed(self, visit: Visit, job: Job[DrawingProgress], request: DrawingRequest) -> Iterator[Shown]:
        before: object = None
        for news in job.news():
            if news is None:
                yield waiting(job, "draw_progress")
                continue
            if news.outcome is not None:
                result = news.outcome.result
                others = tuple(c for c in result.ranked if c.status != "accepted")
                visit.outcome, visit.shown = news.outcome, (result.accepted, others)
            elif (progress := news.progress) is not None:
                answer = {"draw_progress": words.drawing_progress(progress, request.num_candidates)}
                state = len(progress.candidates), [repr(score) for _, score in progress.looks.values()]
                yield answer | (so_far(progress, news.threshold) if state != before else {})
                before = state

    def open_accepted(self, visit: Visit, event: gr.EventData) -> Shown:
        """An accepted picture was clicked."""
        return self._details(visit, 0, event)

    def open_other(self, visit: Visit, event: gr.EventData) -> Shown:
        """Another picture was clicked."""
        return self._details(visit, 1, event)

    def _details(self, visit: Visit, which: int, event: gr.EventData) -> Shown:
        if visit.outcome is None:
            raise InputError("the pictures are still being drawn; they open once all are finished")
        index = place_in(event, visit.shown[which])
        candidate = visit.shown[which][index]
        picture = pictures.picture_of(candidate)
        if picture is None:
            raise InputError("this one was given up before there was anything to see")
        photos = [load_image(path) for path in visit.outcome.request.photos]
        drift = self.studio.drift(picture, photos)
        threshold = visit.outcome.result.threshold
        rank = 1 + index + which * len(visit.shown[0])
        figures = pictures.side_by_side(
            pictures.figure(picture, words.candidate_caption(candidate, threshold, rank)),
            pictures.figure(photos[drift.nearest], f"Your photo {drift.nearest + 1}, the most alike"),
            pictures.figure(drift.overlay, "Where it drifted: red keeps its likeness down the most"),
        )
        return {"details": figures + words.details(candidate, visit.outcome, drift.nearest, rank)}

    def without_guard(self, visit: Visit) -> Iterator[Shown]:
        """What the first seed alone would have given, beside the guard's best."""
        if (outcome := visit.outcome) is None:
            raise InputError("make pictures first")
        first = next(c for c in outcome.result.candidates if c.seed == outcome.request.seed)
        if first.image is None:
            yield {"without": words.note("Drawing the first candidate to its end…")}
            output = visit.visitor.new_folder("plain")
            request = replace(outcome.request, num_images=1, num_candidates=1, race=False, spend="save", output=output)
            with visit.visitor.at_work():
                for news in self.studio.drawing(request).news():
                    if news is not None and news.outcome is not None:
                        first = news.outcome.result.candidates[0]
                    yield {}
        yield {"without": words.without_guard(first, outcome.result.threshold) + beside(first, outcome.result.best)}

    def examine(self, visit: Visit, base_model: str, word: str, steps: float, guidance: float) -> Iterator[Shown]:
        """Fill in the report card of the visitor's LoRA."""
        from nearid_personalize.lora.card import verdict
        from nearid_personalize.lora.files import find_lora_file

        visitor = need_photos(visit.visitor)
        if visit.lora_in_use is None:
            raise InputError("there is no LoRA yet: let a model learn your pet, or bring a LoRA, on the first tab")
        request = CardRequest(
            base_model=base_model,
            photos=tuple(visitor.photos),
            lora=find_lora_file(visit.lora_in_use),
            name=f"{TOKEN} {checked_word(word)}",
            prompts=tuple(whole_prompt(text, checked_word(word)) for text in self.card_places),
            output=visitor.new_folder("report-card"),
            steps=int(steps),
            guidance_scale=guidance or None,
        )
        job = visit.job = self.studio.card(request)
        card, ended = None, {"examine": VISIBLE, "cancel_card": HIDDEN, "card_progress": ""}
        yield {"examine": HIDDEN, "cancel_card": VISIBLE, "card": "", "card_file": HIDDEN, "card_progress": ""}
        try:
            with visitor.at_work():
                for news in job.news():
                    if news is None:
                        yield waiting(job, "card_progress")
                    else:
                        card = news.card
                        yield {"card_progress": words.bar(news.share, f"DrawingProgress and judging: {news.share:.0%}")}
        except Exception:
            yield ended
            raise
        if card is None:
            yield {**ended, "card": words.note("Cancelled.")}
            return
        page = (request.output / "report_card.html").read_text(encoding="utf-8")
        told = words.note(escape(verdict(card)), "good" if card.best.num_accepted else "doubt")
        file = {"value": str(zipped(request.output)), "visible": True}
        yield {**ended, "card": told + pictures.enclosed(page, "The report card"), "card_file": file}

    def cancel(self, visit: Visit) -> Shown:
        """End what runs."""
        if visit is not None and visit.job is not None:
            visit.job.cancel()
        return {}

    def forget(self, visit: Visit) -> Shown:
        """Delete all that is the visitor's, and begin anew."""
        self.cancel(visit)
        self.visitors.forget(visit.visitor)
        blank = (
            "photos",
            "progress",
            "samples",
            "train_note",
            "draw_progress",
            "headline",
            "details",
            "without",
            "card",
        )
        gone = dict.fromkeys(("remove", "tidy", "forget", "results", "card_file"), HIDDEN)
        told = words.note("Your photos, LoRAs and pictures are deleted.", "good")
        files = {"drop": None, "lora_file": None}
        return {**self.welcome(), **dict.fromkeys(blank, ""), **gone, **files, "photo_note": told}


# --- what widgets are told -------------------------------------------------------------------------------------------


def so_far(progress: RaceProgress, threshold: float) -> Shown:
    """The pictures of a race under way: the accepted above, below those being drawn and those that are out."""
    accepted = sorted((c for c in progress.candidates if c.status == "accepted"), key=lambda c: -c.score)
    others = [c for c in progress.candidates if c.status != "accepted"]
    below = [*pictures.tiles_under_way(progress), *pictures.candidate_tiles(others, threshold)]
    return {
        "accepted": pictures.tiles(pictures.candidate_tiles(accepted, threshold)),
        "others": pictures.tiles(below),
        "accepted_title": {"visible": bool(accepted)},
        "others_title": {"value": "### Being drawn, or out", "visible": bool(below)},
    }


def finished(outcome: DrawingResult, word: str) -> Shown:
    """The pictures of a race that is over, and what to take home."""
    accepted, threshold = outcome.result.accepted, outcome.result.threshold
    others = [c for c in outcome.result.ranked if c.status != "accepted"]
    return {
        "headline": words.headline(outcome, word),
        "accepted": pictures.tiles(pictures.candidate_tiles(accepted, threshold, 1)),
        "others": pictures.tiles(pictures.candidate_tiles(others, threshold, len(accepted) + 1)),
        "accepted_title": {"visible": bool(accepted)},
        "others_title": {"value": "### Not accepted: click one to see where it drifted", "visible": bool(others)},
        "saving": words.summary(outcome),
        "download": str(outcome.archive),
        "take_home": VISIBLE,
    }


def beside(first: Candidate, best: Candidate) -> str:
    """Two candidates beside each other: without the guard, and with it."""
    shown = ((first, "Without the guard"), (best, "With the guard"))
    return pictures.side_by_side(
        *(
            pictures.figure(image, f"{title}: likeness {words.score(c.score)}, seed {c.seed}")
            for c, title in shown
            if (image := pictures.picture_of(c))
        )
    )


def waiting(job: Job, widget: str) -> Shown:
    """Nothing new; while other jobs are before this one, how many."""
    if not job.ahead:
        return {}
    return {widget: words.bar(0, f"{job.ahead} before you on this machine; yours begins by itself")}


def sample_tiles(news: TrainingProgress) -> list[pictures.Tile]:
    """The pictures of the latest look at a training."""
    return [pictures.Tile(sample, f"after {news.curve[-1][0]} steps") for sample in news.samples]


# --- what visitors may ask -------------------------------------------------------------------------------------------


def place_in(event: gr.EventData, shown: Sequence) -> int:
    """Which tile was clicked; what a page sends need not be one."""
    index = event._data.get("index") if isinstance(event._data, dict) else None
    if not isinstance(index, int) or not 0 <= index < len(shown):
        raise InputError("this picture is no longer there")
    return index


def need_photos(visitor: Visitor) -> Visitor:
    """The visitor, who must have photos."""
    if not visitor.photos:
        raise InputError("there are no photos yet: drop some, or borrow a pet")
    return visitor


def taken_lora(visitor: Visitor, file: Path) -> Path:
    """An uploaded LoRA, copied into the visitor's folder once its header was checked; InputError when it is none."""
    from nearid_personalize.lora.check import check_lora_file

    try:
        check_lora_file(file)
    except InputError as error:
        raise InputError(str(error).replace(str(file), safe_name(file.name))) from None
    # Not moved: who uploads the same bytes is given the same file
    return Path(shutil.copyfile(file, visitor.new_folder("lora") / "uploaded.safetensors"))


def photo_folder(visitor: Visitor) -> Path:
    """The photos alone, as the trainer wants them."""
    folder = visitor.new_folder("photos")
    for place, path in enumerate(visitor.photos):
        (folder / f"{place:03}.png").write_bytes(path.read_bytes())
    return folder


def checked_word(word: str) -> str:
    """What the subject is, in a word or two."""
    word = " ".join(str(word or "").split()).lower()
    if not 0 < len(word) <= 40:
        raise InputError("say in a word what it is, such as dog")
    return word


def checked_prompt(text: str) -> str:
    """A prompt of sensible length."""
    if not 0 < len(str(text or "").strip()) <= 400:
        raise InputError("say where it is to be, in 1 to 400 characters, such as: in space")
    return text
