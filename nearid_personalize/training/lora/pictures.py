"""Reads and encodes the pictures, captions and masks of a LoRA run once, and makes the batches.

Every random draw is a function of (seed, turn). Letters: M pictures, P prompts, B batch, C h w latent channels and
size.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.files import write_atomically
from nearid_personalize.images import MASK_SUFFIX, list_images, load_image, save_image, to_tensor
from nearid_personalize.training.lora.families import Family
from nearid_personalize.training.lora.noising import Noised, Noising, stratified_levels
from nearid_personalize.training.lora.options import DataOptions, LoraOptions, require

CAPTION_KEYS = ("text", "caption", "prompt")


ASPECTS = (1, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2)  # and upside down


PRIOR_STEPS = 20


NO_CAPTION = ""


# --- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Picture:
    """One training picture as it lies on the disk: RGB, its prompt, and white on the subject ("L", same size)."""

    image: Image.Image
    prompt: str
    mask: Image.Image | None = None

    def mirrored(self) -> "Picture":
        """The same picture, left and right exchanged."""
        return replace(self, image=ImageOps.mirror(self.image), mask=self.mask and ImageOps.mirror(self.mask))


def read_captions(folder: Path) -> dict[str, str]:
    """Captions by file name: metadata.jsonl ({"file_name": …, "text": …}), then photo.txt beside photo.jpg."""
    captions = {}
    table = folder / "metadata.jsonl"
    try:
        for line in table.read_text(encoding="utf-8").splitlines() if table.exists() else ():
            row = json.loads(line)
            caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
            if caption is None:
                raise InputError(f"{table}: {row.get('file_name')} has no caption; name it {' or '.join(CAPTION_KEYS)}")
            captions[row["file_name"]] = caption
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: {error}; each line is JSON with file_name and text") from error
    for path in list_images(folder):
        if path.with_suffix(".txt").exists():
            captions[path.name] = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    return captions


def read_mask(path: Path, size: tuple[int, int], masks: Path | None) -> Image.Image:
    """The mask of the picture at `path`, of the picture's size; InputError when it is missing or of another shape."""
    file = masks / f"{path.stem}.png" if masks else path.with_name(f"{path.stem}{MASK_SUFFIX}.png")
    if not file.exists():
        raise InputError(f"--background-weight below 1: {path.name} needs a mask at {file}")
    mask = load_image(file).convert("L")
    if abs(math.log(mask.width / mask.height * size[1] / size[0])) > 0.02:
        raise InputError(
            f"{file}: {mask.width} x {mask.height}; a mask has the shape of its picture, {size[0]} x {size[1]}"
        )
    return mask.resize(size, Image.Resampling.BILINEAR)


def read_references(options: DataOptions) -> list[Picture]:
    """Read the subject's pictures with their captions and, where the background counts less, their masks."""
    captions = read_captions(options.references)
    pictures = []
    for path in list_images(options.references):
        image, prompt = load_image(path), captions.get(path.name, options.prompt)
        if options.token not in prompt:
            raise InputError(f"{path}: its caption {prompt!r} lacks the --token {options.token!r}")
        mask = read_mask(path, image.size, options.masks) if options.background_weight < 1 else None
        pictures.append(Picture(image, prompt, mask))
    return pictures


def fingerprint(pictures: Sequence[Picture]) -> str:
    """SHA-256 over pixels, prompts and masks, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr((picture.image.size, picture.prompt)).encode())
        digest.update(picture.image.tobytes() + (picture.mask.tobytes() if picture.mask else b""))
    return digest.hexdigest()


# --- class pictures --------------------------------------------------------------------------------------------------
def class_folder(options: LoraOptions) -> Path:
    """Where the pictures of the class lie: also what an accept threshold can be set against."""
    return options.data.class_pictures or options.output / "class_pictures"


def class_files(options: LoraOptions) -> list[Path]:
    """The files of the class pictures, the user's own first; those named class-0000.png … may be still to be drawn."""
    folder = class_folder(options)
    there = list_images(folder) if folder.exists() and any(folder.iterdir()) else []
    own = [path for path in there if not path.name.startswith("class-")]
    drawn = [folder / f"class-{index:04d}.png" for index in range(options.data.prior_pictures - len(own))]
    return (own + drawn)[: options.data.prior_pictures]


def draw_class_pictures(
    family: Family, options: LoraOptions, sizes: Sequence[tuple[int, int]], process: int = 0, processes: int = 1
) -> None:
    """Let the base model draw the missing class pictures, each with its prompt beside it as .txt.

    sizes: (width, height) in turn, pixels. process, processes: this process draws its share.
    """
    share = list(enumerate(class_files(options)))[process::processes]
    missing = [(index, file) for index, file in share if not file.exists()]
    for index, file in tqdm(missing, desc="class pictures", disable=not missing):
        prompt = options.data.class_prompts[index % len(options.data.class_prompts)]
        width, height = sizes[index % len(sizes)]
        output = family.pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=PRIOR_STEPS,
            generator=torch.Generator("cpu").manual_seed(options.seed + index),
            **family.guidance(options.data.prior_guidance_scale),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file.with_suffix(".txt"), prompt)
        save_image(output.images[0], file)


