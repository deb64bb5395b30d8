"""Where rows come from: every layout, alike from disk and as a stream, and every refusal."""

import io
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import checkered
from hub_server import HubServer
from PIL import Image
from test_data_rows import one_line

from nearid_personalize.data import Row, check_disjoint, hash_split, load_rows, split_repeats, stream_rows
from nearid_personalize.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cached in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def png(seed: int, size: int = 16) -> dict[str, Any]:
    buffer = io.BytesIO()
    checkered(seed, size).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mask_png(width: int) -> dict[str, Any]:
    """A 16 x 16 mask whose first `width` columns are the subject."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :width] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, columns: dict[str, Sequence[Any]]) -> Path:
    """A parquet file; columns of dictionaries are pictures."""
    pictures = {n for n, cells in columns.items() if any(isinstance(cell, dict) for cell in cells)}
    kinds = {n: datasets.Image() if n in pictures else datasets.Value(_kind(cells)) for n, cells in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(path)
    return path


def _kind(cells: Sequence[Any]) -> str:
    names = {int: "int64", bytes: "binary"}
    return next((names[type(cell)] for cell in cells if type(cell) in names), "string")


def views(ids: Sequence[str], spelling: str = "images", **more: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Columns of NearID's layout: three views, the third one absent in every other row."""
    pictures = {f"{spelling}{k}": [png(10 * n + k) for n in range(len(ids))] for k in (1, 2)}
    third = [None if n % 2 else png(10 * n + 3) for n in range(len(ids))]
    masks = {f"masks{k}": [mask_png(4 * k)] * len(ids) for k in (1, 2, 3)}
    return {"id": ids, "category": ["cup"] * len(ids), **pictures, f"{spelling}3": third, **masks, **more}


def distractors(ids: Sequence[str], seed: int = 500) -> dict[str, Sequence[Any]]:
    return {"id": ids} | {f"nimg{k}": [png(seed + 10 * n + k) for n in range(len(ids))] for k in (1, 2, 3)}


def both_ways(*arguments: Any, **options: Any) -> list[Row]:
    """The rows as loaded, after checking that a stream brings the same ones."""
    loaded, streamed = load_rows(*arguments, **options), stream_rows(*arguments, **options)
    assert loaded.sources == streamed.sources
    found = list(loaded)
    for one, other in zip(found, streamed, strict=True):
        assert (one.id, one.split, one.category) == (other.id, other.split, other.category)
        assert np.array_equal(one.view(0), other.view(0)) and (one.mask(0) is None) == (other.mask(0) is None)
        for source in loaded.sources:
            assert np.array_equal(one.distractor(source, 0), other.distractor(source, 0))
    return found


# --- NearID's layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["images", "img"])
def test_views_and_sets_of_distractors_are_joined_by_id(tmp_path: Path, spelling: str):
    ids = ["x", "y", "z"]
    place = write(tmp_path / "NearID.parquet", views(ids, spelling))
    flux = write(tmp_path / "NearID-Flux/data/train-00000-of-00001.parquet", distractors(ids)).parents[1]
    qwen = write(tmp_path / "NearID-Qwen.parquet", distractors(ids, 700))
    found = both_ways(place, [flux, qwen])
    assert [row.id for row in found] == ids
    row = found[1]
    assert row.category == "cup" and row.split is None
    assert list(row.distractors) == ["Flux", "Qwen"]
    assert np.array_equal(row.view(1), checkered(12, 16)) and row.views[2] is None and found[0].views[2] is not None
    assert np.array_equal(row.distractor("Flux", 2), checkered(513, 16))
    assert np.array_equal(row.distractor("Qwen", 0), checkered(711, 16))
    mask = row.mask(1)
    assert mask is not None and mask[:, :8].all() and not mask[:, 8:].any()


