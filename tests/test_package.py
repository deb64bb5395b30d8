"""What importing the package costs and brings, and that every console command starts."""

import ast
import fnmatch
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import nearid_personalize

RUN_EXTRAS = ("generate", "train", "demo", "heic", "mcp", "prodigy")
HEAVY = ("datasets", "diffusers", "peft", "accelerate", "gradio", "lancedb", "qdrant_client", "ray")
COMMANDS = ("quickstart", "score", "generate", "distractors", "evaluate", "report-card", "pairs", "demo")


def run_python(code: str, *arguments: str) -> str:
    """Output of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_and_the_command_imports_nothing_heavy():
    code = f"""
import sys
import nearid_personalize, nearid_personalize.images, nearid_personalize.report, nearid_personalize.cli
import nearid_personalize.demo
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_importing_the_package_teaches_auto_model_the_checkpoint(tiny_nearid_dir: Path):
    code = """
import sys
import nearid_personalize
from transformers import AutoConfig, AutoModel
assert "nearid_personalize.encoder" not in sys.modules
print(type(AutoModel.from_pretrained(sys.argv[1], use_safetensors=True)).__name__)
print(type(AutoConfig.for_model("nearid")).__name__, type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
"""
    assert run_python(code, str(tiny_nearid_dir)).split() == ["NearIDModel", "NearIDConfig", "NearIDConfig"]


def test_every_public_name_is_there():
    assert {"IdentityScorer", "IdentityGuard", "NearIDModel"} <= set(nearid_personalize.__all__)
    for name in nearid_personalize.__all__:
        assert getattr(nearid_personalize, name) is not None
        assert name in dir(nearid_personalize)


def test_nothing_but_the_library_is_installed():
    """Folders beside it, `pipelines` or `examples`, would claim these names in everybody's site-packages."""
    root = Path(__file__).parent.parent
    config = (root / "pyproject.toml").read_text(encoding="utf-8")
    (patterns,) = re.findall(r"packages\.find\]\ninclude = (\[.*\])", config)
    packages = [file.parent.name for file in root.glob("*/__init__.py")]
    found = {name for pattern in ast.literal_eval(patterns) for name in fnmatch.filter(packages, pattern)}
    assert found == {"nearid_personalize"} and "namespaces = false" in config


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="IdentityGard"):
        _ = nearid_personalize.IdentityGard


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_answers_help(command: str):
    """The installed console script where there is one, else the same function through the interpreter."""
    script = shutil.which("nearid", path=sysconfig.get_path("scripts"))
    start = [script] if script else [sys.executable, "-c", "from nearid_personalize.cli import main; main()"]
    arguments = [*start, *command.split(), "--help"]
    result = subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: nearid")
    for name in COMMANDS if not command else ["--port" if command == "demo" else "--json"]:
        assert name in result.stdout


def test_floors_are_the_versions_that_are_run_together():
    """`make test-oldest` installs what constraints-oldest.txt pins: exactly the floors, less what needs a GPU."""
    root = Path(__file__).parent.parent
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from 3.11 on")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (root / "constraints-oldest.txt").read_text(), re.MULTILINE))
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name in RUN_EXTRAS for line in extras[name])]
    floors = dict(re.findall(r"^([\w-]+)>=([\w.]+)(?:,.*)?$", "\n".join(asked), re.MULTILINE))
    assert floors.keys() <= pins.keys()
    for name, floor in floors.items():
        assert Version(pins[name]) in SpecifierSet(f"=={floor}.*"), name


@pytest.mark.parametrize(
    "package", ["", ".encoder", ".scorer", ".floors", ".guard", ".gallery", ".lora", ".training.lora"]
)
def test_every_public_name_says_what_it_is(package):
    module = importlib.import_module(f"nearid_personalize{package}")
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), name
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if not method.startswith("_") and inspect.isfunction(function) and function.__name__ != "<lambda>":
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_old_paths_go_on_working():
    from nearid_personalize.encoder import NearIDModel, load_encoder  # noqa: F401
    from nearid_personalize.floors import AdherenceFloor, CopyFloor, QualityFloor  # noqa: F401
    from nearid_personalize.guard import FixedSchedule, IdentityGuard, PreviewProfile, RacingPolicy, replay
    from nearid_personalize.losses import two_tier_loss  # noqa: F401
    from nearid_personalize.metrics import bootstrap_interval  # noqa: F401
    from nearid_personalize.scorer import IdentityScorer, Subject  # noqa: F401

    assert callable(replay) and {FixedSchedule, IdentityGuard, PreviewProfile, RacingPolicy}
