import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from conftest import checkered
from safetensors.torch import load_file, save_file
from tiles import PREPROCESSING, Tiles, same, tiny_model, weights
from tqdm import tqdm

from nearid_personalize import InputError
from nearid_personalize.commands.evaluate import evaluation_rows
from nearid_personalize.commands.flags import run_program
from nearid_personalize.commands.options import Evaluate
from nearid_personalize.data import cache as cache_module
from nearid_personalize.data.cache import TokenCache, cache_in_memory
from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.training.head import (
    DataShare,
    HeadOptions,
    Pooling,
    Schedule,
    TrainingFacts,
    anchor_first,
    batch_loss,
    export,
    is_finished,
    model_card,
    step_bytes,
    train_head,
    warmup_cosine,
)

TRAINER = Path(__file__).parents[1] / "trainers" / "train_head.py"


FACTS = TrainingFacts("train me", "tiny", "tiles", ("stripes",), 20, 9)


def quick_options(output, **changes):
    options = HeadOptions(output, steps=6, batch_size=8, warmup_steps=2, evaluate_every=0)
    return dataclasses.replace(options, **changes)


def tokens_of(rows):
    return cache_in_memory(tiny_model(), rows, PREPROCESSING)


# --- order, anchors, rate


def test_anchors_are_valid_even_and_leave_the_other_slots():
    mask = torch.tensor([[True, True, False], [True, True, True]]).repeat(600, 1)
    order = anchor_first(mask.float(), torch.Generator().manual_seed(0))
    assert (order.sort(dim=1).values == torch.arange(3)).all()
    assert mask.gather(1, order)[:, 0].all()
    two, three = order[::2, 0].bincount(minlength=3), order[1::2, 0].bincount(minlength=3)
    assert two[2] == 0 and two[:2].min() > 250 and three.min() > 160
    uneven = anchor_first(torch.tensor([[0.1, 0.3, 0.0]]).repeat(800, 1), torch.Generator().manual_seed(0))
    assert 150 < int((uneven[:, 0] == 0).sum()) < 250 and not (uneven[:, 0] == 2).any()


def schedule_of(num_rows, *sets, **options):
    mask = torch.ones(num_rows, 2, dtype=torch.bool)
    return Schedule.of(HeadOptions(Path("unused"), **options), mask, [DataShare(*share) for share in sets])


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own():
    schedule = schedule_of(12, batch_size=4)
    batches = [[schedule.batch(3 * epoch + b) for b in range(3)] for epoch in range(2)]
    epochs = [[rows.tolist() for rows, _ in batch] for batch in batches]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(12)) for epoch in epochs)
    assert [[variant for _, variant in batch] for batch in batches] == [[0] * 3, [1] * 3]
    assert epochs[0] != epochs[1]
    assert schedule_of(12, batch_size=4, seed=1).batch(0)[0].tolist() != epochs[0][0]
    assert sorted(schedule_of(3, batch_size=4).batch(7)[0].tolist()) == [0, 1, 2]


def test_one_data_set_keeps_the_order_that_the_packaged_heads_were_trained_in():
    # The card of the packaged head names its command: torch.randperm, seeded by seed and epoch.
    expected = torch.randperm(300, generator=torch.Generator().manual_seed(2 * 7 * 1_000_003 + 1))
    schedule = schedule_of(300, batch_size=100, seed=7)
    assert torch.equal(torch.cat([schedule.batch(3 + number)[0] for number in range(3)]), expected)


@pytest.mark.parametrize("sets", [((40, 1), (7, 4)), ((5, 3), (9, 2), (11, 1)), ((6, 4),), ((3, 1), (4, 1))])
def test_repeated_rows_are_shown_so_often_and_never_twice_in_a_batch(sets):
    schedule = schedule_of(sum(count for count, _ in sets), *sets, batch_size=12)
    size, per_epoch = schedule.batch_size, schedule.epoch_size // schedule.batch_size
    for epoch in range(2):
        batches = [schedule.batch(epoch * per_epoch + number)[0] for number in range(per_epoch)]
        assert all(len(set(rows.tolist())) == size for rows in batches)
        shown = torch.cat(batches).bincount(minlength=sum(count for count, _ in sets))
        start = 0
        for count, repeats in sets:
            part = shown[start : start + count]
            assert part.max() <= repeats and int((repeats - part).sum()) <= schedule.epoch_size % size
            start += count
    assert not torch.equal(schedule.batch(0)[0], schedule.batch(per_epoch)[0])


