"""Augmentation: what each kind does, that masks move with pictures, and that a seed decides everything."""

import random
from dataclasses import fields, replace

import pytest
import torch
from test_data_rows import one_line

from nearid_personalize.data import OFF, Augmentation, augment


def picture(size: int = 32) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))


def disc(size: int = 32) -> torch.Tensor:
    """Bool: an off-centre disc."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (x - size * 0.4) ** 2 + (y - size * 0.55) ** 2 < (size / 4) ** 2


def test_off_changes_not_a_bit():
    assert torch.equal(augment(picture(), None, OFF, random.Random(0)), picture())


def test_the_same_generator_gives_the_same_pixels_and_another_one_others():
    one, other, third = (augment(picture(), disc(), Augmentation(), random.Random(s)) for s in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
    assert one.min() >= 0 and one.max() <= 1 and one.dtype == torch.float32


def test_strengths_do_not_change_each_other_s_draws():
    moves = replace(OFF, flip=0.5, shift=0.1, scale=0.1)
    for seed in range(5):
        both = augment(disc().float().expand(3, -1, -1), None, replace(moves, jitter=0.1), random.Random(seed))
        alone = augment(disc().float().expand(3, -1, -1), None, moves, random.Random(seed))
        assert ((both > 0.5) == (alone > 0.5)).float().mean() > 0.97


def test_outside_a_mask_is_black_and_inside_nothing_changes():
    image = augment(picture(), disc(), OFF, random.Random(0))
    assert not image[:, ~disc()].any() and torch.equal(image[:, disc()], picture()[:, disc()])


def test_flipping_mirrors_picture_and_mask():
    image = augment(picture(), disc(), replace(OFF, flip=1), random.Random(0))
    assert torch.allclose(image, (picture() * disc()).flip(-1), atol=1e-5)


def moved_disc(size: int, strength: Augmentation, seed: int) -> torch.Tensor:
    """Bool: where the subject's mask goes, seen as what stays of a white picture."""
    return augment(torch.ones(3, size, size), disc(size), strength, random.Random(seed))[0] > 0


def test_the_mask_moves_with_the_picture():
    moves = replace(OFF, flip=0.5, shift=0.1, scale=0.1)
    places = set()
    for seed in range(20):
        subject = disc(64).float().expand(3, -1, -1)  # white on black: the picture shows its own mask
        shown = augment(subject, None, moves, random.Random(seed))[0] > 0.5
        mask = moved_disc(64, moves, seed)
        assert (shown != mask).float().mean() < 0.01
        places.add(tuple(mask.nonzero().float().mean(dim=0).round().tolist()))
    assert len(places) > 10


def test_shift_and_scale_stay_in_their_ranges():
    size, still = 200, disc(200)
    masks = torch.stack([moved_disc(size, replace(OFF, shift=0.1, scale=0.1), seed) for seed in range(40)])
    centres = torch.stack([mask.nonzero().float().mean(dim=0) for mask in masks]) / size
    away = (centres - still.nonzero().float().mean(dim=0) / size).abs().amax()
    radii = (masks.sum(dim=(1, 2)) / still.sum()).sqrt()
    assert 0.08 < away <= 0.1 + 0.1 * 0.1 + 0.01  # scaling about the middle moves an off-centre disc a little further
    assert 0.89 < radii.min() < 0.93 and 1.07 < radii.max() < 1.11


def test_gaps_continue_the_edge_and_are_background():
    moves = replace(OFF, shift=0.1, scale=0.1)
    grey, everywhere = torch.full((3, 20, 20), 0.25), torch.ones(20, 20, dtype=torch.bool)
    assert torch.allclose(augment(grey, None, moves, random.Random(3)), grey)
    assert (augment(grey, everywhere, moves, random.Random(3)) == 0).any()


def test_jitter_changes_colours_and_no_geometry():
    image = augment(picture(), None, replace(OFF, jitter=0.2), random.Random(1))
    assert not torch.equal(image, picture())
    assert torch.corrcoef(torch.stack([image.flatten(), picture().flatten()]))[0, 1] > 0.95
    grey = augment(torch.full((3, 4, 4), 0.5), None, replace(OFF, jitter=0.2), random.Random(1))
    assert torch.allclose(grey, grey[0, 0, 0].expand_as(grey), atol=1e-6)  # grey has no contrast and no saturation


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_impossible_strengths_are_refused_by_their_flag(name: str):
    flag = f"--{name.replace('_', '-')}"
    one_line(lambda: replace(OFF, **{name: -0.1}), flag, "-0.1")
    one_line(lambda: replace(OFF, **{name: 1.5}), flag, "1.5")


def test_a_picture_may_not_shrink_to_nothing():
    one_line(lambda: Augmentation(scale=1), "--scale")
