"""Device memory that training a LoRA needs, by base model, at the defaults; without weights or an accelerator.

    python benchmarks/memory.py                 # the table of docs/memory.md, minutes
    python benchmarks/memory.py --models sdxl   # one row
    python benchmarks/memory.py --check         # one estimate against a measured run on this CPU

The architectures are built from their published shapes. GB are 10^9 bytes; a "24 GB" card has 25.8 of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import tyro
from real_models import FLUX_TRANSFORMER, KL_VAE, SDXL_UNET
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nearid_personalize.training.lora.families import FAMILIES, Family, StableDiffusion, Table, pack, unpack
from nearid_personalize.training.lora.loop import adapt
from nearid_personalize.training.lora.memory import assemble, needs_of, question, step_bytes, without_weights
from nearid_personalize.training.lora.options import LoraOptions
from nearid_personalize.training.memory import GB, bytes_of, emptied

CLIP_L, CLIP_G, T5_XXL, QWEN_VL, QWEN3_4B = 123_060_480, 694_659_840, 4_762_310_656, 8_292_166_656, 4_022_468_096
VAE_16 = {**KL_VAE, "latent_channels": 16, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


class Flux2(Family):
    """FLUX.2: memory can be told; it is not among the families that are trained."""

    attention_layers = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
    pixels_at_once = FAMILIES["FluxPipeline"].pixels_at_once
    checkpointed = True

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        return {"encoder_hidden_states": torch.empty(count, 512, self.denoiser.config.joint_attention_dim, dtype=dtype)}

    def latent_affine(self) -> tuple[float, float]:
        return 0.0, 1.0

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        h, w = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / 1000,
            img_ids=noisy.new_zeros(h * w, 4),
            txt_ids=noisy.new_zeros(rows["encoder_hidden_states"].shape[1], 4),
            **rows,
        ).sample
        return unpack(predicted, h, w)


class Weights(nn.Module):
    """As many weights as a text encoder has."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count))


@dataclass(frozen=True)
class Shape:
    """A published base model: classes, configurations, the parameters of its text encoders, pixels of a side."""

    pipeline: str
    denoiser: str
    config: Mapping[str, Any]
    vae: str
    vae_config: Mapping[str, Any]
    texts: tuple[int, ...]
    side: int = 1024
    family: type[Family] | None = None


NOTHING: Mapping[str, Any] = MappingProxyType({})
MODELS: dict[str, Shape] = {
    "sd15": Shape(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        "AutoencoderKL",
        {**KL_VAE, "sample_size": 512},
        (CLIP_L,),
        side=512,
    ),
    "sdxl": Shape(
        "StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL_UNET, "AutoencoderKL", KL_VAE, (CLIP_L, CLIP_G)
    ),
    "sd3.5-medium": Shape(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD35_MEDIUM,
        "AutoencoderKL",
        VAE_16,
        (CLIP_L, CLIP_G, T5_XXL),
    ),
    "flux.1": Shape(
        "FluxPipeline",
        "FluxTransformer2DModel",
        FLUX_TRANSFORMER,
        "AutoencoderKL",
        VAE_16,
        (CLIP_L, T5_XXL),
    ),
    "flux.2-klein-4b": Shape(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        KLEIN,
        "AutoencoderKLFlux2",
        NOTHING,
        (QWEN3_4B,),
        family=Flux2,
    ),
    "qwen-image": Shape(
        "QwenImagePipeline", "QwenImageTransformer2DModel", NOTHING, "AutoencoderKLQwenImage", NOTHING, (QWEN_VL,)
    ),
    "z-image": Shape("ZImagePipeline", "ZImageTransformer2DModel", NOTHING, "AutoencoderKL", VAE_16, (QWEN3_4B,)),
}


@dataclass(frozen=True)
class Options:
    """What to print."""

    models: tuple[str, ...] = tuple(MODELS)
    """Rows of the table."""
    check: bool = False
    """Check one estimate against a measured run, in place of the table."""


