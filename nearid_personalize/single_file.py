"""A pipeline from one checkpoint file, whose keys are those of the model's authors, as most other programs keep it.

Few files hold everything: FLUX.1's is the transformer alone, SD3's come with and without T5. What a file lacks is taken
from the pipeline that its configuration is of.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.hub import HUB_ERRORS, download_fault

_VAE_KEYS = ("first_stage_model.", "vae.")
GIVE_CONFIG = "give --base-config, the folder or Hub id of a pipeline of the same architecture"


def config_of_file(file: Path, base_config: str | None = None) -> str:
    """Folder or Hub id of the pipeline that a file is of: `base_config`, or known by the file's layers.

    Raises InputError for what is no safetensors file.
    """
    if file.suffix != ".safetensors":
        raise InputError(f"--base-model {file}: only .safetensors files are read; convert it, or give a folder")
    return base_config or fetch_diffusers_config(load_file(file))["pretrained_model_name_or_path"]


def load_single_file(
    file: Path, base_config: str | None, dtype: torch.dtype, vae_dtype: torch.dtype, **components: Any
) -> DiffusionPipeline:
    """The whole pipeline on the CPU; its VAE in `vae_dtype`. components: given ones, None to leave one out.

    Raises InputError for a damaged file, one of another architecture, and parts that are nowhere.
    """
    with named_faults(file, GIVE_CONFIG):
        config = config_of_file(file, base_config)
        index = DiffusionPipeline.load_config(config)
        pipeline = getattr(diffusers, index["_class_name"])
        if not hasattr(pipeline, "from_single_file"):
            raise InputError(
                f"--base-model {file}: diffusers reads no {index['_class_name']} from one file; give a folder or Hub id"
            )
        held = load_file(file)
        vae = load_vae(file, held, index["vae"][1], config, vae_dtype)
        texts = texts_elsewhere(file, held, index, config, dtype)
        return pipeline.from_single_file(str(file), config=config, dtype=dtype, vae=vae, **texts, **components)


def load_vae(file: Path, held: Mapping[str, Tensor], kind: str, config: str, dtype: torch.dtype) -> torch.nn.Module:
    """The VAE: the file's own where it has one."""
    vae_class = getattr(diffusers, kind)
    if any(key.startswith(_VAE_KEYS) for key in held):
        return vae_class.from_single_file(str(file), config=config, subfolder="vae", dtype=dtype)
    return load_elsewhere(vae_class, file, config, "vae", dtype)


def texts_elsewhere(
    file: Path, held: Mapping[str, Tensor], index: Mapping[str, Any], config: str, dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """The text encoders that the file lacks."""
    found = {}
    for name, part in index.items():
        if not name.startswith("text_encoder") or part[0] != "transformers":
            continue
        encoder = getattr(transformers, part[1])
        is_t5 = encoder is transformers.T5EncoderModel
        if not (is_t5_in_single_file(held) if is_t5 else is_clip_model_in_single_file(encoder, held)):
            found[name] = load_elsewhere(encoder, file, config, name, dtype)
    return found


def load_elsewhere(model: Any, file: Path, config: str, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A part that the file lacks, from the pipeline of its configuration."""
    try:
        return model.from_pretrained(config, subfolder=name, dtype=dtype, use_safetensors=True)
    except (*HUB_ERRORS, ValueError) as error:
        raise InputError(
            f"--base-model {file}: holds no {name}, and {config} gives none ({download_fault(error)}); "
            "give --base-config, the folder or Hub id of a whole pipeline"
        ) from error


@contextmanager
def named_faults(base_model: object, advice: str) -> Iterator[None]:
    """Turn what the libraries say of files that are missing or damaged into one line that names the flag."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"--base-model {base_model}: damaged weights ({error}); get the file again") from None
    except InputError:  # a ValueError too
        raise
    except (*HUB_ERRORS, ValueError, SingleFileComponentError) as error:
        raise InputError(f"--base-model {base_model}: {download_fault(error)}; {advice}") from error
