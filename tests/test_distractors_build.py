"""A whole set is built: nothing but the subject changes, a killed run goes on, training and evaluation read it."""

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image
from tiny_pipelines import build as build_pipeline

from nearid_personalize.data import load_rows
from nearid_personalize.distractors.build import BackgroundChanged, Builder, Share, build_distractors, proved
from nearid_personalize.distractors.inpaint import inpainter_for
from nearid_personalize.distractors.nearness import Limits, Measuring, Quantiles
from nearid_personalize.distractors.options import BuildOptions
from nearid_personalize.distractors.outputs import write_parquet
from nearid_personalize.distractors.places import list_places, prepare
from nearid_personalize.distractors.prompts import Prompts
from nearid_personalize.distractors.records import Records
from nearid_personalize.errors import InputError
from nearid_personalize.images import load_image
from nearid_personalize.scorer.scorer import IdentityScorer

OPTIONS = BuildOptions(tries=2, quantiles=Quantiles(not_near=0.4, too_alike=0.2, unchanged=0, seam=0))


def write_subject(folder: Path, seed: int, category: str = "dog", views: int = 2) -> None:
    folder.mkdir(parents=True)
    for number in range(views):
        checkered(10 * seed + number, 60).crop((0, 0, 60, 44 + number)).save(folder / f"view{number}.png")
        mask = np.zeros((44 + number, 60), np.uint8)
        mask[12:34, 15 + 3 * number : 45] = 255
        Image.fromarray(mask).save(folder / f"view{number}.mask.png")
    (folder / "category.txt").write_text(category)


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """Three subjects of two views each."""
    for seed, name in enumerate(("ann", "bob", "cid"), start=1):
        write_subject(tmp_path / "views" / name, seed)
    return tmp_path / "views"


@pytest.fixture(scope="module")
def inpaint():
    return inpainter_for(build_pipeline("sd")[0], size=32, steps=2)


@pytest.fixture(scope="module")
def measure(tiny_nearid_dir):
    return Measuring(scorer=IdentityScorer.from_pretrained(tiny_nearid_dir))


