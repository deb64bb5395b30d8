"""The page's actions for programs: named, typed endpoints for `gradio_client`, and with the extra `mcp` MCP tools.

Each call stands alone: what it was given and made is deleted when it ends, but for the files that it returns.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from nearid_personalize.demo.handlers import (
    checked_prompt,
    checked_word,
    need_photos,
    photo_folder,
    sentence,
    taken_lora,
)
from nearid_personalize.demo.jobs import Job
from nearid_personalize.demo.studio import (
    TOKEN,
    CardRequest,
    DrawingRequest,
    Studio,
    TrainingRequest,
    whole_prompt,
    zipped,
)
from nearid_personalize.demo.visitors import Visitor, Visitors
from nearid_personalize.errors import InputError
from nearid_personalize.images import IMAGE_SUFFIXES, load_image, save_image
from nearid_personalize.lora.card import verdict
from nearid_personalize.miniworld import CATEGORIES, example_references
from nearid_personalize.report import finite_or_none
from nearid_personalize.scorer.calibration import FALSE_ACCEPT_RATES

MAX_PLACES = 8
"""Prompts of one report card."""

# By suffix too: whether a .webp or .heic counts as an "image" depends on the machine's table of MIME types.
PHOTO_FILES = ["image", *IMAGE_SUFFIXES]
"""Files that may be uploaded as photos."""


class Endpoints:
    """The handlers; long ones yield where they are, and their result at last."""

    def __init__(self, studio: Studio, visitors: Visitors, steps: int) -> None:
        self.studio, self.visitors, self.steps = studio, visitors, steps

    def sample_photos(self, category: str, number: float) -> Iterator[list[str]]:
        """Four photos of a pet of the toy world. number: which pet, 0 or more."""
        with self._caller() as visitor:
            folder = visitor.new_folder("sample")
            photos = example_references(int(number), category=category)[0]
            for place, photo in enumerate(photos):
                save_image(photo, folder / f"photo-{place}.png")
            yield [str(path) for path in sorted(folder.iterdir())]

    def check_photos(self, photos: list[str] | None) -> Iterator[dict]:
        """How well photos of one pet belong together: a score for each, in [-1, 1], and what is wrong with it."""
        with self._caller(photos) as visitor:
            check = self.studio.check([load_image(path) for path in need_photos(visitor).photos])
            notes = [{"score": finite_or_none(n.score), "problems": list(n.problems)} for n in check.photos]
            yield {"photos": notes, "warnings": list(check.warnings)}

    def compare(self, first: list[str] | None, second: list[str] | None) -> Iterator[tuple[dict, str]]:
        """Do two pictures, or sets of them, show the same subject? Also where the second differs, as a picture."""
        with self._caller(first) as one, self._caller(second) as other:
            sides = [[load_image(path) for path in need_photos(visitor).photos] for visitor in (one, other)]
            found = self.studio.compare(*sides)
            overlay = one.new_folder("compare") / "where-they-differ.png"
            save_image(found.drift.overlay, overlay)
            answer = found.answer
            rates = {"false_accept_rate": answer.false_accept_rate, "false_reject_rate": answer.false_reject_rate}
            yield (
                {"verdict": answer.verdict, "score": answer.score, **rates},
                str(overlay),
            )

    def train(
        self, photos: list[str] | None, word: str, base_model: str, steps: float, seed: float
    ) -> Iterator[tuple[dict, str | None]]:
        """Teach a model the pet of the photos. word: what it is, such as dog. steps: 0 for the model's usual number."""
        with self._caller(photos) as visitor:
            folder = photo_folder(need_photos(visitor))
            request = TrainingRequest(
                base_model,
                folder,
                checked_word(word),
                visitor.new_folder("lora"),
                within("steps", steps, 0, 10_000) or None,
                within("seed", seed, 0, 2**31),
            )
            job = self.studio.training(request)
            for news in job.news():
                if news is None:
                    yield waits(job), None
                    continue
                told = {"step": news.step, "steps": news.steps, "identity": list(map(list, news.curve))}
                done = str(news.lora / "pytorch_lora_weights.safetensors") if news.lora else None
                yield {"status": "done" if done else "training", **told}, done

    def generate(
        self,
        photos: list[str] | None,
        text: str,
        word: str,
        lora: str | None,
        base_model: str,
        num_images: float,
        num_candidates: float,
        strictness: str,
        seed: float,
        steps: float,
    ) -> Iterator[tuple[dict, list[str] | None, str | None]]:
        """Draw candidates and keep those that show the pet of the photos: report, accepted pictures, and a zip of all.

        text: where, such as "in space". lora: from `train`. seed: of the first candidate. steps: of denoising, 0 for
        the usual number.
        """
        with self._caller(photos) as visitor:
            request = DrawingRequest(
                base_model=base_model,
                photos=tuple(need_photos(visitor).photos),
                prompt=whole_prompt(checked_prompt(text), checked_word(word)),
                output=visitor.new_folder("my-pet"),
                lora=taken_lora(visitor, Path(lora)) if lora else None,
                num_images=within("num_images", num_images, 1, 8),
                num_candidates=within("num_candidates", num_candidates, 1, 48),
                strictness=strictness,
                seed=within("seed", seed, 0, 2**31),
                steps=within("steps", steps, 0, 100) or self.steps,
            )
            job = self.studio.drawing(request)
            for news in job.news():
                if news is None:
                    yield waits(job), None, None
                elif news.outcome is not None:
                    named = {c["seed"]: c["image"] for c in news.outcome.report["candidates"]}
                    accepted = [str(request.output / named[c.seed]) for c in news.outcome.result.accepted]
                    yield {"status": "done", **news.outcome.report}, accepted, str(news.outcome.archive)
                elif news.progress is not None:
                    done = len(news.progress.candidates)
                    yield {"status": "drawing", "candidates_done": done, "step": news.progress.step}, None, None

    def report_card(
        self,
        photos: list[str] | None,
        lora: str | None,
        word: str,
        base_model: str,
        texts: str,
        steps: float,
    ) -> Iterator[tuple[dict, str | None]]:
        """What a LoRA of the pet of the photos is worth: figures, and a zip with the report card to look at.

        texts: places to draw the pet in, one a line, such as "in space". steps: of denoising, 0 for the usual number.
        """
        with self._caller(photos) as visitor:
            if not lora:
                raise InputError("there is no LoRA: give a .safetensors file, such as that of `train`")
            word = checked_word(word)
            request = CardRequest(
                base_model=base_model,
                photos=tuple(need_photos(visitor).photos),
                lora=taken_lora(visitor, Path(lora)),
                name=f"{TOKEN} {word}",
                prompts=checked_places(texts, word),
                output=visitor.new_folder("report-card"),
                steps=within("steps", steps, 0, 100) or self.steps,
            )
            job = self.studio.card(request)
            for news in job.news():
                if news is None:
                    yield waits(job), None
                elif news.card is None:
                    yield {"status": "drawing", "share": news.share}, None
                else:
                    told = json.loads((request.output / "report.json").read_text(encoding="utf-8"))
                    yield {"status": "done", "verdict": verdict(news.card), **told}, str(zipped(request.output))

    def _caller(self, photos: list[str] | None = None) -> "_Caller":
        return _Caller(self.visitors, photos)


