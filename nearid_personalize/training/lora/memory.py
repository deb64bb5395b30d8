"""What a LoRA run needs of a device and of the disk, told before any weights are loaded.

The real architecture is built from its configuration without weights; a step is done on fake tensors, which have shapes
and nothing else, and the bytes of all that are alive at once are counted. Where an accelerator is meant, normalisations
are in float32 under autocast, as they are there. Not counted: the accelerator's own context and what its allocator
leaves unused, the models that judge a validation, and the LoRA of text encoders.

Letters: B pictures, L tokens of text.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from nearid_personalize.training.lora.adapters import autocast_to
from nearid_personalize.training.lora.base_model import faults_of, read_index
from nearid_personalize.training.lora.families import Family, family_class
from nearid_personalize.training.lora.loop import (
    HALF,
    adapt,
    checkpoints_gradients,
    choose_autocast,
    frozen_precision,
    micro_batch_size,
)
from nearid_personalize.training.lora.options import LoraOptions
from nearid_personalize.training.lora.reward import decode
from nearid_personalize.training.memory import GB, OVERHEAD, PeakMemory, bytes_of, emptied, norms_in_float32

STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # optimizer bytes per trained parameter


# --- the base model, without weights ---------------------------------------------------------------------------------
def outline(options: LoraOptions, dtype: torch.dtype) -> Family:
    """The base model's family, its models built from their configurations, weights in `dtype`, on the `meta` device.

    Raises InputError for a base model whose configurations cannot be read.
    """
    index, source, revision = read_index(options)
    family = family_class(index["_class_name"], options.base_model)
    parts = {name: part for name, part in index.items() if isinstance(part, list) and len(part) == 2}
    with faults_of(options):
        built = {name: outline_part(source, revision, name, part, dtype) for name, part in parts.items()}
    return family(assemble(index["_class_name"], built))


def outline_part(source: str, revision: str | None, name: str, part: list[Any], dtype: torch.dtype) -> Any:
    """One component of a pipeline: a model without weights, or a scheduler; None for all else.

    part: [library, class], as the pipeline's index has it.
    """
    library, kind = part
    if library == "diffusers" and kind:
        cls = getattr(diffusers, kind)
        config = cls.load_config(source, subfolder=name, revision=revision)
        return without_weights(lambda: cls.from_config(config), dtype) if is_model(cls) else cls.from_config(config)
    if library == "transformers" and kind and name.startswith("text_encoder"):
        text_config = transformers.AutoConfig.from_pretrained(source, subfolder=name, revision=revision)
        return without_weights(lambda: getattr(transformers, kind)(text_config), dtype)
    return None


def is_model(cls: type) -> bool:
    """Whether a component has weights."""
    return issubclass(cls, nn.Module)


def without_weights(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build a model on the `meta` device."""
    with torch.device("meta"):
        return emptied(build(), "meta", dtype)


