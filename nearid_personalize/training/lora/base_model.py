"""Loading the base model of a LoRA: a pipeline's folder, a Hub id, or one checkpoint file in its authors' layout.

A folder may recommend learning rates in `lora_training.json`:

    {"learning_rate": 1e-3, "text_learning_rate": 5e-4, "token_learning_rate": 5e-3}
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from safetensors import SafetensorError
from safetensors.torch import load_file

from nearid_personalize.errors import InputError
from nearid_personalize.hub import HUB_ERRORS, download_fault, split_revision
from nearid_personalize.loading import check_denoiser_precision
from nearid_personalize.names import packaged
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
    load = load_single_file if Path(source).is_file() else load_folder
    with named_faults(options):
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
    with named_faults(options):
        if Path(source).is_file():
            source, revision = config_of_file(Path(source), options), None
        return DiffusionPipeline.load_config(source, revision=revision), source, revision


def config_of_file(file: Path, options: LoraOptions) -> str:
    """Folder or Hub id of the pipeline that a checkpoint file holds the weights of: told, or known by its layers."""
    if file.suffix != ".safetensors":
        raise InputError(f"--base-model {file}: only .safetensors files are read; convert it, or give a folder")
    return options.source.base_config or fetch_diffusers_config(load_file(file))["pretrained_model_name_or_path"]


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


def load_single_file(family: type[Family], options: LoraOptions, dtype: torch.dtype) -> DiffusionPipeline:
    """Load one checkpoint file whose keys are those of the model's authors."""
    source = options.base_model
    config = config_of_file(Path(source), options)
    index = DiffusionPipeline.load_config(config)
    vae_class = getattr(diffusers, index["vae"][1])
    return getattr(diffusers, index["_class_name"]).from_single_file(
        source,
        config=config,
        dtype=dtype,
        vae=vae_class.from_single_file(source, config=config, subfolder="vae", dtype=torch.float32),
        **(NO_CHECKER if family.has_checker else {}),
    )


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


@contextmanager
def named_faults(options: LoraOptions) -> Iterator[None]:
    """Turn what the libraries say of files that are missing or damaged into one line that names the flag."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"--base-model {options.base_model}: damaged weights ({error}); get the file again") from None
    except InputError:  # a ValueError too
        raise
    except (*HUB_ERRORS, ValueError, SingleFileComponentError) as error:
        reason = download_fault(error)
        raise InputError(f"--base-model {options.base_model}: {reason}; {_advice(options)}") from error


def _advice(options: LoraOptions) -> str:
    if Path(options.base_model).is_file():
        return "give --base-config, the folder or Hub id of a pipeline of the same architecture"
    if options.source.variant:
        return f"has it the --variant {options.source.variant}?"
    if options.source.revision:
        return f"has it the --revision {options.source.revision}?"
    return "give a pipeline folder, a Hub id, or one .safetensors file"
