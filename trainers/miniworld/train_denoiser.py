"""Train the mini-world's text-to-image model: `accelerate launch trainers/miniworld/train_denoiser.py`.

Flow matching on cached latents, the subject's pixels weighted up, every attribute named in most captions and only
the category in the others. Exports a complete `StableDiffusionPipeline` folder.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from captions import load_tokenizer, tokenize, training_caption
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from loop import LoopOptions, rng_of, train
from pictures import Pictures
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from nearid_personalize.miniworld.dataset import picture
from nearid_personalize.miniworld.scene import CONTEXTS
from nearid_personalize.miniworld.subjects import ATTRIBUTES, CATEGORIES, Pet, allowed_values, caption, sample_pet


@dataclass(frozen=True)
class DenoiserOptions(LoopOptions):
    """Options of the denoiser's training."""

    state: Path = Path("runs/denoiser")
    steps: int = 4600
    batch_size: int = 32
    learning_rate: float = 1e-3
    pictures: Path = Path("runs/pictures")
    output: Path = Path("runs/pipeline")
    """Pipeline folder; its `vae/`, `tokenizer/` and `text_encoder/` are read, everything is written."""
    noise_mean: float = 0.5
    """Mean of the noise level's logit. What a caption decides (shape above all) shows at high noise alone."""
    noise_std: float = 1.2
    """Standard deviation of the noise level's logit."""
    mask_weight: float = 3.0
    """Extra loss weight of latents that show the subject."""
    drop: float = 0.06
    """Probability of leaving an attribute out of a caption."""
    short: float = 0.28
    """Probability of a caption of the category alone."""
    empty: float = 0.08
    """Probability of no caption at all (classifier-free guidance)."""


class TextToImage(nn.Module):
    """The two trained parts of the pipeline."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted velocity `[B, C, 16, 16]`."""
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """A two-level UNet with cross-attention on the 8 x 8 grid."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
    )
    unet.set_attn_processor(AttnProcessor())  # on a CPU its backward pass is faster than SDPA's
    return unet


def flow_loss(
    model: nn.Module, clean: torch.Tensor, masks: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Flow-matching loss per item, `[B]`: squared error of the velocity noise - clean under weights `[B,1,16,16]`."""
    share = t[:, None, None, None]
    predicted = model((1 - share) * clean + share * noise, t * 1000, ids).float()
    return (masks * (predicted - (noise - clean)).square()).mean((1, 2, 3)) / masks.mean((1, 2, 3))


@torch.no_grad()
def encode_latents(vae: AutoencoderTiny, pictures: Pictures, path: Path, device: torch.device) -> np.ndarray:
    """Latents of every picture as a memory-mapped fp16 file `[N, C, 16, 16]`, made once."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        shape = (len(pictures), vae.config.latent_channels, 16, 16)
        latents = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        for start in tqdm(range(0, len(pictures), 256), "latents", file=sys.stdout, mininterval=15):
            indices = np.arange(start, min(start + 256, len(pictures)))
            with torch.autocast(device.type, torch.bfloat16):
                batch = vae.encode(pictures.pixels(indices, device)).latents
            latents[indices] = batch.float().cpu().numpy()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def swapped_captions(pets: list[Pet], contexts: list[str], what: str) -> list[str]:
    """Captions with one thing deliberately wrong: `nothing`, `context`, `category` or an attribute's name."""
    rng = random.Random(what)
    texts = []
    for pet, context in zip(pets, contexts, strict=True):
        if what == "context":
            context = CONTEXTS[(CONTEXTS.index(context) + 1 + int(rng.random() * 7)) % 8]
        elif what == "category":
            pet = replace(pet, category=CATEGORIES[(CATEGORIES.index(pet.category) + 1 + int(rng.random() * 4)) % 5])
        elif what != "nothing":
            others = [v for v in allowed_values(pet, what) if v != getattr(pet, what)]
            pet = replace(pet, **{what: others[int(rng.random() * len(others))]})
        texts.append(caption(pet, context))
    return texts