def files_of(out: Path) -> dict[str, bytes]:
    """Every file that counts; times of drawing differ from run to run."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("report.json", "contact_sheet.png"):
            content = path.read_bytes()
            if path.suffix == ".json" and "tries" in path.parts:
                content = json.dumps({**json.loads(content), "seconds": 0}).encode()
            found[str(path.relative_to(out))] = content
    return found


# --- the proof -------------------------------------------------------------------------------------------------------
def test_no_pixel_outside_the_mask_changes_in_any_file(views, tmp_path, inpaint, measure):
    report = build_distractors(views, tmp_path / "out", inpaint, OPTIONS, measure=measure)
    assert report["counts"]["kept"] + report["counts"]["refused"] == 6 and report["counts"]["kept"] > 0
    compared = 0
    for distractor in (tmp_path / "out").glob("*/distractors/view?.png"):
        view = np.asarray(Image.open(views / distractor.parent.parent.name / distractor.name).convert("RGB"))
        outside = np.asarray(Image.open(distractor.with_name(f"{distractor.stem}.mask.png"))) == 0
        painted = np.asarray(Image.open(distractor))
        assert np.array_equal(painted[outside], view[outside])
        assert not np.array_equal(painted[~outside], view[~outside])
        compared += outside.sum()
    assert report["background"]["files"] == report["counts"]["kept"]
    assert report["background"]["pixels_compared"] == compared


def save_rotated(path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(path, exif=exif, quality=90)


def save_deep(path: Path, picture: Image.Image) -> None:
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(path)


def save_transparent(path: Path, picture: Image.Image) -> None:
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("turned.jpg", save_rotated),
        ("deep.png", save_deep),
        ("clear.png", save_transparent),
        ("wide.webp", lambda path, picture: picture.save(path, quality=50)),
        ("few.gif", lambda path, picture: picture.convert("P").save(path)),
    ],
)
def test_every_kind_of_photo_keeps_its_background(tmp_path, inpaint, name, save):
    """The background is the one that training sees: upright, 8 bits, transparency over white."""
    folder = tmp_path / "views" / "ann"
    folder.mkdir(parents=True)
    save(folder / name, checkered(3, 60).crop((0, 0, 60, 40)))
    photo = load_image(folder / name)
    mask = np.zeros((photo.height, photo.width), np.uint8)
    mask[8:30, 12:40] = 255
    Image.fromarray(mask).save(folder / f"{Path(name).stem}.mask.png")
    build_distractors(tmp_path / "views", tmp_path / "out", inpaint, replace(OPTIONS, filter=False, dilate=0))
    distractor = Image.open(tmp_path / "out" / "ann" / "distractors" / f"{Path(name).stem}.png")
    assert distractor.mode == "RGB" and distractor.size == photo.size
    assert np.array_equal(np.asarray(distractor)[mask == 0], np.asarray(photo)[mask == 0])
    assert np.array_equal(np.asarray(load_image(tmp_path / "out" / "ann" / name)), np.asarray(photo))


def test_a_changed_background_ends_the_run(views, tmp_path):
    rows = load_rows(views)
    place = list_places(rows, tmp_path / "out")[0]
    view = prepare(place, rows[0], OPTIONS)
    changed = np.array(view.photo)
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(tmp_path / "changed.png")
    with pytest.raises(BackgroundChanged, match="1 pixels outside"):
        proved(view, tmp_path / "changed.png")


# --- going on --------------------------------------------------------------------------------------------------------
class Killed(Exception):
    """Stands for a process that ends anywhere."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inpaint, measure):
    """A set that was built in one go, and its views."""
    home = tmp_path_factory.mktemp("whole")
    for seed, name in enumerate(("ann", "bob", "cid"), start=1):
        write_subject(home / "views" / name, seed)
    build_distractors(home / "views", home / "out", inpaint, OPTIONS, measure=measure)
    return home


@pytest.mark.parametrize("writes", [1, 4, 9, 14, 20, 25, 29, 33, 38, 44])
def test_a_run_that_was_killed_goes_on_to_the_same_files(whole, tmp_path, inpaint, measure, monkeypatch, writes):
    """It is killed before its n-th file is put in place."""
    left, replace_file = [writes], os.replace

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace_file(source, target)

    def run() -> None:
        build_distractors(whole / "views", tmp_path / "out", inpaint, OPTIONS, measure=measure)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    run()
    assert files_of(tmp_path / "out") == files_of(whole / "out")


def test_a_finished_run_draws_nothing_again(whole, tmp_path, measure):
    shutil.copytree(whole / "out", tmp_path / "out")

    class Never:
        size, multiple, steps, guidance_scale = 32, 8, 2, None

        def __call__(self, jobs):
            raise AssertionError("drawn again")

    report = build_distractors(whole / "views", tmp_path / "out", Never(), OPTIONS, measure=measure)
    assert report["counts"] == json.loads((whole / "out" / "report.json").read_text())["counts"]


def test_more_tries_open_refused_views_again(views, tmp_path, inpaint):
    none = replace(OPTIONS, tries=1, limits=Limits(max_seam=-1.0))
    first = build_distractors(views, tmp_path / "out", inpaint, none)
    again = build_distractors(views, tmp_path / "out", inpaint, replace(none, tries=2))
    assert (first["counts"]["kept"], first["counts"]["tries"], again["counts"]["tries"]) == (0, 6, 12)


def test_other_settings_are_refused_by_name(whole, tmp_path, inpaint):
    shutil.copytree(whole / "out", tmp_path / "out")
    with pytest.raises(InputError, match=r"--seed 7: .* was begun with 0"):
        build_distractors(whole / "views", tmp_path / "out", inpaint, replace(OPTIONS, seed=7))


