"""The main job in a browser, on the mini-world: `make demo`.

Widgets only: everything that happens is the quickstart's.
"""

import json
import tempfile
from pathlib import Path

import gradio as gr
from PIL import Image

from nearid_personalize.cli import Quickstart, run_quickstart
from nearid_personalize.errors import InputError
from nearid_personalize.miniworld import CATEGORIES, CONTEXTS, example_references


def show_pet(category: str, index: float) -> list[Image.Image]:
    """The four photos of a pet that no model has seen."""
    return example_references(int(index), category=category)[0]


def personalize(category: str, index: float, context: str, candidates: float) -> tuple[Image.Image, str]:
    """Train a LoRA on the pet, draw candidates, and return the contact sheet with one line about it."""
    with tempfile.TemporaryDirectory() as folder:
        options = Quickstart(
            out=Path(folder),
            subject_index=int(index),
            category=category,
            prompt=f"a photo of sks {category} in {context}",
            num_candidates=int(candidates),
            json=True,
        )
        try:
            run_quickstart(options)
        except InputError as error:
            raise gr.Error(str(error)) from error
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        sheet = Image.open(Path(folder) / "contact_sheet.png").copy()
    accepted = sum(candidate["status"] == "accepted" for candidate in report["candidates"])
    return sheet, f"{accepted} of {len(report['candidates'])} candidates accepted above {report['threshold']:.2f}"


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="my dog in space") as page:
        gr.Markdown(
            "# My dog in space\nFour photos of a pet, a LoRA trained on them, and only the pictures that show *it*."
        )
        with gr.Row():
            category = gr.Dropdown(CATEGORIES, value="dog", label="Pet")
            index = gr.Number(0, label="Number", minimum=0, precision=0)
            context = gr.Dropdown(CONTEXTS, value="space", label="Where")
            candidates = gr.Slider(4, 16, value=8, step=4, label="Candidates")
        photos = gr.Gallery(label="Photos", columns=4, height=200)
        run = gr.Button("Make pictures", variant="primary")
        verdict = gr.Markdown()
        sheet = gr.Image(label="Candidates, best first", type="pil")
        for event in (page.load, category.change, index.change):
            event(show_pet, [category, index], photos, api_visibility="private")
        run.click(personalize, [category, index, context, candidates], [sheet, verdict], api_name="personalize")
    return page


if __name__ == "__main__":
    build().queue(default_concurrency_limit=1).launch()
