"""The widgets of the page, and which handler answers each of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from nearid_personalize.demo import pictures, words
from nearid_personalize.demo.api import PHOTO_FILES, add_endpoints
from nearid_personalize.demo.handlers import SAMPLE_PETS, Handlers, answering
from nearid_personalize.demo.studio import Studio
from nearid_personalize.demo.visitors import Visitors
from nearid_personalize.demo.who import who_tab
from nearid_personalize.miniworld import CATEGORIES, example_references

STYLE = Path(__file__).with_name("style.css")

PLACES = ("in space", "on the beach", "in the snow", "in the city", "in the desert", "in the park")
TOY_PLACES = ("in space", "in beach", "in snow", "in city", "in desert", "in park")
"""The same as the mini-world's model knows them."""

SPENDING = [
    ("Save it", "save"),
    ("Draw more candidates for it", "retry"),
    ("Stop as soon as there are enough", "enough"),
]

PICKED = (
    "element.addEventListener('click', e => { const tile = e.target.closest('[data-index]');"
    " if (tile) trigger('select', {index: Number(tile.dataset.index)}); })"
)
"""Tells which tile of an HTML widget was clicked, by mouse or by keyboard."""

SHOW_DETAILS = "() => document.getElementById('details').scrollIntoView({block: 'nearest'})"

# Gradio's own queue lets all in: jobs wait for the device in `jobs.Device`, where they hear who is before them
PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}


def build(studio: Studio, visitors: Visitors, steps: int = 20, lora: Path | None = None) -> gr.Blocks:
    """The page. steps: denoising steps that the slider starts at. lora: what every visit starts with."""
    # What was uploaded or is offered for download lies in gradio's cache, and goes as the rest does
    cache = (max(60, int(visitors.keep_seconds / 10)), int(visitors.keep_seconds))
    with gr.Blocks(title="My dog in space", analytics_enabled=False, delete_cache=cache) as page:
        add_endpoints(studio, visitors, steps)  # first: names are given to those who come first
        gr.HTML(
            "<h1>My dog in space</h1><p>A few photos of your pet are enough: a model learns it, draws it wherever you"
            " like, and you keep only the pictures that really show <em>your</em> pet.</p>",
            elem_classes="intro",
        )
        toy = studio.base_models[0] == "miniworld"
        handlers = Handlers(studio, visitors, lora, (TOY_PLACES if toy else PLACES)[:3])
        widgets: dict[str, Any] = {"visit": gr.State(None, time_to_live=visitors.keep_seconds)}
        with gr.Tabs():
            with gr.Tab("Personalize"):
                photo_widgets(widgets)
                training_widgets(widgets, handlers)
                picture_widgets(widgets, handlers, steps)
            with gr.Tab("Compare"):
                compare_tab(studio, visitors.max_photos)
            with gr.Tab("Who is it?"):
                who_tab(studio, visitors.max_photos, widgets["visit"])
            with gr.Tab("Report card"):
                card_widgets(widgets)
        connect(handlers, page, widgets)
        gr.HTML(
            "<p>Photos, LoRAs and pictures stay on the machine that shows this page, in a folder of yours alone, and"
            f" are deleted {words.duration(visitors.keep_seconds)} after their last use.</p>",
            elem_classes="small",
        )
    return page


def tile_grid(name: str, label: str) -> gr.HTML:
    """Tiles that can be clicked; the event is `select`."""
    return gr.HTML(elem_id=name.replace("_", "-"), js_on_load=PICKED, elem_classes="grid", label=label)


# --- Personalize -----------------------------------------------------------------------------------------------------


def connect(handlers: Handlers, page: gr.Blocks, widgets: dict[str, Any]) -> None:
    """Which handler answers what. A handler's arguments, and what it answers, go by the widgets' names."""

    def on(event: Callable, handler: Callable, inputs: Sequence[str] = (), busy: str | None = None, **more: Any) -> Any:
        """busy: the widget that shows a wait."""
        shown = {"show_progress": "minimal", "show_progress_on": widgets[busy]} if busy else {}
        asked = {widgets[name] for name in ("visit", *inputs)}
        return event(answering(handler, widgets), asked, [*widgets.values()], **{**PRIVATE, **shown, **more})

    page.load(answering(handlers.welcome, widgets), {widgets["visit"]}, widgets["visit"], **PRIVATE)
    on(widgets["drop"].upload, handlers.add, ["drop"], "photo_note")
    on(widgets["pets"].select, handlers.borrow, (), "photo_note")
    on(widgets["photos"].select, handlers.select)
    on(widgets["remove"].click, handlers.remove_selected)
    on(widgets["tidy"].click, handlers.remove_doubtful)
    on(widgets["forget"].click, handlers.forget)
    on(widgets["train"].click, handlers.train, ["base_model", "word", "lora_steps"])
    on(widgets["lora_file"].upload, handlers.take_lora, ["lora_file"], "train_note")
    on(widgets["lora_file"].clear, handlers.drop_lora)
    on(widgets["examine"].click, handlers.examine, ["base_model", "word", "steps", "guidance"])
    for name in ("cancel", "stop", "cancel_card"):
        on(widgets[name].click, handlers.cancel, queue=False)
    asked = ["base_model", "word", "prompt", "wanted", "candidates", "strictness", "spending", "race", "copies"]
    on(widgets["draw"].click, handlers.draw, [*asked, "seed", "steps", "guidance"])
    for name, handler in (("accepted", handlers.open_accepted), ("others", handlers.open_other)):
        opened = on(widgets[name].select, handler, (), "details")
        opened.then(None, js=SHOW_DETAILS, api_visibility="private")
    on(widgets["plain"].click, handlers.without_guard)


