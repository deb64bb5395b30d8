"""Train a DreamBooth-LoRA on a few pictures of one subject: Stable Diffusion, SDXL, SD3, FLUX.1, Qwen-Image or Z-Image.

accelerate launch --quiet -m nearid_personalize.train_lora --base-model miniworld --references photos \
    --prompt "a photo of sks dog" --output runs/lora --validate-every 50 --patience 3
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from accelerate import PartialState

from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, train_lora
from nearid_personalize.training.lora.options import flat
from nearid_personalize.training.lora.publishing import make_repository, push_lora
from nearid_personalize.training.lora.text_image import WELL_KNOWN, cached_text_image_model
from nearid_personalize.training.lora.validation import IdentityValidation, ValidationOptions

RELEASED = "Aleksandar/nearid-siglip2"


@dataclass(frozen=True)
class Arguments:
    """What to train, and how it is validated."""

    lora: Annotated[LoraOptions, tyro.conf.arg(name="")]
    validation: Annotated[ValidationOptions, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the options, the device memory that each phase needs and the disk; load and train nothing."""


def completed(arguments: Arguments) -> Arguments:
    """Fill in what depends on the base model: the mini-world's knows its own places, and is judged by its own eyes."""
    lora, validation = arguments.lora, arguments.validation
    if not lora.validate_every and validation.validation_model is not None:
        lora = replace(lora, validate_every=max(1, lora.steps // 8))
    if lora.base_model != "miniworld":
        filled = replace(
            validation,
            validation_model=validation.validation_model or RELEASED,
            text_image_model=validation.text_image_model or cached_text_image_model(),
        )
        return replace(arguments, lora=lora, validation=filled)
    from nearid_personalize.miniworld import context_prompts

    prompts = context_prompts(lora.data.subject_name)
    filled = replace(
        validation,
        validation_model=validation.validation_model or "miniworld",
        text_image_model=validation.text_image_model or "miniworld",
        validation_prompts=validation.validation_prompts or prompts,
        validation_guidance_scale=validation.validation_guidance_scale or 3.0,
    )
    return replace(arguments, lora=lora, validation=filled)


def print_plan(arguments: Arguments) -> None:
    """Show every option before anything is loaded; of the validation only where there is one."""
    plan = flat(arguments.lora) | (flat(arguments.validation) if arguments.lora.validate_every else {})
    for name, value in plan.items():
        print(f"{name:>27}  {value}")
    if arguments.lora.validate_every and not arguments.validation.text_image_model:
        print(f"adherence to the prompts is not measured; it would be with --text-image-model {WELL_KNOWN[0]}, say")


def print_needs(options: LoraOptions) -> None:
    """Show what memory and disk a run needs."""
    from nearid_personalize.training.lora.memory import dry_run

    for line in dry_run(options):
        print(line)


def run(arguments: Arguments) -> None:
    """Train, and put the checkpoint to keep into the output folder."""
    repository = arguments.lora.publishing.push_to_hub
    if repository and PartialState().is_main_process:
        make_repository(repository)
    validates = bool(arguments.lora.validate_every)
    validation = IdentityValidation.open(arguments.lora, arguments.validation) if validates else None
    folder = train_lora(arguments.lora, validation)
    if not PartialState().is_main_process:
        return
    best = validation.finish() if validation else None
    kept = ""
    if validation and best:
        floors = ", ".join(validation.floors) or "none"
        kept = f", of step {best['step']}: identity {best['identity']:.3f} (floors that it passed: {floors})"
    print(f"wrote {folder / WEIGHTS_NAME}{kept}")
    if repository:
        print(f"uploaded to {push_lora(folder, repository)}")


def parse(flags: Sequence[str] | None = None) -> Arguments:
    """What `flags` spell, those of the process by default, with what depends on the base model filled in.

    Raises InputError for a wrong or missing flag.
    """
    return completed(parse_flags(Arguments, flags, "train_lora", __doc__))


def main() -> None:
    """Parse, show the plan, train."""
    quieten_libraries()
    arguments = parse()
    if os.environ.get("RANK", "0") == "0":  # one of several processes tells it
        print_plan(arguments)
    if arguments.dry_run:
        print_needs(arguments.lora)
    else:
        run(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main))
