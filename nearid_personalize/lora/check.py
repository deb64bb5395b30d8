"""What a LoRA file from a stranger must be before anything loads it: only its header and single numbers are read.

A safetensors file holds no code, but its names and its configuration steer what diffusers and peft build: how large the
layers are, which modules a pattern of names visits. So all of that is checked here, and the shapes against the base
model, before a tensor is loaded.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from packaging.version import Version
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json


def check_peft() -> None:
    """Raise InputError where transformers wants a newer peft for its text encoders, which may not be released yet."""
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        raise InputError(
            f"transformers {version('transformers')}: LoRA in text encoders needs peft {MIN_PEFT_VERSION} there, and "
            f"{version('peft')} is installed; install releases that were tested together, see constraints.txt"
        )


MAX_BYTES = 4 * 1024**3
"""Largest LoRA file read, bytes: rank 256 on every layer of SDXL and both of its text encoders fits."""


MAX_HEADER_BYTES = 8 * 1024**2


MAX_TENSORS = 20_000


MAX_RANK = 1024


MAX_SIDE = 2**18
"""Longest side of a tensor: wider than any layer of a released text-to-image model."""


FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


_SCALARS = {*FLOATS, "I32", "I64"}  # an alpha may be counted in whole numbers


_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")


_ENDING = re.compile(
    r"(^|[._])(lora_[AB](\.default)?\.weight|lora_B(\.default)?\.bias|lora_(down|up)\.weight|lora\d?\.(down|up)\.weight"
    r"|lora_linear_layer\.(down|up)\.weight|lora_magnitude_vector(\.weight)?|lora_embedding_[AB]|alpha)$"
)


_PATTERN = re.compile(r"[A-Za-z0-9_.\-^$\\]{1,300}")  # peft reads these as regular expressions: none that repeats


_DISGUISES = {b"PK\x03\x04": "a zip archive, as PyTorch's pickles are", b"\x80": "a pickle, which can run code"}


_CONVERSION_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError)


# What peft may be told freely; every other setting of its configuration must be the default.
_TOLD = {"peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}


@dataclass(frozen=True)
class LoraInfo:
    """What the header of a LoRA file says.

    shapes: of every tensor, by its name in the file. rank: the largest. metadata: as in the file, all strings.
    """

    file: Path
    size_bytes: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    rank: int
    metadata: Mapping[str, str] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def check_lora_file(path: str | Path, pipe: DiffusionPipeline | None = None, max_bytes: int = MAX_BYTES) -> LoraInfo:
    """Check a LoRA file without loading it; with `pipe`, also that every tensor fits a layer of that pipeline.

    Raises InputError, one sentence that names the file, when it is too large, not whole safetensors, or holds a name,
    type, shape, number or configuration that no LoRA needs.
    """
    file = Path(path)
    try:
        info = read_header(file, max_bytes)
        _check_settings(info.metadata.get("lora_adapter_metadata"))
        if pipe is not None:
            check_fit(info, pipe)
    except OSError as error:
        raise InputError(f"LoRA {file}: cannot be read ({error.strerror or error})") from None
    except _Fault as fault:
        raise InputError(f"LoRA {file}: {fault}") from None
    return info


class _Fault(Exception):
    """What is wrong, without the name of the file."""


# --- the file --------------------------------------------------------------------------------------------------------
def read_header(file: Path, max_bytes: int) -> LoraInfo:
    """Names, shapes and metadata of a safetensors file, once they are all in bounds."""
    size = file.stat().st_size
    if file.suffix.lower() != ".safetensors":
        raise _Fault(f"the name ends in {file.suffix or 'nothing'!r}; give a .safetensors file")
    if size > max_bytes:
        raise _Fault(f"{size:,} bytes; at most {max_bytes:,} are taken")
    _check_start(file, size)
    try:
        with safe_open(file, framework="pt") as content:  # checks JSON, offsets, gaps and the end of the file
            metadata = content.metadata() or {}
            names = list(content.keys())
            slices = {name: content.get_slice(name) for name in names}
            headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            _check_tensors(headers)
            _check_scalars({name: content.get_tensor(name) for name, (_, shape) in headers.items() if not shape})
    except SafetensorError as error:
        raise _Fault(f"not a whole safetensors file ({error}); download or train it again") from None
    shapes = {name: shape for name, (_, shape) in headers.items()}
    return LoraInfo(file, size, shapes, _largest_rank(shapes), metadata)


def _check_start(file: Path, size: int) -> None:
    """The first bytes: no other kind of file, and a header that is neither huge nor longer than the file."""
    with open(file, "rb") as content:
        start = content.read(9)
    for mark, kind in _DISGUISES.items():
        if start.startswith(mark) and start[8:] != b"{":
            raise _Fault(f"{kind}, under another name; give a true safetensors file")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise _Fault(f"not a safetensors file ({size:,} bytes without its header); download or train it again")
    if length > MAX_HEADER_BYTES:
        raise _Fault(f"a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    if 8 + length > size:
        raise _Fault(f"cut short: a header of {length:,} bytes in a file of {size:,}; download it again")


def _check_tensors(headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    if not headers:
        raise _Fault("holds no tensor; give a LoRA file")
    if len(headers) > MAX_TENSORS:
        raise _Fault(f"{len(headers):,} tensors; at most {MAX_TENSORS:,} are read")
    for name, (dtype, shape) in headers.items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise _Fault(f"tensor name {name[:60]!r} is no layer's name; give a LoRA file")
        if not _ENDING.search(name):
            raise _Fault(f"tensor {name!r} is no LoRA layer that diffusers reads; give a LoRA file")
        if dtype not in (FLOATS if shape else _SCALARS):
            raise _Fault(f"tensor {name!r} has type {dtype}; use one of {', '.join(FLOATS)}")
        if len(shape) > 5 or any(not 1 <= side <= MAX_SIDE for side in shape):
            raise _Fault(f"tensor {name!r} has shape {list(shape)}; sides must be 1 to {MAX_SIDE:,}, at most five")
    if all(name.endswith("alpha") for name in headers):
        raise _Fault(f"none of its {len(headers)} tensors is a LoRA layer; give a LoRA file")
    if (rank := _largest_rank({name: shape for name, (_, shape) in headers.items()})) > MAX_RANK:
        raise _Fault(f"rank {rank:,}; at most {MAX_RANK:,} is taken")


def _check_scalars(scalars: Mapping[str, Tensor]) -> None:
    for name, value in scalars.items():
        if not math.isfinite(value.item()):
            raise _Fault(f"tensor {name!r} is {value.item()}; train it again")


def _largest_rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """First side of the largest "down" tensor: LoRA's A, [rank,in] or [rank,in,k,k]."""
    downs = [shape[0] for name, shape in shapes.items() if re.search(r"lora_A|down\.weight$", name) and len(shape) > 1]
    return max(downs, default=0)


