"""The model families that the guard knows: what their tensors hold of each candidate, and how their latents unpack.

A new family is a record below, and a builder in `tests/tiny_pipelines.py`; docs/architecture.md says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from nearid_personalize.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Unpack = Callable[["DiffusionPipeline", torch.Tensor, int, int], torch.Tensor]
"""Tokens `[n,L,C]` of a picture of (height, width) pixels -> latents `[n,C,h,w]`, scaled as the denoiser's."""


@dataclass(frozen=True)
class Family:
    """How one pipeline class lays out the candidates of a batch."""

    batched: frozenset[str]
    """Arguments that the pipeline passes its denoiser by name, with a row for each candidate: a tensor, a list with a
    tensor for each candidate, or a dict of such. Arguments of other names are shared by the candidates. What it passes
    by position has rows in any case."""
    unpack: Unpack | None = None
    """None: latents are no tokens."""
    source: Literal["none", "by row", "once"] = "none"
    """How a source picture is encoded: there is none, for each candidate by its own generator, or once for all of them
    by `_encode_vae_image`."""
    races: bool = True
    """Whether its batch may shrink: tests hold that the rows that go on come out as in a plain call."""


def unpack_patches(pipe: DiffusionPipeline, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens of 2 x 2 latents, as FLUX and Qwen-Image have them."""
    return pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)


def unpack_flux2(pipe: DiffusionPipeline, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens of 2 x 2 latents, normalised by the statistics of the VAE's batch norm."""
    side = 2 * pipe.vae_scale_factor
    patches = tokens.mT.unflatten(-1, (height // side, width // side))  # [n,4C,h/2,w/2]
    norm = pipe.vae.bn
    mean, variance = (value.view(1, -1, 1, 1).to(patches) for value in (norm.running_mean, norm.running_var))
    return pipe._unpatchify_latents(patches * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean)


UNET = Family(
    batched=frozenset({"encoder_hidden_states", "timestep_cond", "added_cond_kwargs", "cross_attention_kwargs"})
)
SD3 = Family(
    batched=frozenset(
        {"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "joint_attention_kwargs"}
    )
)
FLUX = Family(
    batched=frozenset(
        {
            "hidden_states",
            "timestep",
            "guidance",
            "encoder_hidden_states",
            "pooled_projections",
            "joint_attention_kwargs",
        }
    ),
    unpack=unpack_patches,
)
FLUX2 = replace(FLUX, unpack=unpack_flux2)
QWEN = Family(
    batched=frozenset(
        {
            "hidden_states",
            "timestep",
            "guidance",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "attention_kwargs",
        }
    ),
    unpack=unpack_patches,
)
Z_IMAGE = Family(batched=frozenset({"joint_attention_kwargs"}))

FAMILIES = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionImg2ImgPipeline": replace(UNET, source="by row"),
    "StableDiffusionInpaintPipeline": replace(UNET, source="once"),
    "StableDiffusionXLPipeline": UNET,
    "StableDiffusionXLImg2ImgPipeline": replace(UNET, source="by row", races=False),
    "StableDiffusionXLInpaintPipeline": replace(UNET, source="once", races=False),
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": replace(FLUX, source="once", races=False),
    "FluxInpaintPipeline": replace(FLUX, source="once", races=False),
    "Flux2Pipeline": FLUX2,
    "QwenImagePipeline": QWEN,
    "QwenImageImg2ImgPipeline": replace(QWEN, source="once", races=False),
    "QwenImageInpaintPipeline": replace(QWEN, source="once", races=False),
    "ZImagePipeline": Z_IMAGE,
}
"""By the exact name of the pipeline's class: a subclass may do anything."""


def family_of(pipe: DiffusionPipeline) -> Family | None:
    """The record of a pipeline; None: nothing is known of it."""
    return FAMILIES.get(type(pipe).__name__)


def unpacked(pipe: DiffusionPipeline, tokens: torch.Tensor, height: int | None, width: int | None) -> torch.Tensor:
    """Tokens `[n,L,C]` -> latents `[n,C,h,w]`; height and width in pixels, default: those of the pipeline.

    Raises InputError for tokens that are no picture of that size.
    """
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = int(height or default), int(width or default)
    side = 2 * pipe.vae_scale_factor  # of a token's patch, in pixels
    if tokens.shape[1] != (height // side) * (width // side):
        raise InputError(
            f"height, width: {tokens.shape[1]} latent tokens are no picture of {height} x {width} pixels; "
            "give the size that the pipeline was called with"
        )
    family = family_of(pipe)
    # Other pipelines with tokens have FLUX's way of unpacking them
    unpack = family.unpack if family and family.unpack else unpack_patches
    return unpack(pipe, tokens, height, width)
