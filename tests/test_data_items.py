"""Rows as tensors: slots and their padding, the source of distractors, determinism, the mini-world's exact pixels."""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import checkered
from test_data_rows import one_line
from torch.utils.data import DataLoader

from nearid_personalize.data import OFF, Augmentation, IdentityDataset, Row, Rows, RowStream, load_rows
from nearid_personalize.images import preprocess
from nearid_personalize.miniworld import identity_row, part_edit, part_edits, rows


def flat(value: int) -> np.ndarray:
    """An 8 x 8 picture of one grey, by which it is recognised."""
    return np.full((8, 8, 3), value, np.uint8)


def value(picture: torch.Tensor) -> int:
    return round(picture.mean().item() * 255)


def collection(*rows: Row) -> Rows:
    sources = dict.fromkeys(name for row in rows for name in row.distractors)
    return Rows("data", tuple(row.id for row in rows), (None,) * len(rows), tuple(sources), rows.__getitem__)


TWO_SOURCES = collection(
    Row(
        id="r",
        views=(flat(1), flat(2), None),
        distractors={"flux": (flat(11), flat(12), flat(13)), "qwen": (None, flat(22), None), "none": (None,)},
    )
)


def test_absent_slots_are_zeros_and_false():
    item = IdentityDataset(TWO_SOURCES, size=8, num_slots=4, sources=("qwen",))[0]
    assert item["views"].shape == item["distractors"].shape == (4, 3, 8, 8)
    assert item["view_mask"].tolist() == [True, True, False, False]
    assert item["distractor_mask"].tolist() == [False, True, False, False]
    assert [value(picture) for picture in item["views"]] == [1, 2, 0, 0]
    assert [value(picture) for picture in item["distractors"]] == [0, 22, 0, 0]
    assert item["views"].dtype == torch.float32 and item["view_mask"].dtype == torch.bool


def shown_distractors(dataset, variants=200):
    """How often each combination of distractors is shown."""
    shown = Counter()
    for variant in range(variants):
        shown[tuple(value(picture) for picture in replace(dataset, variant=variant)[0]["distractors"])] += 1
    return shown


def test_a_source_per_row_and_gaps_filled_from_the_others():
    dataset = IdentityDataset(TWO_SOURCES, size=8, source_per="row")
    seen = shown_distractors(dataset)
    assert set(seen) == {(11, 12, 13), (11, 22, 13)} and min(seen.values()) > 60
    one, other = (replace(dataset, sources=names) for names in (("flux", "qwen"), ("qwen", "flux")))
    for variant in range(20):  # the order in which sources are listed decides nothing
        items = [replace(listed, variant=variant)[0] for listed in (one, other)]
        assert torch.equal(items[0]["distractors"], items[1]["distractors"])
    assert set(shown_distractors(replace(dataset, sources=("flux",)), 20)) == {(11, 12, 13)}


