"""Folders of checkpoints that accelerate writes: whole or not there, the newest few kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written whole, oldest first."""
    return sorted(folder.glob("step-*"))


def checkpoint_step(checkpoint: Path) -> int:
    """How many steps were done when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


def write_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, add_files: Callable[[Path], None], total_limit: int
) -> None:
    """Write the state after `step` steps under a temporary name until it is whole, then drop the oldest.

    add_files: writes what is ours into the checkpoint's folder; called in the main process.
    """
    partial = folder / f".partial-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        add_files(partial)
        partial.rename(folder / f"step-{step:06d}")
        for old in whole_checkpoints(folder)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
