"""How often do the floors err? `python benchmarks/quality_floor.py --model FOLDER` (mini-world test subjects).

Quality: good and bad pictures of test subjects, by kind; kinds named by `--left-out` are measured on validation
subjects by a probe that never saw that kind. Copies: altered references must be found, other pictures not. Adherence:
pictures that show the prompt, and the same subjects elsewhere. Candidates that `drawn.py` has drawn, where
`--drawn` has them, are good pictures, copy nothing, and show their prompt and not the other.

Intervals are 95 %. Where subjects have several pictures, subjects are resampled, and the line says of how many. Damaged
pictures are the exception: each is made of a good one drawn at random, and pictures are the unit.
"""

import io
import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from drawn import Drawing, read
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from nearid_personalize.data.reconstruct import Reconstruction
from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.floors.adherence import AdherenceFloor, TextImageEncoder
from nearid_personalize.floors.copies import COPY_LIMIT, CopyFloor
from nearid_personalize.floors.quality import QualityFloor, picture_tokens
from nearid_personalize.images import list_images, load_image, save_image
from nearid_personalize.loading import load_pipeline
from nearid_personalize.metrics import share_interval, wilson_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, Split, photos, render, sample_pet, sample_view, weights_dir
from nearid_personalize.training.quality import (
    QualityOptions,
    centre_at_half,
    fit_probe,
    for_validation,
    make_pictures,
    measure,
    miniworld_photos,
    miniworld_prompts,
)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    quality: Annotated[QualityOptions, tyro.conf.arg(name="")]
    model: str = "miniworld"
    """Folder with quality.safetensors."""
    skip: tuple[str, ...] = ()
    """Of quality, copies, adherence: what is not to be measured."""
    left_out: tuple[str, ...] = ()
    """Kinds of bad picture to leave out of training, one after the other."""
    drawn: Path = Path("runs/drawn")
    """What `drawn.py` drew for other benchmarks, of subjects of `split`."""
    real: Path | None = None
    """Folder of folders with real photos, one subject each, to measure copies on, too."""
    split: Split = "test"
    num_subjects: int = 48
    """Subjects whose copies and prompts are measured."""
    first_subject: int = 6000
    sheet: Path | None = None
    """PNG to write examples of every kind to, passed and refused."""


@dataclass
class Errors:
    """Pictures of one kind: whether each was judged wrongly, and its subject."""

    wrong: list[bool] = field(default_factory=list)
    subjects: list[Hashable] = field(default_factory=list)

    def add(self, wrong: Iterable[bool], subject: Hashable) -> None:
        """Pictures of one subject."""
        for error in wrong:
            self.wrong.append(error)
            self.subjects.append(subject)

    def report(self, what: str) -> None:
        """One line: the share of errors, its interval over subjects, and of how many pictures and subjects it is."""
        low, high = share_interval(self.wrong, self.subjects)
        count, subjects = len(self.wrong), len(set(self.subjects))
        share = sum(self.wrong) / count
        print(f"  {what:42} {share:.3f} [{low:.3f}, {high:.3f}]  n {count} of {subjects} subjects", flush=True)


def report_pictures(what: str, wrong: Sequence[bool]) -> None:
    """As `Errors.report`, for pictures that are the unit themselves."""
    low, high = wilson_interval(sum(wrong), len(wrong))
    print(f"  {what:42} {sum(wrong) / len(wrong):.3f} [{low:.3f}, {high:.3f}]  n {len(wrong)} pictures", flush=True)


@dataclass(frozen=True)
class Drawn:
    """A subject's LoRA, what it learnt from and what it drew, by context."""

    index: int
    pet: Pet
    references: list[Image.Image]
    by_context: list[tuple[str, list[Image.Image]]]

    @property
    def pictures(self) -> list[Image.Image]:
        """All that it drew."""
        return [image for _, images in self.by_context for image in images]


def drawn_candidates(options: Options) -> Iterator[Drawn]:
    """What `drawn.py` left, subject by subject."""
    for path in sorted(options.drawn.glob("*.json")):
        index = int(path.stem)
        found = read(Drawing(options.drawn, split=options.split), index)
        by_context = [(p.context, [Image.fromarray(picture) for picture in p.pictures]) for p in found.prompts]
        yield Drawn(index, sample_pet(options.split, index), found.references, by_context)


# --- quality ---------------------------------------------------------------------------------------------------------


