"""One way to repaint a picture inside a mask, whatever the pipeline: a record for each inpainting class of diffusers,
and blended latents for the text-to-image pipelines."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from nearid_personalize.distractors.blending import blend, check_can_blend
from nearid_personalize.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FROM_NOISE = 0.99
"""Strength at which hardly anything of the subject is left, and the colours around the mask are still known."""


@dataclass(frozen=True, eq=False)
class Repaint:
    """One picture to repaint."""

    picture: Image.Image
    mask: Image.Image
    """0 or 255, white = repaint."""
    prompt: str
    seed: int


class Inpainter(Protocol):
    """Repaints pictures; a callable that has a `size` and a `multiple` is one."""

    @property
    def size(self) -> int:
        """The longer side that it works at, pixels."""
        ...

    @property
    def multiple(self) -> int:
        """What both sides must be a multiple of."""
        ...

    def __call__(self, jobs: Sequence[Repaint]) -> list[Image.Image]:
        """A picture for each job; those of one call have one size."""
        ...


@dataclass(frozen=True)
class InpaintRecord:
    """What an inpainting class calls its arguments."""

    image: str | None = "image"
    mask: str = "mask_image"
    reference: str | None = None
    """Also takes the photo as what to look like."""
    control: str | None = None
    """The picture for its ControlNet. Default content: the picture with its masked pixels black."""
    strength: float | None = FROM_NOISE
    """None: it takes none, and starts from noise."""
    guidance: str = "guidance_scale"
    extra: Mapping[str, Any] = field(default_factory=dict)


_CONTROLLED = InpaintRecord(control="control_image")
_CONTROL_ALONE = InpaintRecord(image=None, mask="control_mask", control="control_image", strength=None)
_QWEN_GUIDANCE = "true_cfg_scale"

RECORDS: dict[str, InpaintRecord] = {
    "StableDiffusionInpaintPipeline": InpaintRecord(),
    "StableDiffusionPAGInpaintPipeline": InpaintRecord(),
    "StableDiffusionControlNetInpaintPipeline": _CONTROLLED,
    "StableDiffusionControlNetPAGInpaintPipeline": _CONTROLLED,
    "StableDiffusionXLInpaintPipeline": InpaintRecord(),
    "StableDiffusionXLPAGInpaintPipeline": InpaintRecord(),
    "StableDiffusionXLControlNetInpaintPipeline": _CONTROLLED,
    "StableDiffusionXLControlNetUnionInpaintPipeline": InpaintRecord(
        control="control_image",
        extra={"control_mode": [7]},  # repaint
    ),
    "StableDiffusion3InpaintPipeline": InpaintRecord(),
    "StableDiffusion3ControlNetInpaintingPipeline": _CONTROL_ALONE,
    "FluxInpaintPipeline": InpaintRecord(),
    "FluxFillPipeline": InpaintRecord(strength=1.0),
    "FluxControlInpaintPipeline": _CONTROLLED,
    "FluxControlNetInpaintPipeline": _CONTROLLED,
    # Else it would paint at one of the sizes that it was trained at, whatever size is asked for
    "FluxKontextInpaintPipeline": InpaintRecord(
        reference="image_reference", strength=1.0, extra={"_auto_resize": False}
    ),
    "Flux2KleinInpaintPipeline": InpaintRecord(reference="image_reference"),
    "QwenImageInpaintPipeline": InpaintRecord(guidance=_QWEN_GUIDANCE),
    "QwenImageEditInpaintPipeline": InpaintRecord(guidance=_QWEN_GUIDANCE),
    "QwenImageControlNetInpaintPipeline": InpaintRecord(
        image=None, mask="control_mask", control="control_image", strength=None, guidance=_QWEN_GUIDANCE
    ),
    "ZImageInpaintPipeline": InpaintRecord(strength=1.0),
    "ZImageControlNetInpaintPipeline": InpaintRecord(control="control_image", strength=None),
    "ChromaInpaintPipeline": InpaintRecord(),
    "IFInpaintingPipeline": InpaintRecord(),
    "KandinskyInpaintCombinedPipeline": InpaintRecord(strength=None),
    "KandinskyV22InpaintCombinedPipeline": InpaintRecord(strength=None),
}
"""By class name: all that `AutoPipelineForInpainting` finds, and those that have to be named."""


def masked_black(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What ControlNets for inpainting are shown: the picture, black where it is to be repainted."""
    return Image.composite(Image.new("RGB", picture.size), picture, mask)