def test_a_folder_of_copies_is_one_data_set_with_its_sources(tmp_path: Path):
    ids = ["x", "y", "z"]
    write(tmp_path / "all/NearID/data/train-00000-of-00001.parquet", views(ids))
    write(tmp_path / "all/NearID-Flux/data/train-00000-of-00001.parquet", distractors(ids))
    for shard, some in enumerate((["x"], ["y", "z"])):
        write(tmp_path / f"all/NearID-SDXL-0000{shard}-of-00002.parquet", distractors(some, 600 + 100 * shard))
    found = both_ways(tmp_path / "all")
    assert sorted(found[0].distractors) == ["Flux", "SDXL"]
    assert np.array_equal(found[2].distractor("SDXL", 0), checkered(711, 16))


def test_columns_that_leave_a_number_out_end_there(tmp_path: Path):
    columns = views(["x"])
    del columns["masks2"]
    row = load_rows(write(tmp_path / "v.parquet", columns))[0]
    assert row.mask(0) is not None and row.mask(1) is None and row.mask(2) is None and row.view(2) is not None


@pytest.mark.parametrize(
    "others, words",
    [
        (["x", "z", "y"], ("row 1", "'y'", "'z'")),
        (["x", "y"], ("row 2", "'z'", "ended")),
        (["x", "z"], ("row 1", "'y'", "'z'")),
        (["x", "y", "z", "w"], ("row 3", "'w'", "ended")),
        (["x", "y", "y"], ("row 2", "'z'", "'y'")),
    ],
)
def test_ids_that_differ_are_named_with_both_files(tmp_path: Path, others: list[str], words: tuple[str, ...]):
    place = write(tmp_path / "views.parquet", views(["x", "y", "z"]))
    flux = write(tmp_path / "flux.parquet", distractors(others))
    for read in (load_rows, lambda *paths: list(stream_rows(*paths))):
        one_line(lambda read=read: read(place, [flux]), str(place), str(flux), *words)


def test_repeated_and_missing_ids_are_refused(tmp_path: Path):
    twice = write(tmp_path / "twice.parquet", views(["x", "y", "x"]))
    without = write(tmp_path / "without.parquet", views(["x", None, "z"]))
    for read in (load_rows, lambda path: list(stream_rows(path))):
        one_line(lambda read=read: read(twice), str(twice), "'x'", "twice")
        one_line(lambda read=read: read(without), str(without), "row 1", "no id")
    columns = distractors(["x", "y", "z"])
    nameless = write(tmp_path / "nameless.parquet", {name: columns[name] for name in ("nimg1", "nimg2")})
    place = write(tmp_path / "views.parquet", views(["x", "y", "z"]))
    one_line(lambda: load_rows(place, [nameless]), str(nameless), "id")


def test_wrong_columns_and_places_are_told(tmp_path: Path):
    place = write(tmp_path / "views.parquet", views(["x"]))
    flux = write(tmp_path / "flux.parquet", distractors(["x"]))
    wrong = write(tmp_path / "wrong.parquet", {"id": ["x"], "picture": [png(1)]})
    numbers = write(tmp_path / "numbers.parquet", {"id": ["x"], "images1": [3]})
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "note.txt").write_text("hello")
    one_line(lambda: load_rows(wrong), str(wrong), "picture", "images1")
    one_line(lambda: load_rows(numbers), str(numbers), "images1", "int64")
    one_line(lambda: load_rows(flux), str(flux), "without views")
    one_line(lambda: load_rows(place, [place]), str(place), "no distractors")
    one_line(lambda: load_rows(place, [flux, flux]), str(flux), "'flux'", "rename")
    one_line(lambda: load_rows(tmp_path / "broken.parquet"), "broken.parquet", "parquet")
    one_line(lambda: load_rows(tmp_path / "note.txt"), "note.txt", "parquet")
    one_line(lambda: load_rows(tmp_path / "nowhere"), "nowhere", "no such")
    one_line(lambda: load_rows("nobody/nothing"), "nobody/nothing", "Hub")
    one_line(lambda: load_rows(place, split="training"), "training", "train, val, test")


