"""Inpainting with any text-to-image pipeline: after each step the background is put back at that step's noise level.

Shape letters: B pictures, C h w latent channels and size, L tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.images import to_tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TOUCHED = 0.01
"""Share of a latent cell's pixels that must be masked for the cell to be repainted."""


def check_can_blend(pipe: "DiffusionPipeline") -> None:
    """Raise `InputError` unless latents can be blended in this pipeline's denoising loop."""
    missing = [name for name in ("prepare_latents", "vae", "scheduler") if getattr(pipe, name, None) is None]
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        missing.append("callback_on_step_end")
    if missing:
        raise InputError(
            f"--base-model: {type(pipe).__name__} has no {missing[0]}, by which latents are blended; give an "
            "inpainting pipeline, or a text-to-image pipeline such as Stable Diffusion, SDXL, SD3, FLUX or Qwen-Image"
        )


@torch.no_grad()
def blend(
    pipe: "DiffusionPipeline",
    pictures: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    seeds: Sequence[int],
    arguments: dict[str, Any],
) -> list[Image.Image]:
    """Repaint pictures inside their masks with a text-to-image pipeline; all have one size.

    Args:
        masks: 0 or 255, white = repaint.
        seeds: each picture's own; a picture does not depend on its neighbours in the batch, rounding aside.
        arguments: of the pipeline's call: prompts [B], steps, guidance, height and width.
    """
    run = _Blending(pipe, pictures, masks)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _capturing(pipe, run.remember_noise):
        result = pipe(
            **arguments,
            generator=generators,
            callback_on_step_end=run.after_step,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type="pil",
        )
    return result.images


class _Blending:
    """One call: the clean background, the noise that it starts from, and the mask, all in the loop's own layout."""

    def __init__(
        self, pipe: "DiffusionPipeline", pictures: Sequence[Image.Image], masks: Sequence[Image.Image]
    ) -> None:
        self.pipe, self.pictures, self.masks = pipe, pictures, masks
        self.noise: Tensor | None = None
        self.clean: Tensor | None = None
        self.mask: Tensor | None = None

    def remember_noise(self, latents: Tensor) -> None:
        """Take the loop's first latents, which are noise times the scheduler's first deviation."""
        scale = getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)
        self.noise = latents / torch.as_tensor(scale).to(latents)
        clean = encode_latents(self.pipe, to_tensor(self.pictures))  # [B,C,h,w]
        mask = _latent_mask(self.masks, clean.shape[-2:]).to(clean).expand_as(clean)
        self.clean = as_loop(self.pipe, clean, latents).to(latents)
        self.mask = as_loop(self.pipe, mask, latents, statistics=False).to(latents)

    def after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """A callback of diffusers: the latents, with the background at the noise level of the next step."""
        assert self.noise is not None and self.clean is not None and self.mask is not None, "prepare_latents has run"
        background = self.clean
        if index + 1 < len(pipe.scheduler.timesteps):
            background = noised(pipe.scheduler, self.clean, self.noise, pipe.scheduler.timesteps[index + 1])
        latents = tensors["latents"]
        return {"latents": torch.where(self.mask > 0, latents, background.to(latents))}


def noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Clean latents at the noise level of a timestep, in the scheduler's own space."""
    timesteps = timestep.reshape(1).to(clean.device)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timesteps, noise)
    return scheduler.add_noise(clean, noise, timesteps)


@contextmanager
def _capturing(pipe: Any, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block `take` is given what `prepare_latents` makes: the latents alone, or first of a tuple."""
    prepare = pipe.prepare_latents

    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        take(found[0] if isinstance(found, tuple) else found)
        return found

    pipe.prepare_latents = prepared
    try:
        yield
    finally:
        del pipe.prepare_latents


# --- latents ---------------------------------------------------------------------------------------------------------
def encode_latents(pipe: "DiffusionPipeline", pixels: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in [0, 1] -> latents [B,C,h,w] scaled as the denoiser sees them: undoes `latents_for_vae`."""
    vae = pipe.vae
    device = getattr(pipe, "_execution_device", vae.device)
    pixels = (2 * pixels - 1).to(device, vae.dtype)
    video = len(vae.config.get("latents_mean") or ()) > 0 and "temperal_downsample" in vae.config  # Qwen-Image's VAE
    encoded = vae.encode(pixels[:, :, None] if video else pixels)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    latents = (latents[:, :, 0] if latents.ndim == 5 else latents).float()
    scale, mean, std = (
        vae.config.get("scaling_factor", 1.0),
        vae.config.get("latents_mean"),
        vae.config.get("latents_std"),
    )
    if mean is None or std is None:
        return (latents - (vae.config.get("shift_factor") or 0.0)) * scale
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
    return (latents - mean) * scale / std


def as_loop(pipe: Any, latents: Tensor, like: Tensor, statistics: bool = True) -> Tensor:
    """[B,C,h,w] as a pipeline's loop holds them: unchanged, with a frame [B,C,1,h,w], or packed as tokens [B,L,4C].

    statistics: normalise as FLUX.2's VAE does; a mask is not.
    """
    if like.ndim == 5:
        return latents[:, :, None]
    if like.ndim == 4:
        return latents
    if hasattr(pipe.vae, "bn"):  # FLUX.2: its VAE normalises patches, and they are packed afterwards
        patches = pipe._patchify_latents(latents)
        if statistics:
            norm = pipe.vae.bn
            mean, variance = (value.view(1, -1, 1, 1).to(patches) for value in (norm.running_mean, norm.running_var))
            patches = (patches - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
        return pipe._pack_latents(patches)
    batch, channels, height, width = latents.shape
    return pipe._pack_latents(latents.contiguous(), batch, channels, height, width)


def _latent_mask(masks: Sequence[Image.Image], size: Sequence[int]) -> Tensor:
    """Masks -> float [B,1,h,w]: 1 where any but a trace of a cell is to be repainted."""
    pixels = np.stack([np.asarray(mask.convert("L"), np.float32) / 255 for mask in masks])
    share = F.interpolate(torch.from_numpy(pixels)[:, None], size=tuple(size), mode="area")
    return (share > _TOUCHED).float()
