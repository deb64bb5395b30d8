"""Train the mini-world's `AutoencoderTiny`: `accelerate launch trainers/miniworld/train_autoencoder.py`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from loop import LoopOptions, rng_of, train
from pictures import Pictures

VALIDATION = 256
"""Pictures at the end of the file that are never trained on."""


@dataclass(frozen=True)
class AutoencoderOptions(LoopOptions):
    """Options of the autoencoder's training."""

    state: Path = Path("runs/autoencoder")
    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema: float = 0.995
    pictures: Path = Path("runs/pictures")
    output: Path = Path("runs/pipeline/vae")
    noise: float = 0.08
    """Standard deviation of noise on the latents, so that the decoder mends what a denoiser gets slightly wrong."""
    crop: int | None = None
    """Side of the training crops in pixels; they lie around the subject, where the detail is. None: half a side."""


def build(image_size: int) -> AutoencoderTiny:
    """A small autoencoder with 16 x 16 latents: factor 4 and 12 channels at 64 pixels, factor 8 and 32 at 128."""
    if image_size == 128:
        # Blocks stand where the map is small: 2.2 times as many crops a second as (1, 1, 1, 1) and (3, 3, 2, 1)
        return AutoencoderTiny(
            encoder_block_out_channels=(64, 64, 64, 64),
            decoder_block_out_channels=(64, 64, 64, 64),
            num_encoder_blocks=(0, 0, 2, 4),
            num_decoder_blocks=(5, 4, 0, 0),
            latent_channels=32,
        )
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=12,
    )


def reconstruction_loss(output: torch.Tensor, pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences to right and lower neighbours (edges), subjects weighted fourfold."""
    weight = 1 + 3 * masks
    error = output - pixels
    right, down = error[..., :, 1:] - error[..., :, :-1], error[..., 1:, :] - error[..., :-1, :]
    plain = (weight * error.abs()).mean()
    edges = (weight[..., :, 1:] * right.abs()).mean() + (weight[..., 1:, :] * down.abs()).mean()
    return plain + 0.5 * edges + (weight * error.square()).mean()


def main(options: AutoencoderOptions) -> None:
    """Train, and report PSNR on held-out pictures at every save."""
    torch.manual_seed(options.seed)
    pictures = Pictures(options.pictures)
    held_out = np.arange(len(pictures) - VALIDATION, len(pictures))
    side = pictures.look.image_size
    crop, grid = options.crop or side // 2, side // 16  # crops begin where a latent does

    def loss_of(model: AutoencoderTiny, step: int) -> torch.Tensor:
        device = next(model.parameters()).device
        numbers, noise = rng_of(options, step, device)
        indices = np.sort(numbers.integers(0, len(pictures) - VALIDATION, options.batch_size))
        pixels, masks = pictures.pixels(indices, device), pictures.masks(indices, device)
        y = grid * numbers.integers(0, (side - crop) // grid + 1)
        x = grid * numbers.integers(1, (side - crop) // grid)
        window = (..., slice(y, y + crop), slice(x, x + crop))
        pixels, masks = pixels[window].contiguous(memory_format=torch.channels_last), masks[window]
        latents = model.encode(pixels).latents
        mean, deviation = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
        anchor = mean.square().mean() + (deviation - 1).square().mean()  # zero mean, unit variance per channel
        noisy = latents + options.noise * torch.randn(latents.shape, generator=noise, device=device)
        return reconstruction_loss(model.decode(noisy).sample, pixels, masks) + 0.05 * anchor

    def check(model: AutoencoderTiny, step: int) -> str:
        device = next(model.parameters()).device
        total = torch.zeros(4, device=device)  # squared error, of all and of the subjects; values, of all and of those
        for indices in np.split(held_out, VALIDATION // 32):
            pixels, masks = pictures.pixels(indices, device), pictures.masks(indices, device)
            latents = model.encode(pixels).latents
            error = (model.decode(latents).sample.clamp(-1, 1) - pixels).square() / 4
            total += torch.stack([error.sum(), (error * masks).sum(), torch.tensor(error.numel()), 3 * masks.sum()])
        everywhere, inside = -10 * (total[:2] / total[2:]).log10()
        return (
            f"PSNR {everywhere:.2f} dB, on subjects {inside:.2f} dB, "
            f"latent std {latents.std():.3f} mean {latents.mean():.3f}"
        )

    train(
        build(side).to(memory_format=torch.channels_last),
        loss_of,
        options,
        lambda model: model.save_pretrained(options.output),
        check,
    )


if __name__ == "__main__":
    main(tyro.cli(AutoencoderOptions))
