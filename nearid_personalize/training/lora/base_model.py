"""Loading the base model of a LoRA: a pipeline's folder, a Hub id, or one checkpoint file in its authors' layout.

A folder may recommend learning rates in `lora_training.json`:

    {"learning_rate": 1e-3, "text_learning_rate": 5e-4, "token_learning_rate": 5e-3}
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from nearid_personalize.errors import InputError
from nearid_personalize.hub import split_revision
from nearid_personalize.loading import check_denoiser_precision
from nearid_personalize.names import packaged
from nearid_personalize.single_file import GIVE_CONFIG, config_of_file, load_single_file, named_faults
from nearid_personalize.training.lora.families import Family, family_class
from nearid_personalize.training.lora.options import RATES, LoraOptions, require

RECOMMENDED = "lora_training.json"


NO_CHECKER: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def load_base_model(options: LoraOptions, dtype: torch.dtype) -> Family:
    """Load the pipeline onto the CPU, from safetensors only, without a safety checker; its VAE in float32, the rest in
    `dtype`.

    Raises InputError for what is no pipeline, lacks weights, or cannot be trained here.
    """
    family, (source, _) = family_of(options), base_model_source(options)
    load = load_file if Path(source).is_file() else load_folder
    with faults_of(options):
        pipe = load(family, options, dtype)
    check_denoiser_precision(pipe, dtype)
    pipe.set_progress_bar_config(disable=True)
    loaded = family(pipe)
    for name, rate in recommended_rates(Path(source)).items():
        setattr(loaded, name, rate)
    guidance = options.noise.distilled_guidance
    if guidance is not None:
        require(loaded.takes_guidance, "distilled_guidance", guidance, "left out for this base model")
        loaded.distilled_guidance = guidance
    return loaded


def base_model_source(options: LoraOptions) -> tuple[str, str | None]:
    """The base model's folder, file or Hub id, and its revision; "miniworld" names the packaged one."""
    source, revision = split_revision(packaged(options.base_model, "pipeline"))
    asked = options.source.revision
    if revision and asked and revision != asked:
        raise InputError(f"--revision {asked}: --base-model {options.base_model} names another; give one of them")
    return source, revision or asked


def family_of(options: LoraOptions) -> type[Family]:
    """The base model's family, from its configuration alone. Raises InputError as `load_base_model` does."""
    return family_class(read_index(options)[0]["_class_name"], options.base_model)


def read_index(options: LoraOptions) -> tuple[dict[str, Any], str, str | None]:
    """The base model's `model_index.json`, and where its configurations lie: folder or Hub id, and revision."""
    source, revision = base_model_source(options)
    with faults_of(options):
        if Path(source).is_file():
            source, revision = config_of_file(Path(source), options.source.base_config), None
        return DiffusionPipeline.load_config(source, revision=revision), source, revision


def load_folder(family: type[Family], options: LoraOptions, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline's folder or Hub id."""
    source, revision = base_model_source(options)
    return DiffusionPipeline.from_pretrained(
        source,
        dtype={"default": dtype, "vae": torch.float32},
        use_safetensors=True,
        variant=options.source.variant,
        revision=revision,
        **(NO_CHECKER if family.has_checker else {}),
    )


def load_file(family: type[Family], options: LoraOptions, dtype: torch.dtype) -> DiffusionPipeline:
    """Load one checkpoint file whose keys are those of the model's authors."""
    file, base_config = Path(base_model_source(options)[0]), options.source.base_config
    return load_single_file(file, base_config, dtype, torch.float32, **(NO_CHECKER if family.has_checker else {}))


def recommended_rates(folder: Path) -> dict[str, float]:
    """The learning rates that a base model's folder asks for; empty where it asks for none."""
    file = folder / RECOMMENDED
    if not file.is_file():
        return {}
    try:
        rates = json.loads(file.read_text(encoding="utf-8"))
        rates = {name: float(rate) for name, rate in rates.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: {error}; it is JSON, learning rates by name") from None
    for name, rate in rates.items():
        if name not in RATES:
            raise InputError(f"{file}: unknown {name!r}; it may name {', '.join(RATES)}")
        require(0 < rate < 1, name, rate, f"between 0 and 1 in {file}")
    return rates


def faults_of(options: LoraOptions) -> AbstractContextManager[None]:
    """Inside, what the libraries say of files that are missing or damaged becomes one line that names the flag."""
    return named_faults(options.base_model, _advice(options))


def _advice(options: LoraOptions) -> str:
    if Path(options.base_model).is_file():
        return GIVE_CONFIG
    if options.source.variant:
        return f"has it the --variant {options.source.variant}?"
    if options.source.revision:
        return f"has it the --revision {options.source.revision}?"
    return "give a pipeline folder, a Hub id, or one .safetensors file"