def photo_widgets(widgets: dict[str, Any]) -> None:
    """Step 1: who is it."""
    gr.Markdown("## 1. Who is it?")
    with gr.Row(equal_height=False):
        with gr.Column():
            widgets["drop"] = gr.File(
                label="Three to five photos of your pet",
                file_count="multiple",
                file_types=PHOTO_FILES,
                height=190,
                elem_id="drop",
            )
            widgets["word"] = gr.Dropdown(
                CATEGORIES, value="dog", label="What is it?", allow_custom_value=True, elem_id="word"
            )
        with gr.Column():
            gr.Markdown("No photos at hand? **Borrow a pet** of the toy world:")
            widgets["pets"] = tile_grid("pets", "Sample pets")
            widgets["pets"].value = pictures.tiles(sample_pets())
    widgets["photos"] = tile_grid("photos", "Your photos")
    widgets["photo_note"] = gr.HTML(elem_id="photo-note")
    with gr.Row():
        widgets["remove"] = gr.Button("Remove photo", visible=False, size="sm", elem_id="remove")
        widgets["tidy"] = gr.Button("Remove the doubtful ones", visible=False, size="sm", elem_id="tidy")
        widgets["forget"] = gr.Button("Start over, delete all", visible=False, size="sm", elem_id="forget")


def sample_pets() -> list[pictures.Tile]:
    """The first photo of each sample pet."""
    return [
        pictures.Tile(example_references(number, category=category)[0][0], f"{category} {number + 1}")
        for category, number in SAMPLE_PETS
    ]


def training_widgets(widgets: dict[str, Any], handlers: Handlers) -> None:
    """Step 2: let a model learn it."""
    models, toy = handlers.studio.base_models, handlers.studio.base_models[0] == "miniworld"
    usual = handlers.studio.lora_steps or (120 if toy else 400)
    gr.Markdown("## 2. Let a model learn it")
    with gr.Row():
        widgets["base_model"] = gr.Dropdown(
            [("The toy world's (small, draws toy pets only)" if m == "miniworld" else m, m) for m in models],
            value=models[0],
            label="Which model",
            elem_id="base-model",
        )
        widgets["lora_steps"] = gr.Slider(
            1,
            max(1000, usual),
            value=usual,
            step=1,
            label="Training steps (more: more alike, slower)",
            elem_id="train-steps",
        )
    widgets["train"] = gr.Button("Learn my pet", variant="primary", elem_id="train")
    widgets["cancel"] = gr.Button("Cancel", visible=False, elem_id="cancel-train")
    widgets["progress"] = gr.HTML(elem_id="train-progress")
    widgets["samples"] = gr.HTML(elem_id="samples", elem_classes="grid")
    widgets["train_note"] = gr.HTML(elem_id="train-note")
    with gr.Accordion("I have a LoRA of it already", open=False):
        widgets["lora_file"] = gr.File(
            label="A LoRA for the model above, .safetensors", file_types=[".safetensors"], height=120, elem_id="lora"
        )


