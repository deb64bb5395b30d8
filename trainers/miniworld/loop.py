"""The training loop that the mini-world's models share: seeded by step, resumable at any step, with progress.

The batch of step k is a function of (seed, k), so resuming needs no data-loader state.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train."""

    state: Path
    """Folder for resumable training state; keep it outside version control."""
    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.5
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.01
    ema: float = 0.998
    """Decay of the averaged weights; 0 keeps the raw ones."""
    seed: int = 0
    save_every: int = 500
    """Steps between two saves of the state."""
    cpu: bool = False


def rate_at(step: int, options: LoopOptions) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, plateau, linear decay."""
    remaining = (options.steps - step) / max(1.0, options.decay * options.steps)
    return max(0.0, min(1.0, (step + 1) / options.warmup, remaining))


def rng_of(options: LoopOptions, step: int, device: torch.device) -> tuple[np.random.Generator, torch.Generator]:
    """The two random sources of a step."""
    return (
        np.random.default_rng((options.seed, step)),
        torch.Generator(device).manual_seed(options.seed * 1_000_003 + step),
    )


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    options: LoopOptions,
    export: Callable[[nn.Module], None],
    check: Callable[[nn.Module, int], str] | None = None,
) -> None:
    """Run (or resume) training and export the averaged weights.

    Args:
        loss_of: scalar loss of the model at a step; runs under bf16 autocast.
        export: writes the model; called at every save with the averaged weights in place.
        check: a line to print at every save, computed with the averaged weights.
    """
    project = ProjectConfiguration(str(options.state), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(mixed_precision="bf16", cpu=options.cpu, project_config=project)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options))
    model, optimizer = accelerator.prepare(model, optimizer)
    average = EMAModel(model.parameters(), decay=options.ema, use_ema_warmup=True, power=0.75)
    progress = _Progress()
    accelerator.register_for_checkpointing(progress, schedule, average)
    checkpoints = sorted((options.state / "checkpoints").glob("checkpoint_*"), key=lambda p: int(p.name.split("_")[1]))
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        project.iteration = int(checkpoints[-1].name.split("_")[1]) + 1
    average.to(accelerator.device)
    bar = tqdm(total=options.steps, initial=progress.step, file=sys.stdout, mininterval=15)
    running = 0.0
    while progress.step < options.steps:
        model.train()
        with accelerator.autocast():
            loss = loss_of(model, progress.step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(model.parameters())
        progress.step += 1
        value = loss.item()
        running = value if running == 0 else 0.98 * running + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{running:.4f}")
        if progress.step % options.save_every == 0 or progress.step == options.steps:
            accelerator.save_state()
            _export(accelerator.unwrap_model(model), average, export, check, progress.step)
    bar.close()


def _export(
    model: nn.Module,
    average: EMAModel,
    export: Callable[[nn.Module], None],
    check: Callable[[nn.Module, int], str] | None,
    step: int,
) -> None:
    average.store(model.parameters())
    average.copy_to(model.parameters())
    model.eval()
    with torch.no_grad():
        if check:
            print(f"\nstep {step}: {check(model, step)}", flush=True)
        export(model)
    average.restore(model.parameters())


@dataclass
class _Progress:
    """The step counter, in the form accelerate saves."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
