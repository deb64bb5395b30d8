"""How latents are noised for training, the denoiser's target, and the weight of each noise level.

Letters: B batch, C h w latent channels and size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.options import FlowWeighting, NoiseOptions

MODE_SCALE = 1.29  # of the "mode" density, as in Stable Diffusion 3


@dataclass(frozen=True)
class Noised:
    """One training question: `noisy` and `target` [B,C,h,w], `timesteps` [B], `weights` [B] of the errors."""

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    weights: Tensor


Noising = Callable[[Tensor, Tensor, Tensor], Noised]
"""(latents [B,C,h,w], noise [B,C,h,w], level [B] uniform in (0, 1)) -> Noised."""


def flow_levels(level: Tensor, weighting: FlowWeighting, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Uniform levels -> noise levels t in (0, 1) of the density that `weighting` names (arXiv:2403.03206, 3.1)."""
    if weighting == "logit-normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(level))
    if weighting == "mode":
        return 1 - level - MODE_SCALE * (torch.cos(math.pi * level / 2) ** 2 - 1 + level)
    return level


def flow_noising(
    latents: Tensor,
    noise: Tensor,
    level: Tensor,
    weighting: FlowWeighting = "logit-normal",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Noised:
    """Flow matching: x_t = (1 - t) x_0 + t noise, target noise - x_0. shift: moves t as the scheduler's does."""
    t = flow_levels(level, weighting, mean, std)  # [B]
    t = shift * t / (1 + (shift - 1) * t)
    column = t.view(-1, 1, 1, 1)
    return Noised(
        noisy=(1 - column) * latents + column * noise,
        target=noise - latents,
        timesteps=1000 * t,
        weights=compute_loss_weighting_for_sd3(weighting.replace("-", "_"), t),
    )


def diffusion_noising(scheduler: DDPMScheduler, min_snr_gamma: float | None = None) -> Noising:
    """DDPM noising with uniform timesteps, the scheduler's target (epsilon or v), and min-SNR weights.

    Min-SNR (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.
    """
    predicts_v = scheduler.config.prediction_type == "v_prediction"

    def apply(latents: Tensor, noise: Tensor, level: Tensor) -> Noised:
        timesteps = (level * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps) if predicts_v else noise
        if min_snr_gamma is None:
            return Noised(noisy, target, timesteps, torch.ones(len(level)))
        snr = compute_snr(scheduler, timesteps)  # [B]
        return Noised(noisy, target, timesteps, snr.clamp(max=min_snr_gamma) / (snr + 1 if predicts_v else snr))

    return apply


def prediction_of(scheduler: Any) -> str:
    """What the denoiser is asked for: "epsilon", "v_prediction", "flow_prediction", or what else the scheduler says."""
    flows = "FlowMatch" in type(scheduler).__name__
    return "flow_prediction" if flows else scheduler.config.get("prediction_type", "epsilon")


def flow_shift(scheduler: Any) -> float:
    """How far the scheduler moves a flow's noise levels; 1: not at all."""
    config = scheduler.config
    if config.get("use_dynamic_shifting", False):  # depends on the picture's size: not trained
        return 1.0
    return config.get("shift", config.get("flow_shift", 1.0))


def noising_of(scheduler: Any, options: NoiseOptions) -> Noising:
    """Choose the noising the base model was trained with; InputError when its prediction type is unknown."""
    kind = prediction_of(scheduler)
    if kind == "flow_prediction":
        if options.min_snr_gamma is not None:
            raise InputError("--min-snr-gamma: this base model predicts flow; use --flow-weighting instead")
        if options.noise_offset:
            raise InputError(f"--noise-offset {options.noise_offset}: this base model predicts flow; give 0")
        return partial(
            flow_noising,
            weighting=options.flow_weighting,
            mean=options.logit_mean,
            std=options.logit_std,
            shift=flow_shift(scheduler),
        )
    if kind in ("epsilon", "v_prediction"):
        return diffusion_noising(DDPMScheduler.from_config(scheduler.config), options.min_snr_gamma)
    raise InputError(
        f"--base-model: its scheduler has prediction_type {kind!r}; "
        "epsilon, v_prediction and flow_prediction can be trained"
    )


def stratified_levels(rng: np.random.Generator, count: int) -> Tensor:
    """Draw one level in (0, 1) from each of `count` equal slices, float `[count]`: steadier losses than free draws."""
    return torch.from_numpy((rng.permutation(count) + rng.uniform(0.001, 0.999, count)) / count).float()


# --- sampling --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Trajectory:
    """The noise levels of a short sampling, from noise to clean latents: x = alpha x_0 + sigma noise."""

    prediction: str
    """See `prediction_of`."""
    timesteps: Tensor
    """[S]."""
    alpha: Tensor
    """[S+1], 1 at the end."""
    sigma: Tensor
    """[S+1], 0 at the end."""

    def __len__(self) -> int:
        return len(self.timesteps)


def trajectory_of(scheduler: Any, steps: int) -> Trajectory:
    """`steps` evenly spaced levels of the noising that the base model was trained with, the noisiest included."""
    prediction = prediction_of(scheduler)
    left = torch.linspace(1, 0, steps + 1)[:-1]  # [S], share of the way that is still to go
    if prediction == "flow_prediction":
        shift = flow_shift(scheduler)
        sigma = shift * left / (1 + (shift - 1) * left)
        timesteps, alpha = 1000 * sigma, 1 - sigma
    else:
        noisy = DDPMScheduler.from_config(scheduler.config)
        timesteps = (left * len(noisy.alphas_cumprod)).round().long() - 1
        alpha, sigma = noisy.alphas_cumprod[timesteps].sqrt(), (1 - noisy.alphas_cumprod[timesteps]).sqrt()
    return Trajectory(prediction, timesteps, torch.cat([alpha, torch.ones(1)]), torch.cat([sigma, torch.zeros(1)]))


def clean_and_noise(noisy: Tensor, predicted: Tensor, level: int, path: Trajectory) -> tuple[Tensor, Tensor]:
    """Read a prediction at the path's level number `level`: the clean latents and the noise that make up `noisy`."""
    alpha, sigma = float(path.alpha[level]), float(path.sigma[level])
    if path.prediction == "epsilon":
        return (noisy - sigma * predicted) / alpha, predicted
    if path.prediction == "v_prediction":
        return alpha * noisy - sigma * predicted, sigma * noisy + alpha * predicted
    return noisy - sigma * predicted, noisy + alpha * predicted


def sample(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, path: Trajectory, steps_with_gradient: int
) -> Tensor:
    """Noise [B,C,h,w] -> clean latents, by DDIM (arXiv:2010.02502), which for flows is Euler's method.

    predict: (noisy [B,C,h,w], timesteps [B]) -> prediction. Gradients flow through its last `steps_with_gradient`
    calls alone: DRaFT-K (arXiv:2309.17400, 4.1).
    """
    noisy = noise
    for level, timestep in enumerate(path.timesteps):
        with torch.set_grad_enabled(level >= len(path) - steps_with_gradient):
            predicted = predict(noisy, timestep.expand(len(noisy))).float()
            clean, noise = clean_and_noise(noisy, predicted, level, path)
            noisy = float(path.alpha[level + 1]) * clean + float(path.sigma[level + 1]) * noise
    return noisy
