"""Nodes for many subjects: fill a gallery, and ask which of its subjects a picture shows, if any."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from nearid_personalize import Gallery, InputError
from nearid_personalize.files import safe_name

from .wires import CATEGORY, LoadedModel, NearID, picked, to_pictures

NO_GALLERY = "(none yet)"


def gallery_root() -> Path:
    """`models/nearid_galleries`: a folder for each gallery."""
    return Path(folder_paths.models_dir) / "nearid_galleries"


def gallery_names() -> list[str]:
    """The galleries that there are."""
    return sorted(path.name for path in gallery_root().glob("*/") if not path.name.startswith(".")) or [NO_GALLERY]


def chosen_gallery(name: str) -> Path:
    """The folder of a gallery that is there, and of no other place. Raises InputError."""
    path = gallery_root() / safe_name(name)
    if name == NO_GALLERY or not path.is_dir():
        raise InputError(f"gallery {name!r}: not found; Gallery: add subject makes one in models/nearid_galleries")
    return path


class AddToGallery(io.ComfyNode):
    """Photos of a subject into a gallery."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDGalleryAdd",
            display_name="Gallery: add subject",
            category=CATEGORY,
            description="Keep a subject among many, for Gallery: who is it? Photos that it has are not doubled.",
            inputs=[
                NearID.Input("nearid"),
                io.Image.Input("photos"),
                io.String.Input("gallery", default="gallery", tooltip="Made in models/nearid_galleries where absent"),
                io.String.Input("name", default="", tooltip="The subject: my dog"),
            ],
            outputs=[io.String.Output("about", display_name="about")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, nearid: LoadedModel, photos: Tensor, gallery: str, name: str) -> io.NodeOutput:
        pictures = to_pictures(photos)
        with nearid.on_device() as scorer:
            kept = Gallery.open(gallery_root() / safe_name(gallery, "gallery"), scorer)
            added = kept.add(name, pictures)
        return io.NodeOutput(f"{name}: {added} new photos; {len(kept)} subjects in {safe_name(gallery, 'gallery')}")


class WhoIsIt(io.ComfyNode):
    """Which subject of a gallery, if any."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDGallery",
            display_name="Gallery: who is it?",
            category=CATEGORY,
            description="Which subject of a gallery each picture shows, or none of them.",
            inputs=[
                NearID.Input("nearid"),
                io.Image.Input("images"),
                io.Combo.Input("gallery", options=gallery_names(), tooltip="A folder in models/nearid_galleries"),
                io.Boolean.Input("one_item", default=False, tooltip="All pictures of the batch show one item"),
                io.Float.Input(
                    "false_accept_rate",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.0001,
                    tooltip="Share of strangers that may be taken for a subject; 0: 0.01, or the smallest possible",
                ),
            ],
            outputs=[
                io.Image.Output("known", display_name="known"),
                io.Image.Output("unknown", display_name="unknown"),
                io.String.Output("names", display_name="names", is_output_list=True, tooltip="Empty where it is none"),
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="Of the most alike"),
                io.String.Output("report", display_name="report", tooltip="A line for each answer"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, gallery: str, **_: Any) -> str:
        try:
            return Gallery.open(chosen_gallery(gallery)).store.version()
        except InputError as error:
            return str(error)

    @classmethod
    def execute(
        cls, nearid: LoadedModel, images: Tensor, gallery: str, one_item: bool, false_accept_rate: float
    ) -> io.NodeOutput:
        folder, pictures = chosen_gallery(gallery), to_pictures(images)
        items: list[Any] = [pictures] if one_item else [[picture] for picture in pictures]
        with nearid.on_device() as scorer:
            answers = Gallery.open(folder, scorer).search(items, false_accept_rate or None)
        each = answers * len(pictures) if one_item else answers
        known = [place for place, answer in enumerate(each) if answer.name is not None]
        unknown = [place for place, answer in enumerate(each) if answer.name is None]
        report = []
        for number, answer in enumerate(answers, start=1):
            likest = ", ".join(f"{match.name} {match.score:.3f}" for match in answer.matches)
            report.append(f"{number}: {answer.name or 'none of them'} ({likest})")
        return io.NodeOutput(
            picked(images, known),
            picked(images, unknown),
            [answer.name or "" for answer in answers],
            [answer.score for answer in answers],
            "\n".join(report),
        )