# --- peft's configuration inside the metadata ------------------------------------------------------------------------
def _check_settings(text: str | None) -> None:
    """The configuration that diffusers hands to peft: sizes in bounds, patterns plain, all else at its default."""
    if text is None:
        return
    try:
        told = parse_json(text)
    except ValueError:
        raise _Fault("its lora_adapter_metadata is no JSON; save it again") from None
    if not isinstance(told, dict):
        raise _Fault("its lora_adapter_metadata is no JSON object; save it again")
    defaults = vars(LoraConfig())
    for key, value in told.items():
        name = key.split(".")[-1]
        if name not in defaults:
            raise _Fault(f"its configuration says {key[:60]!r}, which this peft does not know")
        if name not in _TOLD and value != defaults[name] and not _is_plain(name, value):
            raise _Fault(f"its configuration says {key[:60]} = {str(value)[:60]}, which no LoRA for pictures needs")


def _is_plain(name: str, value: Any) -> bool:
    """Whether a setting of peft's configuration is of the harmless kind that training scripts write."""
    if name == "r":
        return _is_number(value, MAX_RANK) and isinstance(value, int)
    if name == "lora_alpha":
        return _is_number(value, MAX_SIDE)
    if name in ("rank_pattern", "alpha_pattern"):
        limit = MAX_RANK if name == "rank_pattern" else MAX_SIDE
        return isinstance(value, dict) and all(_PATTERN.fullmatch(k) and _is_number(v, limit) for k, v in value.items())
    if name == "target_modules":
        return isinstance(value, list) and all(isinstance(k, str) and _NAME.fullmatch(k) for k in value)
    if name == "lora_dropout":
        return value == 0 or (_is_number(value, 1) and value < 1)
    if name == "init_lora_weights":
        return isinstance(value, bool) or value == "gaussian"
    return name in ("use_rslora", "use_dora", "lora_bias") and isinstance(value, bool)


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most


