"""Previews: the clean picture that a half-denoised one predicts, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nearid_personalize.errors import InputError
from nearid_personalize.guard.families import unpacked
from nearid_personalize.images import to_tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# Which space a scheduler keeps its sample x in; x0 is the clean latent and e the noise.
_BY_TIMESTEP = "x = sqrt(abar) x0 + sqrt(1 - abar) e, abar looked up by timestep"


_PRESERVING = "x = alpha x0 + sigma alpha e, alpha = 1 / sqrt(1 + sigma^2), or (1 - sigma) x0 + sigma e as a flow"


_EXPLODING = "x = x0 + sigma e"


_PRECONDITIONED = "as exploding, and the model's output has a preconditioning of its own"


_FLOW = "x = (1 - sigma) x0 + sigma e"


TESTED_SCHEDULERS = {
    "DDIMScheduler": _BY_TIMESTEP,
    "DDPMScheduler": _BY_TIMESTEP,
    "LCMScheduler": _BY_TIMESTEP,
    "PNDMScheduler": _BY_TIMESTEP,
    "TCDScheduler": _BY_TIMESTEP,
    "DEISMultistepScheduler": _PRESERVING,
    "DPMSolverMultistepScheduler": _PRESERVING,
    "DPMSolverSinglestepScheduler": _PRESERVING,
    "SASolverScheduler": _PRESERVING,
    "UniPCMultistepScheduler": _PRESERVING,
    "DPMSolverSDEScheduler": _EXPLODING,
    "EulerAncestralDiscreteScheduler": _EXPLODING,
    "EulerDiscreteScheduler": _EXPLODING,
    "HeunDiscreteScheduler": _EXPLODING,
    "KDPM2AncestralDiscreteScheduler": _EXPLODING,
    "KDPM2DiscreteScheduler": _EXPLODING,
    "LMSDiscreteScheduler": _EXPLODING,
    "EDMDPMSolverMultistepScheduler": _PRECONDITIONED,
    "EDMEulerScheduler": _PRECONDITIONED,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
}
"""Schedulers whose clean prediction is known, and the space of their sample."""


# --- previews --------------------------------------------------------------------------------------------------------
def predict_clean(
    scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, step_index: int | None
) -> torch.Tensor:
    """The clean latents that a model output stands for: shape of `sample`, float32.

    The inputs are those of `scheduler.step`; `step_index` is the scheduler's at that step, None where it keeps none.
    Parametrisations: epsilon, v (Salimans and Ho 2022, appendix D), sample; flow (Lipman et al. 2023).
    """
    output, sample = model_output.float(), sample.float()
    space = TESTED_SCHEDULERS[type(scheduler).__name__]
    predicts = "flow_prediction" if space == _FLOW else scheduler.config.prediction_type
    if space == _BY_TIMESTEP:
        alpha_bar = scheduler.alphas_cumprod[int(timestep)].to(sample.device)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    else:
        sigma = scheduler.sigmas[step_index].to(sample.device)
        if space == _PRECONDITIONED:
            return scheduler.precondition_outputs(sample, output, sigma)
        if predicts == "flow_prediction":
            return sample - sigma * output
        alpha = (sigma**2 + 1).rsqrt()
        sigma = sigma * alpha
        if space == _EXPLODING:
            sample = sample * alpha
    if predicts == "epsilon":
        return (sample - sigma * output) / alpha
    if predicts == "v_prediction":
        return alpha * sample - sigma * output
    if predicts == "sample":
        return output
    raise InputError(f"scheduler.config.prediction_type is {predicts!r}; no clean prediction is known for it")


@torch.no_grad()
def decode_latents(
    pipe: DiffusionPipeline,
    latents: torch.Tensor,
    height: int | None = None,
    width: int | None = None,
    vae: Any = None,
) -> torch.Tensor:
    """Decode a pipeline's latents as the end of its call does: `[n,3,H,W]` in [0, 1], float32, CPU.

    Args:
        latents: clean, as `output_type="latent"` returns them: `[n,C,h,w]`, or tokens `[n,L,C]` (FLUX, Qwen-Image).
        height, width: of the picture, in pixels; needed for tokens, unless the picture has the pipeline's default size.
        vae: in place of the pipeline's own; its configuration says how the latents are scaled.
    """
    own = vae is None
    vae = pipe.vae if own else vae
    latents = latents_for_vae(pipe, latents, height, width, vae.config)
    dtype = vae.dtype
    # SDXL's VAE overflows in float16, so its pipeline decodes in float32
    overflows = hasattr(pipe, "upcast_vae") or type(pipe).__name__ == "StableDiffusionXLModularPipeline"
    upcast = overflows and dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        # The pipeline's latents lie where its VAE works, which under offloading is not where the VAE's weights lie
        latents = latents.to(vae.dtype) if own else latents.to(vae.device, vae.dtype)
        decoded = vae.decode(latents, return_dict=False)[0]
    finally:
        if upcast:
            vae.to(dtype=dtype)
    if decoded.ndim == 5:  # Qwen-Image has a video VAE: [n,3,1,H,W]
        decoded = decoded[:, :, 0]
    return pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu()


def latents_for_vae(
    pipe: DiffusionPipeline, latents: torch.Tensor, height: int | None, width: int | None, config: Mapping[str, Any]
) -> torch.Tensor:
    """Latents as a VAE of this configuration decodes them: `[n,C,h,w]`, tokens in their places, the scaling undone."""
    if latents.ndim == 3:
        latents = unpacked(pipe, latents, height, width)
    scale, mean, std = config.get("scaling_factor", 1.0), config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / scale + (config.get("shift_factor") or 0.0)
    per_channel = (1, -1) + (1,) * (latents.ndim - 2)
    mean, std = (torch.tensor(value).view(per_channel).to(latents) for value in (mean, std))
    return latents * std / scale + mean


def as_pixels(
    images: Any, output_type: str, pipe: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> torch.Tensor:
    """A pipeline's `images` of any `output_type`, as pixels to score: `[n,3,H,W]` in [0, 1], float32, CPU.

    `height` and `width`, in pixels, are those of the pipeline's call; latents that are tokens need them.
    """
    if output_type == "latent":
        return decode_latents(pipe, images, height, width)
    if output_type == "pil":
        return to_tensor(images)
    if output_type == "np":
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()
    if output_type == "pt":
        return images.float().cpu()
    raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
