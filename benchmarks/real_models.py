"""SDXL, FLUX.1 and the released NearID encoder at their published widths, with random weights; no download.

What such models draw means nothing. What they cost in seconds and bytes is what the trained ones cost.
"""

from typing import Any

import torch
from torch import nn

# As published with the checkpoints; `width` divides the channels where a small stand-in is wanted
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
FLUX_TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@torch.no_grad()
def random_weights(build: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model with small random weights on `device`, built without the minutes that `__init__` would take for them."""
    with torch.device("meta"):
        model = build()
    model = nn.Module.to(model.to_empty(device=device), dtype).eval()  # diffusers' own `to` warns
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # `to_empty` untied them
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif "inv_freq" not in name:
            buffer.zero_()
    return model


def clip_tokenizer() -> Any:
    """A byte-level CLIP tokenizer in which `sks` is one token and every other word is spelt."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    pieces = [*letters, *ends, "sk", "sks</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[("s", "k"), ("sk", "s</w>")], model_max_length=77)


def clip_text(shape: dict[str, int], dtype: torch.dtype, device: str, projection: int | None = None) -> nn.Module:
    """A CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=49408, projection_dim=projection or 768, **shape, **special)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return random_weights(lambda: kind(config), dtype, device)


def t5_tokenizer() -> Any:
    """A T5 tokenizer that spells."""
    from transformers import T5Tokenizer

    letters = [(chr(code), -2.0) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_text(shape: dict[str, int], dtype: torch.dtype, device: str) -> nn.Module:
    """A T5 text encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **shape)
    return random_weights(lambda: T5EncoderModel(config), dtype, device)


def divided(shape: dict[str, Any], names: tuple[str, ...], by: int) -> dict[str, Any]:
    """A shape with some of its widths divided."""
    smaller = dict(shape)
    for name in names:
        value = shape[name]
        smaller[name] = tuple(v // by for v in value) if isinstance(value, tuple) else value // by
    return smaller


def sdxl(dtype: torch.dtype, device: str = "cpu", width: int = 1) -> Any:
    """`StableDiffusionXLPipeline`; `width` divides the UNet's channels (1, 5 or 10); text encoders then are shallow."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet, vae, text, text_2 = SDXL_UNET, KL_VAE, CLIP_L, CLIP_BIG_G
    if width > 1:
        unet = divided(unet, ("block_out_channels",), width) | {"attention_head_dim": (1, 2, 4)}
        vae = divided(vae, ("block_out_channels",), 4)
        text, text_2 = text | {"num_hidden_layers": 2}, text_2 | {"num_hidden_layers": 2}
    return StableDiffusionXLPipeline(
        vae=random_weights(lambda: AutoencoderKL(scaling_factor=0.13025, **vae), dtype, device),
        text_encoder=clip_text(text, dtype, device),
        text_encoder_2=clip_text(text_2, dtype, device, projection=1280),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=random_weights(lambda: UNet2DConditionModel(**unet), dtype, device),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
    )


def flux(dtype: torch.dtype, device: str = "cpu", small: bool = False, text_layers: int = 1) -> Any:
    """`FluxPipeline`, or a small stand-in.

    text_layers: of its T5. One layer gives embeddings of the same shape, and a prompt is encoded once.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    shape, t5 = FLUX_TRANSFORMER, T5_XXL | {"num_layers": text_layers}
    vae = KL_VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    if small:
        shape = shape | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 128}
        t5 = t5 | {"d_model": 128, "d_ff": 256, "num_heads": 2}
        vae = divided(vae, ("block_out_channels",), 4)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=random_weights(lambda: AutoencoderKL(scaling_factor=0.3611, shift_factor=0.1159, **vae), dtype, device),
        text_encoder=clip_text(CLIP_L | ({"num_hidden_layers": 2} if small else {}), dtype, device),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(t5, dtype, device),
        tokenizer_2=t5_tokenizer(),
        transformer=random_weights(lambda: FluxTransformer2DModel(**shape), dtype, device),
    )


def nearid(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, small: bool = False) -> Any:
    """An `IdentityScorer` of the released shape (428 M parameters), or of a small one."""
    from nearid_personalize import IdentityScorer, NearIDConfig, NearIDModel

    shape = dict(SO400M)
    if small:
        shape |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_weights(lambda: NearIDModel(NearIDConfig(vision_config=shape)), torch.float32, device)
    return IdentityScorer(model, 384, (0.5,) * 3, (0.5,) * 3, device=device, dtype=dtype, batch_size=16)
