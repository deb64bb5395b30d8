"""What a run begins with: a device, a precision, and a pipeline from a folder, a file or the Hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json
from nearid_personalize.hub import HUB_ERRORS, download_fault, split_revision
from nearid_personalize.names import packaged

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(wanted: Device) -> str:
    """The device to run on; "auto" is CUDA where there is one, else the CPU."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        raise InputError(f"--device {wanted}: not available on this machine; use --device auto or cpu")
    return wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """The precision of the pipeline's weights; "auto" is float32 on the CPU, else bfloat16."""
    if wanted == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def load_pipeline(
    base_model: str, device: str, dtype: torch.dtype, base_config: str | None = None
) -> "DiffusionPipeline":
    """A text-to-image pipeline from a folder, the Hub, one checkpoint file, or the package; safetensors only.

    base_model: "miniworld" names the packaged one. base_config: of a file, see `single_file.load_single_file`.

    Raises:
        InputError: the folder is no pipeline or lacks weights, a file is damaged, or the Hub cannot give it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError

    if os.environ.get("DIFFUSERS_VERBOSITY") == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    source, revision = split_revision(packaged(base_model, "pipeline"))
    if Path(source).is_file():
        from nearid_personalize.single_file import load_single_file

        pipe = load_single_file(Path(source), base_config, dtype, dtype)
        check_denoiser_precision(pipe, dtype)
        return pipe.to(device)
    if Path(source).exists():
        _check_pipeline_folder(base_model, Path(source))
    try:
        pipe = DiffusionPipeline.from_pretrained(source, revision=revision, dtype=dtype, use_safetensors=True)
    except SafetensorError as error:
        raise InputError(f"--base-model {base_model}: damaged weights ({error}); download the model again") from None
    except (*HUB_ERRORS, ValueError) as error:
        reason = download_fault(error)
        raise InputError(f"--base-model {base_model}: {reason}; give a pipeline's folder or a Hub id") from None
    check_denoiser_precision(pipe, dtype)
    return pipe.to(device)


def check_denoiser_precision(pipe: "DiffusionPipeline", dtype: torch.dtype) -> None:
    """Refuse a pipeline whose denoiser is not in the precision that was asked for; raises InputError."""
    from nearid_personalize.encoder.checkpoints import check_precision

    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if denoiser is not None:
        check_precision("diffusers", denoiser.dtype, dtype)


def _check_pipeline_folder(flag_value: str, folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise InputError(f"--base-model {flag_value}: has no model_index.json; give the folder of a diffusers pipeline")
    try:
        index = parse_json((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"--base-model {flag_value}: model_index.json is damaged; download the model again") from None
    for part in (folder / name for name in index):
        # Only models keep a config.json; schedulers and tokenizers name theirs otherwise and have no weights.
        if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
            raise InputError(
                f"--base-model {flag_value}: {part.name}/ has no .safetensors weights; download the whole model"
            )
