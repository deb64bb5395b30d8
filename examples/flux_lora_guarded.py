"""Pictures of your subject with FLUX.1 and a DreamBooth LoRA."""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from nearid_personalize import IdentityGuard, IdentityScorer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--lora", default="my-lora", help="folder or Hub id")
parser.add_argument("--prompt", default="a photo of sks dog in space")
parser.add_argument("--size", type=int, default=1024, help="pixels, width and height")
parser.add_argument("--steps", type=int, default=28)
parser.add_argument("--out", type=Path, default=Path("pictures"))
args = parser.parse_args()

pipe = FluxPipeline.from_pretrained(args.base, dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.load_lora_weights(args.lora)
scorer = IdentityScorer.from_pretrained("Aleksandar/nearid-siglip2", device=pipe.device)
pipe = IdentityGuard(pipe, scorer, scorer.enroll("photos"))

images = pipe(
    args.prompt,
    width=args.size,
    height=args.size,
    guidance_scale=3.5,
    num_inference_steps=args.steps,
    max_sequence_length=256,
).images

args.out.mkdir(parents=True, exist_ok=True)
for number, image in enumerate(images):
    image.save(args.out / f"{number}.png")