def hollow(shape: Shape) -> Family:
    """The family of a published base model, without weights, in bfloat16."""

    def model(kind: str, config: Mapping[str, Any]) -> nn.Module:
        return without_weights(lambda: getattr(diffusers, kind)(**config), torch.bfloat16)

    name = "unet" if "UNet" in shape.denoiser else "transformer"
    flows = name == "transformer"
    schedulers = (diffusers.DDPMScheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    texts = {
        f"text_encoder{f'_{index + 1}' if index else ''}": without_weights(lambda n=count: Weights(n), torch.bfloat16)
        for index, count in enumerate(shape.texts)
    }
    tokenizers = {text.replace("text_encoder", "tokenizer"): None for text in texts}
    checker = {"safety_checker": None, "feature_extractor": None} if shape.pipeline == "StableDiffusionPipeline" else {}
    parts = {
        name: model(shape.denoiser, shape.config),
        "vae": model(shape.vae, shape.vae_config),
        "scheduler": schedulers[flows](),
        **texts,
        **tokenizers,
        **checker,
    }
    return (shape.family or FAMILIES[shape.pipeline])(assemble(shape.pipeline, parts))


def row(name: str) -> str:
    """One line of the table, as Markdown."""
    shape = MODELS[name]
    options = LoraOptions.of(
        base_model=name, references=Path(), output=Path(), resolution=shape.side, validate_every=50
    )
    family = hollow(shape)
    weights = bytes_of(family.denoiser)
    needs = needs_of(family, options, "cuda", torch.bfloat16)
    family.denoiser.disable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        one = step_bytes(family, 1, shape.side, torch.bfloat16, "cuda")
    how = f"{needs.micro_batch} at once" + (", checkpointed" if needs.checkpointed else "")
    sizes = [weights, one, *(needs.phases[phase] for phase in ("texts", "pictures", "steps", "drawing")), needs.peak]
    figures = " | ".join(f"{size / GB:.1f}" for size in sizes)
    return f"| {name}, {shape.side} px | {how} | {figures} | {needs.lora / 1e6:.0f} MB |"


def table(models: Sequence[str]) -> None:
    """Print the table, a row as soon as it is known."""
    print(
        "| base model | a step's 8 pictures | denoiser | one picture kept | texts | pictures | steps | drawing | peak |"
    )
    print("|---" * 10 + "|")
    for name in models:
        print(row(name), flush=True)


# --- the check -------------------------------------------------------------------------------------------------------


def middling() -> nn.Module:
    """A UNet of Stable Diffusion 1.5's layout, a third as wide."""
    return diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 384, 384),
        cross_attention_dim=768,
        norm_num_groups=32,
        attention_head_dim=8,
    )


def family_around(build: Callable[[], nn.Module]) -> Family:
    """A family with nothing but a UNet and a VAE's configuration."""
    vae = without_weights(lambda: diffusers.AutoencoderKL(**KL_VAE), torch.float32)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    return StableDiffusion(
        assemble("StableDiffusionPipeline", {**parts, "unet": build(), "vae": vae, "scheduler": scheduler})
    )


def measured_step(family: Family, count: int, side: int) -> int:
    """The peak of what torch's allocator gave to a real forward and backward pass, by torch's profiler."""
    noisy, timesteps, rows, frame = question(family, count, side)
    noisy, frame = torch.randn_like(noisy), torch.zeros_like(frame)
    rows = {name: torch.randn_like(value) for name, value in rows.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        predicted = family.denoise(family.denoiser, noisy, timesteps, rows, frame)
        nn.functional.mse_loss(predicted.float(), torch.zeros_like(predicted)).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def estimate_and_measure(checkpointed: bool, count: int, side: int) -> tuple[int, int]:
    """Bytes of a step's activations and gradients in float32: told by fake tensors, and taken by a real step."""
    options = LoraOptions.of(base_model="", references=Path(), output=Path(), text_rank=0)
    real, hull = family_around(middling), family_around(lambda: without_weights(middling, torch.float32))
    for family in (real, hull):
        adapt(family, options, torch.device("cpu"), torch.float32)
        if checkpointed:
            family.denoiser.enable_gradient_checkpointing()
    measured = measured_step(real, count, side)
    with FakeTensorMode(allow_non_fake_inputs=True):
        emptied(hull.denoiser, "cpu")
        return step_bytes(hull, count, side, torch.float32, "cpu"), measured


def check(count: int = 4, side: int = 256) -> None:
    """Print the estimate beside the measurement."""
    parameters = sum(weight.numel() for weight in without_weights(middling, torch.float32).parameters()) / 1e6
    for checkpointed in (False, True):
        estimate, measured = estimate_and_measure(checkpointed, count, side)
        how = "float32, checkpointed" if checkpointed else "float32"
        print(f"UNet of {parameters:.0f} M, {count} pictures of {side} px, {how}:", end=" ")
        print(f"estimated {estimate / GB:.3f} GB, measured {measured / GB:.3f} GB, {estimate / measured - 1:+.1%}")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    check() if chosen.check else table(chosen.models)
