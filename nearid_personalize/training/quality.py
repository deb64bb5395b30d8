"""Trains the probe of the quality floor on a frozen trunk's tokens of good and bad pictures.

Good: photos, photos through the autoencoder, and finished drawings, some of them slightly softened, brightened or
compressed; of any subject. Bad: damaged pictures, and drawings broken off before the end.
"""

import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from nearid_personalize.data.reconstruct import Reconstruction
from nearid_personalize.errors import InputError
from nearid_personalize.floors.quality import QualityProbe, QualityRates
from nearid_personalize.images import to_square
from nearid_personalize.miniworld.dataset import picture, picture_facts
from nearid_personalize.miniworld.subjects import Split, caption

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pictures = dict[str, list[Image.Image]]
"""Kind -> pictures of it."""
Tokens = Mapping[str, Tensor]
"""Kind -> tokens [N,T,D] of its pictures, of any float type."""

MIN_PHOTOS = 24

# Indices that no packaged model was trained or measured on.
_FIRST_PICTURE, _FIRST_PROMPT = 300_000, 800_000


@dataclass(frozen=True)
class QualityOptions:
    """How much is drawn, and how the probe is fitted."""

    num_photos: int = 1600
    """Photos (of the toy world: renders); two thirds of them pass through the pipeline's autoencoder."""
    num_drawn: int = 256
    """Pictures that the pipeline finishes; half as many more are broken off."""
    drawing_steps: int = 20
    """Denoising steps of a finished picture."""
    guidance_scale: float = 3.0
    """The pipeline's guidance scale."""
    fit_steps: int = 1500
    """Steps of the fit, each of 64 good and 64 bad pictures."""
    learning_rate: float = 3e-3
    """Peak learning rate of the fit."""
    false_alarm_rate: float = 0.01
    """Share of good pictures, 0 to 1, that the threshold may refuse."""
    seed: int = 0
    """Of damages, drawings and fit."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--num-photos", self.num_photos, MIN_PHOTOS),
            ("--num-drawn", self.num_drawn, 8),
            ("--drawing-steps", self.drawing_steps, 4),
            ("--fit-steps", self.fit_steps, 1),
        ):
            if value < least:
                raise InputError(f"{flag} must be at least {least}, got {value}")
        if not 0 < self.false_alarm_rate < 1:
            raise InputError(f"--false-alarm-rate must be between 0 and 1, got {self.false_alarm_rate}")


# --- damages ---------------------------------------------------------------------------------------------------------

Damage = Callable[[Image.Image, random.Random, Image.Image], Image.Image]
"""(picture, source of chance, another picture of the same size) -> what no one would accept."""


def blur(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Gaussian, deviation 2.5 to 7 % of the width."""
    return image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.025, 0.07)))


