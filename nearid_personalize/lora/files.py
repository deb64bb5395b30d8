"""LoRA files: written so that a stock `pipe.load_lora_weights` gives back what was trained, read so that all arrive."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.lora.check import LoraInfo
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nearid_personalize.hub import download, is_hub_id
from nearid_personalize.lora.check import LoraInfo, check_lora_file, check_peft

_STATE_FILES = ("adapters.safetensors", "model.safetensors", "optimizer.safetensors")  # of a trainer's own state


# --- LoRA files ------------------------------------------------------------------------------------------------------
def find_loras(paths: Sequence[Path]) -> dict[str, Path]:
    """LoRA files by a short name, in natural order of their paths; of files that are equal the first.

    paths: files, Hub ids, or folders of checkpoints, searched to any depth. Raises InputError for one that holds none.
    """

    found = [file for path in paths for file in _lora_files(lora_path(path))]
    names = _short_names(found)
    first: dict[str, str] = {}
    for name, file in zip(names, found, strict=True):
        with open(file, "rb") as content:
            first.setdefault(_digest(content), name)
    return {name: file for name, file in zip(names, found, strict=True) if name in first.values()}


def _lora_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"--lora {path}: no such file; give .safetensors files or folders that hold some")
        return [path]
    inside = (file for file in path.rglob("*.safetensors") if file.is_file() and file.name not in _STATE_FILES)
    shown = [file for file in inside if not any(_is_hidden(p) for p in file.relative_to(path).parts)]
    if not shown:
        raise InputError(f"--lora {path}: no .safetensors file in this folder; give the folder a trainer wrote")
    return sorted(shown, key=lambda file: _natural(_after_its_checkpoints(file, shown)))


def _is_hidden(part: str) -> bool:
    """A part of a path that no LoRA is looked for below: hidden, or the state that sd-scripts resume from."""
    return part.startswith(".") or part.endswith("-state")


def _after_its_checkpoints(file: Path, all_files: Sequence[Path]) -> Path:
    """A path that sorts the last file of a run, "dog", behind its checkpoints, "dog-000001" or "dog_000000250"."""
    siblings = [other.stem for other in all_files if other.parent == file.parent and other != file]
    is_last = any(re.match(re.escape(file.stem) + r"[-_]\D*\d", stem) for stem in siblings)
    return file.with_name(file.stem + (chr(0x10FFFF) if is_last else ""))


def _digest(content: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := content.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _natural(path: Path) -> list[Any]:
    """A sort key by which step-2 comes before step-10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", str(path))]


def _short_names(found: Sequence[Path]) -> list[str]:
    """What tells the paths apart: as little of their ends as makes all different."""
    whole = [path.with_suffix("").parts for path in found]
    stems = {parts[-1] for parts in whole}
    if len(stems) == 1:  # pytorch_lora_weights in every folder
        whole = [parts[:-1] or parts for parts in whole]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}. {path.stem}" for index, path in enumerate(found)]


def subject_of(infos: Sequence["LoraInfo"]) -> tuple[str, str] | None:
    """What the LoRAs' metadata call the subject, and its rare token ("sks dog", "sks"); None when none says."""
    for info in infos:
        try:
            told = parse_json(info.metadata.get("nearid_personalize", "{}"))
        except ValueError:
            told = {}
        token = told.get("token") if isinstance(told, dict) else None
        prompt = str(told.get("prompt", "")).split() if token else []
        if token in prompt:
            return " ".join(prompt[prompt.index(token) :]), str(token)
        if phrase := info.metadata.get("modelspec.trigger_phrase", "").strip():
            return phrase, phrase.split()[0]
    return None


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
]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_lora` was told about a LoRA file or folder; empty for files from elsewhere.

    Raises InputError when there is no such file, or none that `check_lora_file` lets pass.
    """
    return told_metadata(check_lora_file(find_lora_file(path)))


def told_metadata(info: LoraInfo) -> dict[str, Any]:
    """What `save_lora` was told about a checked file; empty for files from elsewhere."""
    try:
        told = parse_json(info.metadata.get(METADATA_KEY, "{}"))
    except ValueError:
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
