"""Checkpoints of a LoRA run: whole or not there, the newest few kept, and only resumed by the run that wrote them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.options import LoraOptions, flat

BOOKKEEPING = {"output", "resume", "checkpoint_every", "checkpoints_total_limit", "keep_checkpoints", "validate_every"}


BOOKKEEPING |= {"report_to", "push_to_hub"}


BOOKKEEPING |= {"micro_batch_size", "gradient_checkpointing"}  # the gradients are the same


def save_only_adapters(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `save_state` and `load_state` handle the LoRA layers alone, instead of the whole frozen base model."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        adapters = {name: p.detach().contiguous() for name, p in model.named_parameters() if "lora_" in name}
        save_file(adapters, Path(folder, "adapters.safetensors"))
        weights.clear()  # accelerate writes what is left in here

    def load(models: list[nn.Module], folder: str) -> None:
        model.load_state_dict(load_file(Path(folder, "adapters.safetensors")), strict=False)
        models.clear()  # and reads what is left in here

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints(output: Path) -> list[Path]:
    """List whole checkpoints, oldest first."""
    return sorted(output.glob("checkpoint/step-??????"))


def checkpoint_step(checkpoint: Path) -> int:
    """How many steps were done when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator,
    options: LoraOptions,
    step: int,
    run: Mapping[str, Any],
    write_lora: Callable[[Path], None],
) -> None:
    """Write the state after `step` steps, under a temporary name until it is whole, then drop the oldest.

    run: what must be the same on resume beside the options. write_lora: writes the LoRA, as it is now, into a folder.
    """
    folder = options.output / "checkpoint" / f"step-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_lora(partial)
        state = {"options": flat(options), "run": run}
        (partial / "run.json").write_text(json.dumps(state, default=str), encoding="utf-8")
        partial.rename(folder)
        for older in checkpoints(options.output)[: -options.checkpoints.checkpoints_total_limit]:
            shutil.rmtree(older)


def find_checkpoint(options: LoraOptions, run: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start; InputError when `--resume` and OUTPUT disagree."""
    found = checkpoints(options.output)
    if not options.checkpoints.resume:
        if found:
            raise InputError(f"--output {options.output} holds a checkpoint; pass --resume or choose another folder")
        return None
    if not found:
        raise InputError(f"--resume: no checkpoint under {options.output / 'checkpoint'}; start without --resume")
    before = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps({"options": flat(options), "run": run}, default=str))
    for name in (name for name in flat(options) if name not in BOOKKEEPING):
        was, is_now = before["options"].get(name), now["options"][name]
        if was != is_now:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"--resume: {flag} was {was!r}, now {is_now!r}; keep it as it was")
    for name, value in now["run"].items():
        if before["run"][name] != value:
            raise InputError(f"--resume: {name} was {before['run'][name]!r}, now {value!r}; keep it as it was")
    return found[-1]