def test_two_processes_share_the_views_and_agree(whole, tmp_path, inpaint, measure):
    rows, out = load_rows(whole / "views"), tmp_path / "out"
    places, drawn = list_places(rows, out), []
    lock = threading.Lock()  # one pipeline serves both here

    def run(rank: int) -> None:
        class Counting:
            size, multiple = inpaint.size, inpaint.multiple

            def __call__(self, jobs):
                drawn.extend((rank, job.seed) for job in jobs)
                with lock:
                    return inpaint(jobs)

        builder = Builder(
            rows=rows,
            records=Records(out),
            inpaint=Counting(),
            options=replace(OPTIONS, batch_size=2),
            prompts=Prompts(),
            measure=measure,
            share=Share(rank=rank, count=2),
        )
        builder.run(places)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seeds = [seed for _, seed in drawn]
    assert len(seeds) == len(set(seeds)) and {rank for rank, _ in drawn} == {0, 1}
    records, alone = Records(out), Records(whole / "out")
    assert records.limits() == alone.limits()
    assert [records.outcome(place) for place in places] == [alone.outcome(place) for place in places]


# --- faults ----------------------------------------------------------------------------------------------------------
def test_bad_views_are_skipped_and_listed(views, tmp_path, inpaint):
    (views / "ann" / "view0.png").write_bytes(b"no picture")
    (views / "bob" / "view0.mask.png").unlink()
    Image.new("L", (60, 44)).save(views / "cid" / "view0.mask.png")
    report = build_distractors(views, tmp_path / "out", inpaint, OPTIONS)
    reasons = {view["view"]: view["reason"] for view in report["views"] if view["status"] == "skipped"}
    assert set(reasons) == {"ann/view0", "bob/view0", "cid/view0"}
    assert "not a picture" in reasons["ann/view0"] and "--mask-model" in reasons["bob/view0"]
    assert "0.0%" in reasons["cid/view0"]
    assert report["counts"]["skipped"] == 3


def test_nothing_that_can_be_repainted_is_an_error(views, tmp_path, inpaint):
    for mask in views.rglob("*.mask.png"):
        mask.unlink()
    with pytest.raises(InputError, match="no view can be repainted"):
        build_distractors(views, tmp_path / "out", inpaint, OPTIONS)


def test_a_callable_finds_masks_and_another_describes(views, tmp_path, inpaint):
    for mask in views.rglob("*.mask.png"):
        mask.unlink()

    def find(photo, category):
        assert category == "dog"
        mask = np.zeros((photo.height, photo.width), bool)
        mask[10:30, 10:40] = True
        return mask

    report = build_distractors(
        views,
        tmp_path / "out",
        inpaint,
        replace(OPTIONS, filter=False),
        find_mask=find,
        describe=lambda photo, mask, category: f"a photo of a black {category} in a park",
    )
    prompts = {view["tries"][0]["prompt"] for view in report["views"]}
    assert all(prompt.endswith("dog in a park") and "black" not in prompt for prompt in prompts)


def test_names_that_become_one_are_refused(tmp_path):
    rows = replace(load_rows_of("a b", "a_b", tmp_path))
    with pytest.raises(InputError, match="become one folder"):
        list_places(rows, tmp_path)


def load_rows_of(first: str, second: str, tmp_path: Path):
    write_subject(tmp_path / "views" / first, 1)
    write_subject(tmp_path / "views" / second, 2)
    return load_rows(tmp_path / "views")


