"""Embeddings in bulk: sources, engines that agree, stops, corrupt files, and what takes the shards."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import checkered
from pyarrow import parquet

from nearid_personalize import InputError, bulk
from nearid_personalize.bulk import (
    Embedder,
    EncoderOptions,
    PartEmbedder,
    as_objects,
    embed_pictures,
    parts_of,
    read_shards,
    shard_names,
)
from nearid_personalize.cli import main
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.scorer.scorer import IdentityScorer

ENCODER = EncoderOptions(model="miniworld", batch_size=8)


@pytest.fixture(scope="module")
def scorer():
    return IdentityScorer.from_pretrained("miniworld")


def png(seed):
    buffer = io.BytesIO()
    checkered(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in three folders, and a corrupt one."""
    for number in range(12):
        place = tmp_path / "pictures" / f"pet {number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number))
    (tmp_path / "pictures" / "pet 0" / "broken.png").write_bytes(png(0)[:200])
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    return tmp_path / "pictures"


def contents(out):
    """By id: embedding, hash and error; no id twice."""
    found = {}
    for shard in read_shards(str(out)):
        for place, name in enumerate(shard.ids):
            assert name not in found
            found[name] = (shard.embeddings[place], shard.hashes[place], shard.errors[place])
    return found


def test_a_batch_of_arrays_in_and_out(scorer):
    embedder = Embedder(ENCODER)
    rows = embedder({"id": as_objects(["a", "b", "c"]), "bytes": as_objects([png(1), b"no picture", png(1)])})
    assert {name: len(column) for name, column in rows.items()} == dict.fromkeys(rows, 3)
    assert rows["embedding"].dtype == np.float32
    expected = scorer.embed([checkered(1)])[0].numpy()
    np.testing.assert_allclose(rows["embedding"][[0, 2]], np.stack([expected, expected]), atol=1e-6)
    assert rows["hash"][0] == rows["hash"][2] != "" and not rows["embedding"][1].any()
    assert "not a picture" in rows["error"][1] and rows["error"][0] == ""
    assert (embedder({"id": as_objects(["b"]), "bytes": as_objects([b""])})["error"] != "").all()


def test_a_folder_with_a_corrupt_file(folder, scorer, tmp_path):
    result = embed_pictures(str(folder), str(tmp_path / "out"), ENCODER)
    assert (result.pictures, result.errors) == (13, 1)
    found = contents(tmp_path / "out")
    assert found["pet 0/broken.png"][2] and not found["pet 0/broken.png"][1]
    expected = scorer.embed([folder / "pet 1" / "4.png"])[0]
    torch.testing.assert_close(found["pet 1/4.png"][0], expected, atol=1e-6, rtol=0)
    again = embed_pictures(str(folder), str(tmp_path / "out"), ENCODER)
    assert (again.pictures, again.parts) == (0, 0)
    (folder / "new.png").write_bytes(png(99))
    assert embed_pictures(str(folder), str(tmp_path / "out"), ENCODER).pictures == 1
    assert len(contents(tmp_path / "out")) == 14