def read_class_pictures(options: LoraOptions) -> list[Picture]:
    """Read the class pictures; those without a caption show the class prompts in turn."""
    if not options.data.prior_pictures:
        return []
    captions = read_captions(class_folder(options))
    prompts = options.data.class_prompts
    return [
        Picture(load_image(file), captions.get(file.name, prompts[index % len(prompts)]))
        for index, file in enumerate(class_files(options))
    ]


# --- encoding --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One encoded picture."""

    latents: Tensor
    """[2,C,h,w], mean and standard deviation, float32 on the CPU."""
    importance: Tensor
    """[h,w], weight of the loss, in [0, 1]."""
    frame: Tensor
    """[6], pixels: height and width of the original, top and left of the crop, its height and width (the
    micro-conditioning of SDXL, arXiv:2307.01952, 2.2)."""
    prompt: int
    """Its number."""


@dataclass(frozen=True)
class TrainingSet:
    """Encoded pictures: references first, then prior pictures."""

    samples: list[Sample]  # M
    prompts: tuple[str, ...]  # P
    num_references: int
    fingerprint: str  # of the references

    def buckets(self) -> list[list[int]]:
        """The pictures' numbers by latent size."""
        found: dict[torch.Size, list[int]] = {}
        for index, sample in enumerate(self.samples):
            found.setdefault(sample.latents.shape, []).append(index)
        return list(found.values())


def bucket_size(size: tuple[int, int], resolution: int, divisor: int) -> tuple[int, int]:
    """(width, height) nearest in shape to `size`, of about `resolution`² pixels, both sides multiples of `divisor`."""
    wanted = math.log(size[0] / size[1])
    aspect = min((*ASPECTS, *(1 / a for a in ASPECTS)), key=lambda a: abs(math.log(a) - wanted))
    width, height = resolution * math.sqrt(aspect), resolution / math.sqrt(aspect)
    return max(1, round(width / divisor)) * divisor, max(1, round(height / divisor)) * divisor


