"""`nearid quickstart`: from four pictures to a LoRA to pictures that are kept, on the mini-world."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from nearid_personalize.commands.console import Stopwatch, say
from nearid_personalize.commands.enrolment import negative_paths
from nearid_personalize.commands.generate import finish_generation, guarded
from nearid_personalize.commands.options import QUICKSTART_LORA_STEPS, Quickstart
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.images import save_image
from nearid_personalize.loading import choose_device, load_pipeline

if TYPE_CHECKING:
    from nearid_personalize.training.lora.loop import LoraOptions


def run_quickstart(options: Quickstart) -> int:
    """`nearid quickstart`."""
    from nearid_personalize.miniworld import example_references

    references, category, _ = example_references(options.subject_index, category=options.category)
    prompt = choose_prompt(options.prompt, category, options.subject_index)
    negative_paths(options)
    check_writable(options.out)
    reference_dir = write_references(references, options.out / "references")
    say(
        options.json,
        f"plan: train a LoRA on {len(references)} pictures of {category} no. {options.subject_index}, then keep the"
        f" best {options.num_images} of {options.num_candidates} candidates of {prompt!r}",
    )
    clock = Stopwatch()
    device = choose_device("auto")
    with clock.stage("load"):
        from nearid_personalize.scorer.scorer import IdentityScorer

        scorer = IdentityScorer.from_pretrained("miniworld", device=device)
    with clock.stage("train_lora"):
        from nearid_personalize.training.lora.loop import load_lora, train_lora

        lora = train_lora(
            quickstart_lora(reference_dir, options.out / "lora", category, options.lora_steps, options.seed)
        )
    with clock.stage("load"):
        pipe = load_pipeline("miniworld", device, torch.float32)
        load_lora(pipe, lora)
    result = guarded(pipe, scorer, references, prompt, options)
    models: dict[str, str | None] = {"base": "miniworld", "lora": "lora", "scorer": "miniworld"}
    return finish_generation(result, references, models, clock, options.out, options.json)


def quickstart_lora(
    references: Path, output: Path, category: str, steps: int | None = None, seed: int = 0
) -> "LoraOptions":
    """The LoRA recipe of the quickstart: rates, batch and no prior pictures as one validation subject favoured."""
    from nearid_personalize.training.lora.loop import LoraOptions

    return LoraOptions.of(
        base_model="miniworld",
        references=references,
        output=output,
        prompt=f"a photo of sks {category}",
        batch_size=4,
        steps=steps or QUICKSTART_LORA_STEPS,
        seed=seed,
    )


def choose_prompt(wanted: str | None, category: str, subject_index: int) -> str:
    """The quickstart's prompt, which must speak of the subject by its rare token and true category."""
    if wanted is None:
        return f"a photo of sks {category} in space"
    if f"sks {category}" not in wanted:
        raise InputError(
            f'--prompt "{wanted}": subject {subject_index} is a {category}; write of it as "sks {category}"'
        )
    return wanted


def write_references(references: Sequence[Image.Image], folder: Path) -> Path:
    """The quickstart's reference pictures as files; the LoRA is trained on all that lies in `folder`."""
    names = [f"reference-{index}.png" for index in range(len(references))]
    folder.mkdir(exist_ok=True)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in names)
    if strangers:
        raise InputError(f"--out {folder.parent}: references/ already holds {strangers[0]}; give another folder")
    for name, image in zip(names, references):
        save_image(image, folder / name)
    return folder