def measure_quality(options: Options) -> None:
    """The saved floor on test pictures."""
    floor = QualityFloor.from_pretrained(options.model)
    pipe = load_pipeline("miniworld", "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    chosen = for_validation(options.quality)
    good, bad = make_pictures(
        pipe,
        miniworld_photos(options.split, chosen.num_photos),
        miniworld_prompts(options.split, chosen.num_drawn),
        floor.preprocessing.size,
        chosen,
    )
    print(f"quality, threshold {floor.threshold:.2f}: good pictures refused")
    refused = {kind: [reason != "" for reason in floor.judge(images)] for kind, images in (good | bad).items()}
    for kind in good:
        report_pictures(kind, refused[kind])  # each of another subject
    by_lora = Errors()
    for drawn in drawn_candidates(options):
        by_lora.add([reason != "" for reason in floor.judge(drawn.pictures)], drawn.index)
    if by_lora.wrong:
        by_lora.report("drawn with a LoRA")
    print("quality: bad pictures passed")
    for kind in bad:
        report_pictures(kind, [not r for r in refused[kind]])
    report_pictures("all kinds", [not r for kind in bad for r in refused[kind]])
    if options.sheet:
        save_image(sheet(good | bad, refused), options.sheet)


def measure_left_out(options: Options) -> None:
    """Probes that never saw a kind of bad picture, on validation pictures of that kind."""
    model, preprocessing, _ = load_encoder(weights_dir("nearid") if options.model == "miniworld" else options.model)
    pipe = load_pipeline("miniworld", "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sides = []
    splits: tuple[tuple[Split, QualityOptions], ...] = (
        ("train", options.quality),
        ("val", for_validation(options.quality)),
    )
    for split, chosen in splits:
        shots = miniworld_photos(split, chosen.num_photos)
        made = make_pictures(pipe, shots, miniworld_prompts(split, chosen.num_drawn), preprocessing.size, chosen)
        sides.append([{k: picture_tokens(model, preprocessing, p).half() for k, p in side.items()} for side in made])
    (good, bad), (val_good, val_bad) = sides
    print("quality: bad pictures of a kind left out of training, passed (validation subjects)")
    for kind in options.left_out:
        probe = fit_probe(good, {k: tokens for k, tokens in bad.items() if k != kind}, options.quality)
        centre_at_half(probe, val_good, options.quality)
        rates = measure(probe, val_good, {kind: val_bad[kind]}, 0.5, "")
        count = rates.num_bad[kind]
        errors = round(rates.miss[kind] * count)
        report_pictures(kind, [True] * errors + [False] * (count - errors))


def sheet(pictures: dict[str, list[Image.Image]], refused: dict[str, list[bool]], count: int = 20) -> Image.Image:
    """A row of examples per kind; the refused ones are framed red."""
    tile, label = 70, 130
    result = Image.new("RGB", (label + count * tile, len(pictures) * tile), "white")
    draw = ImageDraw.Draw(result)
    for row, (kind, images) in enumerate(pictures.items()):
        draw.text((4, row * tile + 28), kind, fill="black")
        for column, (image, bad) in enumerate(zip(images[:count], refused[kind])):
            corner = (label + column * tile, row * tile)
            result.paste(ImageOps.expand(image.resize((64, 64)), 3, "red" if bad else "white"), corner)
    return result


# --- copies ----------------------------------------------------------------------------------------------------------


def _jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(20, 60))
    return Image.open(buffer).convert("RGB")


def _cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = image.size
    left, top, right, bottom = (rng.uniform(0, 0.1) for _ in range(4))
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


def _shifted(image: Image.Image, rng: random.Random) -> Image.Image:
    move = (1, 0, rng.uniform(-0.08, 0.08) * image.width, 0, 1, rng.uniform(-0.08, 0.08) * image.height)
    return image.transform(image.size, Image.Transform.AFFINE, move, fillcolor=(128, 128, 128))


def _relit(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))).enhance(
        rng.uniform(0.7, 1.3)
    )


ALTERATIONS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "JPEG, quality 20 to 60": _jpeg,
    "each side cropped by up to 10 %": _cropped,
    "shifted by up to 8 %": _shifted,
    "brightness, colour by up to 30 %": _relit,
    "all of these but the shift": lambda image, rng: _jpeg(ImageOps.mirror(_cropped(_relit(image, rng), rng)), rng),
}


