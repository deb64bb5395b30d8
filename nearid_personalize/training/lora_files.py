"""LoRA files: written so that a stock `pipe.load_lora_weights` gives back what was trained, read so that all arrive."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearid_personalize.errors import InputError
from nearid_personalize.hub import download, is_hub_id
from nearid_personalize.training.adapters import PromptedDenoiser, check_peft
from nearid_personalize.training.lora_check import LoraInfo, check_lora_file

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "nearid_personalize"
__all__ = [
    "METADATA_KEY",
    "WEIGHTS_NAME",
    "LoraInfo",
    "check_lora_file",
    "find_lora_file",
    "load_lora",
    "lora_path",
    "read_metadata",
    "save_lora",
]


# --- saving ----------------------------------------------------------------------------------------------------------


def adapter_arguments(name: str, model: Any) -> dict[str, Any]:
    """Arguments of `save_lora_weights` for one model: its layers, and the configuration that carries alpha.

    The layers keep peft's names: diffusers looks at the first key alone to tell the naming scheme, and the mixed names
    that `convert_state_dict_to_diffusers` gives a UNet with convolutions make it skip the attention layers silently.
    Dropout is not told: layers that a pipeline loads start in training mode, so it would go on dropping.
    """
    config = {**model.peft_config["default"].to_dict(), "lora_dropout": 0.0}
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    layers = get_peft_model_state_dict(model)
    return {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}


def save_lora(model: PromptedDenoiser, output: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `pytorch_lora_weights.safetensors` into the folder `output`, whole or not at all.

    metadata: what `read_metadata` gives back; any JSON. Its "token" is also stated as ModelSpec's trigger phrase.
    """
    metadata = dict(metadata or {})
    arguments = adapter_arguments(model.family.denoiser_name, model.denoiser)
    for name, text_encoder in model.text.items():
        arguments |= adapter_arguments(name, text_encoder)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".lora-") as folder:
        type(model.family.pipe).save_lora_weights(folder, **arguments)
        file = Path(folder, WEIGHTS_NAME)
        with safe_open(file, framework="pt") as content:
            known = content.metadata()
        told = {METADATA_KEY: json.dumps(metadata)}
        if "token" in metadata:
            told["modelspec.trigger_phrase"] = metadata["token"]
        save_file(load_file(file), file, metadata=known | told)
        os.replace(file, output / WEIGHTS_NAME)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_lora` was told about a LoRA file or folder; empty for files from elsewhere.

    Raises InputError when there is no such file, or none that `check_lora_file` lets pass.
    """
    return told_metadata(check_lora_file(find_lora_file(path)))


def told_metadata(info: LoraInfo) -> dict[str, Any]:
    """What `save_lora` was told about a checked file; empty for files from elsewhere."""
    try:
        told = json.loads(info.metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise InputError(f"LoRA {info.file}: its {METADATA_KEY} metadata is no JSON object; train it again")
    return told


# --- loading ---------------------------------------------------------------------------------------------------------


def lora_path(path: str | Path) -> Path:
    """A LoRA's file or folder, downloaded where `path` is a Hub id: owner/name, or owner/name@revision."""
    if Path(path).exists() or not is_hub_id(path):
        return Path(path)
    return download(str(path), ["*.safetensors"])


def find_lora_file(path: str | Path) -> Path:
    """Return the safetensors file of a file, a folder or a Hub id; InputError when there is none, or more than one."""
    path = lora_path(path)
    if path.is_dir():
        inside = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).exists() else sorted(path.glob("*.safetensors"))
        if len(inside) != 1:
            raise InputError(f"LoRA {path}: folder holds {len(inside)} .safetensors files; expected one {WEIGHTS_NAME}")
        return inside[0]
    if not path.is_file():
        raise InputError(
            f"LoRA {path}: no such file; give a .safetensors file, the folder train_lora.py wrote, or a Hub id"
        )
    return path


def adapter_tensors(pipe: DiffusionPipeline, adapter_name: str) -> list[Tensor]:
    """List the tensors that one adapter holds in the pipeline's models."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    found = []
    for layer in layers:
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            found += [getattr(layer, kind)[adapter_name].weight] if adapter_name in getattr(layer, kind) else []
        for kind in ("lora_embedding_A", "lora_embedding_B"):
            found += [getattr(layer, kind)[adapter_name]] if adapter_name in getattr(layer, kind) else []
    return [tensor.detach().cpu() for tensor in found]


def count_missing(wanted: Sequence[Tensor], loaded: Sequence[Tensor]) -> int:
    """Count tensors of `wanted` without an equal of their own in `loaded`, up to the cast to the loaded precision."""
    rest = list(loaded)
    missing = 0
    for tensor in wanted:
        equals = (
            index
            for index, other in enumerate(rest)
            if other.shape == tensor.shape and torch.equal(tensor.to(other.dtype), other)
        )
        if (match := next(equals, None)) is None:
            missing += 1
        else:
            del rest[match]
    return missing


def load_lora(pipe: DiffusionPipeline, path: str | Path, adapter_name: str = "subject") -> None:
    """Load a LoRA file or folder into `pipe`, making sure that every one of its tensors arrived in a layer.

    `pipe.load_lora_weights` only warns, or says nothing, when names fit no layer. Raises InputError for a missing file,
    for one that `check_lora_file` refuses, and when any tensor was left behind; the pipeline is then without the
    adapter.
    """
    file = find_lora_file(path)
    info = check_lora_file(file, pipe)
    if any(name.startswith(("text_encoder", "lora_te")) for name in info.shapes):
        check_peft()
    source: dict[str, Any] = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    source["use_safetensors"] = True  # else a file that cannot be read is tried as a pickle
    read = pipe.lora_state_dict(**source)
    state = read[0] if isinstance(read, tuple) else read  # with alphas beside it, in some families
    wanted = {k: v for k, v in state.items() if not k.endswith("alpha")}
    for name, tensor in wanted.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"LoRA {file}: tensor {name!r} holds NaN or infinity; train it again")
    advice = f"it does not fit this {type(pipe).__name__}; was it trained for another base model?"
    try:
        pipe.load_lora_weights(**source, adapter_name=adapter_name)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"LoRA {file}: {advice} ({str(error).splitlines()[0]})") from error
    missing = count_missing(list(wanted.values()), adapter_tensors(pipe, adapter_name))
    if missing:
        pipe.delete_adapters(adapter_name)
        raise InputError(f"LoRA {file}: {missing} of its {len(wanted)} tensors reached no layer; {advice}")
