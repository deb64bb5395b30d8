"""Attention by name: what it does to a denoiser's layers, that it is undone, and what is refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny_pipelines import build
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize import cli
from nearid_personalize.attention import (
    Attention,
    check_attention,
    denoiser_of,
    using_attention,
    using_trunk_attention,
)
from nearid_personalize.errors import InputError

FAMILIES = ["sd", "sdxl", "sd3", "flux", "flux2", "qwen", "z_image"]


def attention_state(denoiser: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Each layer's processor and its backend, and what the whole process falls back to."""
    processors = [m.processor for m in denoiser.modules() if getattr(m, "processor", None) is not None]
    backends = [getattr(processor, "_attention_backend", None) for processor in processors]
    return [*zip(processors, backends, strict=True), (Registry.get_active_backend()[0], None)]


def picture(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(**arguments, num_inference_steps=2, generator=generator, output_type="np").images)


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_draws_the_same_picture_and_is_undone(family: str) -> None:
    pipe, arguments = build(family)
    pipe.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipe)
    if family == "sd":
        denoiser.set_attn_processor(AttnProcessor())
    before, expected = attention_state(denoiser), picture(pipe, arguments)
    with using_attention(denoiser, "sdpa", "cpu"):
        inside = attention_state(denoiser)
        drawn = picture(pipe, arguments)
    assert torch.allclose(drawn, expected, atol=2e-3)
    assert attention_state(denoiser) == before
    if family == "sd":
        assert all(type(processor) is AttnProcessor2_0 for processor, _ in inside[:-1])
    if any(hasattr(processor, "_attention_backend") for processor, _ in before[:-1]):
        assert {backend for _, backend in inside[:-1]} == {"native"}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_changes_nothing(family: str) -> None:
    denoiser = denoiser_of(build(family)[0])
    before = attention_state(denoiser)
    with using_attention(denoiser, "auto", "cpu"):
        assert attention_state(denoiser) == before


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_it_is_undone_after_an_error_too(family: str) -> None:
    denoiser = denoiser_of(build(family)[0])
    before = attention_state(denoiser)
    with pytest.raises(KeyError), using_attention(denoiser, "sdpa", "cpu"):
        raise KeyError
    assert attention_state(denoiser) == before


@pytest.mark.parametrize("wanted", ["xformers", "flash"])
def test_what_needs_a_gpu_is_refused_on_the_cpu(wanted: Any) -> None:
    with pytest.raises(InputError, match=f"--attention {wanted}: needs a CUDA GPU, and this runs on cpu; give sdpa"):
        check_attention(wanted, "cpu")


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        ("xformers", r"xformers is not installed; pip install 'nearid-personalize\[xformers\]'"),
        ("flash", "flash_attn is not installed; pip install flash-attn"),
    ],
)
def test_what_lacks_its_package_is_refused_with_the_command(wanted: Any, advice: str) -> None:
    if find_spec({"flash": "flash_attn"}.get(wanted, wanted)):
        pytest.skip("it is installed here")
    with pytest.raises(InputError, match=advice):
        check_attention(wanted, "cuda")


def test_a_trunk_takes_sdpa_and_gives_it_back() -> None:
    config = SiglipVisionConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    trunk = SiglipVisionModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = trunk(pixels).last_hidden_state
        with using_trunk_attention(trunk, "sdpa", "cpu"):
            assert trunk.config._attn_implementation == "sdpa"
            assert torch.allclose(trunk(pixels).last_hidden_state, expected, atol=1e-5)
    assert trunk.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="needs a CUDA GPU"), using_trunk_attention(trunk, "xformers", "cpu"):
        pass


def nearid(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", ["generate", "report-card", "demo"])
def test_every_command_that_draws_refuses_before_it_loads(
    command: str, photo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--base-model", tmp_path / "nowhere", "--model", tmp_path / "nowhere"]
    photos = ["--references", photo_dir, "--out", tmp_path / "out"]
    options: dict[str, list[object]] = {
        "generate": [*photos, "--prompt", "a dog"],
        "report-card": [*photos, "--lora", a_lora(tmp_path), "--subject", "sks dog"],
        "demo": [],
    }
    assert nearid(command, *nowhere, *options[command], "--device", "cpu", "--attention", "xformers") == 2
    error = capsys.readouterr().err
    assert error == "error: --attention xformers: needs a CUDA GPU, and this runs on cpu; give sdpa or auto\n"


def a_lora(folder: Path) -> Path:
    """A LoRA file of one layer: enough for its header to be read."""
    from safetensors.torch import save_file

    layer = {f"unet.mid_block.to_q.lora_{half}.weight": torch.zeros(shape) for half, shape in HALVES.items()}
    save_file(layer, folder / "lora.safetensors")
    return folder / "lora.safetensors"


HALVES = {"A": (2, 8), "B": (8, 2)}


@pytest.mark.parametrize("trainer", ["train_lora.py", "train_head.py"])
def test_both_trainers_refuse_it_in_one_line(
    trainer: str, photo_dir: Path, tmp_path: Path, tiny_nearid_dir: Path
) -> None:
    options = {
        "train_lora.py": ["--base-model", "miniworld", "--references", photo_dir, "--output", tmp_path / "out"],
        "train_head.py": ["--trunk", tiny_nearid_dir, "--output", tmp_path / "out", "--num-identities", 20],
    }
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "trainers" / trainer, *options[trainer], "--attention", "xformers"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == "error: --attention xformers: needs a CUDA GPU, and this runs on cpu; give sdpa or auto\n"


def test_a_lora_trains_alike_with_sdpa_and_leaves_no_trace(
    tiny_kl_pipeline_dir: Path, photo_dir: Path, tmp_path: Path
) -> None:
    from nearid_personalize.training.lora.loop import LoraOptions, train_lora

    default = Registry.get_active_backend()[0]
    losses: dict[str, list[float]] = {"auto": [], "sdpa": []}
    attentions: tuple[Attention, ...] = ("auto", "sdpa")
    for attention in attentions:
        options = LoraOptions.of(
            base_model=str(tiny_kl_pipeline_dir),
            references=photo_dir,
            output=tmp_path / attention,
            steps=2,
            resolution=32,
        )
        told = losses[attention]
        train_lora(options.but(attention=attention), on_step=lambda step, loss, told=told: told.append(loss))
    assert len(losses["sdpa"]) == 2 and losses["sdpa"] == pytest.approx(losses["auto"], rel=1e-3)
    assert Registry.get_active_backend()[0] == default