def test_a_source_per_slot_and_as_many_sources_as_there_are():
    values = {"a": (1, 2, 3), "b": (11, 12, 13), "c": (21, 22, 23)}
    row = Row(id="r", views=(flat(100),) * 3, distractors={name: tuple(map(flat, v)) for name, v in values.items()})
    dataset = IdentityDataset(collection(row), size=8)
    seen = shown_distractors(dataset, 300)
    assert len(seen) == 6 and min(seen.values()) > 25
    assert all({distractor // 10 for distractor in shown} == {0, 1, 2} for shown in seen)
    two = shown_distractors(replace(dataset, sources=("a", "b")), 40)
    assert set(two) == {(1, 12, 3), (11, 2, 13)}
    assert dataset.num_pictures(0) == 6 and replace(dataset, num_slots=2).num_pictures(0) == 4
    gaps = IdentityDataset(TWO_SOURCES, size=8, sources=("qwen",))
    assert gaps.num_pictures(0) == 3  # two views, one distractor


def test_rows_with_more_views_than_slots_show_others_in_each_variant():
    row = Row(id="r", views=(flat(1), None, flat(2), flat(3), flat(4)), distractors={"d": tuple(map(flat, range(5)))})
    dataset = IdentityDataset(collection(row), size=8, num_slots=2)
    pairs = set()
    for variant in range(60):
        item = replace(dataset, variant=variant)[0]
        assert item["view_mask"].all()
        views, distractors = ([value(p) for p in item[name]] for name in ("views", "distractors"))
        assert distractors == [{1: 0, 2: 2, 3: 3, 4: 4}[view] for view in views]  # each on its view's background
        pairs.add(tuple(views))
    assert pairs == {(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}


def test_other_shapes_are_squashed_as_an_encoder_squashes_them():
    wide = checkered(1, 64).resize((96, 40))
    item = IdentityDataset(collection(Row(id="r", views=(wide,))), size=32)[0]
    assert torch.equal(item["views"][0], preprocess([wide], 32, (0, 0, 0), (1, 1, 1))[0])
    assert not item["distractor_mask"].any()


def test_an_item_depends_on_seed_variant_and_row_alone():
    augmented = IdentityDataset(rows("train", 3), size=48, augmentation=Augmentation())
    item = augmented[1]
    assert torch.equal(item["views"], augmented.item(rows("train", 2)[1])["views"])
    assert torch.equal(item["distractors"], replace(augmented, rows=augmented.rows[1:])[0]["distractors"])
    for changed in (replace(augmented, variant=1), replace(augmented, seed=1)):
        assert not torch.equal(item["views"], changed[1]["views"])
        assert not torch.equal(item["distractors"], changed[1]["distractors"])


def test_workers_and_pickling_change_nothing():
    dataset = IdentityDataset(rows("train", 4)[1:], size=16, augmentation=Augmentation())
    alone = torch.stack([item["views"] for item in dataset])
    (batch,) = DataLoader(dataset, batch_size=3, num_workers=1)
    assert torch.equal(batch["views"], alone)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2]["distractors"], dataset[2]["distractors"])


def test_a_stream_gives_the_items_of_its_rows_loaded():
    world = rows("val", 2)
    loaded = IdentityDataset(world, size=16, augmentation=Augmentation())
    streamed = replace(loaded, rows=RowStream("stream", world.sources, world.__iter__))
    for one, other in zip(loaded, streamed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for ask in (len, lambda stream: stream[0]):
        with pytest.raises(AssertionError, match="stream"):
            ask(streamed)


def test_backgrounds_go_black_as_often_as_said():
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    row = Row(id="r", views=(flat(200),) * 2, distractors={"d": (flat(100),) * 2}, masks=(mask,))
    often = replace(OFF, anchor_blackout=0.3, positive_blackout=0.3, distractor_blackout=0.6)
    dataset = IdentityDataset(collection(row), size=16, num_slots=2, augmentation=often)
    items = [replace(dataset, variant=k)[0] for k in range(400)]
    for name, share in (("views", 0.3), ("distractors", 0.6)):
        black = [not item[name][0, :, 8:].any() for item in items]
        assert np.mean(black) == pytest.approx(share, abs=0.08)
        assert all(item[name][0, :, :8].all() and item[name][1].all() for item in items)  # the second has no mask


def test_anchors_and_positives_are_black_as_often_as_the_paper_says():
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    row = Row(id="r", views=(flat(200), None, flat(190), flat(180), flat(170)), masks=(mask, None, mask, None, mask))
    often = replace(Augmentation(), jitter=0, flip=0, shift=0, scale=0)
    dataset = IdentityDataset(collection(row), size=8, num_slots=5, augmentation=often)
    generator, black = torch.Generator().manual_seed(0), {True: [], False: []}
    anchors = Counter()
    for variant in range(1500):
        drawn = replace(dataset, variant=variant)
        weights = drawn.anchor_weights(0)
        anchor = int(torch.multinomial(weights, 1, generator=generator))
        anchors[anchor] += 1
        views = drawn[0]["views"]
        for slot in (0, 2, 4):  # those with a mask
            black[slot == anchor].append(not views[slot, :, 4:].any())
        assert weights[1] == 0 and views[3, :, 4:].all()
    assert np.mean(black[True]) == pytest.approx(0.5, abs=0.06)  # 1,125 draws: four standard errors
    assert np.mean(black[False]) == pytest.approx(0.2, abs=0.03)
    assert min(anchors.values()) > 320 and set(anchors) == {0, 2, 3, 4}
    # One variant alone tells which anchor it was made for only through what is black.
    even = replace(dataset, augmentation=replace(often, anchor_blackout=0.2))
    assert even.anchor_weights(0).tolist() == [1, 0, 1, 1, 1]


def test_blackout_uses_each_picture_s_own_mask():
    black = replace(OFF, anchor_blackout=1, positive_blackout=1, distractor_blackout=1)
    world = rows("test", 1)
    item, row = IdentityDataset(world, size=64, augmentation=black)[0], world[0]
    for slot in range(3):
        plain = IdentityDataset(world, size=64)[0]
        for kind, mask in (("views", row.mask(slot)), ("distractors", row.distractor_mask("similar", slot))):
            assert torch.equal(item[kind][slot], plain[kind][slot] * mask)


@pytest.mark.parametrize(("split", "options"), [("train", {}), ("val", {"num_views": 2, "wide": False, "seed": 3})])
def test_rows_of_the_mini_world_hold_its_renderings_to_the_bit(split, options):
    num_views = options.get("num_views", 3)
    item = IdentityDataset(rows(split, 2, **options), size=64, num_slots=num_views)[1]
    row = identity_row(split, 1, **options)
    for kind, renderings in (("views", row.views), ("distractors", row.distractors)):
        assert item[kind].shape == (num_views, 3, 64, 64)
        for pixels, rendering in zip(item[kind], renderings, strict=True):
            assert torch.equal(pixels.mul(255).round().byte().permute(1, 2, 0), torch.from_numpy(rendering.image))


def test_sources_of_the_mini_world_share_their_views():
    world = rows("train", 2, sources={"near": (1, 1), "far": (5, 8)})
    near, far = (IdentityDataset(world, size=64, sources=(name,))[1] for name in ("near", "far"))
    assert torch.equal(near["views"], far["views"]) and not torch.equal(near["distractors"], far["distractors"])
    distance = [(item["views"] - item["distractors"]).abs().mean() for item in (near, far)]
    assert distance[0] < distance[1]
    assert not IdentityDataset(rows("train", 1, sources={}), size=64)[0]["distractor_mask"].any()


def test_part_edits_are_rows_with_an_oracle():
    world, edit = part_edits("test", 2), part_edit("test", 1)
    row = world[1]
    assert row.oracle == pytest.approx(edit.oracle) and row.category == edit.pet.category and row.split == "test"
    assert np.array_equal(row.distractor("edit", 0), edit.edited[0].image)
    assert torch.equal(row.part_mask(1), torch.from_numpy(edit.part_masks[1]))
    assert IdentityDataset(world, size=64, num_slots=2)[0]["distractor_mask"].all()


def test_what_cannot_be_is_refused():
    world = rows("train", 1)
    one_line(lambda: IdentityDataset(world, size=0), "--size", "0")
    one_line(lambda: IdentityDataset(world, size=8, num_slots=0), "--num-slots", "0")
    one_line(lambda: IdentityDataset(world, size=8, sources=("flux",)), "'flux'", "similar")
    one_line(lambda: IdentityDataset(rows("train", 0), size=8), "no rows")
    one_line(lambda: rows("nope", 1), "nope", "train")


def test_view_mask_is_known_without_decoding():
    unreadable = collection(Row(id="a", views=(b"no picture", None, b"none")), Row(id="b", views=(b"x",)))
    dataset = IdentityDataset(unreadable, size=8, num_slots=3)
    assert dataset.view_mask.tolist() == [[True, False, True], [True, False, False]]
    many = collection(Row(id="a", views=(flat(1), None, flat(3), flat(4), flat(5))))
    for variant in range(3):
        dataset = IdentityDataset(many, size=8, num_slots=3, variant=variant)
        assert dataset.view_mask[0].tolist() == dataset[0]["view_mask"].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 9},
        {"seed": 1},
        {"variant": 1},
        {"sources": ("flux",)},
        {"source_per": "row"},
        {"augmentation": Augmentation()},
    ],
)
def test_fingerprint_changes_with_every_choice(change):
    dataset = IdentityDataset(TWO_SOURCES, size=8)
    assert dataset.fingerprint == IdentityDataset(TWO_SOURCES, size=8).fingerprint
    assert replace(dataset, **change).fingerprint != dataset.fingerprint


def test_fingerprint_changes_with_the_data(tmp_path):
    def folder_print():
        return IdentityDataset(load_rows(tmp_path), size=8).fingerprint

    (tmp_path / "rex").mkdir()
    for number in range(2):
        checkered(number).save(tmp_path / "rex" / f"{number}.png")
    before = folder_print()
    assert folder_print() == before
    checkered(7, size=64).save(tmp_path / "rex" / "1.png")
    assert folder_print() != before
    worlds = [rows("train", 3, sources={"similar": changes}) for changes in ((2, 4), (2, 3))]
    assert worlds[0].fingerprint != worlds[1].fingerprint != rows("train", 3, seed=1).fingerprint