# --- parts -----------------------------------------------------------------------------------------------------------
def test_parts_change_a_part_only_and_store_the_oracle(views, tmp_path, inpaint):
    out = tmp_path / "out"
    report = build_distractors(views, out, inpaint, replace(OPTIONS, parts="random", filter=False, dilate=0.02))
    rows = load_rows(out)
    for row in rows:
        for slot in range(2):
            part, subject = row.part_mask(slot), row.mask(slot)
            assert 0.03 < part.sum() / subject.sum() < 0.62 and not (part & ~subject).any()
            view, distractor = np.asarray(row.view(slot)), np.asarray(row.distractor("distractors", slot))
            changed = torch.from_numpy((view != distractor).any(axis=-1))
            assert changed.any() and not (changed & ~row.distractor_mask("distractors", slot)).any()
            stored = next(v["oracle"] for v in report["views"] if v["view"] == f"{row.id}/view{slot}")
            assert row.oracle[slot] == pytest.approx(stored)


def test_given_parts_have_to_be_there(views, tmp_path, inpaint):
    with pytest.raises(InputError, match=r"part\.mask\.png"):
        build_distractors(views, tmp_path / "out", inpaint, replace(OPTIONS, parts="given"))
    for mask in views.rglob("view?.mask.png"):
        pixels = np.array(Image.open(mask))
        pixels[20:] = 0
        Image.fromarray(pixels).save(mask.with_name(mask.name.replace(".mask", ".part.mask")))
    report = build_distractors(views, tmp_path / "out", inpaint, replace(OPTIONS, parts="given", filter=False))
    assert report["counts"]["kept"] == 6


# --- what it is for --------------------------------------------------------------------------------------------------
def test_the_set_is_read_as_rows_with_masks_and_category(whole):
    rows = load_rows(whole / "out")
    kept = json.loads((whole / "out" / "report.json").read_text())["counts"]["kept"]
    assert rows.ids == ("ann", "bob", "cid") and rows.sources == ("distractors",)
    assert sum(path is not None for row in rows for path in row.distractors.get("distractors", ())) == kept
    assert rows[0].category == "dog" and rows[0].mask(0).sum() == 22 * 30


def test_the_set_is_evaluated(whole, tiny_nearid_dir):
    from nearid_personalize.encoder.checkpoints import load_encoder
    from nearid_personalize.evaluation import evaluate_rows

    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    found = evaluate_rows(model, preprocessing, load_rows(whole / "out"), num_views=2)["distractors"]
    assert 1 <= found.num_identities <= 3


def test_parquet_holds_the_same_rows(whole, tmp_path):
    rows = load_rows(whole / "views")
    places, records = list_places(rows, whole / "out"), Records(whole / "out")
    write_parquet(rows, places, records, tmp_path, "tiny")
    table, folder = load_rows(tmp_path), load_rows(whole / "out")
    assert table.ids == folder.ids and table.sources == ("distractors",)
    for one, other in zip(table, folder, strict=True):
        assert one.category == other.category
        for slot in range(2):
            assert np.array_equal(one.view(slot), other.view(slot)) and torch.equal(one.mask(slot), other.mask(slot))
            pair = one.distractor("distractors", slot), other.distractor("distractors", slot)
            assert (pair[0] is None) == (pair[1] is None)
            assert pair[0] is None or np.array_equal(pair[0], pair[1])


def test_splits_stay_folders(tmp_path, inpaint):
    for seed, split in enumerate(("train", "test"), start=1):
        write_subject(tmp_path / "views" / split / f"pet{seed}", seed)
    build_distractors(tmp_path / "views", tmp_path / "out", inpaint, replace(OPTIONS, filter=False))
    rows = load_rows(tmp_path / "out")
    assert rows.splits == ("train", "test") and all(row.distractor("distractors", 0) for row in rows)


def test_built_from_parquet_too(whole, tmp_path, inpaint):
    rows = load_rows(whole / "views")
    write_parquet(rows, list_places(rows, whole / "out"), Records(whole / "out"), tmp_path / "table", "tiny")
    report = build_distractors(load_rows(tmp_path / "table"), tmp_path / "out", inpaint, replace(OPTIONS, filter=False))
    assert report["counts"]["kept"] == 6
