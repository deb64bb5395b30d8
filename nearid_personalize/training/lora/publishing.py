"""Who hears of a run: accelerate's trackers while it trains, a Hub repository once the LoRA is there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from huggingface_hub import HfApi

from nearid_personalize.errors import InputError
from nearid_personalize.files import write_atomically
from nearid_personalize.hub import HUB_ERRORS
from nearid_personalize.lora.files import WEIGHTS_NAME, read_metadata
from nearid_personalize.training.lora.options import LoraOptions, flat

LOGS, PROJECT = "logs", "nearid-lora"


CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {base_model}
instance_prompt: {prompt}
tags: [lora, dreambooth, text-to-image, diffusers]
---
# {title}

A DreamBooth-LoRA of one subject, trained for {steps} steps. The word `{token}` stands for the subject, as in
`{plain_prompt}`.

```python
pipe.load_lora_weights("{repository}")
```
"""


# --- trackers --------------------------------------------------------------------------------------------------------
def tracker_arguments(options: LoraOptions) -> dict[str, Any]:
    """Arguments of an `Accelerator` that is to tell the trackers; InputError for one unknown or not installed."""
    wanted = options.publishing.report_to
    known = [name for name in LoggerType.list() if name != "all"]
    installed = [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in known:
            raise InputError(f"--report-to {name}: no tracker of that name; give {', '.join(known)}")
        if name not in installed:
            raise InputError(f"--report-to {name}: not installed; pip install {name.replace('_', '-')}")
    if not wanted:
        return {}
    folders = ProjectConfiguration(project_dir=str(options.output), logging_dir=str(options.output / LOGS))
    return {"log_with": list(wanted), "project_config": folders}


def start_trackers(accelerator: Accelerator, options: LoraOptions) -> None:
    """Open the trackers, if any, and tell them the options."""
    if not options.publishing.report_to:
        return
    told = {}
    for name, value in flat(options).items():
        told[name] = value if isinstance(value, int | float | str) else json.dumps(value, default=str)
    accelerator.init_trackers(PROJECT, config=told)


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they still hold. (`end_training` would also end the process group.)"""
    for tracker in accelerator.trackers:
        if accelerator.is_main_process:
            tracker.finish()


# --- the Hub ---------------------------------------------------------------------------------------------------------
def make_repository(repository: str) -> None:
    """Make sure, before hours of training, that the LoRA can go there; a new repository is private."""
    with _named(repository):
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().auth_check(repository, write=True)  # another's repository exists, too


def push_lora(folder: Path, repository: str) -> str:
    """Upload the LoRA of `folder` with a model card, in one commit; returns its address."""
    write_atomically(folder / "README.md", model_card(folder, repository))
    with _named(repository):
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[WEIGHTS_NAME, "README.md"],
            commit_message="LoRA trained with nearid_personalize",
        )
    return commit.commit_url


def model_card(folder: Path, repository: str) -> str:
    """What the Hub shows of the LoRA in `folder`."""
    told = read_metadata(folder)
    return CARD.format(
        title=repository.split("/")[-1],
        repository=repository,
        base_model=json.dumps(told["base_model"]),
        prompt=json.dumps(told["prompt"]),
        plain_prompt=told["prompt"],
        token=told["token"],
        steps=told["steps"],
    )


@contextmanager
def _named(repository: str) -> Iterator[None]:
    """Turn what the Hub refuses into one line that names the flag."""
    try:
        yield
    except HUB_ERRORS as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"--push-to-hub {repository}: {reason}; check the name owner/name and `hf auth login`"
        ) from None
