"""The example scripts run as people run them, and being guarded costs a script three lines."""

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import checkered
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import build

from nearid_personalize import IdentityScorer
from nearid_personalize.scorer.calibration import CalibrationBank
from nearid_personalize.scorer.subject import save_calibration

EXAMPLES = Path(__file__).parent.parent / "examples"
PAIRS = ("sdxl_lora", "flux_lora", "sd15_batch")


@pytest.mark.parametrize("name", PAIRS)
def test_being_guarded_adds_three_lines_and_changes_none(name):
    """The import is one of the three."""
    plain, guarded = (
        (EXAMPLES / f"{n}.py").read_text(encoding="utf-8").splitlines() for n in (name, f"{name}_guarded")
    )
    difference = list(difflib.ndiff(plain, guarded))
    assert not [line for line in difference if line.startswith("- ")]
    added = [line for line in difference if line.startswith("+ ") and line != "+ "]
    assert len(added) == 3 and added[0].startswith("+ from nearid_personalize import ")


def save_lora(pipe, folder: Path) -> None:
    """A LoRA file as the DreamBooth scripts of diffusers write it."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, part)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    layers = get_peft_model_state_dict(denoiser)
    layers = convert_state_dict_to_diffusers(layers) if part == "unet" else layers
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": layers})
    denoiser.delete_adapters("default")


@pytest.fixture(scope="module", params=PAIRS)
def place(request, tmp_path_factory, tiny_nearid_dir) -> tuple[str, Path]:
    """A pair's name and a folder to run it in: small models where the scripts look for the large ones, and photos."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    pipe, _ = build(request.param.split("_")[0].removesuffix("15"))
    pipe.save_pretrained(folder / "base")
    if request.param.endswith("lora"):
        save_lora(pipe, folder / "my-lora")
    encoder = folder / "Aleksandar" / "nearid-siglip2"
    shutil.copytree(tiny_nearid_dir, encoder)
    # Impostors as unlike as can be: whatever the small models draw is accepted.
    accepting = CalibrationBank(torch.ones(9, 3, 3), torch.ones(9, 1, 3), -torch.ones(9, 1, 3), false_accept_rate=0.5)
    save_calibration(accepting, encoder)
    (folder / "photos").mkdir()
    for seed in range(3):
        checkered(seed).save(folder / "photos" / f"{seed}.png")
    (folder / "prompts.txt").write_text("a photo of sks dog in space\nsks dog\n", encoding="utf-8")
    return request.param, folder


def run(script: str, folder: Path) -> list[list[Path]]:
    """The pictures, by folder, that a script makes in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{script}.py")]
    command += ["--base", "base", "--size", "32", "--steps", "4", "--out", script]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    out = folder / script
    return [sorted(place.glob("*.png")) for place in sorted(out.glob("prompt-*")) or [out]]


def test_the_plain_script_runs(place):
    name, folder = place
    assert [len(pictures) for pictures in run(name, folder)] == ([1, 1] if name == "sd15_batch" else [1])


def test_the_guarded_script_gives_the_best_first(place):
    name, folder = place
    scorer = IdentityScorer.from_pretrained(folder / "Aleksandar" / "nearid-siglip2")
    subject = scorer.enroll(folder / "photos")
    folders = run(f"{name}_guarded", folder)
    assert len(folders) == (2 if name == "sd15_batch" else 1)
    for pictures in folders:
        scores = scorer.score(pictures, subject).tolist()
        assert len(pictures) == 4 and scores == sorted(scores, reverse=True) and len(set(scores)) == 4
