"""The drift map is the rise of the score when a patch is repaired, restated slowly; and it points at edits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import checkered
from PIL import Image
from test_trunks import CONFIGS, HAS_CLASS_TOKEN, tiny_trunk
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize import IdentityScorer, InputError, NearIDModel
from nearid_personalize.driftmap import (
    average_grids,
    drift_map,
    drift_maps,
    repair_rises,
    resolve_grids,
    shifted_grids,
)
from nearid_personalize.encoder.trunks import default_preprocessing
from nearid_personalize.miniworld import part_edit, photos
from nearid_personalize.scorer.subject import identity_scores


def tiny_scorer(family="siglip", batch_size=64):
    trunk = tiny_trunk(family)
    torch.manual_seed(1)
    model = NearIDModel.from_vision_model(trunk).reset_head()
    with torch.no_grad():  # a probe that listens to some patches more than to others
        model.head.probe.mul_(30)
    how = default_preprocessing(trunk.config)
    return IdentityScorer(model, how.size, how.mean, how.std, batch_size=batch_size, resample=how.resample)


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def picture():
    return checkered(9)


@pytest.fixture
def references():
    return [checkered(seed) for seed in range(3)]


@pytest.mark.parametrize("aggregation", ["mean", "max", "centroid"])
@torch.no_grad()
def test_a_rise_is_the_score_with_one_patch_repaired_less_the_score_without(family, aggregation, picture, references):
    scorer = tiny_scorer(family)
    model, first = scorer.model, int(family in HAS_CLASS_TOKEN)
    tokens = model.tokens(scorer.preprocessing([picture]))[0]
    theirs = model.tokens(scorer.preprocessing(references))
    embeddings, patches = model.pool(theirs), theirs[:, first:].flatten(0, 1)
    expected = []
    for place in range(first, len(tokens)):
        cosines = [float(F.cosine_similarity(tokens[place], patch, dim=0)) for patch in patches]
        repaired = tokens.clone()
        repaired[place] = patches[cosines.index(max(cosines))]
        before, after = (identity_scores(model.pool(t[None]), embeddings, aggregation) for t in (tokens, repaired))
        expected.append(float(after - before))
    assert max(expected) > 1e-3
    for batch_size in (1, 5, 64):
        found = repair_rises(model, tokens, patches, embeddings, aggregation, batch_size)
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_moved_pictures_move_by_their_offsets():
    picture = torch.rand(3, 16, 16)
    for size, shifts in ((8, 1), (8, 2), (8, 4), (8, 8), (5, 2)):
        moved, offsets = shifted_grids(picture, size, shifts)
        assert len(set(offsets)) == len(offsets) == len(moved) == shifts**2
        for one, (down, right) in zip(moved, offsets, strict=True):
            assert max(abs(down), abs(right)) <= size // 2
            for y, x in ((0, 0), (7, 9), (15, 15), (3, 12)):
                from_y, from_x = min(max(y - down, 0), 15), min(max(x - right, 0), 15)
                assert torch.equal(one[:, y, x], picture[:, from_y, from_x])
    assert torch.equal(shifted_grids(picture, 8, 1)[0][0], picture)


@pytest.mark.parametrize("side", [16, 19])
def test_a_pixel_has_the_mean_of_the_patches_that_cover_it(side):
    _, offsets = shifted_grids(torch.zeros(3, side, side), 8, 4)
    grids = torch.rand(len(offsets), 4)
    heat = average_grids(grids, offsets, 8, side)
    assert heat.shape == (side, side)
    for y in range(side):
        for x in range(side):
            covering = []
            for values, (down, right) in zip(grids, offsets, strict=True):
                row, column = (y + down) // 8, (x + right) // 8
                if 0 <= row < 2 and 0 <= column < 2:
                    covering.append(values[2 * row + column])
            expected = torch.stack(covering).mean() if covering else torch.tensor(0.0)
            assert torch.allclose(heat[y, x], expected)


def patch_means(values, offsets, size):
    """Slowly: the mean over each patch of a map moved by each offset, its edges repeated."""
    last, rows = len(values) - 1, range(len(values) // size)
    means = []
    for down, right in offsets:
        for row in rows:
            for column in rows:
                inside = [
                    values[min(max(row * size + y - down, 0), last), min(max(column * size + x - right, 0), last)]
                    for y in range(size)
                    for x in range(size)
                ]
                means.append(torch.stack(inside).mean())
    return torch.stack(means).view(len(offsets), -1)


def test_resolved_grids_tell_a_small_place_where_the_average_is_wide():
    truth = torch.zeros(32, 32)
    truth[9:12, 21:24] = 1
    _, offsets = shifted_grids(torch.zeros(3, 32, 32), 8, 4)
    grids = patch_means(truth, offsets, 8)
    average, resolved = (method(grids, offsets, 8, 32) for method in (average_grids, resolve_grids))
    nearby = F.max_pool2d(truth[None], 5, 1, 2)[0] > 0
    assert resolved[nearby].sum() / resolved.sum() > 2 * average[nearby].sum() / average.sum()
    assert truth.flatten()[resolved.argmax()] == 1
    assert resolved.min() >= 0
    assert (patch_means(resolved, offsets, 8) - grids).abs().max() < 0.25 * grids.max()
    first_step = F.avg_pool2d(average[None], 3, 1, 1, count_include_pad=False)[0]
    assert torch.allclose(resolve_grids(grids, offsets, 8, 32, steps=1), first_step)


def test_every_family_gives_a_map_with_the_scorers_own_score(family, picture, references):
    scorer = tiny_scorer(family)
    found = drift_map(scorer, picture, references)
    assert found.heat.shape == (scorer.image_size, scorer.image_size) and found.heat.dtype == torch.float32
    assert found.heat.min() >= 0 and found.heat.max() == 1 and found.peak_rise > 1e-3
    subject = scorer.enroll(references)
    assert found.score == pytest.approx(float(scorer.score(picture, subject)), abs=1e-5)
    assert found.reference_index == int((scorer.embed(picture) @ subject.embeddings.T).argmax())


def test_pictures_do_not_mind_each_other_nor_the_order_of_references(references):
    pictures = [checkered(seed) for seed in (7, 8, 9)]
    together = drift_maps(tiny_scorer(), pictures, references, shifts=2)
    for picture, found in zip(pictures, together, strict=True):
        alone = drift_map(tiny_scorer(batch_size=3), picture, references[::-1], shifts=2)
        assert torch.allclose(alone.heat, found.heat, atol=1e-3) and alone.peak_rise == pytest.approx(found.peak_rise)
        assert alone.reference_index == len(references) - 1 - found.reference_index


def test_a_picture_that_is_a_reference_has_no_drift(references):
    found = drift_map(tiny_scorer(), references[1], references, "max", shifts=1)
    assert found.heat.max() == 0 and found.peak_rise == 0
    assert found.score == pytest.approx(1) and found.reference_index == 1


def test_patches_need_not_fill_the_picture(picture, references):
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=37, patch_size=8
    )
    scorer = IdentityScorer(NearIDModel.from_vision_model(SiglipVisionModel(config)), 37, [0.5] * 3, [0.5] * 3)
    heat = drift_map(scorer, picture, references, shifts=1).heat
    assert heat.shape == (37, 37) and heat.max() == 1
    assert heat[33:].abs().max() == 0 and heat[:, 33:].abs().max() == 0


def test_paths_arrays_and_tensors_are_pictures_too(photo_dir, references):
    scorer = tiny_scorer()
    paths = sorted(photo_dir.iterdir())
    (expected,) = drift_maps(scorer, paths[3], paths[:3], shifts=2)
    batch = scorer.preprocessing([Image.open(path) for path in paths]) / 2 + 0.5
    found = drift_map(scorer, batch[3], batch[:3], shifts=2)
    assert torch.allclose(found.heat, expected.heat, atol=1e-2)


def test_the_peak_and_the_heat_at_another_size(picture, references):
    found = drift_map(tiny_scorer(), picture, references, shifts=2)
    enlarged = found.at(96, 64)
    assert enlarged.shape == (64, 96) and enlarged.min() >= 0 and enlarged.max() <= 1
    x, y = found.peak
    assert found.heat[int(y * 32), int(x * 32)] == 1
    assert enlarged[int(y * 64), int(x * 96)] > 0.7
    assert torch.equal(found.at(32, 32), found.heat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images: empty"),
        ({"references": []}, "references: empty"),
        ({"references": "nowhere.png"}, "'nowhere.png': no such file"),
        ({"shifts": 0}, "shifts: 0"),
        ({"shifts": 9}, "patch size, 8"),
        ({"aggregation": "median"}, "'median'"),
    ],
)
def test_wrong_input_is_told(change, message, picture, references):
    with pytest.raises(InputError, match=message):
        drift_maps(tiny_scorer(), **({"images": [picture], "references": references} | change))


def test_heat_gathers_on_edited_accessories():
    scorer = IdentityScorer.from_pretrained("miniworld")
    gathered, rises = [], []
    for index in range(6):
        edit = part_edit("val", index, "accessory_color")
        references = [edit.originals[1].image, *(shot.image for shot, _ in photos(edit.pet, 3, wide=True))]
        edited, original = drift_maps(scorer, [edit.edited[0].image, edit.originals[0].image], references)
        heat = edited.heat[torch.from_numpy(edit.part_masks[0])]
        gathered.append(float(heat.mean() / edited.heat.mean()))
        rises.append(edited.peak_rise > original.peak_rise)
    assert sum(ratio > 3 for ratio in gathered) >= 4
    assert sum(rises) >= 4