def test_a_damaged_picture_is_named_by_its_row_when_it_is_decoded(tmp_path: Path):
    columns = views(["x", "y"])
    columns["images2"] = [columns["images2"][0], {"bytes": columns["images2"][1]["bytes"][:60], "path": None}]
    found = both_ways(write(tmp_path / "v.parquet", columns))
    assert found[1].view(0) is not None
    one_line(lambda: found[1].view(1), "row 'y'", "view 2")


def test_cells_may_be_bytes_or_paths(tmp_path: Path):
    checkered(5).save(tmp_path / "p.png")
    cells = {"id": ["x", "y"], "images1": [png(4)["bytes"], None], "images2": [None, str(tmp_path / "p.png")]}
    found = load_rows(write(tmp_path / "v.parquet", cells))
    assert np.array_equal(found[0].view(0), checkered(4, 16)) and found[0].view(1) is None
    assert found[1].view(0) is None and np.array_equal(found[1].view(1), checkered(5))


# --- splits ----------------------------------------------------------------------------------------------------------


def test_the_split_column_decides_and_splits_never_mix(tmp_path: Path):
    ids = list("abcde")
    place = write(tmp_path / "v.parquet", views(ids, split=["train", "test", "validation", "train", "holdout"]))
    flux = write(tmp_path / "flux.parquet", distractors(ids))
    train = both_ways(place, [flux], split="train")
    assert [row.id for row in train] == ["a", "d"]
    assert np.array_equal(train[1].distractor("flux", 0), checkered(531, 16))
    assert [row.id for row in both_ways(place, split="val")] == ["c"]
    assert [row.split for row in both_ways(place, hash_splits=True)] == ["train", "test", "val", "train", "holdout"]
    check_disjoint(load_rows(place, split="train"), load_rows(place, split="test"))
    one_line(lambda: check_disjoint(load_rows(place)), "'b'", "'test'")


def test_files_named_after_splits_tell_them(tmp_path: Path):
    for name, ids in (("train", "ab"), ("test", "c")):
        write(tmp_path / f"d/data/{name}-00000-of-00001.parquet", views(list(ids)))
    assert {row.id: row.split for row in both_ways(tmp_path / "d")} == {"a": "train", "b": "train", "c": "test"}
    assert load_rows(tmp_path / "d", split="test").ids == ("c",)
    alone = write(tmp_path / "e/train-00000-of-00001.parquet", views(["a"]))
    one_line(lambda: load_rows(alone, split="train"), str(alone), "hash")
    one_line(lambda: list(stream_rows(alone, split="train")), str(alone), "'a'", "hash")
    one_line(lambda: list(stream_rows(tmp_path / "d", split="val")), "'val'", "test, train")


def test_data_without_splits_is_split_by_hash_only_when_asked(tmp_path: Path):
    ids = [f"id-{n}" for n in range(40)]
    place = write(tmp_path / "v.parquet", {"id": ids, "images1": [png(n) for n in range(40)]})
    one_line(lambda: load_rows(place, split="train"), "hash")
    for name in ("train", "val", "test"):
        wanted = [i for i in ids if hash_split(i) == name]
        assert [row.id for row in both_ways(place, split=name, hash_splits=True)] == wanted


def test_the_published_nearid_is_split_by_position(tmp_path: Path):
    count = 18_786 + 100 + 500
    cells = {"id": [f"{n}" for n in range(count)], "images1": [png(0)] + [None] * (count - 1)}
    place = write(tmp_path / "NearID/data/train-00000-of-00001.parquet", {**cells, "split": ["train"] * count})
    found = load_rows(place.parents[1])
    assert [found.splits.index(name) for name in ("train", "val", "test")] == [0, 18_786, 18_886]
    assert found.split("test").ids[0] == "18886" and len(found.split("test")) == 500
    streamed = [row.id for row in stream_rows(place.parents[1], split="test")]
    assert streamed == list(found.split("test").ids)
    named = ["test"] * 2 + ["val"] + ["train"] * (count - 3)
    place = write(tmp_path / "named.parquet", {**cells, "split": named})
    assert list(load_rows(place).splits) == named


