"""Render the training pictures once: `python trainers/miniworld/pictures.py --output FOLDER`."""

import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.images import write_atomically
from nearid_personalize.miniworld.dataset import picture


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures of the training split to render."""

    output: Path
    """Folder that receives images.npy, masks.npy (bits)."""
    num_pictures: int = 80_000
    wide: bool = False
    """Wide views (for the backbone) instead of the denoiser's modest ones."""
    workers: int = 1
    autoencoder: Path | None = None
    """Folder of an `AutoencoderTiny` to pass every picture through, as pictures that a pipeline draws are."""
    latent_noise: float = 0.1
    """Standard deviation of noise on those latents."""


def _draw(job: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray]:
    rendering = picture("train", job[0], wide=job[1]).rendering
    return rendering.image, np.packbits(rendering.mask)


def render_pictures(options: PictureOptions) -> None:
    """Write `images.npy` uint8 `[N, 64, 64, 3]` and `masks.npy` uint8 `[N, 512]`; both appear when complete."""
    options.output.mkdir(parents=True, exist_ok=True)
    count = options.num_pictures
    partial = [options.output / f"{name}.partial.npy" for name in ("images", "masks")]
    images = np.lib.format.open_memmap(partial[0], "w+", np.uint8, (count, 64, 64, 3))
    masks = np.lib.format.open_memmap(partial[1], "w+", np.uint8, (count, 512))
    with multiprocessing.Pool(options.workers) as pool:
        jobs = ((index, options.wide) for index in range(count))
        results = pool.imap(_draw, jobs, chunksize=64)
        for index, (image, mask) in enumerate(tqdm(results, total=count, file=sys.stdout, mininterval=10)):
            images[index], masks[index] = image, mask
    if options.autoencoder:
        reconstruct(images, AutoencoderTiny.from_pretrained(options.autoencoder).eval(), options.latent_noise)
    write_atomically(options.output / "pictures.json", json.dumps({"wide": options.wide}) + "\n")
    for path in partial:
        path.replace(options.output / path.name.replace(".partial", ""))


@torch.no_grad()
def reconstruct(images: np.ndarray, autoencoder: AutoencoderTiny, noise: float) -> None:
    """Replace uint8 `[N, 64, 64, 3]` by what the autoencoder makes of it."""
    generator = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, len(images), 64), file=sys.stdout, mininterval=10):
        pixels = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).latents
        drawn = autoencoder.decode(latents + noise * torch.randn(latents.shape, generator=generator)).sample
        images[start : start + 64] = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


class Pictures:
    """Rendered pictures on disk, addressed by index.

    Raises InputError when the folder was rendered by other code than today's: its captions would be other pictures'.
    """

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.bits = np.load(folder / "masks.npy", mmap_mode="r")
        wide = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))["wide"]
        for index in (0, len(self) - 1):
            if not np.array_equal(_draw((index, wide))[1], self.bits[index]):
                raise InputError(f"{folder}: rendered by another version of the mini-world; render it again")

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """RGB float `[B, 3, 64, 64]` in [-1, 1]."""
        batch = torch.from_numpy(self.images[indices]).to(device)
        return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def masks(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """Subject masks, float `[B, 1, 64, 64]` in {0, 1}."""
        bits = np.unpackbits(self.bits[indices], axis=1).reshape(-1, 1, 64, 64)
        return torch.from_numpy(bits).to(device).float()


if __name__ == "__main__":
    render_pictures(tyro.cli(PictureOptions))
