"""Identity as validation: what is kept, when it stops, what it costs, and that a kill changes none of it."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from nearid_personalize.errors import InputError
from nearid_personalize.images import load_images
from nearid_personalize.lora.samples import draw_samples
from nearid_personalize.miniworld import example_references
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora import validation
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, fingerprint, read_metadata, train_lora
from nearid_personalize.training.lora.options import Publishing
from nearid_personalize.training.lora.pictures import read_references
from nearid_personalize.training.lora.publishing import LOGS, PROJECT
from nearid_personalize.training.lora.validation import (
    IdentityValidation,
    ValidationOptions,
    without_lora,
    without_word,
)
from nearid_personalize.training.lora.validation_files import JOURNAL, shared_beginning
from nearid_personalize.training.lora.validation_plan import ValidationPlan
from nearid_personalize.training.lora.validation_records import Journal, Limits, best_of, improvements, verdict
from nearid_personalize.training.patience import out_of_patience

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tiny_pipeline_dir: Path, photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "lora",
        rank=2,
        text_rank=2,
        steps=4,
        batch_size=2,
        learning_rate=0.01,
        precision="fp32",
        validate_every=1,
    )


@pytest.fixture
def told(tiny_nearid_dir: Path) -> ValidationOptions:
    return ValidationOptions(
        validation_model=str(tiny_nearid_dir),
        validation_prompts=("a sks dog", "sks dog in snow"),
        validation_steps=1,
        validation_budget=1.0,
        diversity_floor=0.0,
        copy_ceiling=1.0,
    )


def still(options: LoraOptions, **more: object) -> LoraOptions:
    """Rates so low that every checkpoint draws the same pictures."""
    return options.but(
        learning_rate=1e-12,
        text_learning_rate=1e-12,
        token_learning_rate=1e-12,
        **more,  # type: ignore[arg-type]
    )


def run(options: LoraOptions, told: ValidationOptions) -> IdentityValidation:
    """Train to the end as the trainer does."""
    checks = IdentityValidation.open(options, told)
    train_lora(options, checks)
    checks.finish()
    return checks


def lines_of(output: Path) -> list[dict]:
    """The journal, by a parser that refuses NaN."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    text = (output / JOURNAL).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- decisions -------------------------------------------------------------------------------------------------------


def record(step: int, identity: float, refused: str = "") -> dict:
    return {"step": step, "identity": identity, "refused": refused}


def test_the_best_is_the_most_alike_that_passes_and_never_the_base_model():
    records = [record(0, 0.99), record(1, 0.5), record(2, 0.8), record(3, 0.9, "copies"), record(4, 0.8)]
    assert best_of(records) is records[2]
    assert best_of(records[:1]) is None
    assert best_of([record(1, 0.9, "copies")]) is None


def test_best_so_far_is_never_said_of_what_lies_below_the_base_model():
    records = [record(0, 0.4), record(1, 0.3), record(2, 0.5), record(3, 0.45), record(4, 0.9, "copies")]
    said = [verdict(one, records[: number + 1]) for number, one in enumerate(records)]
    assert said == ["", "below the base model's 0.400", "best so far", "", "copies"]


@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_patience_counts_validations_since_the_best(gain):
    """Beside a plain loop over random scores, some of them refused."""
    draw = random.Random(0)
    for _ in range(200):
        records = [record(step, draw.choice([0.1, 0.2, 0.3]), draw.choice(["", "", "low"])) for step in range(1, 8)]
        best, since = -1.0, 0
        for one in records:
            since += 1
            if not one["refused"] and one["identity"] - best > gain:
                best, since = one["identity"], 0
        for patience in range(1, 8):
            assert out_of_patience(improvements([record(0, 1.0), *records], gain), patience) == (since >= patience)
        assert not out_of_patience(improvements(records, gain), 0)


def test_ever_smaller_gains_run_out_of_patience():
    """Identity of a LoRA that has converged: every validation is the best so far, by ever less."""
    records = [record(0, 0.0), *(record(step, 0.97 + 0.003 * step) for step in range(1, 5))]
    assert out_of_patience(improvements(records, gain=0.01), 2)
    assert not out_of_patience(improvements(records), 2)
    assert best_of(records)["step"] == 4


def base(**more: object) -> dict:
    return {"adherence": 0.4, "adherence_of_references": 0.2, "diversity": 0.4, "copy_rate": 0.1, **more}