# --- Mind-the-Glitch, own exports, save_to_disk ----------------------------------------------------------------------


def test_mind_the_glitch(tmp_path: Path):
    cells = {
        f"image_{k}_{what}": [make(10 * n + k) for n in range(2)]
        for k in (1, 2)
        for what, make in (
            ("original", png),
            ("inpainted", lambda seed: png(seed + 100)),
            ("object_mask", lambda seed: mask_png(8)),
            ("part_mask", lambda seed: mask_png(2 * (seed % 10))),
        )
    }
    for name in ("train", "test"):
        write(tmp_path / f"mtg/{name}-00000-of-00001.parquet", cells)
    found = both_ways(tmp_path / "mtg", split="test")
    assert [row.id for row in found] == ["mtg-test-000000", "mtg-test-000001"]  # it has no ids of its own
    assert np.array_equal(found[1].view(1), checkered(12, 16))
    assert np.array_equal(found[1].distractor("mtg", 0), checkered(111, 16))
    assert found[0].oracle == pytest.approx((1 - 2 / 8, 1 - 4 / 8))


def test_table_rows_reach_worker_processes(tmp_path: Path):
    place = write(tmp_path / "v.parquet", views(["x", "y", "z"], split=["test", "train", "train"]))
    found = load_rows(place, [write(tmp_path / "flux.parquet", distractors(["x", "y", "z"]))], split="train")
    sent = pickle.loads(pickle.dumps(found))  # what a loader does where processes are spawned
    assert [row.id for row in sent] == ["y", "z"]
    assert np.array_equal(sent[1].distractor("flux", 0), found[1].distractor("flux", 0))


def test_local_copies_made_by_datasets(tmp_path: Path):
    table = datasets.Dataset.from_parquet(str(write(tmp_path / "v.parquet", views(["x", "y"]))))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table.select([0]), "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert {row.id: row.split for row in both_ways(tmp_path / "one")} == {"x": None, "y": None}
    assert {row.id: row.split for row in both_ways(tmp_path / "two")} == {"x": "train", "y": "test"}


