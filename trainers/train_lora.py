"""Train a DreamBooth-LoRA on a few pictures of one subject: Stable Diffusion, SDXL, SD3, FLUX.1, Qwen-Image or Z-Image.

accelerate launch trainers/train_lora.py --base-model miniworld --references photos --prompt "a photo of sks dog" \
    --output runs/lora
"""

import sys
from dataclasses import asdict

import tyro

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora import WEIGHTS_NAME, LoraOptions, train_lora


def print_plan(options: LoraOptions) -> None:
    """Show every option before anything is loaded."""
    for name, value in asdict(options).items():
        print(f"{name:>24}  {value}")


def main() -> int:
    """Parse, show the plan, train; 2 on wrong input."""
    try:
        options = tyro.cli(LoraOptions, description=__doc__)
        print_plan(options)
        folder = train_lora(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder / WEIGHTS_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
