"""How often is the judge right? `python benchmarks/judge_accuracy.py` (mini-world test subjects).

Three kinds of picture whose truth is known: real renders, the same through the text-to-image model's autoencoder, and
samples of the base model from captions that name every attribute. On the last the "truth" is the caption, so a miss is
the judge's or the model's; the figure is a lower bound on the judge and an upper bound on neither.

Every picture shows another subject, so resampling pictures, as the 95 % intervals do, is resampling subjects.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.metrics import bootstrap_interval, wilson_interval
from nearid_personalize.miniworld import caption, picture, weights_dir
from nearid_personalize.miniworld.judge import Judgement, judge


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_pictures: int = 100
    """Renders, and as many reconstructions."""
    num_samples: int = 48
    """Pictures drawn by the base model."""
    first: int = 5000
    """Index of the first test picture."""


def report(kind: str, verdicts: list[Judgement]) -> None:
    """Print mean agreement, the share with nothing wrong, and what is wrong how often; one picture a subject."""
    agreement = torch.tensor([verdict.agreement for verdict in verdicts])
    perfect = torch.tensor([float(not verdict.wrong) for verdict in verdicts])
    wrong = Counter(name for verdict in verdicts for name in verdict.wrong)
    low, high = bootstrap_interval(agreement)
    low_perfect, high_perfect = wilson_interval(int(perfect.sum()), len(perfect))
    print(
        f"{kind:16} n {len(verdicts)} subjects  attributes right {agreement.mean():.3f} [{low:.3f}, {high:.3f}]  "
        f"all right {perfect.mean():.3f} [{low_perfect:.3f}, {high_perfect:.3f}]  wrong {dict(wrong.most_common())}",
        flush=True,
    )


def main(options: Options) -> None:
    """Judge the three kinds of picture."""
    pipe = StableDiffusionPipeline.from_pretrained(weights_dir("pipeline"), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    shots = [picture("test", options.first + i) for i in range(options.num_pictures)]
    report("real renders", [judge(s.rendering.image, s.pet, s.context) for s in shots])

    pixels = torch.from_numpy(np.stack([s.rendering.image for s in shots])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latents).sample
    images = pipe.image_processor.postprocess(decoded)
    report("reconstructions", [judge(image, s.pet, s.context) for image, s in zip(images, shots, strict=True)])

    drawn: list[Image.Image] = []
    for start in range(0, options.num_samples, 16):
        batch = shots[start : min(start + 16, options.num_samples)]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        prompts = [caption(shot.pet, shot.context) for shot in batch]
        drawn += pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    report("base samples", [judge(image, s.pet, s.context) for image, s in zip(drawn, shots)])


if __name__ == "__main__":
    main(tyro.cli(Options))