def test_floors_are_shares_of_what_the_base_model_does():
    told = ValidationOptions(adherence_floor=0.5, diversity_floor=0.25, copy_ceiling=0.25)
    limits = Limits.from_base(base(), told)
    assert limits == Limits(pytest.approx(0.3), pytest.approx(0.1), pytest.approx(0.35))
    assert limits.floors == ("adherence", "diversity", "copies")
    assert limits.refusal(base()) == ""
    assert limits.refusal(base(adherence=0.29)).startswith("adherence 0.290 below 0.300")
    assert limits.refusal(base(diversity=0.09)).startswith("diversity 0.090")
    assert limits.refusal(base(copy_rate=0.5)) == "50% copies, above 35%"


def test_what_was_not_measured_or_not_led_sets_no_floor():
    unmeasured = base(adherence=None, adherence_of_references=None, diversity=None)
    limits = Limits.from_base(unmeasured, ValidationOptions(copy_ceiling=1.0))
    assert limits.refusal(unmeasured) == "" and limits.floors == ()
    assert Limits.from_base(base(adherence=0.1), ValidationOptions()).adherence is None


def test_the_rare_token_is_kept_from_models_that_never_learnt_it():
    assert without_word("a photo of sks dog", "sks") == "a photo of dog"


def test_prompts_are_told_apart_by_what_differs():
    assert shared_beginning(["a sks dog in snow", "a sks dog in space"]) == "a sks dog in "
    assert shared_beginning(["a dog"]) == shared_beginning(["a dog", "the dog"]) == ""


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append({"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "ident')
    again = Journal.read(path)
    again.append({"step": 2})
    assert Journal.read(path).records == again.records == [{"step": 1}, {"step": 2}]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_every_validation_told(options, told):
    options = options.but(publishing=Publishing(report_to=("tensorboard",)))
    checks = run(options, replace(told, tensorboard=True))
    output, records = options.output, lines_of(options.output)
    assert [one["step"] for one in records] == [0, 1, 2, 3, 4]
    best = max(records[1:], key=lambda one: one["identity"])
    weights = {name: load_file(output / folder / WEIGHTS_NAME) for name, folder in (("kept", "."), ("best", "best"))}
    assert all(torch.equal(weights["kept"][key], weights["best"][key]) for key in weights["best"])

    metadata = read_metadata(output)
    assert metadata["steps"] == metadata["validation"]["step"] == best["step"]
    assert metadata["validation"]["identity"] == best["identity"]
    assert metadata["validation"]["leave_one_out"] == pytest.approx(float(checks.subject.reference_scores.mean()))
    assert metadata["references"] == fingerprint(read_references(options.data))
    assert read_metadata(output / "last")["steps"] == 4

    for one in records:
        assert (output / "validation" / f"step-{one['step']:06d}.png").exists()
        assert one["validation_loss"] > 0 and one["leave_one_out"] == metadata["validation"]["leave_one_out"]
        assert torch.tensor(one["samples"]["identity"]).mean() == pytest.approx(one["identity"], abs=1e-5)
    assert records[0]["validation_loss"] > records[-1]["validation_loss"]  # of pictures that are trained on

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0}).Reload()
    tracked = EventAccumulator(str(output / LOGS / PROJECT)).Reload()
    for heard in (log, tracked):
        logged = [(event.step, event.value) for event in heard.Scalars("validation/identity")]
        assert logged == [(one["step"], pytest.approx(one["identity"])) for one in records]
    assert len(log.Images("validation/samples")) == 5


def test_the_scored_pictures_are_what_the_kept_file_draws(options, told):
    run(options, told)
    best = read_metadata(options.output)["validation"]
    pipe = StableDiffusionPipeline.from_pretrained(options.base_model, safety_checker=None)
    pipe.load_lora_weights(options.output)
    pipe.set_progress_bar_config(disable=True)
    checks = IdentityValidation.open(options.but(output=options.output / "again"), told)
    images = draw_samples(pipe, told.validation_prompts, range(2), num_inference_steps=1)
    scores = checks.scorer.score([image for row in images for image in row], checks.subject)
    assert float(scores.mean()) == pytest.approx(best["identity"], abs=1e-4)


