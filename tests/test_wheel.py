"""Whoever has only the wheel can do everything: installed outside the checkout, every command answers and works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nearid_personalize.cli import COMMANDS
from nearid_personalize.miniworld import example_references

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel, and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves its build folder, and takes what an earlier one left there
    source = folder / "source"
    shutil.copytree(ROOT / "nearid_personalize", source / "nearid_personalize")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    target = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(target, check=True, cwd=folder)
    # Behind the wheel: what it depends on, without the checkout's own editable entry
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "nearid" not in package.name and not (site / package.name).exists() and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_stands_outside_the_checkout(installed, tmp_path):
    done = run(installed, tmp_path, "-c", "import nearid_personalize; print(nearid_personalize.__file__)")
    assert str(ROOT) not in done.stdout and "site-packages" in done.stdout, done.stderr


def test_every_command_answers(installed, tmp_path):
    script = "from nearid_personalize import cli\n"
    script += f"for command in {tuple(COMMANDS)!r}:\n"
    script += " try: cli.main([command, '--help'])\n except SystemExit as stop: assert not stop.code\n"
    done = run(installed, tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: nearid") == len(COMMANDS)


def test_the_quickstart_runs(installed, tmp_path):
    arguments = ("quickstart", "--lora-steps", "2", "--num-candidates", "2", "--num-images", "1", "--steps", "4")
    done = run(installed, tmp_path, "-m", "nearid_personalize.cli", *arguments)
    assert done.returncode in (0, 3), done.stderr
    assert (tmp_path / "quickstart" / "contact_sheet.png").exists()


def test_the_trainers_run(installed, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(example_references(0)[0]):
        photo.save(tmp_path / "photos" / f"{number}.png")
    lora = (
        "--base-model",
        "miniworld",
        "--references",
        "photos",
        "--output",
        "lora",
        "--steps",
        "2",
        "--batch-size",
        "2",
    )
    done = run(installed, tmp_path, "-m", "nearid_personalize.train_lora", *lora)
    assert done.returncode == 0 and (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists(), done.stderr
    head = ("--num-identities", "12", "--num-validation", "4", "--steps", "2", "--batch-size", "4", "--output", "head")
    done = run(
        installed, tmp_path, "-m", "nearid_personalize.train_head", "--trunk", "miniworld", "--data", "miniworld", *head
    )
    assert done.returncode == 0 and any((tmp_path / "head").glob("*.safetensors")), done.stderr