def test_without_datasets_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = write(tmp_path / "v.parquet", views(["x"]))
    monkeypatch.delitem(sys.modules, "nearid_personalize.data.tables", raising=False)
    monkeypatch.delattr("nearid_personalize.data.tables", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    one_line(lambda: load_rows(place), "datasets", "nearid-personalize[train]")


# --- plain folders ---------------------------------------------------------------------------------------------------


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        checkered(sum(map(ord, str(folder.name + name))), 16).save(folder / name)
    return folder


def test_folders_of_subjects(tmp_path: Path):
    root = tmp_path / "pets"
    pictures(root / "rex", "a.jpg", "b.png", "c.png")
    pictures(root / "rex/distractors", "c.jpg", "a.png")
    pictures(root / "tom", "1.png", "2.png")
    pictures(root / "tom/distractors", "x.png")
    pictures(root / "una", "u.png")
    (root / ".cache").mkdir()
    found = both_ways(root)
    assert [row.id for row in found] == ["rex", "tom", "una"] and load_rows(root).sources == ("distractors",)
    rex, tom, una = found
    assert [Path(str(p)).name for p in rex.views] == ["a.jpg", "b.png", "c.png"]
    assert [p and Path(str(p)).name for p in rex.distractors["distractors"]] == ["a.png", None, "c.jpg"]
    assert [Path(str(p)).name for p in tom.distractors["distractors"]] == ["x.png"]  # no name shared: sorted order
    assert una.distractors == {} and una.split is None
    assert [row.split for row in load_rows(root, hash_splits=True)] == [hash_split(row.id) for row in found]


def test_folders_of_splits(tmp_path: Path):
    pictures(tmp_path / "d/train/rex", "a.png")
    pictures(tmp_path / "d/test/tom", "a.png")
    assert load_rows(tmp_path / "d", split="test").ids == ("tom",)
    pictures(tmp_path / "d/test/rex", "a.png")
    one_line(lambda: load_rows(tmp_path / "d"), "'rex'", "twice")


@pytest.mark.parametrize(
    "views, distractors",
    [(("a.png", "b.png"), ("a.png", "typo.png")), (("a.png",), ("x.png", "y.png")), (("a.png",), ("a.png", "a.jpg"))],
)
def test_distractors_that_do_not_match_are_refused(tmp_path: Path, views, distractors):
    pictures(tmp_path / "d/rex", *views)
    folder = pictures(tmp_path / "d/rex/distractors", *distractors)
    one_line(lambda: load_rows(tmp_path / "d"), str(folder), "name")


def test_folders_that_hold_nothing(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    one_line(lambda: load_rows(tmp_path / "empty"), "empty", "subject")
    (tmp_path / "d/rex").mkdir(parents=True)
    one_line(lambda: load_rows(tmp_path / "d"), "rex", "no pictures")
    photos = pictures(tmp_path / "photos", "a.png")
    one_line(lambda: load_rows(photos), "photos", "one folder of pictures per subject")
    (tmp_path / "d/rex/a.jpg").write_text("this is text")
    one_line(lambda: load_rows(tmp_path / "d")[0].view(0), "row 'rex'", "view 1", "a.jpg")
    one_line(lambda: load_rows(tmp_path / "d", [tmp_path]), "distractors")
    with pytest.raises(InputError):
        list(stream_rows(tmp_path / "empty"))


# --- how a flag names a data set


@pytest.mark.parametrize(
    ("flag", "place", "repeats"),
    [
        ("abdo-eldesokey/mtg-dataset:4", "abdo-eldesokey/mtg-dataset", 4),
        ("Aleksandar/NearID", "Aleksandar/NearID", 1),
        ("owner/name@v1.0:12", "owner/name@v1.0", 12),
        ("owner/name@refs/convert/parquet", "owner/name@refs/convert/parquet", 1),
        (r"C:\photos", r"C:\photos", 1),
        (r"C:\photos:4", r"C:\photos", 4),
        ("C:/photos/4", "C:/photos/4", 1),
        ("C:4", "C:4", 1),
        ("dogs:many", "dogs:many", 1),
        ("miniworld:2", "miniworld", 2),
    ],
)
def test_a_number_after_the_last_colon_is_how_often(flag: str, place: str, repeats: int):
    assert split_repeats(flag) == (place, repeats)


def test_a_folder_of_that_name_goes_first(tmp_path: Path):
    (tmp_path / "dogs:2").mkdir()
    assert split_repeats(f"{tmp_path}/dogs:2") == (f"{tmp_path}/dogs:2", 1)
    one_line(lambda: split_repeats("dogs:0"), "--data dogs:0")


def test_a_revision_of_a_hub_data_set_is_the_one_that_is_read(hub: HubServer, tmp_path: Path):
    for revision, ids in (("main", ["x", "y"]), ("v2", ["x", "y", "z"])):
        for name, columns in (("NearID", views(ids)), ("NearID-Flux", distractors(ids))):
            file = write(tmp_path / revision / name / "data/train-00000-of-00001.parquet", columns)
            hub.publish(f"owner/{name}", file.parents[1], "datasets", revision)
    code = """
from nearid_personalize.data import load_rows
from nearid_personalize.errors import InputError

for revision in ("", "@v2", "@v3"):
    try:
        rows = load_rows(f"owner/NearID{revision}", [f"owner/NearID-Flux{revision}"])
        print(len(rows), *rows.sources, rows[0].view(0).size)
    except InputError as error:
        print(error)
"""
    environment = hub.environment(tmp_path / "home", PYTHONPATH=str(Path(__file__).parents[1]))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    main, second, absent = result.stdout.splitlines()
    assert main == "2 Flux (16, 16)" and second == "3 Flux (16, 16)"
    assert absent.startswith("owner/NearID@v3: cannot be loaded")