def picture_widgets(widgets: dict[str, Any], handlers: Handlers, steps: int) -> None:
    """Step 3: where shall it go; and what came of it."""
    toy = handlers.studio.base_models[0] == "miniworld"
    texts = TOY_PLACES if toy else PLACES
    gr.Markdown("## 3. Where shall it go?")
    widgets["prompt"] = gr.Textbox(texts[0], label="A picture of my pet …", max_lines=2, elem_id="prompt")
    with gr.Row(elem_classes="places"):
        for place, text in zip(PLACES, texts):
            button = gr.Button(place, size="sm", min_width=90)
            button.click(lambda text=text: text, None, widgets["prompt"], queue=False, api_visibility="private")
    with gr.Row():
        widgets["wanted"] = gr.Slider(1, 8, value=4, step=1, label="Pictures wanted", elem_id="wanted")
        widgets["candidates"] = gr.Slider(1, 48, value=16, step=1, label="Candidates to draw", elem_id="candidates")
    widgets["strictness"] = gr.Radio(words.STRICTNESS, value="strict", label="How sure must it be your pet?")
    with gr.Accordion("Fine tuning", open=False):
        widgets["spending"] = gr.Radio(SPENDING, value="save", label="Compute saved by giving up hopeless candidates")
        widgets["race"] = gr.Checkbox(True, label="Give up hopeless candidates half-way")
        widgets["copies"] = gr.Checkbox(False, label="Pictures that repeat a photo, or each other, are fine")
        with gr.Row():
            widgets["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0)
            widgets["steps"] = gr.Slider(1, 100, value=steps, step=1, label="Denoising steps")
            widgets["guidance"] = gr.Slider(0, 15, value=3 if toy else 0, step=0.5, label="Guidance (0: model's own)")
    widgets["draw"] = gr.Button("Make pictures", variant="primary", elem_id="draw")
    widgets["stop"] = gr.Button("Stop", visible=False, elem_id="stop-draw")
    widgets["draw_progress"] = gr.HTML(elem_id="draw-progress")
    widgets["headline"] = gr.HTML(elem_id="headline")
    with gr.Column(visible=False, elem_id="results") as widgets["results"]:
        widgets["accepted_title"] = gr.Markdown("### Your pet, best first", visible=False)
        widgets["accepted"] = tile_grid("accepted", "Accepted pictures")
        widgets["others_title"] = gr.Markdown(visible=False)
        widgets["others"] = tile_grid("others", "Pictures not accepted")
        widgets["details"] = gr.HTML(elem_id="details")
        widgets["saving"] = gr.HTML(elem_id="saving")
        with gr.Row(visible=False) as widgets["take_home"]:
            widgets["download"] = gr.DownloadButton("Download pictures and report", elem_id="download")
            widgets["plain"] = gr.Button("And without the guard?", elem_id="plain")
        widgets["without"] = gr.HTML(elem_id="without")


# --- Report card -----------------------------------------------------------------------------------------------------


def card_widgets(widgets: dict[str, Any]) -> None:
    """How good is the LoRA."""
    gr.Markdown(
        "## How well did the model learn it?\nYour LoRA draws your pet in three places, at two strengths, and once"
        " without what it learnt. How many of the pictures are accepted, and which strength is best?"
    )
    widgets["examine"] = gr.Button("Test my LoRA", variant="primary", elem_id="examine")
    widgets["cancel_card"] = gr.Button("Cancel", visible=False, elem_id="cancel-card")
    widgets["card_progress"] = gr.HTML(elem_id="card-progress")
    widgets["card_file"] = gr.DownloadButton("Download the report card", visible=False, elem_id="card-file")
    widgets["card"] = gr.HTML(elem_id="card")


# --- Compare ---------------------------------------------------------------------------------------------------------


def compare_tab(studio: Studio, max_photos: int) -> None:
    """Two pictures, or two sets of them."""
    widgets: dict[str, Any] = {}

    def show(side: str, files: list[str] | None) -> dict[str, str]:
        shown = []
        for number, picture in enumerate(pictures.uploaded(files, max_photos), 1):
            shown.append(pictures.Tile(picture, f"{side} {number}"))
        return {side: pictures.tiles(shown, clickable=False)}

    def show_left(left_files: list[str] | None) -> dict[str, str]:
        return show("left", left_files)

    def show_right(right_files: list[str] | None) -> dict[str, str]:
        return show("right", right_files)

    def compare(left_files: list[str] | None, right_files: list[str] | None) -> dict[str, str]:
        left, right = pictures.uploaded(left_files, max_photos), pictures.uploaded(right_files, max_photos)
        found = studio.compare(left, right)
        figures = pictures.side_by_side(
            pictures.figure(left[found.drift.nearest], "The left picture most like it"),
            pictures.figure(right[found.answer.nearest_picture], "The right picture"),
            pictures.figure(found.drift.overlay, "Where the right one differs, in red"),
        )
        return {"answer": words.comparison(found) + figures}

    gr.Markdown("## Is it the same one?")
    with gr.Row(equal_height=False):
        for side, label, handler in (
            ("left", "One picture, or several of one subject", show_left),
            ("right", "Another one, or several", show_right),
        ):
            with gr.Column():
                files = widgets[f"{side}_files"] = gr.File(
                    label=label, file_count="multiple", file_types=PHOTO_FILES, height=150, elem_id=f"compare-{side}"
                )
                widgets[side] = gr.HTML(elem_classes="grid")
                files.change(answering(handler, widgets), {files}, widgets[side], **PRIVATE)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    widgets["answer"] = gr.HTML(elem_id="comparison")
    both = {widgets["left_files"], widgets["right_files"]}
    button.click(answering(compare, widgets), both, widgets["answer"], **PRIVATE)
