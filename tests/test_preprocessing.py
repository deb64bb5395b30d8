"""One definition of how pictures become pixels, against transformers' own processors."""

import json

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError

DEFAULT = Preprocessing(384)


def photo(seed, width, height):
    """Smooth in places, sharp in others, as photos are."""
    image = checkered(seed, 64).resize((width, height), Image.Resampling.BICUBIC)
    image.paste(checkered(seed + 1, height // 3), (width // 4, height // 3))
    return image


PROCESSORS = {
    "siglip": SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "naflex": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=49),
}


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("side", [40, 56, 131, 300])
def test_agrees_with_each_familys_own_processor_on_square_pictures(tmp_path, family, side):
    """Mean absolute difference at most 1e-3 of the range of pixel values; pictures, bytes and floats alike."""
    processor = PROCESSORS[family]
    processor.save_pretrained(tmp_path)
    preprocessing = Preprocessing.from_folder(tmp_path, DEFAULT)
    pictures = [photo(seed, side, side) for seed in (0, 2)]
    expected = torch.from_numpy(np.stack(processor(pictures, return_tensors="np")["pixel_values"])).float()
    if family == "naflex":  # [N,49,8*8*3] -> [N,3,56,56]
        expected = expected.view(2, 7, 7, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 56, 56)
    as_bytes = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    floats = as_bytes.float() / 255
    span = 1 / min(preprocessing.std)
    for source in (pictures, as_bytes, floats):
        ours = preprocessing(source)
        assert ours.shape == expected.shape == (2, 3, 56, 56)
        # Floats are not rounded to bytes, as Pillow does after each of its two passes: most seen when enlarging.
        limit = 1.1e-3 if side < 56 and source is floats else 1e-3
        assert float((ours - expected).abs().mean()) <= limit * span


def test_agrees_with_siglips_processor_on_oblong_pictures(tmp_path):
    processor = PROCESSORS["siglip"]
    processor.save_pretrained(tmp_path)
    preprocessing = Preprocessing.from_folder(tmp_path, DEFAULT)
    pictures = [photo(0, 300, 131), photo(2, 70, 200)]
    expected = torch.from_numpy(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    assert float((preprocessing(pictures) - expected).abs().mean()) <= 2e-3


def test_a_subject_at_the_side_is_not_cut_off():
    """CLIP's own processor crops the centre: of a red stripe at the edge nothing would be left."""
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 0, 0), (0, 0, 60, 100))
    plain = Preprocessing(50, (0.0,) * 3, (1.0,) * 3)
    assert float(plain([picture])[0, 0].mean()) == pytest.approx(60 / 300, abs=0.01)
    cropped = PROCESSORS["clip"](picture, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert float(cropped[0, 0].mean()) == 0


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [20, 11])
def test_gradients_of_float_pixels_are_those_of_finite_differences(side, resample):
    preprocessing = Preprocessing(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), resample)
    generator = torch.Generator().manual_seed(0)
    # Away from 0 and 1, where clamping has a kink.
    pixels = (0.4 + 0.2 * torch.rand(1, 3, side, side, generator=generator)).requires_grad_()
    weights = torch.randn(1, 3, 16, 16, generator=generator)
    gradient = torch.autograd.grad((preprocessing(pixels) * weights).sum(), pixels)[0]
    for direction in torch.randn(5, 1, 3, side, side, generator=generator):
        with torch.no_grad():
            ahead, behind = (preprocessing(pixels + step * direction) for step in (0.01, -0.01))
            slope = float(((ahead - behind) * weights).sum()) / 0.02
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_reads_what_it_and_transformers_write(tmp_path, resample):
    written = Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resample)
    written.save(tmp_path)
    assert Preprocessing.from_folder(tmp_path, DEFAULT) == written
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path / "again")
    assert Preprocessing.from_folder(tmp_path / "again", DEFAULT) == written


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"size": {"height": 224, "width": 224}}, 224),
        ({"size": 224}, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, 224),
        ({"size": 256, "crop_size": 224}, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, 256),
        ({"patch_size": 16, "max_num_patches": 256}, 256),
        ({"patch_size": 16, "max_num_patches": 1000}, 496),
        ({}, 384),
    ],
)
def test_size_is_what_the_model_sees(tmp_path, fields, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert Preprocessing.from_folder(tmp_path, DEFAULT) == Preprocessing(size)


def test_without_a_file_the_default_holds(tmp_path):
    other = Preprocessing(7, (0.1,) * 3, (0.2,) * 3, "bilinear")
    assert Preprocessing.from_folder(tmp_path, other) == other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "list, where an object is needed"),
        ('{"resample": 1}', "resample 1; 2 .bilinear. and 3 .bicubic. work"),
        ('{"size": {"height": 3, "width": 4}}', "one side of 1 to 8192 for height and width"),
        ('{"size": {"longest_edge": 4}}', "one side of 1 to 8192 for height and width"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        Preprocessing.from_folder(tmp_path, DEFAULT)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
