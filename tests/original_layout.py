"""Tiny pipelines as one file in their authors' key layout, as most other programs keep them.

UNets: written for `layers_per_block=1` and blocks with attention in the second half of the encoder, as in `conftest`.
FLUX.1 is not among them: diffusers reads its layout at the published width only.
"""

import re
from typing import Any

import torch
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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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


def denoised_by_unet(pipe: Any) -> dict[str, Tensor]:
    """UNet and VAE under the authors' names and in their shapes."""
    weights = {unet_name(name): tensor for name, tensor in pipe.unet.state_dict().items()}
    return weights | vae_weights(pipe.vae)


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """A VAE, whose attention once was convolutions."""
    weights, blocks = {}, len(vae.config.up_block_types)
    for name, tensor in vae.state_dict().items():
        was_convolution = "attentions" in name and "group_norm" not in name and name.endswith("weight")
        weights[vae_name(name, blocks)] = tensor[:, :, None, None] if was_convolution else tensor
    return weights


def clip_weights(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder in the layout of transformers, below a prefix."""
    weights = {}
    for name, tensor in encoder.state_dict().items():
        inner = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
        weights[prefix + inner] = tensor
    return weights


OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_weights(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder in the layout of open_clip: queries, keys and values are one matrix."""
    weights: dict[str, Tensor] = {}
    for name, tensor in clip_weights(encoder, "").items():
        if name == "text_projection.weight":
            weights[prefix + "text_projection"] = tensor.T
            continue
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        if found := re.match(r"(.*attn)\.([qkv])_proj\.(weight|bias)", name):
            joined = f"{prefix}{found[1]}.in_proj_{found[3]}"
            weights.setdefault(joined, torch.empty(0))
            continue
        weights[prefix + name] = tensor
    state = clip_weights(encoder, "")
    for name in weights:
        if ".attn.in_proj_" in name:
            layer, kind = re.search(r"resblocks\.(\d+)", name)[1], name.rpartition("_")[2]
            parts = [f"text_model.encoder.layers.{layer}.self_attn.{one}_proj.{kind}" for one in "qkv"]
            weights[name] = torch.cat([state[part] for part in parts])
    return weights


SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "transformer_blocks": "joint_blocks",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_JOINED = {
    "x_block.attn.qkv": ("to_q", "to_k", "to_v"),
    "context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def sd3_transformer(transformer: Any) -> dict[str, Tensor]:
    """A transformer of SD3: queries, keys and values are one matrix, scale and shift of the last norms are swapped."""
    state, weights = transformer.state_dict(), {}
    last = transformer.config.num_layers - 1
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    for name, tensor in state.items():
        if any(f".attn.{part}." in name for parts in SD3_JOINED.values() for part in parts):
            continue
        if name.startswith(swapped):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for new, old in SD3.items():
            name = re.sub(rf"(^|\.){re.escape(new)}(\.|$)", rf"\g<1>{old}\g<2>", name)
        weights[f"model.diffusion_model.{name}"] = tensor
    for block in range(last + 1):
        for joined, parts in SD3_JOINED.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.attn.{part}.{kind}" for part in parts]
                found = torch.cat([state[name] for name in names])
                weights[f"model.diffusion_model.joint_blocks.{block}.{joined}.{kind}"] = found
    return weights


def original_layout(pipe: Any) -> dict[str, Tensor]:
    """The weights of a tiny Stable Diffusion, SDXL or SD3 pipeline under the authors' names and in their shapes."""
    name = type(pipe).__name__
    if name == "StableDiffusionXLPipeline":
        weights = denoised_by_unet(pipe)
        weights |= clip_weights(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        weights |= open_clip_weights(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif name == "StableDiffusion3Pipeline":
        weights = sd3_transformer(pipe.transformer) | vae_weights(pipe.vae)
        weights |= clip_weights(pipe.text_encoder, "text_encoders.clip_l.transformer.")
        weights |= clip_weights(pipe.text_encoder_2, "text_encoders.clip_g.transformer.")
        t5 = pipe.text_encoder_3.state_dict()
        weights |= {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in t5.items()}
    else:
        weights = denoised_by_unet(pipe) | clip_weights(pipe.text_encoder, "cond_stage_model.transformer.")
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