def test_rate_rises_then_falls_to_nothing():
    factors = [warmup_cosine(step, 10, 100) for step in range(101)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[0] > 0 and factors[10] == 1 and factors[100] == pytest.approx(0, abs=1e-6)
    assert warmup_cosine(0, 0, 1) == 1


def test_loss_depends_on_the_batch_number_only_through_the_anchors():
    model, cache, options = tiny_model(), tokens_of(Tiles(6)), HeadOptions(Path("unused"))
    losses = [
        batch_loss(model.pool, cache, torch.arange(6), 0, options, number, Accelerator()).item() for number in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def measured_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator had given out at once, by its own profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_memory_of_a_step_is_what_a_real_step_takes(half):
    model, pictures, shape = tiny_model().freeze_trunk(), 4 * 6, (256, 32)
    tokens = torch.zeros(pictures, *shape, dtype=torch.float16)
    slots = torch.arange(pictures).view(1, 4, 2, 3)
    cache = TokenCache(shards=((tokens,),), slots=slots)
    optimizer = torch.optim.AdamW(model.head.parameters())

    def step() -> None:
        with torch.autocast("cpu", half) if half else nullcontext():
            batch_loss(model.pool, cache, torch.arange(4), 0, HeadOptions(Path("unused")), 0, Accelerator()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured = measured_bytes(step)
    held = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in model.head.parameters())
    expected = held + measured + tokens.nbytes  # the batch that is read ahead
    assert step_bytes(model, pictures, shape, half) == pytest.approx(expected, rel=0.15)


# --- the loop


def test_training_teaches_the_head_and_leaves_the_trunk_alone(tmp_path):
    model = tiny_model()
    before = weights(model)
    options = HeadOptions(
        tmp_path, steps=150, batch_size=32, warmup_steps=10, learning_rate=3e-3, evaluate_every=75, keep="last"
    )
    result = train_head(options, model, tokens_of(Tiles(160)), tokens_of(Tiles(60, seed=1)))
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.head.") for name in changed)
    assert list(result.validation) == [0, 75, 150] and len(result.losses) == 150 and result.kept_step == 150
    assert sum(result.losses[-10:]) < sum(result.losses[:10])
    assert result.validation[150].pa_interval[0] > result.validation[0].pa_interval[1]
    assert result.validation[150].ssr > result.validation[0].ssr


def test_the_best_head_is_kept_and_patience_ends_the_run(tmp_path):
    # A rate that wrecks the head: the untrained one stays the best.
    options = quick_options(tmp_path, steps=30, learning_rate=5.0, evaluate_every=2, patience=3)
    model = tiny_model()
    before = weights(model)
    result = train_head(options, model, tokens_of(Tiles(24)), tokens_of(Tiles(40, seed=1)))
    best = max(result.validation, key=lambda step: (result.validation[step].ssr, result.validation[step].pa))
    assert result.kept_step == best
    assert list(result.validation)[-1] == best + 6 and len(result.losses) == best + 6
    if best == 0:
        assert same(weights(model), before)


def test_accumulated_batches_are_contrasted_within_themselves(tmp_path):
    model, cache = tiny_model(), tokens_of(Tiles(16))
    options = quick_options(tmp_path, steps=1, gradient_accumulation_steps=2)
    schedule = Schedule.of(options, cache.view_mask)
    expected = [
        batch_loss(model.pool, cache, schedule.batch(n)[0], 0, options, n, Accelerator()).item() for n in (0, 1)
    ]
    assert train_head(options, model, cache).losses == [pytest.approx(sum(expected) / 2)]


@pytest.mark.parametrize(("change", "objective"), [({"alpha": 0.0}, "two-tier"), ({}, "info-nce")])
def test_baselines_train(tmp_path, change, objective):
    cache = tokens_of(Tiles(16))
    ours = train_head(quick_options(tmp_path), tiny_model(), cache).losses
    baseline = train_head(quick_options(tmp_path, objective=objective, **change), tiny_model(), cache).losses
    assert baseline[0] < ours[0]


def test_half_precision_trains(tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process keeps its first precision otherwise
        options = quick_options(tmp_path, mixed_precision=precision)
        losses[precision] = train_head(options, tiny_model(), tokens_of(Tiles(16))).losses
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05) and losses["bf16"] != losses["no"]


def test_output_is_a_whole_model_and_nothing_else(tmp_path):
    model, preprocessing = tiny_model(), Preprocessing(32, (0.4, 0.5, 0.6), (0.3, 0.3, 0.3))
    options = quick_options(tmp_path / "out", checkpoint_every=2)
    result = train_head(options, model, tokens_of(Tiles(9)))
    assert not is_finished(options)
    export(options, model, preprocessing, result, FACTS)
    assert is_finished(options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    ]
    again, read, _ = load_encoder(tmp_path / "out")
    assert read == preprocessing
    assert same(weights(again), weights(model))
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["recipe"]["steps"] == 6 and len(report["losses"]) == 6 and report["data"] == "tiles"


def test_a_head_alone_goes_back_on_its_trunk(tmp_path):
    trunk = tiny_model()
    trunk.save_pretrained(tmp_path / "trunk")
    model, options = tiny_model(), quick_options(tmp_path / "out")
    result = train_head(options, model, tokens_of(Tiles(9)))
    facts = dataclasses.replace(FACTS, trunk=str(tmp_path / "trunk"))
    export(options, model, PREPROCESSING, result, facts, layout="head")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert same(weights(load_encoder(tmp_path / "out")[0]), weights(model))


def test_a_model_is_exported_for_its_authors_own_class(tmp_path):
    model, options = tiny_model(), quick_options(tmp_path / "out")
    result = train_head(options, model, tokens_of(Tiles(9)))
    export(options, model, PREPROCESSING, result, FACTS, layout="released")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names and all(name.startswith("backbone.vision_model.") for name in names)
    assert same(weights(load_encoder(tmp_path / "out")[0]), weights(model))


def test_card_tells_data_splits_command_and_figures(tmp_path):
    options = quick_options(tmp_path)
    result = train_head(options, tiny_model(), tokens_of(Tiles(16)), tokens_of(Tiles(9, seed=1)))
    card = model_card(options, result, FACTS)
    for words in ("tiles", "20 identities", "9 others", "train me", "stripes", f"{result.validation[0].ssr:.3f} ["):
        assert words in card


def test_losses_and_measurements_are_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = quick_options(tmp_path, tensorboard=True, evaluate_every=3)
    result = train_head(options, tiny_model(), tokens_of(Tiles(16)), tokens_of(Tiles(9, seed=1)))
    log = EventAccumulator(str(next((tmp_path / "tensorboard").rglob("events*")).parent)).Reload()
    assert [event.value for event in log.Scalars("loss")] == pytest.approx(result.losses)
    assert [event.step for event in log.Scalars("ssr")] == [3, 6]


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    models = []
    for number, seed in enumerate((3, 3, 4)):
        model = tiny_model()
        train_head(quick_options(tmp_path / str(number), seed=seed), model, tokens_of(Tiles(20)))
        models.append(weights(model))
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_resumed_run_ends_in_exactly_the_unbroken_runs_weights(tmp_path):
    unbroken, cache, held_out = tiny_model(), tokens_of(Tiles(20)), tokens_of(Tiles(9, seed=1))
    options = quick_options(tmp_path, steps=10, checkpoint_every=4, evaluate_every=3)
    whole = train_head(options, unbroken, cache, held_out)
    # What lies in the folder now are the checkpoints of steps 4 and 8, as if the run had been killed after them.
    resumed = tiny_model()
    rest = train_head(dataclasses.replace(options, resume=True), resumed, cache, held_out)
    assert rest.losses == whole.losses and rest.validation == whole.validation and rest.kept_step == whole.kept_step
    assert same(weights(resumed), weights(unbroken))
    with pytest.raises(InputError, match=r"--learning-rate 0\.01: the checkpoint .* --learning-rate 0\.001"):
        train_head(dataclasses.replace(options, resume=True, learning_rate=1e-2), tiny_model(), cache)


def test_old_checkpoints_go(tmp_path):
    options = quick_options(tmp_path, steps=8, checkpoint_every=2, checkpoints_total_limit=3)
    train_head(options, tiny_model(), tokens_of(Tiles(9)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
        "step-000008",
    ]


def run_to_the_end(options, cache, held_out):
    """A whole run in a process of its own: resume, train, export."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks: a sibling killed inside it would keep it
    model = tiny_model()
    export(options, model, PREPROCESSING, train_head(options, model, cache, held_out), FACTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_moment_it_resumes_to_the_same_weights(tmp_path):
    cache, held_out = tokens_of(Tiles(20)), tokens_of(Tiles(9, seed=1))
    # A checkpoint at every step: many of the kills fall inside a save.
    options = quick_options(tmp_path / "killed", steps=40, checkpoint_every=1, evaluate_every=7, resume=True)
    whole = dataclasses.replace(options, output=tmp_path / "whole", resume=False)
    fork = multiprocessing.get_context("fork")
    started = time.monotonic()
    run = fork.Process(target=run_to_the_end, args=(whole, cache, held_out))
    run.start()
    run.join()
    seconds = time.monotonic() - started
    assert run.exitcode == 0
    numbers, kills, partial = random.Random(0), 0, 0
    while kills < 20:
        run = fork.Process(target=run_to_the_end, args=(options, cache, held_out))
        run.start()
        time.sleep(numbers.random() * seconds / 4)
        if run.is_alive():
            os.kill(run.pid, signal.SIGKILL)
            kills += 1
        run.join()
        partial += any((tmp_path / "killed" / "checkpoints").glob(".partial-*"))
        if is_finished(options):
            shutil.rmtree(options.output)
    run = fork.Process(target=run_to_the_end, args=(options, cache, held_out))
    run.start()
    run.join()
    assert run.exitcode == 0
    ours, theirs = (load_encoder(tmp_path / name)[0] for name in ("killed", "whole"))
    assert same(weights(ours), weights(theirs))
    assert partial > 0, "no kill fell inside a save: the test shows nothing about halves"


def test_rows_without_a_positive_are_left_out(tmp_path):
    slots = torch.full((1, 3, 2, 3), -1)
    slots[0, 1, :, :2] = torch.arange(4).view(2, 2)
    slots[0, 0, 0, 0] = 4
    cache = TokenCache(((torch.randn(5, 16, 32).half(),),), slots)
    losses = train_head(quick_options(tmp_path, steps=1), tiny_model(), cache).losses
    alone = TokenCache(cache.shards, slots[:, 1:2])
    assert losses == train_head(quick_options(tmp_path, steps=1), tiny_model(), alone).losses
    with pytest.raises(InputError, match="no identity has two views"):
        train_head(quick_options(tmp_path), tiny_model(), TokenCache(cache.shards, slots[:, [0, 2]]))


# --- several processes


@pytest.fixture
def in_processes():
    """Runs a function in so many forked processes of one gloo group."""

    def run(function, arguments, processes):
        AcceleratorState._reset_state(reset_partial_state=True)
        debug_launcher(function, arguments, num_processes=processes)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def write_gradients(path):
    torch.set_num_threads(1)
    model = tiny_model().freeze_trunk()
    accelerator, cache = Accelerator(), tokens_of(Tiles(12))
    pooling = accelerator.prepare(Pooling(model))
    for number in range(2):  # accumulated, and with a padded slot in every third row
        rows = torch.arange(6 * number, 6 * number + 6)
        loss = batch_loss(pooling, cache, rows, 0, HeadOptions(Path("unused")), number, accelerator)
        accelerator.backward(loss)
    if accelerator.is_main_process:
        save_file({name: p.grad for name, p in model.head.named_parameters()}, path)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_gradients_of_two_processes_are_those_of_one(tmp_path, in_processes):
    for processes in (1, 2):
        in_processes(write_gradients, (tmp_path / f"{processes}.safetensors",), processes)
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys() and max(value.abs().max() for value in one.values()) > 0.01
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=0, atol=1e-6), name


def refuse_the_batch(output):
    with pytest.raises(InputError, match="--batch-size 7: 2 processes cannot share 7"):
        train_head(HeadOptions(output, batch_size=7), tiny_model(), tokens_of(Tiles(9)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, in_processes):
    in_processes(refuse_the_batch, (tmp_path,), 2)


def launch(processes, *arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *map(str, launcher)], capture_output=True, text=True, env=environment)


def test_two_processes_train_the_head_of_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "trunk")
    other = folder_of_subjects(tmp_path / "other", [f"train/{n}" for n in range(5)], size=8)
    flags = ("--trunk", tmp_path / "trunk", "--num-identities", 14, "--num-validation", 3, "--steps", 4)
    flags += ("--data", "miniworld", f"{other}:2", "--augment", "--variants", 2)
    flags += ("--batch-size", 8, "--checkpoint-every", 2)
    reports = []
    for processes in (1, 2):
        result = launch(processes, TRAINER, *flags, "--output", tmp_path / str(processes))
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("of each of") == 1 and f"of each of {processes} processes" in result.stdout
        reports.append(json.loads((tmp_path / str(processes) / "training.json").read_text()))
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], abs=1e-4)
    assert reports[1]["validation"].keys() == reports[0]["validation"].keys()


# --- wrong input


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"steps": 0}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"temperature": 0.0}, "--temperature"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"alpha": -0.5}, "--alpha"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps"),
        ({"checkpoints_total_limit": 0}, "--checkpoints-total-limit"),
    ],
)
def test_impossible_options_name_their_flag(change, flag):
    with pytest.raises(InputError, match=flag):
        HeadOptions(Path("unused"), **change)


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        train_head(quick_options(tmp_path / "file"), tiny_model(), tokens_of(Tiles(4)))


# --- the entry point


@pytest.fixture
def script():
    """The program as a module; its name is also that of a function here."""
    return importlib.import_module("nearid_personalize.train_head")


@pytest.fixture
def trainer(script, monkeypatch):
    """Runs the script's `main` here, with the flags given."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TRAINER.name, *map(str, arguments)])
        return run_program(script.main)

    return run


def test_trainer_shows_its_plan_and_trains_on_the_mini_world(trainer, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "trunk")
    arguments = ("--trunk", tmp_path / "trunk", "--num-identities", 6, "--num-validation", 3, "--steps", 2)
    assert trainer(*arguments, "--output", tmp_path / "out", "--dry-run") == 0
    assert "32 x 32 pixels" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert trainer(*arguments, "--output", tmp_path / "out", "--keep", "last") == 0
    assert "SSR" in capsys.readouterr().out
    assert not same(weights(load_encoder(tmp_path / "out")[0]), weights(tiny_model()))


@pytest.mark.parametrize(
    ("flag", "value"), [("--trunk", "none"), ("--steps", 0), ("--num-views", 1), ("--preview-augment", "none")]
)
def test_trainer_answers_wrong_input_with_one_line(trainer, tmp_path, capsys, flag, value):
    tiny_model().save_pretrained(tmp_path / "trunk")
    arguments = {"--trunk": tmp_path / "trunk", "--output": tmp_path / "out", flag: value}
    assert trainer(*(item for pair in arguments.items() for item in pair)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and (flag in error or str(value) in error)
    assert not (tmp_path / "out").exists()


def test_trainer_refuses_a_misspelt_flag(trainer, tmp_path, capsys):
    assert trainer("--trunk", "somewhere", "--output", tmp_path / "out", "--alhpa", 1) == 2
    assert "--alhpa" in capsys.readouterr().err


def test_trainer_takes_a_folder_of_subjects(trainer, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "trunk")
    for split, count in (("train", 4), ("val", 2)):
        for subject in range(count):
            folder = tmp_path / "data" / split / f"{split}-{subject}"
            (folder / "distractors").mkdir(parents=True)
            for view in range(2):
                checkered(10 * subject + view).save(folder / f"{view}.png")
                checkered(100 + 10 * subject + view).save(folder / "distractors" / f"{view}.png")
    flags = ("--trunk", tmp_path / "trunk", "--data", tmp_path / "data", "--steps", 4, "--variants", 2, "--augment")
    for tokens in ("disk", "live"):
        output = tmp_path / tokens
        assert trainer(*flags, "--tokens", tokens, "--output", output, "--keep", "last") == 0
        report = json.loads((output / "training.json").read_text())
        assert (report["num_identities"], report["num_validation"]) == (4, 2)
        assert report["sources"] == ["distractors"]
        assert not same(weights(load_encoder(output)[0]), weights(tiny_model()))
    assert "4 of" in capsys.readouterr().out


def folder_of_subjects(folder, names, size=64):
    """Subjects of two views and two distractors each."""
    for number, name in enumerate(names):
        (folder / name / "distractors").mkdir(parents=True)
        for view in range(2):
            checkered(10 * number + view, size).save(folder / name / f"{view}.png")
            checkered(1000 + 10 * number + view, size).save(folder / name / "distractors" / f"{view}.png")
    return folder


def test_hash_splits_of_trainer_and_evaluation_agree(script, tmp_path):
    data = folder_of_subjects(tmp_path / "data", [f"subject-{n}" for n in range(40)], size=8)
    head = HeadOptions(tmp_path / "out")
    (share,), (held_out,) = script.open_rows(script.Arguments("trunk", head, data=(str(data),), hash_splits=True))
    train = share.rows
    options = Evaluate(data=str(data), hash_splits=True)
    measured = {split: set(evaluation_rows(dataclasses.replace(options, split=split)).ids) for split in ("val", "test")}
    assert measured["val"] == set(held_out.ids) and measured["test"]
    assert not set(train.ids) & (measured["val"] | measured["test"])
    assert len(train) + len(measured["val"]) + len(measured["test"]) == 40
    with pytest.raises(InputError, match="--hash-splits"):
        evaluation_rows(dataclasses.replace(options, hash_splits=False))


@pytest.fixture
def tiny_trunk(tmp_path):
    tiny_model().save_pretrained(tmp_path / "trunk")
    return tmp_path / "trunk"


def test_a_second_run_reads_the_cache_that_fills_the_disk(trainer, tiny_trunk, tmp_path, monkeypatch, capsys):
    flags = ("--trunk", tiny_trunk, "--num-identities", 6, "--num-validation", 0, "--steps", 2, "--augment")
    flags += ("--token-folder", tmp_path / "tokens")
    room = 6 * 6 * 16 * 32 * 2 + 1

    def left(folder):  # a disk that holds this cache and nothing else
        used = sum(path.stat().st_size for path in (tmp_path / "tokens").rglob("*.safetensors"))
        return max(0, room - used)

    monkeypatch.setattr(cache_module, "free_bytes", left)
    heads = []
    for name in ("first", "second"):
        assert trainer(*flags, "--output", tmp_path / name) == 0
        heads.append(weights(load_encoder(tmp_path / name)[0]))
    said = capsys.readouterr().out
    assert "0 of 1 shards are there" in said and "1 of 1 shards are there, 0.00 GB to write" in said
    assert "live" not in said and same(*heads)
    assert trainer(*flags, "--variants", 2, "--output", tmp_path / "third") == 0  # the second variant does not fit
    assert "live, the trunk runs at every step" in capsys.readouterr().out
    assert trainer(*flags, "--variants", 2, "--tokens", "disk", "--output", tmp_path / "fourth") == 2
    assert "--token-folder" in capsys.readouterr().err


def test_resuming_under_other_data_trunk_or_augmentation_is_refused(trainer, tiny_trunk, tmp_path, capsys):
    other = tiny_model()
    with torch.no_grad():
        other.backbone.post_layernorm.bias += 0.1
    other.save_pretrained(tmp_path / "other trunk")
    begun = {"--trunk": tiny_trunk, "--num-identities": 6, "--num-validation": 2, "--steps": 3, "--output": tmp_path}
    begun |= {"--token-folder": tmp_path / "tokens", "--checkpoint-every": 2, "--data": "miniworld"}

    def run(*more, **changes):
        changes = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return trainer(*(item for pair in (begun | changes).items() for item in pair), *more)

    assert run("--keep-checkpoints") == 0
    whole = json.loads((tmp_path / "training.json").read_text())["losses"]
    changes = [
        ({"num_identities": 7}, "--num-identities 7: ", "--num-identities 6"),
        ({"data_seed": 1}, "--data-seed 1: ", "--data-seed 0"),
        ({"seed": 1}, "--seed 1: ", "--seed 0"),
        ({"trunk": tmp_path / "other trunk"}, f"--trunk {tmp_path / 'other trunk'}: ", f"--trunk {tiny_trunk}"),
        ({"variants": 2}, "--variants 2: ", "--variants 1"),
        ({"tokens": "live"}, "--tokens live: ", "--tokens disk"),
        ({"trunk_precision": "bf16"}, "--trunk-precision bf16: ", "--trunk-precision fp32"),
        ({"max_changes": 3}, "--max-changes 3: ", "--max-changes 4"),
        ({"data": "miniworld:2"}, "--data miniworld:2: ", "--data miniworld"),
        ({"num_validation": 3}, "--num-validation 3: ", "--num-validation 2"),
    ]
    for finished in (True, False):
        if not finished:  # as if the run had been killed after its checkpoint
            (tmp_path / "training.json").unlink()
        for change, *words in changes[:: 1 if finished else 4]:
            assert run("--resume", **change) == 2, change
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith("error: ") and all(word in error for word in words), error
        assert run("--resume", "--augment") == 2
        assert "--augment True: " in capsys.readouterr().err
    # The same pictures and weights under another path are the same.
    shutil.copytree(tiny_trunk, tmp_path / "copied trunk")
    assert run("--resume", trunk=tmp_path / "copied trunk") == 0
    assert json.loads((tmp_path / "training.json").read_text())["losses"] == whole


def test_pictures_that_changed_since_are_another_data_set(trainer, tiny_trunk, tmp_path, capsys):
    data = folder_of_subjects(tmp_path / "data", [f"train/{n}" for n in range(4)], size=8)
    flags = ("--trunk", tiny_trunk, "--data", data, "--num-validation", 0, "--steps", 2, "--output", tmp_path / "out")
    assert trainer(*flags) == 0
    assert trainer(*flags, "--resume") == 0 and "finished already" in capsys.readouterr().out
    checkered(99, 16).save(data / "train" / "1" / "0.png")
    assert trainer(*flags, "--resume") == 2
    assert f"--data {data}: has changed since" in capsys.readouterr().err


def test_several_data_sets_share_a_run_and_their_tokens(trainer, tiny_trunk, tmp_path, capsys):
    one = folder_of_subjects(
        tmp_path / "one", [f"{split}/{split}{n}" for split in ("train", "val") for n in range(4)], size=8
    )
    other = folder_of_subjects(tmp_path / "other", [f"train/b{n}" for n in range(3)], size=8)
    tokens = tmp_path / "tokens"
    flags = ("--trunk", tiny_trunk, "--steps", 3, "--batch-size", 4, "--token-folder", tokens)
    assert trainer(*flags, "--data", one, "--output", tmp_path / "alone") == 0
    written = {path: path.stat().st_mtime_ns for path in tokens.rglob("*.safetensors")}
    reports = {}
    for kind in ("disk", "live"):
        both = ("--data", one, f"{other}:4", "--tokens", kind, "--output", tmp_path / kind)
        assert trainer(*flags, *both) == 0
        said = capsys.readouterr().out
        assert f"3 of {other}, 4 times an epoch" in said and "validation  4 identities" in said
        reports[kind] = json.loads((tmp_path / kind / "training.json").read_text())
    assert len(list(tokens.rglob("*.safetensors"))) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert reports["live"]["losses"] == pytest.approx(reports["disk"]["losses"], abs=1e-2)
    assert reports["disk"]["num_identities"] == 7 and reports["disk"]["data"] == f"{one} and {other}"
    assert trainer(*flags, "--data", one, f"{one}:2", "--output", tmp_path / "twice") == 2
    assert "named twice" in capsys.readouterr().err
    assert trainer(*flags, "--data", other, "--output", tmp_path / "no validation") == 2
    assert "--num-validation 300: " in capsys.readouterr().err


def test_the_papers_recipe_is_printed_and_flags_go_first(trainer, tiny_trunk, tmp_path, capsys):
    flags = ("--trunk", tiny_trunk, "--num-identities", 6, "--num-validation", 2, "--output", tmp_path / "out")

    def plan(*more):
        assert trainer(*flags, "--dry-run", *more) == 0
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        return {line[0]: line[1].strip() for line in lines if len(line) == 2}

    paper = plan("--recipe", "paper")
    expected = {"steps": 3344, "batch_size": 128, "warmup_steps": 100, "learning_rate": 1e-4, "weight_decay": 1e-4}
    expected |= {"max_gradient_norm": 1.0, "temperature": 0.07, "alpha": 0.5, "objective": "two-tier"}
    assert {name: paper[name] for name in expected} == {name: str(value) for name, value in expected.items()}
    for words in ("anchor_blackout=0.5", "positive_blackout=0.2", "distractor_blackout=0.6", "flip=0.5", "shift=0.1"):
        assert words in paper["augment"]
    assert "scale=0.1" in paper["augment"] and paper["pictures"].endswith("trunk in fp16")
    assert "11 variants" in paper["tokens"] and "0 of 11 shards" in paper["tokens"] and "GB" in paper["memory"]
    changed = plan("--recipe", "paper", "--steps", 10, "--no-augment", "--trunk-precision", "fp32")
    assert changed["steps"] == "10" and changed["augment"] == "no" and changed["learning_rate"] == "0.0001"
    assert plan()["steps"] == "600" and not (tmp_path / "out").exists()


def test_the_trunk_follows_the_precision_of_the_run(script):
    class Run:
        mixed_precision = "bf16"

    arguments = script.Arguments("trunk", HeadOptions(Path("unused")))
    assert script.trunk_precision(arguments, Run) == "bf16"
    assert script.trunk_precision(dataclasses.replace(arguments, trunk_precision="fp32"), Run) == "fp32"
    Run.mixed_precision = "no"
    assert script.trunk_precision(arguments, Run) == "fp32"


def test_anchors_are_drawn_by_the_weights_of_the_source():
    model, cache = tiny_model(), tokens_of(Tiles(8))
    options = HeadOptions(Path("unused"))
    for slot in range(2):
        weights_ = torch.zeros_like(cache.weights)
        weights_[:, :, slot] = 1
        sure = dataclasses.replace(cache, weights=weights_)
        losses = [
            batch_loss(model.pool, sure, torch.arange(8), 0, options, number, Accelerator()).item() for number in (0, 1)
        ]
        assert losses[0] == losses[1]  # nothing is left to draw


def test_trainer_shows_previews_and_keeps_their_tokens_apart(
    trainer, tmp_path, tiny_pipeline_dir, tiny_kl_pipeline_dir
):
    tiny_model().save_pretrained(tmp_path / "trunk")
    flags = ("--trunk", tmp_path / "trunk", "--num-identities", 6, "--num-validation", 0, "--steps", 2)
    tokens, heads = tmp_path / "tokens", []
    runs = [
        (),
        ("--preview-augment", tiny_pipeline_dir),
        ("--preview-augment", tiny_pipeline_dir, "--previewed", 0.6),
        ("--preview-augment", tiny_kl_pipeline_dir, "--previewed", 0.6),
        ("--preview-augment", tiny_kl_pipeline_dir, "--previewed", 0.6, "--reconstruct-with", tiny_pipeline_dir),
    ]
    for number, augmented in enumerate(runs, start=1):
        output = tmp_path / str(number)
        assert trainer(*flags, *augmented, "--token-folder", tokens, "--output", output) == 0
        assert len(list(tokens.iterdir())) == number
        heads.append(weights(load_encoder(output)[0]))
    assert not any(same(heads[i], heads[j]) for i in range(len(runs)) for j in range(i))
    assert trainer(*flags, *runs[-1], "--token-folder", tokens, "--output", tmp_path / "again") == 0
    assert len(list(tokens.iterdir())) == len(runs) and same(weights(load_encoder(tmp_path / "again")[0]), heads[-1])
