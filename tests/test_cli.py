"""The `nearid` commands end to end on tiny real models, and every wrong input as one line with status 2."""

import dataclasses
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import checkered
from PIL import Image

from nearid_personalize import cli
from nearid_personalize.commands.console import Stopwatch, table
from nearid_personalize.commands.options import Generate
from nearid_personalize.commands.quickstart import choose_prompt, write_references
from nearid_personalize.commands.racing import choose_racing
from nearid_personalize.encoder.checkpoints import load_encoder, save_head
from nearid_personalize.errors import InputError
from nearid_personalize.evaluation import evaluate_rows
from nearid_personalize.guard.policy import RacingPolicy
from nearid_personalize.guard.records import RaceRecords
from nearid_personalize.miniworld import part_edits

PROMPT = "a photo of sks dog in space"


def nearid(*arguments: object) -> int:
    """Run the command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def score(photo_dir: Path, tiny_nearid_dir: Path) -> list[object]:
    """A complete `nearid score`: four photos against themselves."""
    return ["score", "--references", photo_dir, "--images", photo_dir, "--model", tiny_nearid_dir]


@pytest.fixture
def generate(photo_dir: Path, tiny_nearid_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> list[object]:
    """A complete, short `nearid generate` into tmp_path/out."""
    options = ["--references", photo_dir, "--model", tiny_nearid_dir, "--base-model", tiny_pipeline_dir]
    options += ["--prompt", PROMPT, "--out", tmp_path / "out", "--device", "cpu"]
    return ["generate", *options, "--steps", 2, "--num-candidates", 3, "--num-images", 2, "--max-batch-size", 2]


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: object) -> None:
    """stderr is one line that holds all `words`; stdout tells of no result."""
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert str(word) in lines[0]
    assert "accepted" not in captured.out


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_ranks_the_subject_first_and_writes_nothing_unasked(
    score: list, photo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in (40, 41):
        checkered(seed).save(pictures / f"other-{seed}.png")
    checkered(0).save(pictures / "own.png")
    single = tmp_path / "single"
    single.mkdir()
    checkered(0).save(single / "reference.png")
    before = sorted(tmp_path.rglob("*"))
    score[score.index("--images") + 1] = pictures
    score[score.index("--references") + 1] = single
    assert nearid(*score) in (0, 3)
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    heading = next(index for index, line in enumerate(lines) if line.startswith("rank"))
    assert lines[heading + 1].split()[:2] == ["1", "own.png"]


def test_score_writes_report_and_sheet(score: list, tmp_path: Path):
    status = nearid(*score, "--out", tmp_path / "a" / "b")
    report = json.loads((tmp_path / "a" / "b" / "report.json").read_text())
    assert status == (0 if any(image["status"] == "accepted" for image in report["images"]) else 3)
    scores = [image["score"] for image in report["images"]]
    assert scores == sorted(scores, reverse=True)
    assert {image["image"] for image in report["images"]} == {f"photo-{seed}.png" for seed in range(4)}
    assert all((image["score"] >= report["threshold"]) == (image["status"] == "accepted") for image in report["images"])
    with Image.open(tmp_path / "a" / "b" / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_json_is_all_that_stdout_holds(score: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nearid(*score, "--json", "--out", tmp_path / "out")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_head_saved_alone_scores_on_the_trunk_given(
    photo_dir: Path, tiny_nearid_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    save_head(model, tmp_path / "head", str(tmp_path / "moved"), preprocessing)
    flags = ("score", "--references", photo_dir, "--images", photo_dir, "--model", tmp_path / "head")
    assert nearid(*flags) == 2
    assert_one_line(capsys, tmp_path / "moved")
    assert nearid(*flags, "--trunk", tiny_nearid_dir) == 0


def test_one_picture_may_be_scored(score: list, photo_dir: Path, capsys: pytest.CaptureFixture[str]):
    score[score.index("--images") + 1] = photo_dir / "photo-2.png"
    nearid(*score, "--json")
    assert [image["image"] for image in json.loads(capsys.readouterr().out)["images"]] == ["photo-2.png"]


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_writes_candidates_sheet_and_report(generate: list, tiny_nearid_dir: Path, tmp_path: Path):
    status = nearid(*generate)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert status == (0 if any(c["status"] == "accepted" for c in report["candidates"]) else 3)
    assert sorted(c["seed"] for c in report["candidates"]) == [0, 1, 2]
    names = {c["image"] for c in report["candidates"]} | {"contact_sheet.png", "report.json"}
    assert {path.name for path in out.iterdir()} == names
    assert report["prompt"] == PROMPT
    assert report["models"]["scorer"] == str(tiny_nearid_dir)
    assert report["models"]["lora"] is None
    assert report["cost"]["denoiser_rows"] == report["cost"]["denoiser_rows_best_of_n"] > 0
    assert {"load", "generate", "score"} <= set(report["cost"]["seconds"])


def test_a_candidate_is_what_the_plain_pipeline_makes_of_its_seed(
    generate: list, tiny_pipeline_dir: Path, tmp_path: Path
):
    import torch
    from diffusers import DiffusionPipeline

    nearid(*generate, "--seed", 5)
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_dir, use_safetensors=True)
    for seed in (5, 6, 7):
        plain = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).images[0]
        with Image.open(tmp_path / "out" / f"candidate-{seed}.png") as image:
            assert np.abs(np.asarray(image, int) - np.asarray(plain, int)).max() <= 1


def test_candidates_race_unless_told_not_to(generate: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate[generate.index("--num-candidates") + 1] = 6
    generate[generate.index("--num-images") + 1] = 1
    generate[generate.index("--steps") + 1] = 10
    generate[generate.index("--max-batch-size") + 1] = 6
    nearid(*generate)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    stopped = [c for c in report["candidates"] if c["status"] == "stopped"]
    assert stopped and all(0 < c["stopped_at_step"] < 10 and c["image"] is None and c["reason"] for c in stopped)
    assert report["cost"]["denoiser_rows"] < report["cost"]["denoiser_rows_best_of_n"]
    assert "stopped" in capsys.readouterr().out
    nearid(*generate, "--no-race")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(c["image"] for c in report["candidates"])
    assert report["cost"]["denoiser_rows"] == report["cost"]["denoiser_rows_best_of_n"]


def test_a_plan_is_learnt_from_prompt_to_prompt(generate: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flag, value in (("--steps", 10), ("--num-candidates", 4), ("--num-images", 1), ("--max-batch-size", 5)):
        generate[generate.index(flag) + 1] = value
    path = tmp_path / "plans" / "base.json"
    nearid(*generate, "--learn-plan", path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["candidates"]) == 5 and all(c["image"] for c in report["candidates"]), "nobody is stopped"
    assert "race: recorded; from now on: " in capsys.readouterr().out
    nearid(*generate, "--learn-plan", path, "--seed", 100)
    records = RaceRecords.load(path)
    assert len(records.races) == 2 and records.plan.num_groups == 2 and records.plan.baseline_candidates == 4
    generate[generate.index("--steps") + 1] = 3
    nearid(*generate, "--learn-plan", path)
    assert "not recorded, recorded races have previews at 0.1, 0.2" in capsys.readouterr().out
    assert RaceRecords.load(path) == records

    generate[generate.index("--steps") + 1] = 10
    plan = dataclasses.replace(records.plan, policy=RacingPolicy(0.0, (0.3,)), num_candidates=6, is_certified=True)
    dataclasses.replace(records, plan=plan).save(path)
    nearid(*generate, "--learn-plan", path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    statuses = [candidate["status"] for candidate in report["candidates"]]
    assert len(statuses) == 6 and statuses.count("stopped") >= 3, "it races by the plan"


def test_a_plan_that_cannot_be_used_is_refused(generate: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "base.json"
    path.write_text('{"encoder": "other"}')
    assert nearid(*generate, "--learn-plan", path) == 2
    assert f"{path}: no race plan" in capsys.readouterr().err
    assert path.read_text() == '{"encoder": "other"}'
    RaceRecords("other").save(path)
    assert nearid(*generate, "--learn-plan", path) == 2
    assert "was learnt with --model other" in capsys.readouterr().err
    assert nearid(*generate, "--learn-plan", path / "inside.json") == 2
    assert f"--learn-plan {path}: cannot be written" in capsys.readouterr().err
    assert nearid(*generate, "--learn-plan", path, "--no-race") == 2
    assert "--learn-plan" in capsys.readouterr().err


def test_the_toy_world_has_a_plan():
    options = Generate("miniworld", Path("."), PROMPT, Path("."), model="miniworld")
    policy = choose_racing(options, "miniworld", "miniworld").policy
    assert policy.profile.at((0.5,)).correlation()[0] > 0.8
    assert choose_racing(options, "miniworld", "other").policy == RacingPolicy()


def test_a_prompt_that_is_not_shown_and_copies_are_rejected(generate: list, tmp_path: Path):
    generate[generate.index("--prompt") + 1] = "a photo of a red dog in space"
    nearid(*generate, "--no-race", "--reject-copies", "--text-image-model", "miniworld")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all((c["reason"] == "") == (c["status"] == "accepted") for c in report["candidates"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0.5"], ["budget", "0.5"]),
        (["--false-accept-rate", "0.05"], ["--false-accept-rate 0.05", "--negatives"]),
        (["--text-image-model", "nobody/no-such-model"], ["nobody/no-such-model"]),
    ],
)
def test_options_of_the_race_that_cannot_be(generate: list, flags: list, words: list, capsys):
    assert nearid(*generate, *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words)


def test_status_three_when_nothing_is_accepted(
    generate: list, tmp_path: Path, photo_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """References that are all one flat picture: noise from an untrained pipeline reaches no threshold of theirs."""
    for path in photo_dir.iterdir():
        Image.new("RGB", (32, 32), "white").save(path)
    assert nearid(*generate, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert {c["status"] for c in report["candidates"]} == {"rejected"}
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["quickstart", "score", "generate"]),
        (["paint"], ["paint", "quickstart, score, verify"]),
        (["score"], ["--references", "nearid score --help"]),
        (["score", "--references", "a", "--images", "b", "--modle", "x"], ["--modle"]),
        (["score", "--references", "a", "--images", "b", "--device", "gpu"], ["--device", "gpu", "cuda"]),
        (["quickstart", "--num-candidates", "3"], ["--num-candidates 3", "--num-images (4)"]),
        (["quickstart", "--num-images", "0"], ["--num-images 0", "1 or more"]),
        (["quickstart", "--subject-index", "-1"], ["--subject-index -1", "0 or more"]),
        (["quickstart", "--lora-steps", "0"], ["--lora-steps 0"]),
        (["quickstart", "--seed", "many"], ["--seed", "many"]),
        (["quickstart", "--steps", "0"], ["--steps 0"]),
    ],
)
def test_unknown_and_contradicting_flags(arguments: list, words: list, capsys: pytest.CaptureFixture[str]):
    assert nearid(*arguments) == 2
    assert_one_line(capsys, *words)


def test_missing_and_empty_reference_folders(score: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flag in ("--references", "--images"):
        wrong = list(score)
        wrong[wrong.index(flag) + 1] = tmp_path / "nowhere"
        assert nearid(*wrong) == 2
        assert_one_line(capsys, tmp_path / "nowhere", "no such folder")
        empty = tmp_path / flag
        empty.mkdir()
        wrong[wrong.index(flag) + 1] = empty
        assert nearid(*wrong) == 2
        assert_one_line(capsys, empty, ".png")


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "text", "huge"])
def test_a_bad_reference_among_good_ones_is_named(
    score: list, photo_dir: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    bad = photo_dir / "photo-9.jpg"
    whole = (photo_dir / "photo-0.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + whole[24:29]
    bad.write_bytes(
        {
            "corrupt": whole[:60] + bytes(30) + whole[90:],
            "truncated": whole[: len(whole) // 2],
            "text": b"not a picture at all",
            "huge": whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:],
        }[kind]
    )
    assert nearid(*score, "--out", tmp_path / "out") == 2
    assert_one_line(capsys, bad)
    assert not list(tmp_path.glob("out/*"))


def with_bad_files(score: list, folder: Path, *good: int) -> list[object]:
    """`score`, its pictures a folder of good ones (seeds of `checkered`), a damaged, and a text file."""
    folder.mkdir()
    for seed in good:
        checkered(seed).save(folder / f"good-{seed}.png")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    (folder / "notes.jpg").write_text("not a picture at all")
    return [folder if word == score[score.index("--images") + 1] else word for word in score[3:]]


def test_score_goes_on_past_files_that_cannot_be_read_and_lists_them(
    score: list, photo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    flags = ["score", "--references", photo_dir, *with_bad_files(score, pictures, 0, 1)]
    assert nearid(*flags, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"not scored: {pictures / 'cut.png'}: " in printed and f"not scored: {pictures / 'notes.jpg'}: " in printed
    rows = [line.split()[1:] for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows[2:]] == ["cut.png", "notes.jpg"]
    assert all(row[1:] == ["-", "unreadable"] for row in rows[2:])
    assert "accepted 2 of 4" in printed and "2 could not be read" in printed

    report = json.loads((out / "report.json").read_text())
    assert [entry["status"] for entry in report["images"]] == ["accepted", "accepted", "unreadable", "unreadable"]
    assert [entry["score"] for entry in report["images"][2:]] == [None, None]
    assert all("picture" in entry["reason"] or "damaged" in entry["reason"] for entry in report["images"][2:])
    assert not any("reason" in entry for entry in report["images"][:2])

    nearid(*flags, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == report["images"]


def test_a_score_of_files_none_of_which_can_be_read_is_wrong_input(
    score: list, photo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["score", "--references", photo_dir, *with_bad_files(score, tmp_path / "bad")]
    assert nearid(*flags, "--out", tmp_path / "out") == 2
    assert_one_line(capsys, "none of 2 files", tmp_path / "bad" / "cut.png")
    assert not list(tmp_path.glob("out/*"))
    score[score.index("--images") + 1] = tmp_path / "bad" / "notes.jpg"
    assert nearid(*score) == 2
    assert_one_line(capsys, tmp_path / "bad" / "notes.jpg", "not a picture")


def test_a_full_disk_is_told_as_such(score: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The limit on the size of files stands for it: the system refuses the write in the same way."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status = nearid(*score, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert_one_line(capsys, tmp_path / "out" / "contact_sheet.png", "File too large", "make room")
    assert not list(tmp_path.glob("out/*"))


# --- accept thresholds -----------------------------------------------------------------------------------------------


def test_a_false_accept_rate_without_anything_to_set_it_by_names_both_flags(
    score: list, generate: list, capsys: pytest.CaptureFixture[str]
):
    for command in (score, generate):
        assert nearid(*command, "--false-accept-rate", 0.05) == 2
        assert_one_line(capsys, "--false-accept-rate 0.05", "--negatives", "19 or more")
    assert nearid(*score, "--false-accept-rate", 1.5) == 2
    assert_one_line(capsys, "--false-accept-rate 1.5", "between 0 and 1")


def test_negatives_set_the_threshold(score: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    negatives = tmp_path / "negatives"
    negatives.mkdir()
    for seed in range(100, 119):
        checkered(seed).save(negatives / f"{seed}.png")
    nearid(*score, "--false-accept-rate", 0.05, "--negatives", negatives, "--json")
    captured = capsys.readouterr()
    assert "at most 5.00% of pictures like the 19 negatives given" in captured.err
    threshold = json.loads(captured.out)["threshold"]

    score[score.index("--images") + 1] = negatives
    assert nearid(*score, "--false-accept-rate", 0.05, "--negatives", negatives, "--json") == 3
    scores = [entry["score"] for entry in json.loads(capsys.readouterr().out)["images"]]
    assert max(scores) < threshold and threshold == pytest.approx(max(scores), abs=1e-5)

    assert nearid(*score, "--false-accept-rate", 0.01, "--negatives", negatives) == 2
    assert_one_line(capsys, "--false-accept-rate 0.01", "takes 99 negatives", "here are 19", "--negatives")
    assert nearid(*score, "--negatives", tmp_path / "nowhere") == 2
    assert_one_line(capsys, tmp_path / "nowhere", "no such folder")


def test_unwritable_out_is_found_before_any_model_is_loaded(
    score: list, generate: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("in the way")
    for command in (score, generate):
        arguments = [*command, "--out", tmp_path / "file" / "out"]
        for model in ("--model", "--base-model"):
            if model in arguments:
                arguments[arguments.index(model) + 1] = tmp_path / "no-model"
        assert nearid(*arguments) == 2
        assert_one_line(capsys, "--out", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "in the way"


def test_pipeline_folders_without_index_or_weights(
    generate: list, tiny_pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "broken"
    generate[generate.index("--base-model") + 1] = broken
    broken.mkdir()
    assert nearid(*generate) == 2
    assert_one_line(capsys, "--base-model", broken, "model_index.json")

    shutil.copytree(tiny_pipeline_dir, broken, dirs_exist_ok=True)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert nearid(*generate) == 2
    assert_one_line(capsys, "--base-model", broken)

    weights.unlink()
    assert nearid(*generate) == 2
    assert_one_line(capsys, "--base-model", broken, "unet", ".safetensors")

    (broken / "model_index.json").write_text("{")
    assert nearid(*generate) == 2
    assert_one_line(capsys, "--base-model", broken, "model_index.json")
    assert not list((tmp_path / "out").iterdir())


def test_an_encoder_folder_without_weights(
    score: list, generate: list, tiny_nearid_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_nearid_dir, broken)
    (broken / "model.safetensors").unlink()
    for command in (score, generate):
        command[command.index("--model") + 1] = broken
        assert nearid(*command) == 2
        assert_one_line(capsys, broken, "model.safetensors")


def test_models_that_are_nowhere(score: list, generate: list, capsys: pytest.CaptureFixture[str]):
    score[score.index("--model") + 1] = "nobody/no-such-encoder"
    assert nearid(*score) == 2
    assert_one_line(capsys, "nobody/no-such-encoder", "miniworld")
    generate[generate.index("--base-model") + 1] = "nobody/no-such-pipeline"
    assert nearid(*generate) == 2
    assert_one_line(capsys, "--base-model nobody/no-such-pipeline")


def test_a_lora_that_is_missing_or_loads_no_layer(generate: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import torch
    from safetensors.torch import save_file

    assert nearid(*generate, "--lora", tmp_path / "nowhere.safetensors") == 2
    assert_one_line(capsys, tmp_path / "nowhere.safetensors")
    stranger = tmp_path / "stranger.safetensors"
    layer = "unet.nowhere.attn1.to_q.lora"
    save_file({f"{layer}.down.weight": torch.ones(4, 8), f"{layer}.up.weight": torch.ones(8, 4)}, stranger)
    assert nearid(*generate, "--lora", stranger) == 2
    assert_one_line(capsys, stranger)
    assert not list((tmp_path / "out").iterdir())


# --- quickstart ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_weights(monkeypatch: pytest.MonkeyPatch, tiny_pipeline_dir: Path, tiny_nearid_dir: Path) -> None:
    """The quickstart on untrained tiny weights: every step of it runs, in seconds."""
    from nearid_personalize import miniworld

    folders = {"pipeline": tiny_pipeline_dir, "nearid": tiny_nearid_dir}
    monkeypatch.setattr(miniworld, "weights_dir", folders.__getitem__)


def test_quickstart_does_the_whole_job(tiny_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    options = ["--out", out, "--category", "cat", "--lora-steps", 2, "--steps", 2]
    options += ["--num-candidates", 3, "--num-images", 2, "--json"]
    assert nearid("quickstart", *options) in (0, 3)
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["prompt"] == "a photo of sks cat in space"
    assert report["models"] == {"base": "miniworld", "lora": "lora", "scorer": "miniworld"}
    assert {"train_lora", "load", "generate", "score"} <= set(report["cost"]["seconds"])
    names = {"references", "lora", "contact_sheet.png", "report.json", *(f"candidate-{seed}.png" for seed in range(3))}
    assert {path.name for path in out.iterdir()} == names
    assert len(list((out / "references").iterdir())) == 4
    assert [path.name for path in (out / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_quickstart_refuses_an_unknown_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert nearid("quickstart", "--out", tmp_path / "out", "--category", "giraffe") == 2
    assert_one_line(capsys, "giraffe", "dog", "cat")
    assert not (tmp_path / "out").exists()


def test_quickstart_refuses_an_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert nearid("quickstart", "--out", tmp_path / "file") == 2
    assert_one_line(capsys, "--out", tmp_path / "file")


def test_the_quickstart_prompt_speaks_of_the_true_category():
    assert choose_prompt(None, "cat", 0) == "a photo of sks cat in space"
    assert choose_prompt("a photo of sks cat in a park", "cat", 0) == "a photo of sks cat in a park"
    for wrong in ("a photo of sks dog in space", "a photo of a cat", "a photo of sks unicorn"):
        with pytest.raises(InputError, match=r"--prompt .*sks cat"):
            choose_prompt(wrong, "cat", 0)


def test_the_quickstart_does_not_train_on_pictures_it_did_not_make(tmp_path: Path):
    folder = tmp_path / "references"
    pictures = [checkered(seed) for seed in range(4)]
    write_references(pictures, folder)
    write_references(pictures, folder)
    assert len(list(folder.iterdir())) == 4
    checkered(9).save(folder / "mine.png")
    with pytest.raises(InputError, match=r"--out .*mine\.png"):
        write_references(pictures, folder)


def test_stage_times_add_up():
    clock = Stopwatch()
    for _ in range(2):
        with clock.stage("a"):
            pass
    assert list(clock.seconds) == ["a"]
    assert clock.seconds["a"] >= 0


def test_the_table_is_aligned():
    rows = [("1", "a.png", 0.9, "accepted"), ("10", "longer.png", float("nan"), "stopped")]
    lines = table(rows).splitlines()
    assert len({line.index(word) for line, word in zip(lines, ("status", "accepted", "stopped"))}) == 1


# --- evaluate


@pytest.fixture
def subjects_dir(tmp_path: Path) -> Path:
    """Four subjects with two views and two distractors each."""
    for subject in range(4):
        folder = tmp_path / "subjects" / f"subject-{subject}"
        (folder / "distractors").mkdir(parents=True)
        for view in range(2):
            checkered(10 * subject + view).save(folder / f"{view}.png")
            checkered(100 + 10 * subject + view).save(folder / "distractors" / f"{view}.png")
    return tmp_path / "subjects"


def test_evaluate_measures_encoder_and_trunk(
    subjects_dir: Path, tiny_nearid_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["evaluate", "--data", str(subjects_dir), "--split", "all", "--model", str(tiny_nearid_dir)]
    assert nearid(*[*flags, "--trunk", str(tiny_nearid_dir), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert table.splitlines()[-1] == f"[low, high]: {report['intervals']}" and "over identities" in report["intervals"]
    assert [result["encoder"] for result in report["results"]] == ["encoder", "frozen trunk"]
    for result in report["results"]:
        assert result["source"] == "distractors" and result["num_identities"] == 4
        assert result["ssr_interval"][0] <= result["ssr"] <= result["ssr_interval"][1]
        assert f"{result['ssr']:.3f}" in table
    assert nearid(*[*flags, "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["num_identities"] == 2


def test_evaluate_measures_part_edits_against_their_oracle(tiny_nearid_dir: Path):
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    measured = evaluate_rows(model, preprocessing, part_edits("val", 6))
    assert list(measured) == ["edit"] and measured["edit"].num_identities == 6
    assert -1 <= measured["edit"].m_o <= 1 and measured["edit"].m_o_interval is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "miniworld", "--split", "all"], "--split all"),
        (["--data", "miniworld", "--num-views", "1"], "--num-views 1"),
    ],
)
def test_evaluate_answers_wrong_input_with_one_line(flags: list, words: str, capsys: pytest.CaptureFixture[str]):
    assert nearid("evaluate", *flags) == 2
    assert_one_line(capsys, words)


def test_evaluate_needs_distractors(photo_dir: Path, tiny_nearid_dir: Path, capsys: pytest.CaptureFixture[str]):
    flags = ("--data", photo_dir.parent, "--split", "all", "--model", tiny_nearid_dir)
    assert nearid("evaluate", *flags) == 2
    assert "--distractors" in capsys.readouterr().err
