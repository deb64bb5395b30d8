"""Checkpoints on disk: finding and reading them, a head alone beside its trunk's fingerprint, the released layout."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError, in_one_line
from nearid_personalize.files import write_atomically
from nearid_personalize.hub import download, is_hub_id

if TYPE_CHECKING:
    from nearid_personalize.encoder.model import NearIDModel
from transformers import AutoConfig

from nearid_personalize.encoder.model import NearIDConfig, NearIDModel
from nearid_personalize.encoder.trunks import CHECKPOINT_TYPES, default_preprocessing, trunk_class

HEAD_FILE = "head.safetensors"
"""What a folder with a head alone has in place of whole weights; its metadata name the trunk."""


# Large models are split; their index then stands where the one file would.
_WHOLE = ("model.safetensors", "model.safetensors.index.json")


_NEEDED = "config.json and model.safetensors"


TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt")
"""What the vocabulary of a text-image model may lie in: SentencePiece's for the first SigLIP, a pair for old CLIPs."""


# The fields of the released config's vision_config; its trunk is SigLIP's fixed-size one, without a model_type.
_RELEASED_TRUNK = "siglip_vision_model"


_RELEASED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


CONFIG_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, IndexError),
    *(ArithmeticError, RuntimeError, AssertionError, StrictDataclassError),
)
"""What transformers raises on a config.json that is damaged, or says what no model can be."""


# --- finding and reading ---------------------------------------------------------------------------------------------
def checkpoint_folder(name_or_folder: str | Path) -> Path:
    """The local folder of a checkpoint: the folder itself, or that of a Hub id (owner/name, owner/name@revision).

    Raises InputError when config.json or weights are missing, or the Hub id cannot be had.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if not is_hub_id(name_or_folder):
            raise InputError(f"{name_or_folder}: no such folder; give a folder with {_NEEDED}, or a Hub id owner/name")
        folder = _download(str(name_or_folder))
    needed = {"config.json": ("config.json",), "model.safetensors": (*_WHOLE, HEAD_FILE)}
    missing = [name for name, files in needed.items() if not any((folder / file).is_file() for file in files)]
    if missing:
        raise InputError(f"{name_or_folder}: lacks {' and '.join(missing)}; a model folder holds {_NEEDED}")
    return folder


def holds_head_alone(folder: Path) -> bool:
    """Whether `save_head` wrote this folder, and no whole model lies beside it."""
    return (folder / HEAD_FILE).is_file() and not any((folder / file).is_file() for file in _WHOLE)


def load_weights(
    model_class: type[PreTrainedModel], folder: Path, name: str | Path, dtype: torch.dtype
) -> PreTrainedModel:
    """A model from safetensors only. Raises InputError, naming `name`, when they are damaged or leave weights unset."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of every weight of the text half, which is left in the file on purpose
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except SafetensorError as error:
        raise InputError(f"{name}: model.safetensors cannot be read ({error}); get the file again") from None
    except CONFIG_ERRORS as error:
        reason = in_one_line(error)
        raise InputError(
            f"{name}: no model can be made of config.json and its weights ({reason}); get them again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        # transformers would fill them with random numbers and go on.
        some = sorted(info["missing_keys"])[0]
        raise InputError(f"{name}: model.safetensors lacks {len(info['missing_keys'])} weights, {some} first")
    check_precision("transformers", model.dtype, dtype)
    return model


def check_precision(package: str, got: torch.dtype, wanted: torch.dtype) -> None:
    """Raise InputError when a loader gave weights of another type: releases differ in what they call the argument."""
    if got != wanted:
        raise InputError(
            f"{package} {version(package)}: loaded the weights as {got} where {wanted} was asked for; "
            "install a release that was tested, see constraints.txt"
        )


def _download(repository: str) -> Path:
    try:
        # Weights as safetensors only, and no code: what is not asked for cannot be loaded.
        return download(repository, ["*.json", "*.safetensors", *TOKENIZER_FILES])
    except InputError as error:
        raise InputError(
            f"{error} (`hf download {repository}` gets it, and a folder works too; "
            "the built-in `miniworld` is only for the toy world)"
        ) from None


# --- heads alone -----------------------------------------------------------------------------------------------------
def trunk_fingerprint(model: "NearIDModel") -> str:
    """SHA-256, in hex, over the trunk's tensors in the order of their names: name, shape, values as float16.

    Independent of a file's spelling and sharding. Raises InputError for a bfloat16 trunk: load it in float32.
    """
    return weights_fingerprint(model.trunk_state())


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """`trunk_fingerprint` of any model's tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype == torch.bfloat16:
            raise InputError("trunk: held in bfloat16, which has no comparable fingerprint; load it in float32")
        values = tensor.detach().to("cpu", torch.float16).contiguous()  # as copies of float32 trunks are published
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_head(model: "NearIDModel", folder: str | Path, trunk: str, preprocessing: Preprocessing) -> None:
    """Write the head alone: head.safetensors, config.json and preprocessor_config.json, each whole or not at all.

    trunk: Hub id or folder where `load_encoder` finds the trunk again; stored with its fingerprint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "trunk": trunk, "trunk_fingerprint": trunk_fingerprint(model)}
    write_atomically(folder / "config.json", model.config.to_json_string())
    preprocessing.save(folder)
    write_atomically(folder / HEAD_FILE, save(_on_cpu(model.head.state_dict()), metadata))


