"""Captions, masks, aspect-ratio buckets, class pictures, and which pictures make which batch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import checkered
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora import pictures as cached
from nearid_personalize.training.lora.families import StableDiffusion
from nearid_personalize.training.lora.noising import Noised, flow_noising
from nearid_personalize.training.lora.options import LoraOptions
from nearid_personalize.training.lora.pictures import (
    Batch,
    Picture,
    Sample,
    TrainingSet,
    batch_indices,
    batch_loss,
    bucket_size,
    class_files,
    draw_class_pictures,
    encode_all,
    fingerprint,
    frame_of,
    make_batch,
    read_class_pictures,
    read_references,
    shares,
    shuffled_indices,
)


@pytest.fixture
def options(photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(base_model="", references=photo_dir, output=tmp_path / "lora", resolution=32, batch_size=4)


@pytest.fixture(scope="module")
def family(tiny_kl_pipeline_dir) -> StableDiffusion:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_kl_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    return StableDiffusion(pipe)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_captions_come_from_text_files_then_metadata_then_the_prompt(options, photo_dir):
    rows = [{"file_name": "photo-0.png", "text": "sks at sea"}, {"file_name": "photo-1.png", "caption": "sks in snow"}]
    (photo_dir / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (photo_dir / "photo-0.txt").write_text("sks in space\n")
    prompts = [picture.prompt for picture in read_references(options.data)]
    assert prompts == ["sks in space", "sks in snow", options.data.prompt, options.data.prompt]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo-2.txt", "a dog", "photo-2.png: its caption 'a dog' lacks the --token 'sks'"),
        ("metadata.jsonl", "{no json", "metadata.jsonl"),
        ("metadata.jsonl", '{"text": "sks"}', "file_name"),
        ("metadata.jsonl", '{"file_name": "photo-0.png"}', "has no caption"),
    ],
)
def test_unusable_captions_are_refused(name, content, message, options, photo_dir):
    (photo_dir / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_references(options.data)
    assert "\n" not in str(error.value)


def test_masks_are_no_pictures_and_are_read_from_both_places(options, photo_dir, tmp_path):
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    for index in range(4):
        mask.save(photo_dir / f"photo-{index}.mask.png")
    assert len(read_references(options.data)) == 4
    assert all(picture.mask is None for picture in read_references(options.data))
    options = options.but(background_weight=0.25)
    assert [picture.mask.getpixel((0, 0)) for picture in read_references(options.data)] == [255] * 4
    other = tmp_path / "masks"
    other.mkdir()
    options = options.but(masks=other)
    with pytest.raises(InputError, match=r"needs a mask at .*photo-0\.png"):
        read_references(options.data)
    for index in range(4):
        Image.new("L", (24, 48)).save(other / f"photo-{index}.png")
    with pytest.raises(InputError, match="24 x 48; a mask has the shape of its picture"):
        read_references(options.data)


def test_fingerprint_sees_pixels_prompts_and_masks():
    image, mask = checkered(0), Image.new("L", (48, 48))
    told = {
        fingerprint([Picture(image, "sks")]),
        fingerprint([Picture(checkered(1), "sks")]),
        fingerprint([Picture(image, "sks dog")]),
        fingerprint([Picture(image, "sks", mask)]),
    }
    assert len(told) == 4 and fingerprint([Picture(image.copy(), "sks")]) in told


# --- encoding --------------------------------------------------------------------------------------------------------


def test_buckets_keep_shape_and_area():
    for size in ((400, 300), (300, 400), (1920, 1080), (500, 500), (100, 1000)):
        width, height = bucket_size(size, 512, 16)
        assert width % 16 == height % 16 == 0
        assert width * height == pytest.approx(512**2, rel=0.05)
        assert (width - height) * (size[0] - size[1]) >= 0
    assert bucket_size((400, 300), 512, 16) == (592, 448)
    assert bucket_size((300, 300), 512, 16) == (512, 512)


def test_frame_of_a_centre_crop():
    assert frame_of((200, 100), (32, 32)).tolist() == [100, 200, 0, 16, 32, 32]
    assert frame_of((100, 300), (32, 32)).tolist() == [300, 100, 32, 0, 32, 32]
    assert frame_of((64, 64), (32, 32)).tolist() == [64, 64, 0, 0, 32, 32]


def test_pictures_of_any_shape_fall_into_buckets(options, family, photo_dir):
    for index, size in enumerate(((60, 30), (64, 34), (30, 60), (40, 40))):
        checkered(index).resize(size).save(photo_dir / f"photo-{index}.png")
    options = options.but(aspect_buckets=True, horizontal_flips=True)
    data = encode_all(
        family, options.data, read_references(options.data), [Picture(checkered(9).resize((50, 48)), "a dog")]
    )
    shapes = [tuple(sample.latents.shape[1:]) for sample in data.samples]
    assert shapes[:4] == shapes[4:8] == [(4, 6, 11), (4, 6, 11), (4, 11, 6), (4, 8, 8)] and shapes[8] == (4, 8, 8)
    assert data.prompts == (options.data.prompt, "a dog") and data.num_references == 8
    for turn in range(6):
        batch = make_batch(data, flow_noising, options, turn)
        assert len(batch.noised.noisy) == 4
        own_size = batch.noised.noisy.shape[1:] != (4, 8, 8)
        assert batch.share.tolist() == ([0.25] * 4 if own_size else [0.5] * 4)  # else half of them are the class's


def test_importance_is_the_mask_on_the_latents_grid(options, family):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    sample = cached.encode_picture(family, Picture(checkered(0, 32), "sks", mask), (32, 32), 0.25, 0)
    assert torch.equal(sample.importance[:, :4], torch.ones(8, 4))
    assert torch.equal(sample.importance[:, 4:], torch.full((8, 4), 0.25))
    mirrored = Picture(checkered(0, 32), "sks", mask).mirrored()
    flipped = cached.encode_picture(family, mirrored, (32, 32), 0.25, 0)
    assert torch.equal(flipped.importance, sample.importance.flip(1))


# --- class pictures --------------------------------------------------------------------------------------------------


def test_class_pictures_are_drawn_once_and_completed(options, family, tmp_path):
    folder = tmp_path / "class"
    prompts = ("a dog", "a photo of a dog")
    options = options.but(class_pictures=folder, prior_pictures=3, class_prompts=prompts)
    for process in range(2):
        draw_class_pictures(family, options, [(32, 32), (32, 16)], process, 2)
    first = {path.name: path.read_bytes() for path in class_files(options)}
    assert sorted(first) == ["class-0000.png", "class-0001.png", "class-0002.png"]
    pictures = read_class_pictures(options)
    assert [picture.prompt for picture in pictures] == ["a dog", "a photo of a dog", "a dog"]
    assert [picture.image.size for picture in pictures] == [(32, 32), (32, 16), (32, 32)]
    (folder / "class-0001.png").unlink()
    draw_class_pictures(family, options, [(32, 32), (32, 16)])
    assert {path.name: path.read_bytes() for path in class_files(options)} == first
    checkered(5).save(folder / "mine.png")
    assert [path.name for path in class_files(options)] == ["mine.png", "class-0000.png", "class-0001.png"]
    assert read_class_pictures(options)[0].prompt == "a dog"


# --- batches ---------------------------------------------------------------------------------------------------------


def test_every_epoch_shows_every_picture_once():
    order = shuffled_indices(0, 15, size=5, seed=3)
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert order[7:12] == shuffled_indices(7, 5, size=5, seed=3)


def samples(*shapes: tuple[int, int]) -> list[Sample]:
    """Samples of the given latent sizes whose mean is their own number."""
    return [
        Sample(torch.full((2, 1, *shape), float(i)), torch.ones(shape), torch.zeros(6), prompt=i)
        for i, shape in enumerate(shapes)
    ]


def test_buckets_are_visited_as_often_as_they_have_pictures():
    data = TrainingSet(samples((4, 4), (2, 4), (4, 4), (4, 4), (2, 4), (4, 4)), ("",) * 6, 6, "")
    shown = [0] * 6
    for turn in range(18):  # three visits per picture, two pictures each
        chosen, references = batch_indices(data, 2, turn, seed=0)
        assert references == 2 and len({data.samples[i].latents.shape for i in chosen}) == 1
        for i in chosen:
            shown[i] += 1
    assert shown == [6] * 6


def test_latents_are_drawn_from_their_distribution():
    sample = Sample(
        torch.stack([torch.full((1, 64, 64), 3.0), torch.full((1, 64, 64), 0.5)]), *[torch.ones(64, 64)] * 2, 0
    )
    data = TrainingSet([sample], ("sks",), 1, "")
    options = LoraOptions.of(base_model="", references=Path(), output=Path(), batch_size=2)

    def clean(latents, noise, level):
        return Noised(latents, noise, level, level)

    first, again, other = (make_batch(data, clean, options, turn).noised.noisy for turn in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    assert float(first.mean()) == pytest.approx(3.0, abs=0.05) and float(first.std()) == pytest.approx(0.5, abs=0.02)


def test_loss_matches_a_slow_oracle():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 2, 4, 4, generator=generator)
    importance, weights = torch.rand(3, 4, 4, generator=generator), torch.rand(3, generator=generator)
    noised = Noised(target, target, torch.zeros(3), weights)
    batch = Batch(noised, importance, shares(2, 1, 0.7), torch.zeros(3, 6), torch.zeros(1), torch.zeros(3))
    errors = []
    for i in range(3):
        total = sum(
            float(importance[i, y, x]) * float((predicted[i, c, y, x] - target[i, c, y, x]) ** 2)
            for c in range(2)
            for y in range(4)
            for x in range(4)
        )
        errors.append(float(weights[i]) * total / (2 * float(importance[i].sum())))
    expected = (errors[0] + errors[1]) / 2 + 0.7 * errors[2]
    assert float(batch_loss(predicted, batch)) == pytest.approx(expected, rel=1e-5)
    plain = dataclasses.replace(batch, importance=torch.ones(3, 4, 4), share=shares(3, 0, 0.7))
    expected = float((weights * ((predicted - target) ** 2).mean(dim=(1, 2, 3))).mean())
    assert float(batch_loss(predicted, plain)) == pytest.approx(expected, rel=1e-5)
