"""The crop that a model sees, and the paste that leaves every other pixel alone."""

import numpy as np
import pytest
from conftest import checkered
from PIL import Image

from nearid_personalize.distractors.regions import (
    bounding_box,
    changed_outside,
    dilated,
    paste,
    region_around,
)


def disc(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_dilation_is_the_maximum_over_a_square():
    mask = np.random.default_rng(0).random((13, 17)) > 0.9
    grown = dilated(mask, 2)
    for row in range(13):
        for column in range(17):
            near = mask[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            assert grown[row, column] == near.any()
    assert np.array_equal(dilated(mask, 0), mask)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (301, 207)])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.02, 0.1), (0.97, 0.9)])
def test_a_region_holds_the_mask_and_lies_in_the_photo(size, place):
    width, height = size
    mask = disc(width, height, place[0] * width, place[1] * height, 9)
    region = region_around(mask, 64, 16, padding=0.5)
    left, top, right, bottom = region.box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    box = bounding_box(mask)
    assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
    assert max(region.size) == 64 and all(side % 16 == 0 for side in region.size)
    # Stretched by no more than rounding to a multiple of 16 can
    aspect = (right - left) / (bottom - top) / (region.size[0] / region.size[1])
    assert 0.7 < aspect < 1.4


def test_a_region_is_padded_by_a_share_of_the_mask():
    mask = disc(400, 400, 200, 200, 50)
    narrow, wide = (region_around(mask, 32, 8, padding) for padding in (0.1, 0.6))
    assert narrow.box[2] - narrow.box[0] == round(99 * 1.2) and wide.box[2] - wide.box[0] == round(99 * 2.2)


def test_a_small_subject_is_enlarged_twice_at_most():
    region = region_around(disc(1000, 1000, 500, 500, 10), 512, 8, padding=0.5)
    assert region.box[2] - region.box[0] == 256


def test_the_model_may_paint_any_pixel_that_the_mask_touches():
    mask = np.zeros((100, 100), bool)
    mask[50, 50] = True
    region = region_around(mask, 16, 8, padding=20)
    _, shrunk = region.crop(checkered(0, 100), mask)
    assert shrunk.size == region.size and set(np.unique(shrunk)) == {0, 255}
    assert (np.asarray(shrunk) == 255).sum() == 1


@pytest.mark.parametrize("painted_size", [(64, 64), (48, 64), (200, 100)])
def test_a_painted_crop_returns_to_its_place(painted_size):
    photo, mask = checkered(1, 90), disc(90, 90, 30, 40, 12)
    region = region_around(mask, 64, 8, padding=0.5)
    whole = region.restore(Image.new("RGB", painted_size, "red"), photo)
    left, top, right, bottom = region.box
    inside = np.zeros((90, 90), bool)
    inside[top:bottom, left:right] = True
    assert whole.size == photo.size
    assert (np.asarray(whole)[inside] == (255, 0, 0)).all()
    assert np.array_equal(np.asarray(whole)[~inside], np.asarray(photo)[~inside])


@pytest.mark.parametrize("feather", [0, 1, 5, 30])
def test_paste_changes_no_pixel_outside_the_mask(feather):
    photo, painted = checkered(1, 80), checkered(2, 80)
    mask = disc(80, 80, 60, 30, 25) | disc(80, 80, 3, 3, 9)
    result = paste(photo, painted, mask, feather)
    assert changed_outside(photo, result, mask) == 0
    expected = np.where(mask[..., None], np.asarray(painted), np.asarray(photo))
    if feather == 0:
        assert np.array_equal(np.asarray(result), expected)
    else:
        assert not np.array_equal(np.asarray(result), expected)


def test_feathering_passes_from_the_photo_at_the_border_to_the_painting_inside():
    photo, painted = Image.new("RGB", (60, 60), "black"), Image.new("RGB", (60, 60), "white")
    mask = np.zeros((60, 60), bool)
    mask[:, 20:] = True
    row = np.asarray(paste(photo, painted, mask, 8))[30, :, 0].astype(int)
    assert (row[:20] == 0).all() and (row[28:] == 255).all()
    assert (np.diff(row[19:29]) > 0).all()


def test_a_changed_pixel_outside_is_counted():
    photo, mask = checkered(1, 40), disc(40, 40, 20, 20, 8)
    changed = np.array(photo)
    changed[0, 0, 2] ^= 1
    changed[20, 20] ^= 255  # inside
    assert changed_outside(photo, Image.fromarray(changed), mask) == 1
    assert changed_outside(photo, photo.resize((41, 40)), mask) == int((~mask).sum())