@pytest.mark.parametrize(("resolution", "side"), [(None, 32), (16, 16)])
def test_pictures_are_as_large_as_those_that_are_trained_on(options, told, resolution, side):
    """At the pipeline's own size a validation of SDXL takes four times the pixels of a training at 512."""
    checks = IdentityValidation.open(options.but(resolution=resolution), told)
    pipe = StableDiffusionPipeline.from_pretrained(options.base_model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    plan = ValidationPlan(
        steps=(1,), prompts=told.validation_prompts[:1], seeds=2, denoising_steps=1, seconds=0.0, share=0.0
    )
    snapshot = lora.Snapshot(pipe=pipe, step=1, loss=0.0, save=print, loss_on=lambda pictures: 0.0)
    assert [image.size for image in checks.draw(snapshot, plan)[0]] == [(side, side)] * 2


def test_last_is_kept_when_asked(options, told):
    checks = run(options, replace(told, keep="last"))
    assert checks.finish() is None
    assert read_metadata(options.output)["steps"] == 4
    assert read_metadata(options.output / "best")["steps"] == best_of(checks.journal.records)["step"]


def test_it_stops_when_identity_stops_growing(options, told):
    run(still(options, steps=9), replace(told, patience=2))
    assert [one["step"] for one in lines_of(options.output)] == [0, 1, 2, 3]
    assert read_metadata(options.output)["steps"] == 1
    assert read_metadata(options.output / "last")["steps"] == 3


def test_floors_refuse_a_copy_paste_checkpoint(options, told, monkeypatch):
    """At step 3 the pictures are the reference photos themselves: nothing is more alike, and it is not kept."""
    photos, draws = load_images(options.data.references), []

    def draw(*arguments, **more):
        draws.append(0)
        return [photos[:2], photos[2:]] if len(draws) == 4 else draw_samples(*arguments, **more)  # base, 1, 2, 3

    monkeypatch.setattr(validation, "draw_samples", draw)
    run(options, replace(told, copy_ceiling=0.25))
    records = lines_of(options.output)
    assert max(records, key=lambda one: one["identity"])["step"] == 3
    assert records[3]["refused"] == "100% copies, above 25%"
    assert read_metadata(options.output)["steps"] == best_of(records)["step"] != 3


def test_where_nothing_passes_the_last_is_kept_and_said(options, told, capsys, monkeypatch):
    photos = load_images(options.data.references)
    monkeypatch.setattr(validation, "draw_samples", lambda *_, **__: [photos[:2], photos[2:]])
    monkeypatch.setattr(Limits, "from_base", lambda *_: Limits(None, None, 0.25))
    checks = run(options, told)
    assert checks.finish() is None and "no checkpoint passed" in capsys.readouterr().err
    assert read_metadata(options.output)["steps"] == 4 and not (options.output / "best").exists()


class WorkClock:
    """A clock that only work moves: a training step, a picture's denoising step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, training_step: float, denoising_step: float) -> None:
        self.now, self.drawn = 0.0, []
        add_gradients = lora.LoraRun.add_gradients

        def train(run, step):
            self.now += training_step
            return add_gradients(run, step)

        def draw(pipe, prompts, seeds, *arguments, num_inference_steps, **more):
            self.drawn.append((tuple(prompts), len(seeds), num_inference_steps))
            self.now += len(prompts) * len(seeds) * num_inference_steps * denoising_step
            return draw_samples(pipe, prompts, seeds, *arguments, num_inference_steps=1, **more)

        monkeypatch.setattr(lora.LoraRun, "add_gradients", train)
        monkeypatch.setattr(validation, "draw_samples", draw)

    def __call__(self) -> float:
        return self.now


def test_validations_are_fitted_to_the_budget_and_evenly_spaced(options, told, capsys, monkeypatch):
    """As asked, one validation would take a tenth of the run: 2 prompts, 2 seeds, 20 steps are 80 of 800 seconds."""
    clock = WorkClock(monkeypatch, training_step=40.0, denoising_step=1.0)
    told = replace(told, validation_steps=20, validation_budget=0.3)
    checks = IdentityValidation.open(options.but(steps=20, validate_every=2), told, clock)
    train_lora(checks.options, checks)
    records = lines_of(options.output)
    steps = [one["step"] for one in records]
    assert steps[0] == 0 and steps[-1] == 20 and 4 <= len(steps[1:]) < 10
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 20 / (len(steps) - 1) + 1
    whole = clock.drawn[-len(steps) :]
    assert len(set(whole)) == 1 and whole[0][2] < 20  # all alike, and smaller than asked for
    assert records[-1]["seconds"]["validations"] == checks.spent <= 0.3 * records[-1]["seconds"]["run"]
    told_lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validation: ")]
    assert (
        len(told_lines) == 1
        and f"of the 10 asked for), each 2 prompts × 2 seeds × {whole[0][2]} of 20" in told_lines[0]
    )


def test_where_one_validation_exceeds_the_budget_the_last_step_has_it(options, told, capsys, monkeypatch):
    clock = WorkClock(monkeypatch, training_step=1.0, denoising_step=10.0)
    told = replace(told, validation_steps=20, validation_budget=0.1)
    checks = IdentityValidation.open(options.but(steps=6), told, clock)
    train_lora(checks.options, checks)
    assert checks.finish()["step"] == 6 and [one["step"] for one in lines_of(options.output)] == [0, 6]
    assert "exceeds --validation-budget 0.1" in capsys.readouterr().err


def test_a_step_that_could_not_be_measured_never_loses(options, told, capsys, monkeypatch):
    """Memory runs out for the last one's pictures; everything before is measured."""
    draws = []

    def draw(*arguments, **more):
        draws.append(0)
        if len(draws) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw_samples(*arguments, **more)

    monkeypatch.setattr(validation, "draw_samples", draw)
    checks = run(options.but(steps=3), told)
    assert [one["step"] for one in lines_of(options.output)] == [0, 1, 2]
    assert read_metadata(options.output)["steps"] == 3 and not (options.output / "last").exists()
    heard = capsys.readouterr().err
    assert "step 3: not measured" in heard and "step 3, the last, was not measured: it is kept" in heard
    assert checks.finish() is None


def test_where_nothing_could_be_measured_the_last_is_written_and_said(options, told, capsys, monkeypatch):
    def draw(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(validation, "draw_samples", draw)
    assert run(options, told).finish() is None
    assert read_metadata(options.output)["steps"] == 4 and not (options.output / JOURNAL).exists()
    heard = capsys.readouterr().err
    assert "base model: not measured" in heard and "nothing was measured" in heard


def test_other_errors_than_memory_are_raised(options, told, monkeypatch):
    def draw(*arguments, **more):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(validation, "draw_samples", draw)
    with pytest.raises(RuntimeError, match="same dtype"):
        run(options, told)


def test_a_resumed_run_keeps_its_plan_on_a_slower_machine(options, told, capsys, monkeypatch):
    told = replace(told, validation_steps=20, validation_budget=0.5)
    options = options.but(steps=8, checkpoint_every=3, keep_checkpoints=True)
    clock = WorkClock(monkeypatch, training_step=40.0, denoising_step=1.0)
    checks = IdentityValidation.open(options, told, clock)
    train_lora(options, checks, on_step=lambda step, loss: step < 4)
    plan = lines_of(options.output)[0]["plan"]
    assert clock.drawn[-1][2] == plan["denoising_steps"] < 20 and plan["steps"][0] < 4 < plan["steps"][-1]

    slower = WorkClock(monkeypatch, training_step=1.0, denoising_step=5.0)
    again = IdentityValidation.open(options.but(resume=True), told, slower)
    train_lora(again.options, again)
    assert set(slower.drawn) == {clock.drawn[-1]}
    assert [one["step"] for one in lines_of(options.output)] == [0, *plan["steps"]]
    assert "as planned before, after step" in capsys.readouterr().err


class Interruption(Exception):
    pass


@pytest.mark.parametrize("patience", [0, 3])
def test_a_resumed_run_goes_on_with_its_best_and_its_patience(patience, options, told, tmp_path, monkeypatch):
    """Killed after the validation of step 3, resumed from the checkpoint of step 2."""
    options = options.but(steps=6, checkpoint_every=2)
    options = still(options) if patience else options
    told = replace(told, patience=patience)
    whole = run(options.but(output=tmp_path / "whole"), told)

    take_step, drawn = lora.LoraRun.take_step, []

    def fail_at_step_four(run, step):
        if step == 4:
            raise Interruption
        return take_step(run, step)

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(lora.LoraRun, "take_step", fail_at_step_four)
        run(options, told)
    assert [one["step"] for one in lines_of(options.output)] == [0, 1, 2, 3]

    monkeypatch.setattr(validation, "draw_samples", lambda *a, **k: (drawn.append(0), draw_samples(*a, **k))[1])
    run(options.but(resume=True), told)
    records, expected = lines_of(options.output), whole.journal.records
    assert [one["step"] for one in records] == [one["step"] for one in expected]
    assert [one["identity"] for one in records] == pytest.approx([one["identity"] for one in expected])
    assert len(drawn) == len(records) - 4  # step 3 is not drawn again
    assert records[-1]["step"] == (4 if patience else 6)
    kept = [load_file(folder / WEIGHTS_NAME) for folder in (options.output, tmp_path / "whole")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])
    seconds = [one["seconds"]["run"] for one in records]
    assert seconds == sorted(seconds)


def test_a_resumed_run_measures_what_it_measured_before(options, told):
    train_lora(options.but(checkpoint_every=2, keep_checkpoints=True), IdentityValidation.open(options, told))
    resumed = options.but(resume=True)
    IdentityValidation.open(resumed, replace(told, patience=3))
    for change, flag in (({"validation_seeds": 3}, "--validation-seeds"), ({"validation_steps": 2}, "--validation-st")):
        with pytest.raises(InputError, match=f"--resume: {flag}"):
            IdentityValidation.open(resumed, replace(told, **change))


def test_a_fresh_run_forgets_the_one_it_replaces(options, told):
    run(options, told)
    run(options.but(steps=2), told)
    assert [one["step"] for one in lines_of(options.output)] == [0, 1, 2]
    assert not (options.output / "validation" / "step-000004.png").exists()


def test_opening_writes_and_removes_nothing(options, told):
    run(options, told)
    before = {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}
    IdentityValidation.open(options, replace(told, tensorboard=True))
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("*")} == before


