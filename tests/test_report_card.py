"""The report card: what is drawn, judged, counted and written for a finished LoRA."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import checkered
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from nearid_personalize import IdentityScorer, cli
from nearid_personalize.commands.quickstart import quickstart_lora
from nearid_personalize.errors import InputError
from nearid_personalize.lora.card import (
    Cell,
    ReportCard,
    SampleJudge,
    Shot,
    report_card,
    thumbnail,
    times,
    verdict,
    wilson_interval,
)
from nearid_personalize.lora.card_page import to_html, weakness
from nearid_personalize.lora.files import check_lora_file, find_loras, subject_of
from nearid_personalize.lora.samples import draw_samples
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, load_lora, train_lora

PROMPTS = ("a photo of sks dog", "sks dog in <space> & snow")


@pytest.fixture(scope="module")
def lora(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A LoRA of a few steps on the tiny pipeline, strong enough to change pictures."""
    folder = tmp_path_factory.mktemp("lora")
    photos = folder / "photos"
    photos.mkdir()
    for seed in range(4):
        checkered(seed).save(photos / f"{seed}.png")
    options = LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photos,
        output=folder / "run",
        rank=4,
        steps=3,
        resolution=32,
        learning_rate=0.05,
        precision="fp32",
    )
    return train_lora(options) / WEIGHTS_NAME


@pytest.fixture(scope="module")
def checkpoints(lora, tmp_path_factory) -> Path:
    """A run's folder: two checkpoints that differ, a copy of the second, and a trainer's own state."""
    folder = tmp_path_factory.mktemp("run")
    for step, factor in ((2, 0.5), (10, 1.0)):
        inside = folder / f"step-{step}"
        inside.mkdir()
        save_file({name: tensor * factor for name, tensor in load_file(lora).items()}, inside / WEIGHTS_NAME)
        save_file({"weight": torch.ones(1)}, inside / "model.safetensors")
    shutil.copytree(folder / "step-10", folder / "step-best")
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_dir):
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sample_judge(tiny_nearid_dir) -> SampleJudge:
    photos = [checkered(seed) for seed in range(3)]
    scorer = IdentityScorer.from_pretrained(tiny_nearid_dir)
    return SampleJudge(scorer, scorer.enroll(photos), photos, token="sks")


@pytest.fixture(scope="module")
def card(pipe, sample_judge, checkpoints) -> ReportCard:
    loras = find_loras([checkpoints])
    return report_card(
        pipe, loras, sample_judge, "sks dog", (0.5, 1.0), PROMPTS, 2, progress=False, num_inference_steps=2
    )


def cell(num_accepted: int, num_images: int = 10, scale: float = 1.0, identity: float = 0.5) -> Cell:
    """A cell of made-up pictures."""
    jpeg = thumbnail(checkered(0))
    reasons = [""] * num_accepted + ["identity"] * (num_images - num_accepted)
    shots = tuple(Shot(PROMPTS[0], seed, identity, reason, False, jpeg) for seed, reason in enumerate(reasons))
    return Cell("step-1", scale, shots, None, math.nan)


def card_of(*cells: Cell) -> ReportCard:
    return ReportCard("sks dog", cells, cell(0), PROMPTS[:1], (0,), 0.5, "", (), ())


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (0, 32), (1, 2), (7, 32), (31, 32), (32, 32)])
def test_the_interval_solves_wilsons_equation(hits, count):
    """Each end p is where the count seen lies 1.96 standard deviations of a binomial of p away."""
    share = hits / count
    low, high = wilson_interval(hits, count)
    assert 0 <= low <= share <= high <= 1 and low < high
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.96, abs=1e-3)
    more_low, more_high = wilson_interval(hits * 10, count * 10)
    assert more_high - more_low < high - low


def test_candidates_are_the_inverse_of_the_rate():
    some = cell(4)
    assert some.candidates == pytest.approx(2.5)
    low, high = some.candidates_interval
    assert 1 < low < 2.5 < high and (1 / high, 1 / low) == pytest.approx(some.rate_interval)
    none = cell(0)
    assert math.isinf(none.candidates) and math.isinf(none.candidates_interval[1]) and none.candidates_interval[0] > 2
    assert none.to_dict()["candidates"] is None
    assert [times(1), times(1.25), times(12.4), times(math.inf)] == ["1.0", "1.2", "12", "∞"]


def test_the_best_is_most_accepted_then_most_alike_then_nearest_to_one():
    weak, plain, strong = cell(5, scale=0.6), cell(5), cell(5, scale=1.4)
    assert card_of(weak, plain, strong).best is plain
    closer = cell(5, scale=0.6, identity=0.6)
    assert card_of(plain, closer).best is closer
    most = cell(6, scale=1.4, identity=0.4)
    assert card_of(plain, closer, most).best is most
    assert "6 of 10" in verdict(card_of(most)) and "None of the 10" in verdict(card_of(cell(0)))


