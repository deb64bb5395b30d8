"""Copy trained models into the package: `python trainers/miniworld/package_weights.py --runs FOLDER`.

UNet and autoencoder are stored in half precision, which diffusers reads back as float32; the rest in float32, because
transformers keeps the precision of the file.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from diffusers import StableDiffusionPipeline

import nearid_personalize.miniworld
from nearid_personalize.files import write_atomically

WEIGHTS = Path(nearid_personalize.miniworld.__file__).parent / "weights"


@dataclass(frozen=True)
class PackageOptions:
    """Where the trained models are."""

    runs: Path = Path("runs")
    """Folder with `pipeline`, `siglip`, `nearid` and `nearid-reward`; those that are absent stay as they are."""


def main(options: PackageOptions) -> None:
    """Copy configurations and weights; model cards in the package stay."""
    for name in ("siglip", "nearid", "nearid-reward"):
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
    for path in WEIGHTS.rglob("*.json"):  # configurations remember the folder they were loaded from: nobody's business
        text = path.read_text(encoding="utf-8")
        if "_name_or_path" in text:
            write_atomically(path, json.dumps(json.loads(text, object_hook=_without_folder), indent=2) + "\n")
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{WEIGHTS}: {total / 1e6:.1f} MB")


def _without_folder(values: dict) -> dict:
    return {key: value for key, value in values.items() if key != "_name_or_path"}


if __name__ == "__main__":
    main(tyro.cli(PackageOptions))