def head_trunk(folder: str | Path) -> tuple[str, str]:
    """The trunk that a saved head was trained on: its Hub id or folder, and its fingerprint."""
    metadata, _ = _read_head(Path(folder))
    return metadata["trunk"], metadata["trunk_fingerprint"]


def attach_head(model: "NearIDModel", folder: str | Path) -> None:
    """Give `model` the head that `save_head` wrote to `folder`.

    Raises InputError when the head was trained on a trunk with other weights than `model`'s, or cannot be read.
    """
    metadata, tensors = _read_head(Path(folder))
    fingerprint = trunk_fingerprint(model)
    if fingerprint != metadata["trunk_fingerprint"]:
        raise InputError(
            f"{folder}: this head belongs to trunk {metadata['trunk']} with fingerprint "
            f"{metadata['trunk_fingerprint'][:12]}, not to {model.config.vision_config.model_type} trunk "
            f"{model.name_or_path} with fingerprint {fingerprint[:12]}; give the trunk that it was trained on"
        )
    try:
        model.head.load_state_dict(tensors)
    except RuntimeError as error:
        file, reason = Path(folder) / HEAD_FILE, in_one_line(error)
        raise InputError(f"{file}: not the weights of this head ({reason}); get it again") from None


def _read_head(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    path = folder / HEAD_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a folder written by save_head")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be read ({error}); get the file again") from None
    if not {"trunk", "trunk_fingerprint"} <= metadata.keys():
        raise InputError(f"{path}: its metadata name no trunk; give a file written by save_head")
    return metadata, tensors


# --- the released layout ---------------------------------------------------------------------------------------------
def check_released_layout(model: "NearIDModel") -> None:
    """Raise InputError where the layout has no place for the model's trunk."""
    trunk = model.config.vision_config
    if trunk.model_type != _RELEASED_TRUNK or not getattr(trunk, "vision_use_head", True):
        raise InputError(f"trunk {trunk.model_type}: the released layout is for SigLIP trunks; use save_pretrained")


def export_released_layout(
    model: "NearIDModel", folder: str | Path, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model as `Aleksandar/nearid-siglip2` is laid out, for its authors' own class.

    Keys are `backbone.vision_model.*`, in `dtype` (theirs: float16). Raises InputError for trunks other than
    SigLIP's with its own head.
    """
    check_released_layout(model)
    trunk = model.config.vision_config
    config = {
        "architectures": ["NearIDModel"],
        "model_type": "nearid",
        "embed_dim": model.config.embed_dim,
        "normalize_embeddings": model.config.normalize_embeddings,
        "vision_config": {field: getattr(trunk, field) for field in _RELEASED_FIELDS},
    }
    weights = model.backbone.state_dict()
    tensors = {f"backbone.vision_model.{name}": tensor.to(dtype) for name, tensor in weights.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    preprocessing.save(folder)
    write_atomically(folder / "model.safetensors", save(_on_cpu(tensors), {"format": "pt"}))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_encoder(
    name_or_folder: str | Path, dtype: torch.dtype = torch.float32, trunk: str | Path | None = None
) -> tuple[NearIDModel, Preprocessing, Path]:
    """A NearID checkpoint, a head alone, or a bare trunk; its preprocessing; its local folder.

    A bare trunk gets the head that training starts from: SigLIP's own, else one that gives the mean token. A head alone
    is put on the trunk that it names, or on `trunk`. dtype: of the trunk; the head is in float32.

    Safetensors only, no remote code. Raises InputError for a checkpoint that cannot be found or read, is of another
    kind or incomplete, or whose head and trunk differ.
    """
    folder = checkpoint_folder(name_or_folder)
    if holds_head_alone(folder):
        model, default = _on_its_trunk(folder, trunk)
    elif trunk is not None:
        raise InputError(f"trunk {trunk}: {name_or_folder} has its own; only a head saved alone needs one")
    else:
        model = _load_whole(folder, name_or_folder, dtype)
        default = default_preprocessing(model.config.vision_config)
    return model.cast_trunk(dtype).eval(), Preprocessing.from_folder(folder, default), folder


def _load_whole(folder: Path, name: str | Path, dtype: torch.dtype) -> NearIDModel:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise InputError(f"{name}: config.json cannot be read ({in_one_line(error)}); get it again") from None
    if config.model_type == NearIDConfig.model_type:
        return load_weights(NearIDModel, folder, name, dtype)
    if config.model_type not in CHECKPOINT_TYPES:
        known = ", ".join(CHECKPOINT_TYPES)
        raise InputError(f"{name}: a model of type {config.model_type!r}; give a NearID checkpoint, or one of {known}")
    return NearIDModel.from_vision_model(load_weights(trunk_class(config.model_type), folder, name, dtype))


def _on_its_trunk(folder: Path, trunk: str | Path | None) -> tuple[NearIDModel, Preprocessing]:
    named, fingerprint = head_trunk(folder)
    try:
        # In float32, whatever is asked for: in bfloat16 its fingerprint could not be told.
        model, preprocessing, _ = load_encoder(named if trunk is None else trunk)
    except InputError as error:
        raise InputError(
            f"{folder}: a head alone, for trunk {named} (fingerprint {fingerprint[:12]}), which cannot be had; "
            f"give its folder as `trunk` ({error})"
        ) from None
    attach_head(model, folder)
    return model, preprocessing
