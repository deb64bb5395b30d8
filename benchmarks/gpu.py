"""The guard, the LoRA trainer and the scorer at real sizes on a GPU: `python benchmarks/gpu.py`, under ten minutes.

SDXL, FLUX.1 and the NearID encoder at their published widths, with random weights (`real_models.py`; of T5, one layer).
What they draw means nothing, so a fixed schedule decides who is stopped: half of the candidates after 40 % of the
steps, and half of the rest after 70 %. For each base model:

- guard: seconds of that race, and of drawing all candidates to the end (best of N).
- lora: steps a second of our trainer, and of a plain diffusers loop with the same layers, latents and text embeddings
  encoded once in both; peak memory, and what `--dry-run` told of it.

And pictures a second of the scorer. `--device cpu --small` runs all of it on small stand-ins in a minute or two.
Takes up to 33 GB of disk, and 50 GB of GPU memory. Results go to OUT/gpu.json.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from real_models import flux, nearid, sdxl
from real_size import PROMPT, photos, timed

from nearid_personalize import IdentityGuard, IdentityScorer
from nearid_personalize.files import write_atomically
from nearid_personalize.guard.policy import FixedSchedule
from nearid_personalize.training.lora.families import FAMILIES
from nearid_personalize.training.lora.loop import checkpoints_gradients, train_lora
from nearid_personalize.training.lora.memory import needs_of, outline
from nearid_personalize.training.lora.options import LoraOptions
from nearid_personalize.training.memory import OVERHEAD

Name = Literal["sdxl", "flux"]
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
SHARE_KEPT = {0.4: 0.5, 0.7: 0.5}
WARM_UP = 2  # LoRA steps before time is taken


@dataclass(frozen=True)
class Options:
    """What is run."""

    out: Path = Path("runs/gpu")
    """Folder for the models, the LoRAs and gpu.json."""
    models: tuple[Name, ...] = ("sdxl", "flux")
    """Base models."""
    parts: tuple[Literal["guard", "lora", "scorer"], ...] = ("guard", "lora", "scorer")
    """What to measure."""
    device: str = "cuda"
    """Where all runs."""
    small: bool = False
    """Small stand-ins, small pictures, few steps: to see that all of it runs."""
    resolution: int = 1024
    """Picture side, pixels."""
    steps: int = 30
    """Denoising steps."""
    num_candidates: int = 8
    """Candidates of the guard, and of best of N."""
    max_batch_size: int = 4
    """Candidates denoised together."""
    lora_steps: int = 20
    """LoRA steps that are timed, of one picture each."""
    num_scored: int = 128
    """Pictures that the scorer embeds."""


def made_small(options: Options) -> Options:
    """The same for small stand-ins."""
    return options.but(resolution=64, steps=4, num_candidates=4, lora_steps=3, num_scored=4)


# --- memory ----------------------------------------------------------------------------------------------------------


def forget(device: str) -> None:
    """Free what nobody holds any more, and count the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> float | None:
    """Most that tensors took since `forget`, GB; None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def finished(device: str) -> float:
    """The time at which all that was asked of the device is done, seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- guard -----------------------------------------------------------------------------------------------------------


def measure_guard(pipe: Any, scorer: IdentityScorer, options: Options) -> dict[str, Any]:
    """The same candidates drawn to the end, and raced."""
    size = {"height": options.resolution, "width": options.resolution}
    subject = scorer.enroll(photos(4, options.resolution))
    pipe([PROMPT] * options.max_batch_size, num_inference_steps=1, **size)  # kernels are chosen at first use
    found = {}
    for name, policy in (("best_of_n", None), ("guard", FixedSchedule(share_kept=SHARE_KEPT))):
        forget(options.device)
        guard = IdentityGuard(pipe, scorer, subject, max_batch_size=options.max_batch_size, policy=policy)
        count, steps = options.num_candidates, options.steps
        call = {"num_images": 1, "num_candidates": count, "seed": 0, "num_inference_steps": steps, **size}
        result, seconds = timed(lambda guard=guard, call=call: guard(PROMPT, **call))
        found[name] = {
            "seconds": seconds,
            "stages_s": result.cost.seconds,
            "denoiser_rows": result.cost.denoiser_rows,
            "stopped": sum(candidate.status == "stopped" for candidate in result.candidates),
            "peak_gb": peak_gb(options.device),
        }
    found["guard_of_best_of_n"] = found["guard"]["seconds"] / found["best_of_n"]["seconds"]
    return found


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_options(folder: Path, options: Options) -> LoraOptions:
    """One picture a step, attention layers, all else by default, in bfloat16."""
    references = options.out / "photos"
    references.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(4, options.resolution)):
        photo.save(references / f"{number}.png")
    return LoraOptions.of(
        base_model=str(folder),
        references=references,
        output=options.out / f"lora-{folder.name}",
        steps=WARM_UP + options.lora_steps,
        batch_size=1,
        resolution=options.resolution,
        target_modules=LAYERS,
        text_rank=0,
        precision="bf16",
        base_precision="same",
    )


def steps_per_second(seconds: list[float]) -> float:
    """Of the times at which steps ended, after the warm-up."""
    return (len(seconds) - WARM_UP) / (seconds[-1] - seconds[WARM_UP - 1])


