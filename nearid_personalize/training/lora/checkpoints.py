"""Checkpoints of a LoRA run: whole or not there, the newest few kept, and only resumed by the run that wrote them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearid_personalize.errors import InputError
from nearid_personalize.training.checkpoints import whole_checkpoints, write_checkpoint
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


def save_checkpoint(
    accelerator: Accelerator,
    options: LoraOptions,
    step: int,
    run: Mapping[str, Any],
    write_lora: Callable[[Path], None],
) -> None:
    """Write the state after `step` steps.

    run: what must be the same on resume beside the options. write_lora: writes the LoRA, as it is now, into a folder.
    """

    def add_files(folder: Path) -> None:
        write_lora(folder)
        state = {"options": flat(options), "run": run}
        (folder / "run.json").write_text(json.dumps(state, default=str), encoding="utf-8")

    limit = options.checkpoints.checkpoints_total_limit
    write_checkpoint(accelerator, checkpoint_folder(options), step, add_files, limit)


def checkpoint_folder(options: LoraOptions) -> Path:
    """Where the checkpoints lie."""
    return options.output / "checkpoint"


def find_checkpoint(options: LoraOptions, run: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start; InputError when `--resume` and OUTPUT disagree."""
    found = whole_checkpoints(checkpoint_folder(options))
    if not options.checkpoints.resume:
        if found:
            raise InputError(f"--output {options.output} holds a checkpoint; pass --resume or choose another folder")
        return None
    if not found:
        raise InputError(f"--resume: no checkpoint under {checkpoint_folder(options)}; start without --resume")
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