def test_parquet_and_tars_give_the_same_vectors(folder, tmp_path):
    pictures = sorted(path for path in folder.rglob("*.png"))
    names = [str(path.relative_to(folder)) for path in pictures]
    (tmp_path / "tables").mkdir()
    content = [path.read_bytes() for path in pictures]
    table = pa.table({"label": [0] * len(names), "image": [{"bytes": one, "path": None} for one in content]})
    parquet.write_table(table.append_column("id", pa.array(names)), tmp_path / "tables" / "a.parquet")
    parquet.write_table(table, tmp_path / "tables" / "b.parquet")
    (tmp_path / "tables" / "c.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(folder, ".", filter=lambda member: member)
    cut = (tmp_path / "tars" / "0.tar").read_bytes()[:6000]
    (tmp_path / "tars" / "1.tar").write_bytes(cut)
    for source, out in ((folder, "of-folder"), (tmp_path / "tables", "of-tables"), (tmp_path / "tars", "of-tars")):
        embed_pictures(str(source), str(tmp_path / out), ENCODER)
    plain, tables, tars = (contents(tmp_path / out) for out in ("of-folder", "of-tables", "of-tars"))
    for number, name in enumerate(names):
        vector, content_hash, error = plain[name]
        for found in (tables[name], tables[f"b.parquet#{number}"], tars[f"0.tar/./{name}"]):
            torch.testing.assert_close(found[0], vector, atol=1e-6, rtol=0)
            assert (found[1], bool(found[2])) == (content_hash, bool(error))
    assert "not a parquet file" in tables["c.parquet"][2]
    assert "not a tar that can be read to its end" in tars["1.tar"][2]


def test_a_column_and_sources_that_do_not_fit(folder, tmp_path):
    table = pa.table({"text": ["x"], "file": [png(3)]})
    parquet.write_table(table, tmp_path / "one.parquet")
    embed_pictures(str(tmp_path / "one.parquet"), str(tmp_path / "a"), ENCODER, column="file")
    assert [row[2] for row in contents(tmp_path / "a").values()] == [""]
    with pytest.raises(InputError, match="no column of pictures; give --column"):
        embed_pictures(str(tmp_path / "one.parquet"), str(tmp_path / "b"), ENCODER, column="nothing")
    for source, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "a" / "..", None),
        ("nowhere://x", "nowhere"),
    ):
        if message:
            with pytest.raises(InputError, match=message):
                list(parts_of(str(source)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures, parquet files or tars"):
        list(parts_of(str(tmp_path / "empty")))


def test_a_part_has_the_same_name_however_its_folder_is_spelled(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (relative,), (absolute,) = parts_of("pictures/"), parts_of(str(folder))
    assert relative.name == absolute.name and relative.root == absolute.root


def test_shards_of_another_encoder_are_refused(folder, tmp_path):
    embed_pictures(str(folder), str(tmp_path / "out"), ENCODER)
    with pytest.raises(InputError, match="embedded with miniworld, another encoder"):
        list(read_shards(str(tmp_path / "out"), IdentityScorer.from_pretrained(weights_dir("siglip"))))
    with pytest.raises(InputError, match="no shards there"):
        list(read_shards(str(folder)))
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "out" / "other.parquet")
    with pytest.raises(InputError, match="not a shard"):
        list(read_shards(str(tmp_path / "out")))


def test_ray_gives_the_same_vectors_and_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(bulk, "PART_FILES", 4)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
        embed_pictures(str(folder), str(tmp_path / "local"), ENCODER)
        first = shard_names(str(tmp_path / "local"))[0]
        (tmp_path / "ray").mkdir()
        shutil.copy(tmp_path / "local" / first, tmp_path / "ray" / first)
        already = len(parquet.read_table(tmp_path / "ray" / first))
        result = embed_pictures(str(folder), str(tmp_path / "ray"), ENCODER, engine="ray")
        assert (result.pictures, result.parts) == (13 - already, 3)
    finally:
        ray.shutdown()
    local, on_ray = contents(tmp_path / "local"), contents(tmp_path / "ray")
    assert local.keys() == on_ray.keys()
    for name, (vector, content_hash, error) in local.items():
        torch.testing.assert_close(on_ray[name][0], vector, atol=1e-6, rtol=0)
        assert on_ray[name][1:] == (content_hash, error)


KILLED = """
import sys
from nearid_personalize import bulk
bulk.PART_FILES = 1
bulk.embed_pictures(sys.argv[1], sys.argv[2], bulk.EncoderOptions(model="miniworld"))
"""


def test_killed_and_started_again_nothing_is_twice_or_missing(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(out)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (out.is_dir() and len(os.listdir(out)) > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (out / name).stat().st_mtime_ns for name in shard_names(str(out))}
    assert len(before) >= 1
    monkeypatch.setattr(bulk, "PART_FILES", 5)
    embed_pictures(str(folder), str(out), ENCODER)
    assert len(contents(out)) == 13
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_the_shards_fill_a_gallery_and_are_scored(folder, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        return stop.value.code, capsys.readouterr().out

    model = ("--model", "miniworld")
    code, out = run("embed", "--images", folder, "--out", tmp_path / "out", *model)
    assert code == 0 and "embedded 13 pictures (1 could not be read)" in out
    place = ("--gallery", tmp_path / "gallery")
    code, out = run("gallery", "add", *place, *model, "--embeddings", tmp_path / "out")
    assert (code, out) == (0, "added 12 photos; 3 subjects\n")
    code, out = run("gallery", "add", *place, *model, "--photos", folder / "pet 1", "--name", "pet 1")
    assert (code, out) == (0, "added 0 photos; 3 subjects\n")
    shards = ("--embeddings", tmp_path / "out")
    code, out = run("score", *shards, *model, "--references", folder / "pet 1", "--json")
    rows = json.loads(out)["images"]
    assert len(rows) == 13 and rows[-1]["image"] == "pet 0/broken.png" and rows[-1]["status"] == "unreadable"
    assert all(row["image"].startswith("pet 1/") for row in rows[:2])
    for wrong in (("embed", "--images", folder, "--out", tmp_path / "o", "--workers", "2"), ("score", *model)):
        assert run(*wrong)[0] == 2


def test_a_part_is_a_dict_of_arrays_too(folder, tmp_path):
    (part,) = parts_of(str(folder))
    result = PartEmbedder(ENCODER, str(tmp_path))({"part": as_objects([bulk._as_text(part)])})
    assert result["pictures"].tolist() == [13] and result["errors"].tolist() == [1]
