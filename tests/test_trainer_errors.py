"""The trainers as processes: a flag that is missing or wrong is one line, status 2, whoever launches them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes=1"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NOWHERE = ("--base-model", "miniworld", "--references", "nowhere", "--output", "out")


def launch(launcher: list[str], trainer: str, *flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, str(ROOT / "trainers" / trainer), *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("trainer", "flags", "words"),
    [
        ("train_lora.py", ("--rank", 4), "missing --base-model, --output, --references; see train_lora --help"),
        ("train_lora.py", (*NOWHERE, "--rank", "many"), "--rank: invalid literal for int() with base 10: 'many'"),
        ("train_head.py", ("--trunk", "nowhere", "--output", "out"), "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_one_line(trainer, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch(PLAIN, trainer, *flags)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and words in lines[0]
    assert not any(tmp_path.iterdir())


def test_accelerate_adds_no_traceback(tmp_path):
    done = launch(ACCELERATE, "train_lora.py", "--base-model", "miniworld", "--output", tmp_path / "out")
    assert done.stderr.splitlines() == ["error: missing --references; see train_lora --help"]
    assert done.returncode == 1  # accelerate's own, whatever the script's is


def test_one_of_two_processes_says_it(tmp_path):
    flags = ("--base-model", "miniworld", "--references", tmp_path / "nowhere", "--output", tmp_path / "out")
    done = launch(TWO, "train_lora.py", *flags)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and f"error: {tmp_path / 'nowhere'}" in done.stderr


def test_a_run_shows_its_progress_and_nothing_else(tmp_path, photo_dir, tiny_pipeline_dir):
    flags = ("--base-model", tiny_pipeline_dir, "--references", photo_dir, "--output", tmp_path / "out", "--steps", 1)
    done = launch(PLAIN, "train_lora.py", *flags, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("LoRA: ")] == []