def test_a_refused_fresh_run_forgets_nothing(options, told):
    run(options.but(checkpoint_every=2, keep_checkpoints=True), told)
    with pytest.raises(InputError, match="--resume"):
        run(options, told)
    assert [one["step"] for one in lines_of(options.output)] == [0, 1, 2, 3, 4]


def test_looking_changes_nothing(options, told):
    plain = load_file(train_lora(options.but(output=options.output.with_name("plain"))) / WEIGHTS_NAME)
    run(options, replace(told, keep="last"))
    seen = load_file(options.output / WEIGHTS_NAME)
    assert all(torch.equal(seen[name], plain[name]) for name in plain)


def test_without_its_lora_a_pipeline_is_its_base_model(options):
    plain = StableDiffusionPipeline.from_pretrained(options.base_model, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    expected = draw_samples(plain, ["sks dog"], [0], num_inference_steps=1)[0][0]
    drawn = []

    def look(snapshot):
        trained = [p.requires_grad for p in snapshot.pipe.text_encoder.parameters()]
        with without_lora(snapshot.pipe):
            drawn.append(draw_samples(snapshot.pipe, ["sks dog"], [0], num_inference_steps=1)[0][0])
        assert [p.requires_grad for p in snapshot.pipe.text_encoder.parameters()] == trained
        drawn.append(draw_samples(snapshot.pipe, ["sks dog"], [0], num_inference_steps=1)[0][0])

    train_lora(options.but(steps=2, validate_every=2), look)
    assert drawn[0].tobytes() == expected.tobytes() != drawn[1].tobytes()


def test_the_validation_loss_is_of_the_pictures_given_and_always_the_same(options):
    losses = []

    def look(snapshot):
        pictures = read_references(options.data)
        losses.append((snapshot.loss_on(pictures[:2]), snapshot.loss_on(pictures[:2]), snapshot.loss_on(pictures[2:])))

    train_lora(options.but(steps=2, validate_every=1), look)
    for first, again, others in losses:
        assert first == again != others and math.isfinite(first)
    assert losses[0][0] != losses[1][0]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"validation_model": None}, "--validation-model"),
        ({"validation_model": "/nowhere"}, "/nowhere"),
        ({"validation_prompts": ("a dog",)}, "--validation-prompts"),
        ({"validation_photos": Path("/nowhere")}, "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(change, flag, options, told):
    with pytest.raises(InputError, match=flag) as error:
        IdentityValidation.open(options, replace(told, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"validation_seeds": 0}, "--validation-seeds"),
        ({"validation_budget": 0.0}, "--validation-budget"),
        ({"copy_ceiling": 1.5}, "--copy-ceiling"),
        ({"patience": -1}, "--patience"),
    ],
)
def test_options_name_the_wrong_flag(change, flag):
    with pytest.raises(InputError, match=flag):
        ValidationOptions(**change)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainer_validates_in_the_mini_world(processes, tmp_path):
    """The main process draws and decides, the others wait for it."""
    references, category, _ = example_references()
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(references):
        image.save(folder / f"{number}.png")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "trainers/train_lora.py"]
    command += ["--base-model", "miniworld", "--references", str(folder)]
    command += ["--prompt", f"a photo of sks {category}", "--output", str(tmp_path / "lora"), "--steps", "4"]
    command += ["--batch-size", "1", "--validation-model", "miniworld", "--validate-every", "2"]
    command += ["--validation-steps", "2", "--validation-budget", "1", "--validation-seeds", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = lines_of(tmp_path / "lora")
    assert [one["step"] for one in records] == [0, 2, 4]
    assert all(one["adherence"] is not None and one["diversity"] is None for one in records)  # one seed
    assert records[0]["measured"]["validation_prompts"][0] == f"a photo of sks {category} in park"
    assert f"of step {best_of(records)['step']}" in done.stdout
