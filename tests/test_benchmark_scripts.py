"""The benchmarks at real sizes: they start, and their models have the published sizes. Running them takes a machine."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PUBLISHED = {"SDXL's UNet": 2.567e9, "FLUX.1's transformer": 11.90e9, "their VAE": 83.7e6}
"""Parameters."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("name", ["real_size", "gpu"])
def test_help(name, script, capsys):
    with pytest.raises(SystemExit) as ended:
        tyro.cli(script(name).Options, args=["--help"])
    assert ended.value.code == 0 and "--parts" in capsys.readouterr().out


def test_models_have_the_published_sizes(script):
    """On the meta device, where weights have shapes and no memory."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel

    models = script("real_models")
    with torch.device("meta"):
        built = {
            "SDXL's UNet": UNet2DConditionModel(**models.SDXL_UNET),
            "FLUX.1's transformer": FluxTransformer2DModel(**models.FLUX_TRANSFORMER),
            "their VAE": AutoencoderKL(**models.KL_VAE),
        }
    for name, model in built.items():
        assert math.isclose(sum(p.numel() for p in model.parameters()), PUBLISHED[name], rel_tol=0.001), name


def test_random_weights_are_small_finite_and_tied_where_the_model_ties_them(script):
    models = script("real_models")
    text = models.t5_text(
        {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}, torch.bfloat16, "cpu"
    )
    assert all(p.isfinite().all() and p.abs().max() <= 1 for p in text.parameters())
    assert text.shared.weight is text.encoder.embed_tokens.weight
    with torch.no_grad():
        assert text(torch.tensor([[3, 4, 5]])).last_hidden_state.isfinite().all()


def test_the_peak_is_that_of_the_command_alone(script, tmp_path):
    """What this process holds is not counted."""
    real_size = script("real_size")
    ballast = bytearray(b"x" * 900_000_000)
    command = [sys.executable, "-c", "print(len(b'x' * 500_000_000))"]
    peak = real_size.in_its_own_process(real_size.run_to_the_end, command, tmp_path / "log")
    assert 0.5 < peak < 0.85 < len(ballast) / 1e9 and (tmp_path / "log").read_text() == "500000000\n"
    with pytest.raises(SystemExit, match="no memory"):
        real_size.run_to_the_end([sys.executable, "-c", "raise SystemExit('no memory')"], tmp_path / "log")