def noise(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Gaussian in every channel, deviation .15 to .4 of the range."""
    normal = np.random.default_rng(rng.getrandbits(32)).normal(0, 255 * rng.uniform(0.15, 0.4), (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + normal).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Quality 1 to 6."""
    return _compressed(image, rng.randint(1, 6))


def blocks(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """A mosaic of 6 to 14 squares a side."""
    side = rng.randint(6, 14)
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def washed_out(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """10 to 35 % of the contrast left, on grey."""
    return Image.blend(image, Image.new("RGB", image.size, (rng.randint(60, 220),) * 3), rng.uniform(0.65, 0.9))


def burnt(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Contrast and colour far too strong, as of far too much guidance."""
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(rng.uniform(2.5, 5))).enhance(rng.uniform(2, 4))


def shuffled(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """The cells of a grid of 3 to 8 a side in any order."""
    count = rng.choice([3, 4, 6, 8])
    side = image.width // count
    corners = [(x * side, y * side) for x in range(count) for y in range(count)]
    result = image.copy()
    for (left, top), place in zip(corners, rng.sample(corners, len(corners))):
        result.paste(image.crop((left, top, left + side, top + side)), place)
    return result


def doubled(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Another picture shines through."""
    return Image.blend(image, other, rng.uniform(0.35, 0.5))


def warped(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """Move the nodes of a 5 x 5 grid by up to 10 to 15 % of the width."""
    count, side = 5, image.width
    reach = side * rng.uniform(0.1, 0.15)
    lines = [round(side * i / count) for i in range(count + 1)]
    moved = {
        (i, j): [line + rng.uniform(-reach, reach) * (0 < i < count and 0 < j < count) for line in (lines[i], lines[j])]
        for i in range(count + 1)
        for j in range(count + 1)
    }
    cells = [(i, j) for i in range(count) for j in range(count)]
    mesh = [
        (
            (lines[i], lines[j], lines[i + 1], lines[j + 1]),
            (*moved[i, j], *moved[i, j + 1], *moved[i + 1, j + 1], *moved[i + 1, j]),
        )
        for i, j in cells
    ]
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def cut_off(image: Image.Image, rng: random.Random, other: Image.Image) -> Image.Image:
    """35 to 60 % of it, at one side, is flat grey."""
    side, part = image.width, int(image.width * rng.uniform(0.35, 0.6))
    boxes = [(0, 0, part, side), (side - part, 0, side, side), (0, 0, side, part), (0, side - part, side, side)]
    result = image.copy()
    result.paste((rng.randint(0, 255),) * 3, rng.choice(boxes))
    return result


DAMAGES: dict[str, Damage] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "blocks": blocks,
    "washed out": washed_out,
    "burnt": burnt,
    "shuffled": shuffled,
    "doubled": doubled,
    "warped": warped,
    "cut off": cut_off,
}


def slightly_varied(image: Image.Image, rng: random.Random) -> Image.Image:
    """What leaves a picture good: a breath of blur, a little more or less light and contrast, compression."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0, 0.008)))
    if rng.random() < 0.3:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
    if rng.random() < 0.3:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.85, 1.15))
    return _compressed(image, rng.randint(50, 95)) if rng.random() < 0.3 else image


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    stop_after: int | None = None,
) -> list[Image.Image]:
    """One picture per prompt and seed, 16 at a time; broken off after step `stop_after`, noisy latents are decoded."""

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 == stop_after  # a stock pipeline then skips the other steps and decodes what it has
        return tensors

    images: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + 16]]
        images += pipe(
            list(prompts[start : start + 16]),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            callback_on_step_end=None if stop_after is None else interrupt,
        ).images
    return images


def make_pictures(
    pipe: "DiffusionPipeline", photos: Iterable[Image.Image], prompts: Sequence[str], size: int, options: QualityOptions
) -> tuple[Pictures, Pictures]:
    """Good and bad pictures by kind, `size` pixels a side.

    prompts: one for each finished drawing; half of them are drawn again with other seeds and broken off.
    """
    rng = random.Random(f"quality/{options.seed}")
    squares = [_square(photo, size) for photo in photos]
    if len(squares) < MIN_PHOTOS:
        raise InputError(f"--data: {len(squares)} photos in a split; at least {MIN_PHOTOS} are needed")
    third = len(squares) // 3
    first_seed = rng.randrange(2**30)

    def drawn(part: Sequence[str], steps: int, stop_after: int | None = None) -> list[Image.Image]:
        nonlocal first_seed
        seeds = range(first_seed, first_seed + len(part))
        first_seed += len(part)
        images = draw(pipe, part, seeds, steps, options.guidance_scale, stop_after)
        return [_square(image, size) for image in images]

    good: Pictures = {
        "photos": squares[:third],
        "reconstructed": _through_autoencoder(pipe, squares[third:], 0.1, options.seed),
        "finished": drawn(prompts, options.drawing_steps),
    }
    sources = [image for images in good.values() for image in images]
    share = len(squares) // 4
    bad: Pictures = {
        name: [damage(rng.choice(sources), rng, rng.choice(sources)) for _ in range(share)]
        for name, damage in DAMAGES.items()
    }
    bad["noisy latents"] = [
        image
        for level in (0.7, 1.0, 1.5)
        for image in _through_autoencoder(pipe, rng.choices(sources, k=max(share // 3, 1)), level, options.seed)
    ]
    quarter = max(len(prompts) // 4, 1)
    bad["one step"] = drawn(prompts[:quarter], 1)
    bad["two steps"] = drawn(prompts[:quarter], 2)
    bad["broken off"] = [
        image
        for share_done in (0.15, 0.4, 0.6)
        for image in drawn(
            prompts[quarter : 2 * quarter], options.drawing_steps, max(1, round(share_done * options.drawing_steps))
        )
    ]
    varied = {name: [slightly_varied(image, rng) for image in images] for name, images in good.items()}
    return varied, bad


def miniworld_photos(split: Split, count: int) -> Iterator[Image.Image]:
    """Renders of `count` subjects of the toy world, every fourth in a wide view."""
    for index in range(_FIRST_PICTURE, _FIRST_PICTURE + count):
        yield Image.fromarray(picture(split, index, wide=index % 4 == 0).rendering.image)


def miniworld_prompts(split: Split, count: int) -> list[str]:
    """Captions of `count` other subjects, with a word left out here and there, and some of the category alone."""
    rng = random.Random(f"prompts/{split}")
    facts = (picture_facts(split, _FIRST_PROMPT + index) for index in range(count))
    return [caption(pet, context, rng, drop=0.2, short=0.2) for pet, context in facts]


def _square(image: Image.Image, size: int) -> Image.Image:
    return Image.fromarray(to_square(image, size).permute(1, 2, 0).numpy())


def _through_autoencoder(
    pipe: "DiffusionPipeline", images: Sequence[Image.Image], latent_noise: float, seed: int
) -> list[Image.Image]:
    again = Reconstruction(pipe.vae, share=1.0, latent_noise=latent_noise)
    result = []
    for start in range(0, len(images), 32):
        part = images[start : start + 32]
        pixels = torch.stack([to_square(image, image.width) for image in part]).float() / 255
        drawn = (again(pixels, seed + start) * 255).round().byte()
        result += [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in drawn]
    return result


# --- the probe -------------------------------------------------------------------------------------------------------


def fit_probe(good: Tokens, bad: Tokens, options: QualityOptions) -> QualityProbe:
    """Logistic loss over equally many good and bad pictures, drawn anew at every step."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    sides = [(torch.cat(list(tokens.values())), label) for tokens, label in ((good, 1.0), (bad, 0.0))]
    probe = QualityProbe(sides[0][0].shape[2])
    optimizer = torch.optim.AdamW(probe.parameters(), options.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.fit_steps)
    for _ in range(options.fit_steps):
        loss = torch.zeros(())
        for tokens, label in sides:
            batch = tokens[torch.randint(len(tokens), (64,), generator=generator)].float()
            loss = loss + F.binary_cross_entropy_with_logits(probe(batch), torch.full((64,), label))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def qualities(probe: QualityProbe, tokens: Tensor) -> Tensor:
    """Tokens [N,T,D] -> qualities [N] in [0, 1]."""
    return torch.cat([probe(part.float()).sigmoid() for part in tokens.split(256)])


@torch.no_grad()
def centre_at_half(probe: QualityProbe, good: Tokens, options: QualityOptions) -> None:
    """Move the probe's bias so that a quality of .5 refuses the wanted share of good pictures that a pipeline made."""
    made = torch.cat([good["reconstructed"], good["finished"]])
    log_odds = torch.cat([probe(part.float()) for part in made.split(256)])
    probe.decide.bias.sub_(torch.quantile(log_odds, options.false_alarm_rate, interpolation="lower"))


def measure(probe: QualityProbe, good: Tokens, bad: Tokens, threshold: float, measured_on: str) -> QualityRates:
    """False alarms and misses by kind at a threshold."""
    return QualityRates(
        threshold=threshold,
        false_alarm={kind: float((qualities(probe, t) < threshold).double().mean()) for kind, t in good.items()},
        miss={kind: float((qualities(probe, t) >= threshold).double().mean()) for kind, t in bad.items()},
        num_good={kind: len(t) for kind, t in good.items()},
        num_bad={kind: len(t) for kind, t in bad.items()},
        measured_on=measured_on,
    )


def for_validation(options: QualityOptions) -> QualityOptions:
    """The same with other draws, and fewer of them: a third of the photos and drawings."""
    return replace(
        options,
        num_photos=max(MIN_PHOTOS, options.num_photos // 3),
        num_drawn=max(8, options.num_drawn // 3),
        seed=options.seed + 1,
    )
