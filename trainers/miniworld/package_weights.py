"""Copy trained models into the package: `python trainers/miniworld/package_weights.py --runs FOLDER`.

UNet and autoencoder are stored in half precision, which diffusers reads back as float32; the rest in float32, because
transformers keeps the precision of the file.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from diffusers import StableDiffusionPipeline

import nearid_personalize.miniworld

WEIGHTS = Path(nearid_personalize.miniworld.__file__).parent / "weights"


@dataclass(frozen=True)
class PackageOptions:
    """Where the trained models are."""

    runs: Path = Path("runs")
    """Folder with `pipeline`, `siglip` and `nearid`; those that are absent stay as they are."""


def main(options: PackageOptions) -> None:
    """Copy configurations and weights; model cards in the package stay."""
    for name in ("siglip", "nearid"):
        if (options.runs / name).is_dir():
            (WEIGHTS / name).mkdir(parents=True, exist_ok=True)
            for path in (options.runs / name).iterdir():
                if path.suffix in (".json", ".safetensors", ".txt") and path.name != "training.json":
                    shutil.copy(path, WEIGHTS / name / path.name)
                    (WEIGHTS / name / path.name).chmod(0o644)
    if (options.runs / "pipeline").is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(options.runs / "pipeline", use_safetensors=True)
        pipe.unet.half()
        pipe.vae.half()
        pipe.save_pretrained(WEIGHTS / "pipeline")
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{WEIGHTS}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(PackageOptions))
