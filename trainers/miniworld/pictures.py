"""Render the training pictures once: `python trainers/miniworld/pictures.py --output FOLDER`."""

import functools
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.files import write_atomically
from nearid_personalize.miniworld.dataset import picture
from nearid_personalize.miniworld.scene import IMAGE_SIZE
from nearid_personalize.miniworld.subjects import CATEGORIES, VALUES


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures of the training split to render."""

    output: Path
    """Folder that receives images.npy, masks.npy (bits)."""
    num_pictures: int = 80_000
    wide: bool = False
    """Wide views (for the backbone) instead of the denoiser's modest ones."""
    image_size: int = IMAGE_SIZE
    """Side in pixels, a multiple of 64."""
    rich: bool = False
    """Richer shading, and every category that can be drawn instead of those the packaged models know."""
    workers: int = 1
    autoencoder: Path | None = None
    """Folder of an `AutoencoderTiny` to pass every picture through, as pictures that a pipeline draws are."""
    latent_noise: float = 0.1
    """Standard deviation of noise on those latents."""


@dataclass(frozen=True)
class Look:
    """How every picture of a folder is drawn; `pictures.json`."""

    wide: bool = False
    image_size: int = IMAGE_SIZE
    rich: bool = False

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories that subjects are sampled from."""
        return VALUES["category"] if self.rich else CATEGORIES


def draw(index: int, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Picture number `index` of the training split: uint8 `[R, R, 3]`, and its mask's bits."""
    rendering = picture(
        "train", index, wide=look.wide, image_size=look.image_size, rich=look.rich, categories=look.categories
    ).rendering
    return rendering.image, np.packbits(rendering.mask)


def render_pictures(options: PictureOptions) -> None:
    """Write `images.npy` uint8 `[N, R, R, 3]` and `masks.npy` uint8 `[N, R * R / 8]`; both appear when complete."""
    options.output.mkdir(parents=True, exist_ok=True)
    count, side = options.num_pictures, options.image_size
    look = Look(wide=options.wide, image_size=side, rich=options.rich)
    partial = [options.output / f"{name}.partial.npy" for name in ("images", "masks")]
    images = np.lib.format.open_memmap(partial[0], "w+", np.uint8, (count, side, side, 3))
    masks = np.lib.format.open_memmap(partial[1], "w+", np.uint8, (count, side * side // 8))
    with multiprocessing.Pool(options.workers) as pool:
        results = pool.imap(functools.partial(draw, look=look), range(count), chunksize=64)
        for index, (image, mask) in enumerate(tqdm(results, total=count, file=sys.stdout, mininterval=10)):
            images[index], masks[index] = image, mask
    if options.autoencoder:
        reconstruct(images, AutoencoderTiny.from_pretrained(options.autoencoder).eval(), options.latent_noise)
    write_atomically(options.output / "pictures.json", json.dumps(asdict(look)) + "\n")
    for path in partial:
        path.replace(options.output / path.name.replace(".partial", ""))


@torch.no_grad()
def reconstruct(images: np.ndarray, autoencoder: AutoencoderTiny, noise: float) -> None:
    """Replace uint8 `[N, R, R, 3]` by what the autoencoder makes of it."""
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
        self.look = Look(**json.loads((folder / "pictures.json").read_text(encoding="utf-8")))
        for index in (0, len(self) - 1):
            if not np.array_equal(draw(index, self.look)[1], self.bits[index]):
                raise InputError(f"{folder}: rendered by another version of the mini-world; render it again")

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """RGB float `[B, 3, R, R]` in [-1, 1]."""
        batch = torch.from_numpy(self.images[indices]).to(device)
        return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def masks(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """Subject masks, float `[B, 1, R, R]` in {0, 1}."""
        side = self.look.image_size
        bits = np.unpackbits(self.bits[indices], axis=1).reshape(-1, 1, side, side)
        return torch.from_numpy(bits).to(device).float()


if __name__ == "__main__":
    render_pictures(tyro.cli(PictureOptions))
