"""Photos as a text-to-image model would have drawn them: an augmentation for scorers of generated pictures.

Generated pictures carry the texture of the autoencoder that decoded them; photos do not. A head trained on photos
alone takes some of that texture for a change of identity. So a share of the training pictures is encoded and decoded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearid_personalize.encoder.checkpoints import weights_fingerprint
from nearid_personalize.errors import InputError


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A `PixelTransform`: encodes and decodes a share of the pictures, chosen by seed."""

    autoencoder: Any
    """A diffusers autoencoder: `AutoencoderTiny`, or one with a latent distribution."""
    share: float = 0.3
    """Share of the pictures, 0 to 1."""
    latent_noise: float = 0.1
    """Standard deviation of noise on the latents, in units of theirs."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"--reconstructed {self.share}: give a share of the pictures, 0 to 1")

    @property
    def fingerprint(self) -> str:
        """Changes with all that the pictures depend on but the seeds."""
        weights = weights_fingerprint(self.autoencoder.state_dict())
        return f"reconstructed {self.share} {self.latent_noise} {weights}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Pictures [m,3,H,W] in [0, 1] -> such pictures. H and W must suit the autoencoder."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(len(pixels), generator=generator) < self.share
        if not chosen.any():
            return pixels
        encoded = self.autoencoder.encode(pixels[chosen] * 2 - 1)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        drawn = self.autoencoder.decode(latents + self.latent_noise * latents.std() * noise).sample
        pixels = pixels.clone()
        pixels[chosen] = (drawn.float() / 2 + 0.5).clamp(0, 1)
        return pixels


def load_reconstruction(pipeline: str | Path, share: float, device: Any = "cpu") -> Reconstruction:
    """The augmentation with the autoencoder of a pipeline folder (its `vae` subfolder).

    Raises InputError when the folder holds none.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny  # the library does not need diffusers otherwise

    folder = Path(pipeline) / "vae"
    if not (folder / "config.json").is_file():
        raise InputError(f"--reconstruct-with {pipeline}: holds no vae/config.json; give the folder of a pipeline")
    kind = AutoencoderTiny if "Tiny" in (folder / "config.json").read_text(encoding="utf-8") else AutoencoderKL
    return Reconstruction(kind.from_pretrained(folder, use_safetensors=True).eval().to(device), share)