# --- the base model --------------------------------------------------------------------------------------------------
def check_fit(info: LoraInfo, pipe: DiffusionPipeline) -> None:
    """Every tensor must fit a layer of `pipe` once its names are converted as `load_lora_weights` does.

    The conversion sees tensors of the right shapes without memory behind them; only alphas have their values.
    """
    advice = f"it does not fit this {type(pipe).__name__}; was it trained for another base model?"
    try:
        converted = peft_names(stand_ins(info), pipe)
    except _CONVERSION_ERRORS as error:
        raise _Fault(f"{advice} ({(str(error) or type(error).__name__).splitlines()[0][:200]})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    strangers = [name for name, shape in shapes.items() if not fits(name, shape, pipe)]
    strangers = strangers or [name for name, shape in shapes.items() if not has_partner(name, shape, shapes)]
    if strangers or not converted:
        example = f" ({strangers[0]})" if strangers else ""
        raise _Fault(f"{len(strangers)} of its {len(converted)} tensors reached no layer{example}; {advice}")


def stand_ins(info: LoraInfo) -> dict[str, Tensor]:
    """Tensors of the file's shapes that share one number each, but for single numbers, which are read."""
    with safe_open(info.file, framework="pt") as content:
        return {
            name: torch.zeros(()).expand(shape) if math.prod(shape) > 1 else content.get_tensor(name)
            for name, shape in info.shapes.items()
        }


def peft_names(state: Mapping[str, Tensor], pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Tensors by "component.layer.lora_A.weight", whatever the naming of `state`; alphas are left out."""
    unet = {"unet_config": pipe.unet.config} if isinstance(pipe, StableDiffusionXLLoraLoaderMixin) else {}
    read = pipe.lora_state_dict(dict(state), **unet)
    plain = read[0] if isinstance(read, tuple) else read  # with alphas beside it, in some families
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plain.items():
        component, _, rest = name.partition(".")
        if not name.endswith("alpha"):
            parts.setdefault(component, {})[rest] = tensor
    return {f"{part}.{name}": tensor for part in parts for name, tensor in _layer_names(part, parts[part]).items()}


def _layer_names(component: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One component's tensors as diffusers names them before it calls peft."""
    if component.startswith("text_encoder"):
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return state if "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)


def fits(name: str, shape: Sequence[int], pipe: DiffusionPipeline) -> bool:
    """Whether a tensor of peft's name "component.layer.lora_A.weight" has the shape that its layer asks for."""
    component, _, rest = name.partition(".")
    layer_name, _, kind = rest.partition(".lora_")
    model = pipe.components.get(component)
    if not isinstance(model, nn.Module):
        return False
    if not hasattr(model, "text_model"):  # transformers flattened CLIP; files of before keep the prefix
        layer_name = layer_name.removeprefix("text_model.")
    try:
        layer = model.get_submodule(layer_name)
    except AttributeError:
        return False
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return any(tuple(shape) == wanted for wanted in _wanted_shapes(base, kind, shape))


def has_partner(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the A or B of a layer, which both fit it, comes with a B or A of the same rank."""
    if len(shape) < 2:
        return True
    if ".lora_A." in name:  # [rank,in], its partner [out,rank]
        return shape[0] == shapes.get(name.replace(".lora_A.", ".lora_B."), (0, 0))[1]
    if ".lora_B." in name:
        return shape[1] == shapes.get(name.replace(".lora_B.", ".lora_A."), (0, 0))[0]
    return True


def _wanted_shapes(layer: nn.Module, kind: str, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Shapes that a LoRA tensor of this kind may have on `layer`, at the rank that its own shape tells."""
    letter = kind.removeprefix("embedding_")[:1]
    rank = (shape[0] if letter == "A" else shape[-1] if len(shape) < 3 else shape[1]) if shape else 0
    kernel: tuple[int, ...] = ()
    if isinstance(layer, nn.Linear):  # quantized ones too, whose weights are packed
        sides = (layer.in_features, layer.out_features)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sides, kernel = (layer.in_channels // layer.groups, layer.out_channels), tuple(layer.kernel_size)
    elif isinstance(layer, nn.Embedding):
        sides = (layer.num_embeddings, layer.embedding_dim)
    else:
        return
    ones = (1,) * len(kernel)
    if letter == "A":
        yield (rank, sides[0], *kernel)
    elif kind.endswith("bias"):
        yield (sides[1],)
    elif letter == "B":
        yield (sides[1], rank, *ones)
    else:  # magnitudes: one for each output
        yield (sides[1],)
        yield (1, sides[1], *ones)
