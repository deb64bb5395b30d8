"""Steps per second of LoRA training against a plain loop: `python benchmarks/lora_training.py`.

Same machine, same process, by turns, same base model, LoRA layers, batch, size and precision, text encoder frozen. The
plain loop does what diffusers' DreamBooth-LoRA example does in every step: it encodes the pictures and the prompts of
the batch, noises, predicts, and steps AdamW. Its pictures are ready tensors, which flatters it. On a CPU our UNet uses
the plain attention processor; `--attention ours` gives it to the plain loop too, so that the cache alone is compared.

The default base model has random weights, which cost what trained ones cost, and the shape of Stable Diffusion 1.5 at a
fifth of its width; `--base-model` takes "miniworld", a folder or a Hub id.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nearid_personalize.images import to_tensor
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.training.lora.families import ATTENTION
from nearid_personalize.training.lora.loop import LoraOptions, LoraRun, load_family
from nearid_personalize.training.lora.noising import Noising, noising_of
from nearid_personalize.training.lora.pictures import read_references


@dataclass(frozen=True)
class Options:
    """What is measured."""

    base_model: str = "random"
    """A StableDiffusionPipeline: folder, Hub id, "miniworld", or "random"."""
    resolution: int | None = 128
    """Picture side, pixels. None: the base model's own."""
    batch_size: int = 2
    rank: int = 4
    rounds: int = 8
    """Turns of both loops; one more comes before, unmeasured."""
    steps: int = 3
    """Steps of each loop in a round."""
    attention: Literal["stock", "ours"] = "stock"
    """Attention processor of the plain loop."""


def save_random_pipeline(folder: Path) -> None:
    """Stable Diffusion 1.5 at a fifth of its width, with the mini-world's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(weights_dir("pipeline") / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=max(77, tokenizer.model_max_length),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=16, **levels)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 256, 256), cross_attention_dim=160, attention_head_dim=8
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def plain_loop(
    pipe: StableDiffusionPipeline, noising: Noising, pixels: Tensor, options: LoraOptions
) -> Callable[[], None]:
    """One step of the example script: encode pictures, encode prompts, noise, predict, step.

    pixels: [B,3,H,W] in [-1, 1].
    """
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=list(options.target_modules))
    pipe.unet.add_adapter(config)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    device, batch = pipe.device, len(pixels)

    def step() -> None:
        with torch.no_grad():
            encoded = pipe.vae.encode(pixels.to(device))
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
            ids = pipe.tokenizer(
                [options.prompt] * batch, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            embedded = pipe.text_encoder(ids.to(device))[0]
        latents = latents * pipe.vae.config.scaling_factor
        noised = noising(latents.cpu(), torch.randn(latents.shape), torch.rand(batch))
        predicted = pipe.unet(noised.noisy.to(device), noised.timesteps.to(device), embedded).sample
        F.mse_loss(predicted.float(), noised.target.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], object], count: int) -> float:
    """Seconds per step over `count` steps, the accelerator's queue emptied."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def spread(values: list[float]) -> str:
    """The median, then the smallest and the largest in brackets."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def main(options: Options, scratch: Path) -> None:
    """Measure both loops by turns and print their speeds and ratio."""
    photos = scratch / "photos"
    photos.mkdir()
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{index}.png")
    base_model = options.base_model
    if base_model == "random":
        base_model = str(scratch / "base")
        save_random_pipeline(Path(base_model))
    lora = LoraOptions(
        base_model=base_model,
        references=photos,
        output=scratch / "lora",
        rank=options.rank,
        text_rank=0,
        target_modules=ATTENTION,
        batch_size=options.batch_size,
        resolution=options.resolution,
        learning_rate=1e-4,
        steps=10**6,
        precision="fp32",
    )
    references = read_references(lora)
    run = LoraRun(lora, Accelerator(), references)
    plain = load_family(lora)
    side = lora.resolution or plain.picture_size
    pixels = to_tensor([picture.image.resize((side, side)) for picture in references])[
        torch.arange(options.batch_size) % 4
    ]
    plain.pipe.to(run.accelerator.device)
    if options.attention == "ours":
        plain.pipe.unet.set_attn_processor(dict(run.family.denoiser.attn_processors))
    plain_step = plain_loop(plain.pipe, noising_of(plain.pipe.scheduler, lora), pixels * 2 - 1, lora)

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in tqdm(range(options.rounds + 1)):
        ours = seconds(lambda: run.take_step(1), options.steps)
        theirs = seconds(plain_step, options.steps)
        if turn:
            times["ours"].append(ours)
            times["plain"].append(theirs)
    print(
        f"{options.rounds} rounds of {options.steps} steps, batch {options.batch_size}, {side} px, rank {options.rank}"
    )
    for name, found in times.items():
        print(f"{name:>6}  {spread([1 / t for t in found])} steps/s")
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["plain"])]
    print(f" ratio  {spread(ratios)}: median (smallest - largest)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(tyro.cli(Options, description=__doc__), Path(folder))