def binding_check(vae: AutoencoderTiny, tokenizer: CLIPTokenizer) -> Callable[[TextToImage, int], str]:
    """A check that reports the held-out loss under right and under deliberately wrong captions.

    The plain loss hides for long that words are ignored; the gap to wrong captions shows it.
    """
    held_out = [picture("val", i) for i in range(96)]
    pixels = torch.from_numpy(np.stack([p.rendering.image for p in held_out])).permute(0, 3, 1, 2) / 127.5 - 1
    masks = 1 + 3 * F.max_pool2d(torch.from_numpy(np.stack([p.rendering.mask for p in held_out]))[:, None].float(), 4)
    with torch.no_grad():
        clean = vae.encode(pixels).latents * vae.config.scaling_factor
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=source)
    t = torch.linspace(0.5, 0.98, len(clean))

    def check(model: TextToImage, step: int) -> str:
        device = next(model.parameters()).device
        results = []
        for what in ("nothing", "context", "category", *ATTRIBUTES):
            texts = swapped_captions([p.pet for p in held_out], [p.context for p in held_out], what)
            ids = tokenize(tokenizer, texts)
            loss = flow_loss(model, *(x.to(device) for x in (clean, masks, ids, noise, t))).mean().item()
            results.append(f"{what} {loss:.4f}")
        return "held-out loss, wrong: " + ", ".join(results)

    return check


def exporter(options: DenoiserOptions, vae: AutoencoderTiny, tokenizer: CLIPTokenizer) -> Callable[[TextToImage], None]:
    """Writes the pipeline and, beside the state, a sheet of samples of unseen subjects."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)

    def export(model: TextToImage) -> None:
        pipe = StableDiffusionPipeline(
            vae=vae.to(next(model.parameters()).device),
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            unet=model.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(options.output)
        pipe.set_progress_bar_config(disable=True)
        prompts = [caption(sample_pet("val", i, CATEGORIES[i % 5]), CONTEXTS[i % 8]) for i in range(20)]
        prompts += [f"a photo of a {CATEGORIES[i]} in space" for i in range(4)]
        sources = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=sources).images
        sheet = Image.new("RGB", (8 * 128, 3 * 128))
        for i, image in enumerate(images):
            sheet.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (i % 8 * 128, i // 8 * 128))
        sheet.save(options.state / "samples.png")

    return export


def main(options: DenoiserOptions) -> None:
    """Train on the rendered pictures."""
    torch.manual_seed(options.seed)
    pictures = Pictures(options.pictures)
    tokenizer = load_tokenizer(options.output / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(options.output / "vae", use_safetensors=True).eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(
        options.output / "text_encoder", use_safetensors=True, dtype=torch.float32
    )
    model = TextToImage(build_unet(vae.config.latent_channels), text_encoder)
    options.state.mkdir(parents=True, exist_ok=True)
    latents = encode_latents(vae, pictures, options.state / "latents.npy", torch.device("cpu"))
    scale = vae.config.scaling_factor

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        device = next(model.parameters()).device
        numbers, source = rng_of(options, step, device)
        indices = numbers.integers(0, len(pictures), options.batch_size)
        texts = [training_caption(int(i), step, options.drop, options.short, options.empty) for i in indices]
        clean = torch.from_numpy(latents[indices]).to(device).float() * scale
        masks = 1 + options.mask_weight * F.max_pool2d(pictures.masks(indices, device), 4)
        noise = torch.randn(clean.shape, generator=source, device=device)
        level = torch.randn(len(clean), generator=source, device=device)
        t = torch.sigmoid(options.noise_mean + options.noise_std * level)
        return flow_loss(model, clean, masks, tokenize(tokenizer, texts).to(device), noise, t).mean()

    train(model, loss_of, options, exporter(options, vae, tokenizer), binding_check(vae, tokenizer))


if __name__ == "__main__":
    main(tyro.cli(DenoiserOptions))
