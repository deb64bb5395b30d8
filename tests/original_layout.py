"""A tiny Stable Diffusion as one file in its authors' key layout, as CompVis' code and most other programs keep it.

Written for `layers_per_block=1` and blocks with attention in the second half of the encoder, as in `conftest`.
"""

import re
from typing import Any

from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str) -> str:
    """diffusers' name of a UNet weight -> the authors'."""
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        number = 1 + 2 * block + (1 if kind == "downsamplers" else layer)
        place = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
        rest = rest.removeprefix("conv.") if kind == "downsamplers" else rest
        name = f"input_blocks.{number}.{place}{rest}"
    elif found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        number = 2 * block + (1 if kind == "upsamplers" else layer)
        place = {"resnets": "0.", "attentions": "1.", "upsamplers": "2."}[kind]
        name = f"output_blocks.{number}.{place}{rest}"
    for new, old in UNET.items():
        name = re.sub(rf"^{re.escape(new)}\.", f"{old}.", name)
    if re.search(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
        for new, old in RESNET.items():
            name = name.replace(f".{new}.", f".{old}.")
    return f"model.diffusion_model.{name}"


def vae_name(name: str, blocks: int) -> str:
    """diffusers' name of an `AutoencoderKL` weight -> the authors', who count the decoder's blocks from the end."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{blocks - 1 - int(found[1])}.", name)
    name = name.replace("upsamplers.0", "upsample")
    name = re.sub(r"(up\.\d+)\.resnets", r"\1.block", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in VAE_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return f"first_stage_model.{name}"


def original_layout(pipe: Any) -> dict[str, Tensor]:
    """The weights of a tiny Stable Diffusion pipeline under the authors' names and in their shapes."""
    weights = {unet_name(name): tensor for name, tensor in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.up_block_types)
    for name, tensor in pipe.vae.state_dict().items():
        was_convolution = "attentions" in name and "group_norm" not in name and name.endswith("weight")
        weights[vae_name(name, blocks)] = tensor[:, :, None, None] if was_convolution else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}
