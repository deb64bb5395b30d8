"""One folder of pictures for each line of a file of prompts, with Stable Diffusion 1.5 and another scheduler."""

import argparse
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from nearid_personalize import IdentityGuard, IdentityScorer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--prompts", type=Path, default=Path("prompts.txt"), help="one a line")
parser.add_argument("--size", type=int, default=512, help="pixels, width and height")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", type=Path, default=Path("pictures"))
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionPipeline.from_pretrained(args.base, dtype=dtype).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
scorer = IdentityScorer.from_pretrained("Aleksandar/nearid-siglip2", device=pipe.device)
pipe = IdentityGuard(pipe, scorer, scorer.enroll("photos"))

for line, prompt in enumerate(args.prompts.read_text(encoding="utf-8").splitlines()):
    folder = args.out / f"prompt-{line}"
    folder.mkdir(parents=True, exist_ok=True)
    images = pipe(prompt, width=args.size, height=args.size, num_inference_steps=args.steps).images
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