def test_rivals_lie_within_the_bests_interval():
    best, near, far = cell(8), cell(6, scale=0.8), cell(1, scale=0.6)
    assert card_of(best, near, far).rivals == (near,)
    assert card_of(cell(0), cell(0, scale=0.8)).rivals == ()


def test_the_hardest_prompt_is_named_with_its_reason():
    jpeg = thumbnail(checkered(0))
    reasons = {PROMPTS[0]: ("", ""), PROMPTS[1]: ("", "not the place asked for")}
    shots = [Shot(p, seed, 0.9, why, False, jpeg) for p, found in reasons.items() for seed, why in enumerate(found)]
    line = weakness(Cell("a", 1.0, tuple(shots), None, math.nan), PROMPTS)
    assert PROMPTS[1] in line and "1 of 2" in line and "not the place asked for" in line
    assert weakness(cell(10), PROMPTS[:1]) == ""
    assert weakness(cell(5), PROMPTS[:1]) == ""


# --- LoRA files ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_found_in_natural_order_and_once(checkpoints, lora):
    assert list(find_loras([checkpoints])) == ["step-2", "step-10"]
    assert list(find_loras([checkpoints / "step-10", checkpoints / "step-2"])) == ["step-10", "step-2"]
    assert find_loras([lora]) == {"run": lora}


def test_files_of_other_trainers_keep_their_names(lora, tmp_path):
    for name, factor in (("dog-000002", 0.5), ("dog-000010", 0.7), ("dog", 1.0)):
        save_file({key: tensor * factor for key, tensor in load_file(lora).items()}, tmp_path / f"{name}.safetensors")
    assert set(find_loras([tmp_path])) == {"dog-000002", "dog-000010", "dog"}


def test_missing_files_and_folders_without_any(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="--lora"):
            find_loras([path])


def test_the_file_says_what_it_calls_the_subject(lora, checkpoints, tmp_path):
    assert subject_of([check_lora_file(lora)]) == ("sks dog", "sks")
    assert subject_of([check_lora_file(checkpoints / "step-2" / WEIGHTS_NAME)]) is None
    other = tmp_path / "other.safetensors"
    save_file(load_file(lora), other, metadata={"modelspec.trigger_phrase": "ohwx cat", "nearid_personalize": "[["})
    assert subject_of([check_lora_file(other)]) == ("ohwx cat", "ohwx")


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_drawn_as_a_plain_pipeline_draws_it(card, checkpoints, tiny_pipeline_dir):
    assert [(c.checkpoint, c.scale) for c in card.cells] == [
        ("step-2", 0.5),
        ("step-2", 1.0),
        ("step-10", 0.5),
        ("step-10", 1.0),
    ]
    plain = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    plain.set_progress_bar_config(disable=True)
    drawn = {"base": draw_samples(plain, PROMPTS, (0, 1), num_inference_steps=2)}
    load_lora(plain, checkpoints / "step-10")
    plain.set_adapters(["subject"], [0.5])
    drawn["half"] = draw_samples(plain, PROMPTS, (0, 1), num_inference_steps=2)
    for found, pictures in ((card.base, drawn["base"]), (card.cell("step-10", 0.5), drawn["half"])):
        assert [shot.jpeg for shot in found.shots] == [thumbnail(image) for row in pictures for image in row]
    assert drawn["base"][0][0].tobytes() != drawn["half"][0][0].tobytes()


def test_half_the_weights_at_full_scale_are_the_full_at_half_scale_squared(card):
    """Scaling A and B by a half scales the LoRA by a quarter: another setting than the whole at a half."""
    images = [card.cell(name, scale).shots[0].jpeg for name, scale in (("step-2", 1.0), ("step-10", 0.5))]
    assert images[0] != images[1]


def test_the_pipeline_is_left_as_it_was(card, pipe):
    assert not pipe.get_list_adapters()
    redrawn = draw_samples(pipe, PROMPTS, (0, 1), num_inference_steps=2)
    assert [shot.jpeg for shot in card.base.shots] == [thumbnail(image) for row in redrawn for image in row]


def test_acceptance_is_the_threshold_and_the_floors(pipe, sample_judge, lora):
    class Refuses:
        def judge(self, images, prompt):
            assert "sks" not in prompt
            return ["too plain"] * len(images)

    low = sample_judge.subject.__class__(sample_judge.subject.embeddings, -1.0)
    high = sample_judge.subject.__class__(sample_judge.subject.embeddings, 1.1)
    rates = []
    for subject, floors in ((low, ()), (high, ()), (low, (Refuses(),)), (high, (Refuses(),))):
        judges = SampleJudge(sample_judge.scorer, subject, sample_judge.references, floors, token="sks")
        found = report_card(
            pipe, {"a": lora}, judges, "sks dog", (1.0,), PROMPTS, 1, progress=False, num_inference_steps=1
        )
        rates.append((found.best.rate, {shot.reason.split()[0] for shot in found.best.shots if shot.reason}))
    assert rates == [(1.0, set()), (0.0, {"identity"}), (0.0, {"too"}), (0.0, {"identity"})]