@dataclass(frozen=True, eq=False)
class PipelineInpainter:
    """Repaints with an inpainting pipeline, picture by picture.

    Args:
        record: names of the pipeline's arguments.
        size: the longer side of the pictures, pixels.
        steps: denoising steps.
        guidance_scale, strength: None: the pipeline's own, and the record's.
        control: (picture, mask) -> the picture that a ControlNet is shown; edges or depth for those that want them.
        options: further arguments of the pipeline's call, which go before ours; with `prompt_embeds` among them no
            prompt is passed.
    """

    pipe: "DiffusionPipeline"
    record: InpaintRecord
    size: int
    steps: int = 30
    guidance_scale: float | None = None
    strength: float | None = None
    control: Callable[[Image.Image, Image.Image], Image.Image] = masked_black
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """See `Inpainter`."""
        return side_multiple(self.pipe)

    def __call__(self, jobs: Sequence[Repaint]) -> list[Image.Image]:
        """See `Inpainter`."""
        return [self._paint(job) for job in jobs]

    @torch.no_grad()
    def _paint(self, job: Repaint) -> Image.Image:
        record = self.record
        width, height = job.picture.size
        arguments: dict[str, Any] = {"prompt": job.prompt, record.mask: job.mask, "height": height, "width": width}
        if record.image is not None:
            arguments[record.image] = job.picture
        if record.reference is not None:
            arguments[record.reference] = job.picture
        if record.control is not None:
            control = self.control(job.picture, job.mask)
            union = "Union" in type(self.pipe).__name__
            arguments[record.control] = [control] if union else control
        if record.strength is not None:
            arguments["strength"] = record.strength if self.strength is None else self.strength
        arguments |= self._shared_arguments(record.guidance, job.seed)
        return self.pipe(**_accepted(self.pipe, arguments)).images[0]

    def _shared_arguments(self, guidance: str, seed: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {"num_inference_steps": self.steps, **self.record.extra}
        if self.guidance_scale is not None:
            arguments |= _guidance(guidance, self.guidance_scale)
        return {
            **arguments,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pil",
            **self.options,
        }


@dataclass(frozen=True, eq=False)
class BlendingInpainter:
    """Repaints with a text-to-image pipeline, several pictures at once; arguments as of `PipelineInpainter`."""

    pipe: "DiffusionPipeline"
    size: int
    steps: int = 30
    guidance_scale: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """See `Inpainter`."""
        return side_multiple(self.pipe)

    def __call__(self, jobs: Sequence[Repaint]) -> list[Image.Image]:
        """See `Inpainter`."""
        width, height = jobs[0].picture.size
        arguments: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "height": height,
            "width": width,
            "num_inference_steps": self.steps,
        }
        if self.guidance_scale is not None:
            qwen = "QwenImage" in type(self.pipe).__name__
            arguments |= _guidance(_QWEN_GUIDANCE if qwen else "guidance_scale", self.guidance_scale)
        arguments = _accepted(self.pipe, {**arguments, **self.options})
        seeds = [job.seed for job in jobs]
        return blend(self.pipe, [job.picture for job in jobs], [job.mask for job in jobs], seeds, arguments)


def _guidance(name: str, scale: float) -> dict[str, Any]:
    # Qwen-Image guides only where there is a negative prompt
    return {name: scale, "negative_prompt": " "} if name == _QWEN_GUIDANCE else {name: scale}


def _accepted(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a pipeline's call has; a prompt that comes as embeddings is left out."""
    known = inspect.signature(pipe.__call__).parameters
    kept = {name: value for name, value in arguments.items() if name in known}
    if kept.get("prompt_embeds") is not None:
        kept.pop("prompt", None)
        kept.pop("negative_prompt", None)
    return kept


def inpainter_for(
    pipe: "DiffusionPipeline",
    size: int | None = None,
    steps: int = 30,
    guidance_scale: float | None = None,
    strength: float | None = None,
    control: Callable[[Image.Image, Image.Image], Image.Image] = masked_black,
    options: Mapping[str, Any] | None = None,
) -> Inpainter:
    """The inpainter of a pipeline: by its record where it has one, else by blending latents.

    size: the longer side of the pictures, pixels. Default: what the pipeline was made for.

    Raises:
        InputError: the pipeline can do neither, or takes no strength where one is given.
    """
    options = options or {}
    side = (size or model_size(pipe)) // side_multiple(pipe) * side_multiple(pipe)
    if side == 0:
        raise InputError(f"--size {size}: must be {side_multiple(pipe)} or more")
    record = record_of(pipe)
    if strength is not None and (record is None or record.strength is None):
        raise InputError(f"--strength {strength:g}: {type(pipe).__name__} takes none; leave it out")
    if record is not None:
        return PipelineInpainter(
            pipe=pipe,
            record=record,
            size=side,
            steps=steps,
            guidance_scale=guidance_scale,
            strength=strength,
            control=control,
            options=options,
        )
    check_can_blend(pipe)
    return BlendingInpainter(pipe=pipe, size=side, steps=steps, guidance_scale=guidance_scale, options=options)


def record_of(pipe: "DiffusionPipeline") -> InpaintRecord | None:
    """The record of a pipeline's class, or of a class that it is made from; None: it does not inpaint."""
    names = (kind.__name__ for kind in type(pipe).__mro__)
    return next((RECORDS[name] for name in names if name in RECORDS), None)


def model_size(pipe: "DiffusionPipeline") -> int:
    """The side of the pictures that a pipeline was made for, pixels; 1024 where it does not say."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None and denoiser is not None:
        sample = denoiser.config.get("sample_size")
    return int(np.max(sample or 128)) * getattr(pipe, "vae_scale_factor", 8)


def side_multiple(pipe: "DiffusionPipeline") -> int:
    """What the sides of a pipeline's pictures must be a multiple of, pixels."""
    patched = getattr(pipe, "transformer", None) is not None
    factor = getattr(pipe, "vae_scale_factor", 8) * (2 if patched else 1)
    denoiser = getattr(pipe, "unet", None)
    # A UNet halves its latents at every level but the last
    levels = len(denoiser.config.get("block_out_channels") or ()) - 1 if denoiser is not None else 0
    return factor * 2 ** max(levels, 0)