class _Caller:
    """A visitor for the length of one call, with these photos. A photo that is refused is the call's error."""

    def __init__(self, visitors: Visitors, photos: list[str] | None) -> None:
        self.visitors, self.photos = visitors, photos or []

    def __enter__(self) -> Visitor:
        self.visitor = self.visitors.new()
        self.visitor.busy += 1
        if refused := self.visitor.add_photos(Path(path) for path in self.photos):
            self.visitors.forget(self.visitor)
            raise InputError(refused[0])
        return self.visitor

    def __exit__(self, *error: object) -> None:
        self.visitors.forget(self.visitor)


def waits(job: Job) -> dict:
    """Where a job is that has no news."""
    return {"status": "waiting", "jobs_before": job.ahead} if job.ahead else {"status": "working"}


def checked_places(texts: str, word: str) -> tuple[str, ...]:
    """The prompts of a report card, from lines of places; InputError for none or more than `MAX_PLACES`."""
    places = [line for line in str(texts or "").splitlines() if line.strip()]
    if not 0 < len(places) <= MAX_PLACES:
        raise InputError(f"texts: {len(places)} places; give 1 to {MAX_PLACES}, one a line, such as: in space")
    return tuple(whole_prompt(checked_prompt(place), word) for place in places)


def within(name: str, value: float, least: int, most: int) -> int:
    """A whole number in a range; InputError, naming it, for any other."""
    if value is None or not least <= value <= most or int(value) != value:
        raise InputError(f"{name} {value}: give a whole number from {least} to {most}")
    return int(value)


def add_endpoints(studio: Studio, visitors: Visitors, steps: int) -> None:
    """Define the endpoints inside the page that is being built; no widget of theirs is seen."""
    calls = Endpoints(studio, visitors, steps)

    def files(name: str) -> gr.File:
        return gr.File(label=name, file_count="multiple", file_types=PHOTO_FILES)

    def endpoint(handler: Any, inputs: list, outputs: list) -> None:
        description = " ".join((handler.__doc__ or "").split())
        gr.Button(handler.__name__).click(
            sentence_errors(handler),
            inputs,
            outputs,
            api_name=handler.__name__,
            api_description=description,
            concurrency_limit=None,
            show_progress="hidden",
        )

    models, rates = list(studio.base_models), list(FALSE_ACCEPT_RATES)
    with gr.Row(visible=False):
        base_model = gr.Dropdown(models, value=models[0], label="base_model")
        word = gr.Textbox("dog", label="word")
        seed, steps_widget = gr.Number(0, label="seed"), gr.Number(0, label="steps")
        number = gr.Number(0, label="number")
        category = gr.Dropdown(CATEGORIES, value="dog", label="category")
        told = gr.JSON(label="result")
        endpoint(calls.sample_photos, [category, number], [files("photos")])
        endpoint(calls.check_photos, [files("photos")], [told])
        endpoint(calls.compare, [files("first"), files("second")], [told, gr.File(label="where_they_differ")])
        endpoint(calls.train, [files("photos"), word, base_model, steps_widget, seed], [told, gr.File(label="lora")])
        asked = [files("photos"), gr.Textbox("in space", label="text"), word]
        asked += [gr.File(label="lora", file_types=[".safetensors"]), base_model]
        asked += [gr.Number(4, label="num_images"), gr.Number(16, label="num_candidates")]
        asked += [gr.Dropdown(rates, value="strict", label="strictness"), seed, steps_widget]
        endpoint(calls.generate, asked, [told, files("accepted"), gr.File(label="archive")])
        lora = gr.File(label="lora", file_types=[".safetensors"])
        asked = [files("photos"), lora, word, base_model, gr.Textbox("in space", label="texts", lines=3), steps_widget]
        endpoint(calls.report_card, asked, [told, gr.File(label="archive")])


def sentence_errors(handler: Any) -> Any:
    """A generator whose errors reach the caller as one sentence."""

    @functools.wraps(handler)
    def call(*arguments: Any) -> Iterator:
        try:
            yield from handler(*arguments)
        except Exception as error:  # noqa: BLE001 - told and logged
            raise gr.Error(sentence(error), print_exception=False) from None

    return call
