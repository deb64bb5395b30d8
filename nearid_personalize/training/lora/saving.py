"""Writing a trained LoRA as stock diffusers reads it."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nearid_personalize.lora.files import METADATA_KEY, WEIGHTS_NAME
from nearid_personalize.training.lora.adapters import PromptedDenoiser


# --- saving ----------------------------------------------------------------------------------------------------------
def adapter_arguments(name: str, model: Any) -> dict[str, Any]:
    """Arguments of `save_lora_weights` for one model: its layers, and the configuration that carries alpha."""
    # A pipeline loads layers in training mode: with their dropout it would go on dropping
    config = {**model.peft_config["default"].to_dict(), "lora_dropout": 0.0}
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    # With peft's names: diffusers tells the naming scheme from the first key alone, and of the mixed names that
    # `convert_state_dict_to_diffusers` gives a UNet with convolutions it would skip the attention layers silently
    layers = get_peft_model_state_dict(model)
    return {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}


def save_lora(model: PromptedDenoiser, output: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write `pytorch_lora_weights.safetensors` into `output`, whole or not at all.

    metadata: any JSON, returned by `read_metadata`. Its "token" is also stated as ModelSpec's trigger phrase.
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