def assemble(pipeline_class: str, parts: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline of the parts, which draws nothing."""
    more = {"requires_safety_checker": False} if pipeline_class == "StableDiffusionPipeline" else {}
    return getattr(diffusers, pipeline_class)(**parts, **more)


# --- what a run needs ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Needs:
    """What a LoRA run needs, bytes.

    phases: device memory by phase of the run, see `needs_of`. lora: the LoRA file. disk: what the output folder holds
    at most, without pictures. micro_batch, checkpointed: how the steps are done.
    """

    phases: dict[str, int]
    lora: int
    disk: int
    micro_batch: int
    checkpointed: bool

    @property
    def peak(self) -> int:
        """Device memory of the phase that needs most."""
        return max(self.phases.values())

    def lines(self) -> list[str]:
        """The table that `--dry-run` prints."""
        how = f"{self.micro_batch} at once" + (", gradients checkpointed" if self.checkpointed else "")
        rows = [f"{name:>25}  {size / GB:.1f} GB" for name, size in self.phases.items()]
        rows.append(f"{'peak memory':>25}  {self.peak / GB:.1f} GB, {how}")
        rows.append(f"{'disk':>25}  {self.disk / 1e6:.0f} MB in the output folder, beside pictures")
        return rows

    def warning(self, capacity: int, device: str) -> str:
        """Why the run may not fit a device of so many bytes; "" when it should."""
        if self.peak <= capacity:
            return ""
        return (
            f"warning: {device} has {capacity / GB:.1f} GB, the run needs about {self.peak / GB:.1f}; try "
            "--gradient-checkpointing on, a smaller --micro-batch-size or --resolution, --base-precision same"
        )


def needs_of(family: Family, options: LoraOptions, device: str, autocast: torch.dtype | None) -> Needs:
    """What training on an outlined family needs, by phase.

    texts: the text encoders. pictures: the VAE encodes one. steps: forward and backward pass of a micro-batch, beside
    the optimizer's state. reward: the same of a rewarded picture. drawing: one picture with guidance, as class pictures
    and validations are drawn, beside frozen text encoders that are there by turns with the denoiser; larger batches are
    made smaller where memory runs out.
    """
    side = options.data.resolution or family.picture_size
    micro_batch = micro_batch_size(options, family, side * side)
    texts = sum(bytes_of(encoder) for encoder in family.text_encoders().values())
    adapted = adapt(family, options.but(text_rank=0, token_init=()), torch.device(device), autocast)
    if checkpointed := checkpoints_gradients(options.compute, family, device):
        family.denoiser.enable_gradient_checkpointing()
    trained = sum(parameter.numel() for parameter in adapted.denoiser.parameters() if parameter.requires_grad)
    state = STATES[options.optimization.optimizer] + 4 * bool(options.optimization.ema_decay)
    held = bytes_of(family.denoiser) + trained * state
    vae = family.pipe.vae
    with FakeTensorMode(allow_non_fake_inputs=True):
        emptied(family.denoiser, "cpu")
        emptied(vae, "cpu", torch.float32)
        step = step_bytes(family, micro_batch, side, autocast, device)
        phases = {"texts": texts, "pictures": bytes_of(vae) + encode_bytes(family, side), "steps": held + step}
        if options.reward.reward_weight:
            copies = 2 if options.reward.reward_guidance_scale > 1 else 1
            rewarded = step_bytes(family, copies, side, autocast, device) + decode_bytes(family, side, True)
            phases["reward"] = held + bytes_of(vae) + rewarded
        if options.data.prior_pictures or options.validate_every:
            emptied(vae, "cpu", family.denoiser.dtype)
            phases["drawing"] = drawing_bytes(family, options, held, side)
    overhead = int(OVERHEAD) if device != "cpu" else 0
    return Needs(
        phases={name: size + overhead for name, size in phases.items()},
        lora=4 * trained,
        disk=disk_bytes(options, trained),
        micro_batch=micro_batch,
        checkpointed=checkpointed,
    )


def disk_bytes(options: LoraOptions, trained: int) -> int:
    """The output folder's LoRA files, and its checkpoints with the optimizer's state."""
    kept = 3 if options.validate_every else 1  # the last, the best, the one put in place
    checkpoint = trained * (4 + 4 + STATES[options.optimization.optimizer])  # adapters, LoRA file, optimizer
    if not options.checkpoints.checkpoint_every:
        return 4 * trained * kept
    return 4 * trained * kept + checkpoint * (options.checkpoints.checkpoints_total_limit + 1)


# --- phases, inside a FakeTensorMode ---------------------------------------------------------------------------------
def step_bytes(family: Family, count: int, side: int, autocast: torch.dtype | None, device: str) -> int:
    """Activations and gradients of a forward and backward pass of `count` pictures."""
    denoiser = family.denoiser
    noisy, timesteps, rows, frame = question(family, count, side)
    norms = norms_in_float32() if device != "cpu" else nullcontext()
    with PeakMemory(denoiser.parameters()) as memory, norms:
        with autocast_to(autocast, "cpu"):
            predicted = family.denoise(denoiser, noisy, timesteps, rows, frame)
        F.mse_loss(predicted.float(), torch.empty_like(predicted.float())).backward()
    peak = memory.peak
    denoiser.zero_grad()
    return peak


def drawing_bytes(family: Family, options: LoraOptions, held: int, side: int) -> int:
    """All that is on the device while a picture is drawn, its prompt encoded before.

    held: the denoiser and the optimizer's state, bytes. The VAE is in the denoiser's precision already.
    """
    texts = sum(bytes_of(encoder) for encoder in family.text_encoders().values())
    always = held + bytes_of(family.pipe.vae)
    denoising = always + max(draw_bytes(family, side), decode_bytes(family, side, False))
    own = options.adapter.text_rank
    trains_text = family.text_rank if own is None else own
    if trains_text:
        return denoising + texts
    return max(denoising, always - bytes_of(family.denoiser) + texts)  # by turns


@torch.no_grad()
def draw_bytes(family: Family, side: int) -> int:
    """Activations of the denoiser for one picture and its guidance, without gradients."""
    noisy, timesteps, rows, frame = question(family, 2, side)
    dtype = family.denoiser.dtype
    rows = {name: value.to(dtype) if value.is_floating_point() else value for name, value in rows.items()}
    with PeakMemory(family.denoiser.parameters()) as memory:
        family.denoise(family.denoiser, noisy.to(dtype), timesteps, rows, frame.to(dtype))
    return memory.peak


@torch.no_grad()
def encode_bytes(family: Family, side: int) -> int:
    """Activations of the VAE for one picture."""
    with PeakMemory(family.pipe.vae.parameters()) as memory:
        family.encode_pictures(torch.empty(1, 3, side, side, dtype=family.pipe.vae.dtype))
    return memory.peak


def decode_bytes(family: Family, side: int, gradients: bool) -> int:
    """Activations of the VAE that decodes one picture, with gradients as the reward does."""
    vae = family.pipe.vae.requires_grad_(False)
    latents = torch.empty(latent_shape(family, 1, side), dtype=vae.dtype, requires_grad=gradients)
    with PeakMemory(vae.parameters()) as memory, torch.set_grad_enabled(gradients):
        if not gradients:
            family.decode(latents)
        else:
            if vae._supports_gradient_checkpointing:
                vae.enable_gradient_checkpointing()
            decode(family, latents).sum().backward()
    return memory.peak


def question(family: Family, count: int, side: int) -> tuple[Tensor, Tensor, dict[str, Any], Tensor]:
    """What a denoiser is asked: noisy latents, timesteps, the prompts' rows, frames."""
    noisy = torch.empty(latent_shape(family, count, side))
    with unset_fake_temporarily():  # Z-Image reads the prompts' lengths
        rows = family.blank_rows(count, family.denoiser.dtype)
    return noisy, torch.full((count,), 500), rows, torch.empty(count, 6)


def latent_shape(family: Family, count: int, side: int) -> tuple[int, int, int, int]:
    """[B,C,h,w] of pictures of this side, pixels."""
    small = side // family.pipe.vae_scale_factor
    config = family.pipe.vae.config
    return count, config.get("latent_channels") or config["z_dim"], small, small


# --- the plan ------------------------------------------------------------------------------------------------------
def capacity_of(device: torch.device) -> int:
    """How many bytes a device holds altogether; of a CPU, the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dry_run(options: LoraOptions) -> list[str]:
    """What a run needs of this machine's device and disk, line by line, with a warning where the device has less."""
    accelerator = Accelerator()
    device = accelerator.device
    half = choose_autocast(options.compute.precision, accelerator) or HALF.get(accelerator.mixed_precision)
    family = outline(options, frozen_precision(options.compute, half, device.type))
    needs = needs_of(family, options, device.type, half)
    warning = needs.warning(capacity_of(device), str(device))
    return [*needs.lines(), *([warning] if warning else [])]
