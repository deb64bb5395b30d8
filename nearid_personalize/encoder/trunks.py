"""The vision trunks an encoder can stand on, and which of their tokens it reads.

The last layer's tokens after the trunk's final norm: the class token where there is one, then the patches in reading
order. Registers are dropped. CLIP applies its final norm to the class token alone; here all tokens go through it.

    model_type                                   tokens                      the trunk's own pooled output
    siglip_vision_model (SigLIP, SigLIP2 fixed)  patches                     its attention-pooling head
    siglip2_vision_model (SigLIP2 NaFlex)        patches of a square grid    its attention-pooling head
    clip_vision_model                            class, patches              class token
    dinov2, dinov2_with_registers, dinov3_vit    class, patches              class token

Letters: N images, T tokens, D width, P patches, p pixels of a patch's side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nearid_personalize.encoder.preprocessing import Preprocessing, Resample


def _siglip(trunk: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    # Part by part rather than `trunk(...)`, which would also run the head, and in the trunk's precision.
    hidden = trunk.embeddings(pixel_values)
    return trunk.post_layernorm(trunk.encoder(inputs_embeds=hidden).last_hidden_state)


def _naflex(trunk: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    # Every picture fills the same square grid, so there is no padding and nothing to mask.
    patches, grid = _patches(pixel_values, trunk.config.patch_size)
    shapes = torch.tensor([grid]).expand(len(patches), 2)
    hidden = trunk.embeddings(patches, shapes)
    return trunk.post_layernorm(trunk.encoder(inputs_embeds=hidden).last_hidden_state)


def _clip(trunk: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    return trunk.post_layernorm(trunk(pixel_values).last_hidden_state)


def _dino(trunk: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    tokens = trunk(pixel_values).last_hidden_state  # class, registers, patches
    registers = getattr(trunk.config, "num_register_tokens", 0)  # belong to no place in the picture
    return torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1) if registers else tokens


def _patches(pixel_values: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """[N,3,H,W] -> [N,P,3*p*p], channels last within a patch, and the grid (rows, columns)."""
    count, channels, height, width = pixel_values.shape
    rows, columns = height // size, width // size
    blocks = pixel_values.view(count, channels, rows, size, columns, size)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, size * size * channels), (rows, columns)


@dataclass(frozen=True)
class _Family:
    read: Callable[[PreTrainedModel, Tensor], Tensor]
    has_class_token: bool
    mean: list[float]
    std: list[float]
    resample: Resample = "bicubic"


_HALF = [0.5] * 3


_DINOV2 = _Family(_dino, True, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


_FAMILIES = {
    "siglip_vision_model": _Family(_siglip, False, _HALF, _HALF),
    "siglip2_vision_model": _Family(_naflex, False, _HALF, _HALF, "bilinear"),
    "clip_vision_model": _Family(_clip, True, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _Family(_dino, True, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear"),
}


TRUNK_TYPES = tuple(_FAMILIES)
"""The `model_type` of every trunk there is code for."""


# Whole text-and-image checkpoints: their vision half is read, the rest is left in the file.
_CLASSES = {
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


CHECKPOINT_TYPES = tuple(_CLASSES)
"""The `model_type` of every checkpoint that holds such a trunk."""


def trunk_class(checkpoint_type: str) -> type[PreTrainedModel]:
    """One of `CHECKPOINT_TYPES` -> the transformers class of its vision trunk."""
    return getattr(transformers, _CLASSES[checkpoint_type])


def read_tokens(trunk: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """[N,3,H,W] normalised pixels -> [N,T,D], see the table above; in the trunk's own float type."""
    return _FAMILIES[trunk.config.model_type].read(trunk, pixel_values.to(trunk.dtype))


def has_class_token(config: PretrainedConfig) -> bool:
    """Whether the first token that `read_tokens` gives is the class token."""
    return _FAMILIES[config.model_type].has_class_token


def default_preprocessing(config: PretrainedConfig) -> Preprocessing:
    """What a trunk's pictures look like where no `preprocessor_config.json` says so."""
    family = _FAMILIES[config.model_type]
    size = config.image_size if hasattr(config, "image_size") else config.patch_size * isqrt(config.num_patches)
    return Preprocessing(size, tuple(family.mean), tuple(family.std), family.resample)
