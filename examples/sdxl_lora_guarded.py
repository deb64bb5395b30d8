"""Pictures of your subject with SDXL and a DreamBooth LoRA."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from nearid_personalize import IdentityGuard, IdentityScorer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--lora", default="my-lora", help="folder or Hub id")
parser.add_argument("--prompt", default="a photo of sks dog in space")
parser.add_argument("--size", type=int, default=1024, help="pixels, width and height")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("pictures"))
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionXLPipeline.from_pretrained(args.base, dtype=dtype).to(device)
pipe.load_lora_weights(args.lora)
scorer = IdentityScorer.from_pretrained("Aleksandar/nearid-siglip2", device=pipe.device)
pipe = IdentityGuard(pipe, scorer, scorer.enroll("photos"))

images = pipe(
    args.prompt,
    negative_prompt="blurry",
    width=args.size,
    height=args.size,
    num_inference_steps=args.steps,
    cross_attention_kwargs={"scale": 0.9},
).images

args.out.mkdir(parents=True, exist_ok=True)
for number, image in enumerate(images):
    image.save(args.out / f"{number}.png")
