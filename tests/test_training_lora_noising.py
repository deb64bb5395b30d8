"""Noising, targets and weights against slow restatements of their formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.noising import flow_levels, flow_noising, noising_of, stratified_levels
from nearid_personalize.training.lora.options import LoraOptions

OPTIONS = LoraOptions.of(base_model="", references=Path(), output=Path())


def test_flow_noising_is_what_the_shipped_scheduler_inverts():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    noising = noising_of(scheduler, OPTIONS.noise)
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    noised = noising(latents, noise, torch.tensor([0.1, 0.5, 0.9]))
    noisy, target, timesteps = noised.noisy, noised.target, noised.timesteps
    torch.testing.assert_close(noisy - timesteps.view(-1, 1, 1, 1) / 1000 * target, latents)
    assert timesteps[1] == 500 and timesteps.diff().min() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_noising_matches_a_slow_oracle(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    levels = torch.tensor([0.001, 0.5, 0.999])
    plain = noising_of(scheduler, OPTIONS.noise)(latents, noise, levels)
    capped = noising_of(scheduler, OPTIONS.but(min_snr_gamma=5.0).noise)(latents, noise, levels)
    assert plain.timesteps.tolist() == [1, 500, 999] and plain.weights.tolist() == [1, 1, 1]
    for i, t in enumerate(plain.timesteps.tolist()):
        a, s = math.sqrt(scheduler.alphas_cumprod[t]), math.sqrt(1 - scheduler.alphas_cumprod[t])
        torch.testing.assert_close(plain.noisy[i], a * latents[i] + s * noise[i])
        expected = noise[i] if prediction_type == "epsilon" else a * noise[i] - s * latents[i]
        torch.testing.assert_close(plain.target[i], expected)
        snr = (a / s) ** 2
        weight = min(snr, 5) / (snr if prediction_type == "epsilon" else snr + 1)
        assert float(capped.weights[i]) == pytest.approx(weight, rel=1e-4)


def test_flow_time_is_shifted_as_the_scheduler_shifts_it():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising = noising_of(scheduler, OPTIONS.but(flow_weighting="none").noise)
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    timesteps = noising(latents, noise, torch.tensor([0.9, 0.5, 0.1])).timesteps
    torch.testing.assert_close(timesteps, scheduler.timesteps[[100, 500, 900]])
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    noising = noising_of(dynamic, OPTIONS.but(flow_weighting="none").noise)
    torch.testing.assert_close(noising(latents, noise, torch.tensor([0.9, 0.5, 0.1])).timesteps[1].item(), 500.0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sigma-sqrt", lambda t: t**-2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
        ("none", lambda t: 1.0),
        ("logit-normal", lambda t: 1.0),
        ("mode", lambda t: 1.0),
    ],
)
def test_errors_of_flows_are_weighted_as_in_the_paper(name, formula):
    """arXiv:2403.03206, section 3.1; a density of noise levels asks for no weights."""
    latents, noise = torch.randn(2, 3, 4, 2, 2)
    noised = flow_noising(latents, noise, torch.tensor([0.1, 0.5, 0.9]), name)
    levels = (noised.timesteps / 1000).tolist()
    assert noised.weights.tolist() == pytest.approx([formula(t) for t in levels], rel=1e-5)


def test_flow_levels_have_the_density_asked_for():
    uniform = (torch.arange(1000) + 0.5) / 1000
    logits = torch.logit(flow_levels(uniform, "logit-normal", mean=0.5, std=2.0))
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.01) and float(logits.std()) == pytest.approx(2.0, abs=0.02)
    mode = flow_levels(uniform, "mode")
    assert float(mode.min()) >= 0 and float(mode.max()) <= 1
    middle = [float(((t > 0.4) & (t < 0.6)).float().mean()) for t in (mode, uniform)]
    assert middle[0] > 1.5 * middle[1]  # more often half-noised
    assert torch.equal(flow_levels(uniform, "none"), uniform)


def test_levels_cover_every_slice():
    levels = stratified_levels(rng := np.random.default_rng(0), 8)
    assert sorted((levels * 8).long().tolist()) == list(range(8))
    assert not torch.equal(levels, stratified_levels(rng, 8))


def test_unknown_prediction_type_is_refused():
    with pytest.raises(InputError, match="'sample'"):
        noising_of(DDPMScheduler(prediction_type="sample"), OPTIONS.noise)
