"""`nearid gallery`, from photos in folders to an answer, and the page's tab that does the same."""

import json

import pytest
from PIL import Image

from nearid_personalize import InputError
from nearid_personalize.cli import main
from nearid_personalize.commands.gallery import facts_of
from nearid_personalize.miniworld import photos, sample_pet


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photos of three pets, a query of each and one of a stranger, and 99 pictures of others."""
    root = tmp_path_factory.mktemp("pets")

    def write(index, where, count, first=0):
        where.mkdir(parents=True, exist_ok=True)
        for place, (rendering, _) in enumerate(photos(sample_pet("test", index), first + count)):
            if place >= first:
                Image.fromarray(rendering.image).save(where / f"{index}-{place}.png")

    for index in range(3):
        write(index, root / "pets" / f"pet {index}", 2)
        write(index, root / "queries", 1, first=2)
    write(50, root / "queries", 1)
    for index in range(100, 199):
        write(index, root / "others", 1)
    return root


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["gallery", *map(str, arguments)])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_from_photos_to_an_answer(folders, tmp_path, capsys):
    place = ["--gallery", tmp_path / "gallery"]
    model = ["--model", "miniworld"]
    code, out, _ = run(capsys, "add", *place, *model, "--photos", folders / "pets", "--metadata", "owner=me", "age=3")
    assert (code, out) == (0, "added 6 photos; 3 subjects\n")
    ask = ["search", *place, *model, "--images", folders / "queries"]
    code, _, err = run(capsys, *ask, "--false-accept-rate", "0.005")
    assert code == 2 and "error: --false-accept-rate 0.005" in err and "199 negatives" in err and "--negatives" in err
    code, out, _ = run(capsys, "add", *place, *model, "--negatives", folders / "others")
    assert (code, out) == (0, "added 99 negatives; 3 subjects\n")
    code, out, _ = run(capsys, *ask, "--false-accept-rate", "0.01", "--out", tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0 and report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["query"]: row["name"] for row in report["queries"]} == {
        "0-2.png": "pet 0",
        "1-2.png": "pet 1",
        "2-2.png": "pet 2",
        "50-0.png": None,
    }
    assert report["false_accept_rate"] == 0.01 and report["subjects"] == 3
    code, out, _ = run(capsys, *ask, "--where", "owner=you")
    assert code == 2
    code, out, _ = run(capsys, *ask[:-1], folders / "queries" / "50-0.png")
    assert code == 3 and "none of them" in out
    assert run(capsys, "rename", *place, "--name", "pet 0", "--to", "rex")[0] == 0
    assert run(capsys, "remove", *place, "--name", "pet 1")[0] == 0
    code, out, _ = run(capsys, "list", *place)
    assert code == 0 and [line.split() for line in out.splitlines()[1:]] == [
        ["pet", "2", "2", "age=3", "owner=me"],
        ["rex", "2", "age=3", "owner=me"],
        ["2", "subjects"],
    ]


def test_what_is_wrong_is_said_in_one_line(folders, tmp_path, capsys):
    model = ["--model", "miniworld"]
    for arguments, message in (
        (["list", "--gallery", tmp_path / "none"], "no such folder"),
        (["add", "--gallery", tmp_path / "g", *model], "--photos: missing"),
        (["add", "--gallery", tmp_path / "g", *model, "--photos", folders / "others"], "no folders in it; give --name"),
        (["search", "--gallery", tmp_path / "g", *model, "--images", folders / "queries", "--limit", "0"], "--limit 0"),
        ([], "Expected one of"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_facts_are_text_numbers_or_truth_values():
    assert facts_of("--where", ["a=1", "b=x y", "c=true", "d=1.5", "a=2"]) == {
        "a": [1, 2],
        "b": "x y",
        "c": True,
        "d": 1.5,
    }
    for wrong in (["a"], ["a b=1"], ["a=1", "a=2"]):
        with pytest.raises(InputError, match="--metadata"):
            facts_of("--metadata", wrong)