def frame_of(original: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """`Sample.frame` of a centre crop: (width, height) of the original and of what is trained on, pixels."""
    scale = max(size[0] / original[0], size[1] / original[1])
    left, top = ((o * scale - s) / 2 for o, s in zip(original, size))
    return torch.tensor([original[1], original[0], round(top), round(left), size[1], size[0]], dtype=torch.float32)


@torch.no_grad()
def encode_picture(family: Family, picture: Picture, size: tuple[int, int], background: float, prompt: int) -> Sample:
    """Encode the centre of a picture, cut to (width, height) `size` in pixels."""
    pixels = to_tensor([ImageOps.fit(picture.image, size, Image.Resampling.BICUBIC)])  # [1,3,H,W]
    vae = family.pipe.vae
    latents = torch.cat(family.encode_pictures(pixels.to(vae.device, vae.dtype) * 2 - 1))
    importance = torch.ones(latents.shape[-2:])
    if picture.mask is not None:
        mask = to_tensor([ImageOps.fit(picture.mask, size, Image.Resampling.BILINEAR).convert("RGB")])[:, :1]
        importance = background + (1 - background) * F.interpolate(mask, importance.shape, mode="area")[0, 0]
    return Sample(latents.float(), importance, frame_of(picture.image.size, size), prompt)


def training_sizes(options: DataOptions, family: Family, pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    """(width, height) in pixels to train each picture at: the square, or with `aspect_buckets` the nearest bucket."""
    side = options.resolution or family.picture_size
    require(side % family.divisor == 0, "resolution", side, f"a multiple of {family.divisor}")
    if not options.aspect_buckets:
        return [(side, side)] * len(pictures)
    return [bucket_size(picture.image.size, side, family.divisor) for picture in pictures]


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` nearest in shape to `size`."""
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1] * size[1] / size[0])))


def encode_all(
    family: Family,
    options: DataOptions,
    references: Sequence[Picture],
    priors: Sequence[Picture],
    more_texts: Sequence[str] = (),
) -> TrainingSet:
    """Encode every picture once, prior pictures at a size that the references have. more_texts: prompts of no
    picture.
    """
    print_of_references = fingerprint(references)
    if options.horizontal_flips:
        references = [*references, *(picture.mirrored() for picture in references)]
    sizes = training_sizes(options, family, references)
    sizes += [nearest_size(picture.image.size, sizes) for picture in priors]
    pictures = [*references, *priors]
    texts = [picture.prompt for picture in pictures] + ([NO_CAPTION] if options.caption_dropout else [])
    prompts = tuple(dict.fromkeys([*texts, *more_texts]))
    samples = [
        encode_picture(family, picture, size, options.background_weight, prompts.index(picture.prompt))
        for picture, size in zip(pictures, sizes)
    ]
    return TrainingSet(samples, prompts, len(references), print_of_references)


# --- batches ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Batch:
    """Pictures that are trained on together, on the CPU."""

    noised: Noised
    importance: Tensor
    """[B,h,w], inside a picture."""
    share: Tensor
    """[B], of each picture's error in the loss, see `shares`."""
    frame: Tensor
    """[B,6]."""
    prompts: Tensor
    """Which rows of the table, each once."""
    prompt_index: Tensor
    """[B], into `prompts`."""

    def __len__(self) -> int:
        return len(self.share)

    def part(self, rows: slice) -> "Batch":
        """Some of the pictures: the losses of the parts add up to that of the whole batch."""
        prompts, prompt_index = self.prompts[self.prompt_index[rows]].unique(return_inverse=True)
        noised = self.noised
        return Batch(
            noised=Noised(
                noisy=noised.noisy[rows],
                target=noised.target[rows],
                timesteps=noised.timesteps[rows],
                weights=noised.weights[rows],
            ),
            importance=self.importance[rows],
            share=self.share[rows],
            frame=self.frame[rows],
            prompts=prompts,
            prompt_index=prompt_index,
        )

    def cut(self, size: int) -> "list[Batch]":
        """Parts of at most `size` pictures."""
        return [self.part(rows) for rows in parts(len(self), size)]


def shares(references: int, priors: int, prior_weight: float) -> Tensor:
    """How much each error counts, [references + priors]: the references' mean plus `prior_weight` times the priors'."""
    of_prior = prior_weight / max(1, priors)
    return torch.tensor([1 / references] * references + [of_prior] * priors)


def parts(count: int, size: int) -> list[slice]:
    """Cut `count` things into runs of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def shuffled_indices(start: int, count: int, size: int, seed: int) -> list[int]:
    """Return entries `start … start + count - 1` of an endless row of seeded permutations of `range(size)`."""
    positions = [divmod(position, size) for position in range(start, start + count)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch, _ in positions}
    return [int(orders[epoch][offset]) for epoch, offset in positions]


def choose_bucket(sizes: Sequence[int], turn: int, seed: int) -> tuple[int, int]:
    """Choose the bucket of batch number `turn`, each as often as it has pictures, and count its earlier turns."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    epoch, offset = divmod(turn, len(owners))
    row = owners[shuffled_indices(epoch * len(owners), offset + 1, len(owners), seed)]
    return int(row[-1]), epoch * sizes[row[-1]] + int((row[:-1] == row[-1]).sum())


def batch_indices(data: TrainingSet, batch_size: int, turn: int, seed: int) -> tuple[list[int], int]:
    """Choose the pictures of batch number `turn`, all of one size, and how many are references (they come first)."""
    buckets = data.buckets()
    sizes = [sum(index < data.num_references for index in bucket) for bucket in buckets]
    number, turn = choose_bucket(sizes, turn, seed)
    references, priors = buckets[number][: sizes[number]], buckets[number][sizes[number] :]
    count = batch_size // 2 if priors else 0
    chosen = shuffled_indices(turn * (batch_size - count), batch_size - count, len(references), seed)
    chosen_priors = shuffled_indices(turn * count, count, len(priors), seed) if priors else []
    return [references[i] for i in chosen] + [priors[i] for i in chosen_priors], batch_size - count


def make_batch(data: TrainingSet, noising: Noising, options: LoraOptions, turn: int) -> Batch:
    """Draw batch number `turn`: pictures, latents from their distributions, noise and noise levels."""
    rng = np.random.default_rng([options.seed, turn])
    chosen, references = batch_indices(data, options.data.batch_size, turn, options.seed)
    samples = [data.samples[index] for index in chosen]
    mean, std = torch.stack([sample.latents for sample in samples], dim=1)  # [B,C,h,w] each
    noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
    levels = torch.cat([stratified_levels(rng, references), stratified_levels(rng, len(chosen) - references)])
    latents = mean + std * torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
    if options.noise.noise_offset:
        shape = (*mean.shape[:2], 1, 1)  # one draw for a whole channel
        noise = noise + options.noise.noise_offset * torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    numbers = torch.tensor([sample.prompt for sample in samples])
    if options.data.caption_dropout:
        dropped = torch.from_numpy(rng.random(len(samples)) < options.data.caption_dropout)
        numbers[dropped] = data.prompts.index(NO_CAPTION)
    prompts, prompt_index = numbers.unique(return_inverse=True)
    return Batch(
        noised=noising(latents, noise, levels),
        importance=torch.stack([sample.importance for sample in samples]),
        share=shares(references, len(chosen) - references, options.data.prior_weight),
        frame=torch.stack([sample.frame for sample in samples]),
        prompts=prompts,
        prompt_index=prompt_index,
    )


def batch_loss(predicted: Tensor, batch: Batch) -> Tensor:
    """Squared error of predictions [B,C,h,w], averaged by importance inside a picture, summed by `share` over
    pictures.
    """
    device = predicted.device
    errors = F.mse_loss(predicted.float(), batch.noised.target.to(device), reduction="none")  # [B,C,h,w]
    if bool((batch.importance == 1).all()):
        errors = errors.mean(dim=(1, 2, 3))  # [B]
    else:
        importance = batch.importance.to(device)
        errors = (errors.mean(dim=1) * importance).sum(dim=(1, 2)) / importance.sum(dim=(1, 2))
    return (errors * (batch.noised.weights * batch.share).to(device)).sum()
