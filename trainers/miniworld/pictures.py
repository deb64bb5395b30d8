"""Render the training pictures once: `python trainers/miniworld/pictures.py --output FOLDER`."""

import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

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
    for path in partial:
        path.replace(options.output / path.name.replace(".partial", ""))


class Pictures:
    """Rendered pictures on disk, addressed by index."""

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.bits = np.load(folder / "masks.npy", mmap_mode="r")

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
