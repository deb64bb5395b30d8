"""Nodes that say who is looked for: the encoder, and the subject of some photos."""

import os
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management
from comfy_api.latest import io

from nearid_personalize import InputError
from nearid_personalize.commands.options import RELEASED_MODEL
from nearid_personalize.files import safe_name
from nearid_personalize.images import list_images, load_image
from nearid_personalize.loading import choose_dtype
from nearid_personalize.scorer.subject import Subject

from .wires import (
    CATEGORY,
    PRECISIONS,
    EnrolledSubject,
    LoadedModel,
    NearID,
    SubjectWire,
    cached_scorer,
    to_image,
    to_pictures,
)

NONE_SAVED = "(none saved yet)"


def model_root() -> Path:
    """`models/nearid`: a folder for each encoder."""
    return Path(folder_paths.models_dir) / "nearid"


def subject_root() -> Path:
    """`models/nearid_subjects`: a file for each saved subject."""
    return Path(folder_paths.models_dir) / "nearid_subjects"


def model_names() -> list[str]:
    """The released encoder, those in `model_root`, and the toy world's."""
    folders = sorted(path.name for path in model_root().glob("*/") if (path / "config.json").is_file())
    return [RELEASED_MODEL, *folders, "miniworld"]


def subject_names() -> list[str]:
    """Saved subjects, without their suffix."""
    return sorted(path.stem for path in subject_root().glob("*.safetensors")) or [NONE_SAVED]


def chosen_folder(name: str) -> Path:
    """A folder inside ComfyUI's input, output or temp folder, links in them included.

    Whoever reaches the server chooses the name, so no other folder of the machine is read. Raises InputError.
    """
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory()]
    for root in roots:
        path = Path(os.path.normpath(Path(root) / name))
        if path.is_relative_to(os.path.normpath(root)) and path.is_dir():
            return path
    raise InputError(f"folder {name!r}: not found; put or link it into ComfyUI's input folder, and give its name")


def folder_state(name: str) -> str:
    """What changes when the pictures of a folder do, so that ComfyUI reads it again."""
    if not name:
        return ""
    try:
        return " ".join(f"{path.name}:{path.stat().st_mtime_ns}" for path in list_images(chosen_folder(name)))
    except InputError as error:
        return str(error)


class LoadNearID(io.ComfyNode):
    """The encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDLoad",
            display_name="Load NearID",
            category=CATEGORY,
            description="An identity encoder. Your own ones go into models/nearid, each in a folder.",
            inputs=[
                io.Combo.Input(
                    "model", options=model_names(), default=RELEASED_MODEL, tooltip="miniworld: toy pictures only"
                ),
                io.Combo.Input("precision", options=list(PRECISIONS), default="auto"),
                io.Combo.Input(
                    "after_use",
                    options=["keep on the device", "move to the CPU"],
                    default="move to the CPU",
                    tooltip="Move it off where the sampler needs the memory",
                ),
            ],
            outputs=[NearID.Output("nearid", display_name="nearid")],
        )

    @classmethod
    def execute(cls, model: str, precision: str, after_use: str) -> io.NodeOutput:
        device = torch.device(model_management.get_torch_device())
        dtype = PRECISIONS[precision] or choose_dtype("auto", device.type)
        own = model_root() / model
        scorer = cached_scorer(str(own) if own.is_dir() else model, dtype)
        return io.NodeOutput(
            LoadedModel(
                name=str(own) if own.is_dir() else model,
                scorer=scorer,
                device=device,
                dtype=dtype,
                release=after_use == "move to the CPU",
            )
        )


class EnrollSubject(io.ComfyNode):
    """Photos -> subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDEnroll",
            display_name="Enroll subject",
            category=CATEGORY,
            description="Learn a subject from three to five photos: connected ones, or those of an input folder.",
            inputs=[
                NearID.Input("nearid"),
                io.Image.Input("photos", optional=True),
                io.Image.Input(
                    "negatives",
                    optional=True,
                    tooltip="Pictures of similar subjects that must be refused; they raise the threshold where needed",
                ),
                io.String.Input("folder", default="", tooltip="A folder inside ComfyUI's input folder"),
                io.String.Input("save_as", default="", tooltip="A name: the subject is kept for Load subject"),
            ],
            outputs=[
                SubjectWire.Output("subject", display_name="subject"),
                io.String.Output("about", display_name="about"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_: Any) -> str:
        return folder_state(folder)

    @classmethod
    def execute(
        cls,
        nearid: LoadedModel,
        folder: str = "",
        save_as: str = "",
        photos: torch.Tensor | None = None,
        negatives: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        pictures = [] if photos is None else to_pictures(photos)
        if folder:
            pictures += [load_image(path) for path in list_images(chosen_folder(folder))]
        if not pictures:
            raise InputError("Enroll subject: no photos; connect photos, or name a folder in ComfyUI's input folder")
        with nearid.on_device() as scorer:
            subject = scorer.enroll(pictures, negatives=None if negatives is None else to_pictures(negatives))
        if save_as:
            subject_root().mkdir(parents=True, exist_ok=True)
            subject.save(subject_root() / f"{safe_name(save_as, 'subject')}.safetensors")
        return io.NodeOutput(EnrolledSubject(subject, tuple(pictures)), subject.describe())


class LoadSubject(io.ComfyNode):
    """A saved subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDLoadSubject",
            display_name="Load subject",
            category=CATEGORY,
            description="A subject that Enroll subject saved. Its photos are not saved with it.",
            inputs=[io.Combo.Input("name", options=subject_names())],
            outputs=[
                SubjectWire.Output("subject", display_name="subject"),
                io.String.Output("about", display_name="about"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **_: Any) -> int:
        path = subject_root() / f"{name}.safetensors"
        return path.stat().st_mtime_ns if path.is_file() else 0

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        if name == NONE_SAVED:
            raise InputError("Load subject: none is saved yet; give Enroll subject a name in save_as")
        subject = Subject.load(subject_root() / f"{safe_name(name)}.safetensors")
        return io.NodeOutput(EnrolledSubject(subject), subject.describe())


class LoadFolder(io.ComfyNode):
    """Pictures of any sizes, one after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDLoadFolder",
            display_name="Load pictures of a folder",
            category=CATEGORY,
            description="Each picture of a folder, of any size, in order of names; what follows runs for each.",
            inputs=[io.String.Input("folder", default="", tooltip="A folder inside ComfyUI's input or output folder")],
            outputs=[
                io.Image.Output("images", display_name="images", is_output_list=True),
                io.String.Output("names", display_name="names", is_output_list=True),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_: Any) -> str:
        return folder_state(folder)

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        paths = list_images(chosen_folder(folder))
        return io.NodeOutput([to_image([load_image(path)]) for path in paths], [path.stem for path in paths])
