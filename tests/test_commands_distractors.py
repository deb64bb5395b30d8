"""`nearid distractors`: the whole command on tiny real models."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_distractors_build import write_subject

from nearid_personalize.cli import parse, run
from nearid_personalize.errors import InputError


@pytest.fixture
def flags(tmp_path: Path, tiny_kl_pipeline_dir: Path, tiny_nearid_dir: Path) -> list[str]:
    """A run on two subjects, the shortest there is."""
    for seed, name in enumerate(("ann", "bob"), start=1):
        write_subject(tmp_path / "views" / name, seed)
        (tmp_path / "views" / name / "view0.txt").write_text("a photo of a black dog on grass")
    places = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")]
    models = ["--base-model", str(tiny_kl_pipeline_dir), "--model", str(tiny_nearid_dir)]
    return ["distractors", *places, *models, "--steps", "2", "--tries", "2"]


def nearid(*arguments: str) -> int:
    return run(parse(arguments))


def test_the_command_builds_a_set_that_training_reads(flags, tmp_path, capsys):
    assert nearid(*flags, "--parquet", str(tmp_path / "table")) == 0
    printed = capsys.readouterr().out
    assert "plan: 4 views of 2 subjects" in printed and "none differs" in printed
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["kept"] > 0 and report["models"]["base_model"] == flags[6]
    prompts = [view["tries"][0]["prompt"] for view in report["views"]]
    assert prompts[0].endswith("dog on grass") and "black" not in prompts[0]
    for name in ("contact_sheet.png", "limits.png"):
        assert Image.open(out / name).size[0] > 300
    assert (tmp_path / "table" / "distractors.parquet").is_file()
    assert nearid("evaluate", "--data", str(out), "--model", flags[8], "--split", "all") == 0


def test_json_is_the_report_and_nothing_else(flags, tmp_path, capsys):
    assert nearid(*flags, "--no-filter", "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["kept"] == 4


def test_a_dry_run_draws_one_and_writes_nothing(flags, tmp_path, capsys):
    assert nearid(*flags, "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["views"] == 4 and facts["hours_at_most"] >= facts["hours_at_least"] >= 0
    assert facts["gigabytes"] >= 0 and facts["seconds_per_picture"] > 0
    assert list((tmp_path / "out").iterdir()) == []


def test_when_all_are_refused_the_status_is_three(flags):
    assert nearid(*flags, "--max-seam", "-1") == 3


def test_an_inpainting_class_is_made_of_the_base_models_parts(flags, tmp_path):
    assert nearid(*flags, "--inpaint-class", "StableDiffusionInpaintPipeline", "--no-filter") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"]["inpaint_class"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--tries", "0"], "--tries 0"),
        (["--steps", "0"], "--steps 0"),
        (["--strength", "2"], "--strength 2"),
        (["--strength", "0.5"], "--strength 0.5"),  # a text-to-image pipeline takes none
        (["--not-near", "1"], "--not-near 1"),
        (["--dilate", "-1"], "--dilate -1"),
        (["--prompts", "none.txt"], "--prompts none.txt"),
        (["--vocabulary", "none.json"], "--vocabulary none.json"),
        (["--inpaint-class", "NoSuchPipeline"], "--inpaint-class NoSuchPipeline"),
        (["--controlnet", "x/y"], "--controlnet x/y"),
        (["--mask-model", "no/such"], "--mask-model no/such"),
        (["--views", "nowhere"], "nowhere"),
        (["--split", "val"], "val"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(flags, more, named):
    with pytest.raises(InputError, match=named.split(" ")[0].lstrip("-")) as caught:
        nearid(*flags, *more)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_the_set_may_not_be_built_into_its_own_views(flags, tmp_path):
    with pytest.raises(InputError, match="--out"):
        nearid(*flags, "--out", str(tmp_path / "views"))
    with pytest.raises(InputError, match="--parquet"):
        nearid(*flags, "--parquet", str(tmp_path / "out" / "table"))


def test_masks_from_a_model(flags, tmp_path, monkeypatch):
    from nearid_personalize.distractors import masks

    def halves(photo):
        mask = np.zeros((photo.height, photo.width), bool)
        mask[:, : photo.width // 2] = True
        return [masks.Segment(mask, "dog"), masks.Segment(~mask, "wall")]

    for mask in (tmp_path / "views").rglob("*.mask.png"):
        mask.unlink()
    monkeypatch.setattr(masks, "load_mask_model", lambda *_: masks.ModelMasks(halves))
    assert nearid(*flags, "--mask-model", "any", "--no-filter") == 0
    assert (np.asarray(Image.open(tmp_path / "out" / "ann" / "view0.mask.png"))[:, :30] == 255).all()
