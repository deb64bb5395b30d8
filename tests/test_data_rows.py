"""Rows: pictures decoded on demand, masks, oracle, splits, and what keeps them apart."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image

from nearid_personalize.data import Row, Rows, check_disjoint, hash_split
from nearid_personalize.errors import InputError


def rows_of(splits: dict[str, str | None], name: str = "data") -> Rows:
    """A row per id, without pictures."""
    ids = tuple(splits)
    return Rows(name, ids, tuple(splits.values()), (), [Row(id=i, views=()) for i in ids].__getitem__)


def one_line(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_pictures_are_decoded_when_asked_for_and_not_before(tmp_path: Path):
    checkered(1).save(tmp_path / "a.png")
    asked = []
    row = Row(
        id="r",
        views=(tmp_path / "a.png", None, lambda: asked.append(1) or checkered(2), b"rubbish"),
        distractors={"flux": (checkered(3),)},
    )
    assert asked == []
    assert np.array_equal(row.view(0), checkered(1)) and row.view(1) is None
    assert np.array_equal(row.view(2), checkered(2)) and asked == [1]
    assert np.array_equal(row.distractor("flux", 0), checkered(3))
    assert row.distractor("flux", 1) is None and row.distractor("qwen", 0) is None
    one_line(lambda: row.view(3), "row 'r'", "view 4", "not a picture")


def test_masks_are_pixels_above_zero_and_a_distractor_borrows_its_view_s():
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2], mask[3, 5] = 255, 1
    other = np.ones((4, 6), bool)
    row = Row(id="r", views=(b"", b""), masks=(Image.fromarray(mask),), distractor_masks={"own": (other,)})
    assert torch.equal(row.mask(0), torch.from_numpy(mask > 0)) and row.mask(1) is None
    assert torch.equal(row.distractor_mask("flux", 0), torch.from_numpy(mask > 0))
    assert row.distractor_mask("own", 0).all() and row.distractor_mask("flux", 1) is None


def test_the_oracle_is_the_share_of_the_subject_that_stays():
    subject, part = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    subject[:8], part[:2] = True, True
    row = Row(id="r", views=(b"", b""), masks=(subject, subject), part_masks=(part,))
    assert row.oracle is not None
    assert row.oracle[0] == pytest.approx(1 - 20 / 80) and np.isnan(row.oracle[1])
    assert replace(row, part_masks=()).oracle is None


def test_rows_index_slice_and_select_by_split():
    rows = rows_of({"a": "train", "b": None, "c": "test", "d": "train"})
    assert [row.id for row in rows] == list("abcd") and rows[-1].id == "d" and len(rows) == 4
    assert rows[1:].ids == ("b", "c", "d") and rows[1:][1].id == "c"
    assert rows.split_names == ("train", "test") and rows[2].split == "test"
    train = rows.split("train")
    assert train.ids == ("a", "d") and train[1].id == "d" and train[1].split == "train"
    assert train[1:].ids == ("d",)
    with pytest.raises(IndexError):
        rows[4]
    one_line(lambda: rows.split("val"), "data", "'val'", "train, test")
    one_line(lambda: rows.split("holdout"), "holdout", "train, val, test")
    one_line(lambda: rows_of({"a": None}).split("train"), "data", "hash")
    assert "'a'" not in repr(rows)


def test_an_id_may_occur_once_only():
    one_line(lambda: Rows("d", ("a", "b", "a"), (None,) * 3, (), [].__getitem__), "d:", "'a'", "twice")


def test_hash_splits_depend_on_the_id_alone_and_are_80_10_10():
    ids = [f"id-{n}" for n in range(4000)]
    shares = [sum(hash_split(i) == name for i in ids) / len(ids) for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    rows = rows_of(dict.fromkeys(ids[:50]) | {"known": "test"}).hash_splits()
    assert [row.split for row in rows] == [*(hash_split(i) for i in ids[:50]), "test"]
    one, other, third = (set(rows.split(name).ids) for name in ("train", "val", "test"))
    assert not one & other and not one & third and not other & third and len(one | other | third) == 51


def test_training_on_what_is_held_out_is_refused():
    train = rows_of({"a": "train", "b": None}, "mine")
    check_disjoint(train)
    check_disjoint(train, rows_of({"c": "test"}), rows_of({"d": None}))
    one_line(lambda: check_disjoint(train, rows_of({"b": "test"}, "yours")), "mine", "'b'", "yours")
    one_line(lambda: check_disjoint(rows_of({"a": "train", "x": "test"})), "'x'", "'test'")
    one_line(lambda: check_disjoint(rows_of({"y": "val"})), "'y'", "'val'")


def test_importing_the_room_does_not_import_datasets():
    code = "import sys, nearid_personalize.data, nearid_personalize.miniworld; print('datasets' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