def test_a_misfit_is_refused_before_anything_is_drawn(pipe, sample_judge, lora, tmp_path):
    stranger = tmp_path / "stranger.safetensors"
    save_file({f"transformer.blocks.0.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, stranger)
    calls = []
    with (
        pipe.unet.register_forward_hook(lambda *_: calls.append(1)),
        pytest.raises(InputError, match=r"stranger\.safetensors.*does not fit"),
    ):
        report_card(pipe, {"good": lora, "bad": stranger}, sample_judge, "sks dog", (1.0,), PROMPTS, 1, progress=False)
    assert not calls and not pipe.get_list_adapters()


# --- the file --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes; fails on tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_names_every_picture(card):
    text = to_html(card, {"base": "<b>base</b>", "scorer": "toy"})
    page = Page(text)
    pictures = [attributes for tag, attributes in page.found if tag == "img"]
    shown = min(len(card.base.shots), 12)
    assert len(pictures) == 3 + shown + 5 * len(card.base.shots)
    assert all(attributes["alt"] and attributes["src"].startswith("data:image/jpeg") for attributes in pictures)
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "object"}
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in text and "url(" not in text
    assert "&lt;b&gt;base" in text and "in &lt;space&gt; &amp; snow" in text and "<space>" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def nearid(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def command(checkpoints, photo_dir, tiny_pipeline_dir, tiny_nearid_dir, tmp_path) -> list:
    options = ["report-card", "--lora", checkpoints, "--base-model", tiny_pipeline_dir, "--references", photo_dir]
    options += ["--model", tiny_nearid_dir, "--out", tmp_path / "card", "--steps", 1, "--seeds", 1, "--scales", 0.5, 1]
    return [*options, "--prompts", *PROMPTS, "--device", "cpu"]


def test_the_command_writes_page_sheet_and_report(command, tmp_path, capsys):
    assert nearid(*command, "--json") in (0, 3)
    report = json.loads(capsys.readouterr().out)
    out = tmp_path / "card"
    assert {path.name for path in out.iterdir()} == {"report_card.html", "contact_sheet.png", "report.json"}
    assert report == json.loads((out / "report.json").read_text())
    assert len(report["cells"]) == 4 and all(len(found["images"]) == 2 for found in report["cells"])
    assert report["best"]["accepted"] == max(found["accepted"] for found in report["cells"])
    assert list(report["models"]["lora"]) == ["step-2", "step-10"]
    assert nearid(*command) == (0 if report["best"]["accepted"] else 3)
    assert report["best"]["checkpoint"] in capsys.readouterr().out


def test_the_mini_worlds_own_pipeline(tmp_path, capsys):
    from nearid_personalize.miniworld import example_references

    photos, category, _ = example_references(0, "val")
    (tmp_path / "photos").mkdir()
    for index, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / f"{index}.png")
    output = train_lora(quickstart_lora(tmp_path / "photos", tmp_path / "lora", category, steps=2))
    options = ["--lora", output, "--base-model", "miniworld", "--references", tmp_path / "photos", "--steps", 4]
    options += ["--model", "miniworld", "--out", tmp_path / "card", "--seeds", 1, "--scales", 1, "--device", "cpu"]
    assert nearid("report-card", *options, "--text-image-model", "miniworld", "--json") in (0, 3)
    report = json.loads(capsys.readouterr().out)
    assert report["subject"] == f"sks {category}" and len(report["prompts"]) == 8
    assert report["cells"][0]["adherence"] is not None


@pytest.mark.parametrize(
    ("flag", "values", "said"),
    [
        ("--lora", ["nowhere"], "--lora nowhere"),
        ("--references", ["nowhere"], "nowhere: no such folder"),
        ("--base-model", ["nowhere/at-all"], "--base-model nowhere/at-all"),
        ("--scales", [0], "--scales 0"),
        ("--scales", [1, 1], "--scales"),
        ("--seeds", [0], "--seeds 0"),
        ("--prompts", [], "--subject"),
    ],
)
def test_wrong_input_is_one_line(flag, values, said, command, capsys):
    start = command.index(flag)
    end = next((i for i in range(start + 1, len(command)) if str(command[i]).startswith("--")), len(command))
    command[start:end] = [flag, *values] if values else []
    assert nearid(*command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