def measure_copies(options: Options) -> None:
    """Altered references must be found; other pictures of the subject, its places, and LoRA drawings must not."""
    vae = load_pipeline("miniworld", "cpu", torch.float32).vae
    errors: dict[str, Errors] = {}

    def judge(kind: str, floor: CopyFloor, images: list[Image.Image], copies: bool, subject: Hashable) -> None:
        name = f"{'miss' if copies else 'false alarm'}: {kind}"
        wrong = [(reason == "") == copies for reason in floor.judge(images)]
        errors.setdefault(name, Errors()).add(wrong, subject)

    for index in range(options.first_subject, options.first_subject + options.num_subjects):
        pet, other = sample_pet(options.split, index), sample_pet(options.split, index + options.num_subjects)
        rng = random.Random(f"copies/{index}")
        shots = photos(pet, len(CONTEXTS))
        references = [Image.fromarray(shot.image) for shot, _ in shots[:4]]
        floor = CopyFloor.from_references(references)
        for kind, alter in ALTERATIONS.items():
            judge(kind, floor, [alter(image, rng) for image in references], True, index)
        for level in (0.0, 0.3):
            pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in references]).float() / 255
            drawn = Reconstruction(vae, 1.0, level)(pixels, index)
            images = [Image.fromarray((p * 255).byte().permute(1, 2, 0).numpy()) for p in drawn]
            judge(f"autoencoder, latent noise {level}", floor, images, True, index)
        for kind, who, wide in (
            ("same place, wide view", pet, True),
            ("same place, modest view", pet, False),
            ("same place, another subject", other, False),
        ):
            images = [Image.fromarray(render(who, place, sample_view(rng, wide)).image) for _, place in shots[:4]]
            judge(kind, floor, images, False, index)
        judge("subject in other places", floor, [Image.fromarray(shot.image) for shot, _ in shots[4:]], False, index)
    for drawn in drawn_candidates(options):
        floor = CopyFloor.from_references(drawn.references)
        judge("drawn with a LoRA", floor, drawn.pictures, False, drawn.index)
    for folder in sorted(options.real.iterdir()) if options.real else ():
        if folder.is_dir():
            shots_of_one = [load_image(path) for path in list_images(folder)]
            rng = random.Random(folder.name)
            for position, photo in enumerate(shots_of_one):
                floor = CopyFloor.from_references([photo])
                altered = [alter(photo, rng) for alter in ALTERATIONS.values()]
                judge("real photos, altered", floor, altered, True, folder.name)
                others = shots_of_one[:position] + shots_of_one[position + 1 :]
                judge("real photos, others of the subject", floor, others, False, folder.name)
    print(f"copies, limit {COPY_LIMIT}")
    for kind, found in errors.items():
        found.report(kind)


# --- adherence -------------------------------------------------------------------------------------------------------


def measure_adherence(options: Options) -> None:
    """Each picture with a prompt that it shows, and with a prompt of another place."""
    encoder = TextImageEncoder.from_pretrained("miniworld")
    names = ("contrasting prompts", "references", "references, floor .1")
    rivals = {name: (Errors(), Errors()) for name in names}

    def judge(index: int, pet: Pet, place: str, references: list[Image.Image], showing: list, elsewhere: list) -> None:
        contrasts = tuple(f"a photo of a {pet.category} in {other}" for other in CONTEXTS if other != place)
        embedded = encoder.embed_images(references)
        floors = (
            AdherenceFloor(encoder, contrasts=contrasts),
            AdherenceFloor(encoder, references=embedded),
            AdherenceFloor(encoder, 0.1, references=embedded),
        )
        for (refused, passed), floor in zip(rivals.values(), floors):
            reasons = floor.judge([*showing, *elsewhere], f"a photo of a {pet.category} in {place}")
            refused.add([reason != "" for reason in reasons[: len(showing)]], index)
            passed.add([reason == "" for reason in reasons[len(showing) :]], index)

    for index in range(options.first_subject, options.first_subject + options.num_subjects):
        pet = sample_pet(options.split, index)
        shots = [(Image.fromarray(shot.image), place) for shot, place in photos(pet, len(CONTEXTS))]
        references, (showing, place), elsewhere = shots[:4], shots[4], shots[5:]
        judge(index, pet, place, [image for image, _ in references], [showing], [image for image, _ in elsewhere])
    for drawn in drawn_candidates(options):
        (place, images), (other, others) = drawn.by_context
        judge(drawn.index, drawn.pet, place, drawn.references, images, others)
        judge(drawn.index, drawn.pet, other, drawn.references, others, images)
    for name, (refused, passed) in rivals.items():
        print(f"adherence, against {name}")
        refused.report("false alarm: shows the prompt")
        passed.report("miss: shows another place")


def main(options: Options) -> None:
    """Print all tables."""
    parts = {"quality": measure_quality, "copies": measure_copies, "adherence": measure_adherence}
    for name, part in parts.items():
        if name not in options.skip:
            part(options)
    if options.left_out:
        measure_left_out(options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