def our_steps(lora: LoraOptions, options: Options) -> dict[str, Any]:
    """Our trainer, from a folder."""
    forget(options.device)
    ends: list[float] = []
    train_lora(lora, on_step=lambda step, loss: ends.append(finished(options.device)))
    told = needs_of(outline(lora, torch.bfloat16), lora, options.device, torch.bfloat16)
    uncounted = OVERHEAD if options.device == "cuda" else 0  # max_memory_allocated does not see it either
    return {
        "steps_per_s": steps_per_second(ends),
        "peak_gb": peak_gb(options.device),
        "estimated_gb": (told.peak - uncounted) / 1e9,
        "gradients_checkpointed": told.checkpointed,
    }


def plain_steps(lora: LoraOptions, options: Options) -> dict[str, Any]:
    """A loop as diffusers' DreamBooth examples have it, with latents and text embeddings encoded before."""
    forget(options.device)
    pipe = DiffusionPipeline.from_pretrained(lora.base_model, dtype=torch.bfloat16)
    family = FAMILIES[type(pipe).__name__](pipe)
    denoiser = family.denoiser.requires_grad_(False).to(options.device)
    rank = lora.adapter.rank
    layers = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LAYERS))
    denoiser.add_adapter(layers)
    cast_training_params(denoiser, torch.float32)
    if checkpoints_gradients(lora.compute, family, options.device):
        denoiser.enable_gradient_checkpointing()
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    loss_of = (flux_loss if isinstance(pipe, FluxPipeline) else sdxl_loss)(pipe, options)
    ends = []
    for _ in range(WARM_UP + options.lora_steps):
        with torch.autocast(options.device, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(finished(options.device))
    return {"steps_per_s": steps_per_second(ends), "peak_gb": peak_gb(options.device)}


def sdxl_loss(pipe: Any, options: Options) -> Callable[[], torch.Tensor]:
    """The epsilon loss of one picture at a random time."""
    device, side = options.device, options.resolution
    with torch.no_grad():
        prompt, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, device="cpu")
    prompt, pooled = prompt.to(device), pooled.to(device)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]], device=device)}
    latents = torch.randn(1, 4, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor, device=device)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def loss() -> torch.Tensor:
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=device)
        noisy = scheduler.add_noise(latents, noise, times)
        predicted = pipe.unet(noisy, times, prompt, added_cond_kwargs=conditions).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    return loss


def flux_loss(pipe: Any, options: Options) -> Callable[[], torch.Tensor]:
    """The flow loss of one picture at a random time."""
    device, side = options.device, options.resolution // pipe.vae_scale_factor
    with torch.no_grad():
        encoded = pipe.encode_prompt(PROMPT, None, device="cpu")
    prompt, pooled, text_ids = (tensor.to(device) for tensor in encoded)
    image_ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, device, torch.bfloat16)
    latents = pipe._pack_latents(torch.randn(1, 16, side, side, device=device), 1, 16, side, side)
    guidance = torch.ones(1, device=device)

    def loss() -> torch.Tensor:
        noise, time_ = torch.randn_like(latents), torch.rand(1, device=device)
        predicted = pipe.transformer(
            (1 - time_) * latents + time_ * noise,
            timestep=time_,
            guidance=guidance,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise - latents)

    return loss


# --- all of it -------------------------------------------------------------------------------------------------------


def measure_model(name: Name, options: Options) -> dict[str, Any]:
    """One base model: the guard on it, then LoRAs of it."""
    folder, device = options.out / name, options.device
    width = 10 if options.small else 1
    build = {
        "sdxl": lambda: sdxl(torch.bfloat16, device, width),
        "flux": lambda: flux(torch.bfloat16, device, options.small),
    }
    pipe, seconds = timed(build[name])
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"build_s": seconds}
    if "guard" in options.parts:
        found["guard"] = measure_guard(pipe, nearid(device, small=options.small), options)
    if "lora" in options.parts:
        pipe.save_pretrained(folder)
        del pipe
        lora = lora_options(folder, options)
        found["lora"] = {"ours": our_steps(lora, options), "plain": plain_steps(lora, options)}
    return found


def measure_scorer(options: Options) -> dict[str, Any]:
    """Pictures a second, from PIL pictures to embeddings."""
    forget(options.device)
    scorer = nearid(options.device, small=options.small)
    pictures = photos(options.num_scored, options.resolution)
    scorer.embed(pictures[: scorer.batch_size])
    _, seconds = timed(lambda: scorer.embed(pictures))
    return {"pictures_per_s": len(pictures) / seconds, "peak_gb": peak_gb(options.device)}


def main(options: Options) -> None:
    """Measure, print and write."""
    if options.small:
        options = made_small(options)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "options": asdict(options)}
    parts: dict[str, Callable[[], Any]] = {name: partial(measure_model, name, options) for name in options.models}
    if "scorer" in options.parts:
        parts["scorer"] = partial(measure_scorer, options)
    for part, measure in parts.items():
        found[part], seconds = timed(measure)
        found[part]["seconds"] = seconds
        print(part, json.dumps(found[part], indent=1), flush=True)
        write_atomically(options.out / "gpu.json", json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
