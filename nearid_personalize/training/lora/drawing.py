"""What is on the device while a pipeline draws beside its training: the denoiser or the text encoders, never both.

Text encoders are often as large as the denoiser (Qwen-Image: 17 GB beside 41), and needed for a moment. While they are
frozen a prompt's embedding never changes, so each is made once a run, in the absence of the denoiser.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from torch import nn

Embeddings = dict[str, Any]
"""What `encode_prompt` returned, on the CPU, by the arguments it was given."""


@contextmanager
def encoding_apart(
    pipe: DiffusionPipeline,
    encoders: Sequence[nn.Module],
    aside: nn.Module | None,
    device: torch.device,
    known: Embeddings,
) -> Iterator[None]:
    """Inside, the pipeline's `encode_prompt` brings the frozen `encoders` to `device` for as long as it takes.

    aside: the denoiser, which leaves the device meanwhile; None: it stays. known: what has been encoded already; such
    prompts are not encoded again.
    """
    encode: Callable[..., Any] = pipe.encode_prompt

    @wraps(encode)
    def encode_once(*args: Any, **kwargs: Any) -> Any:
        plain = all(is_plain(value) for value in (*args, *kwargs.values()))
        asked = repr((args, sorted(kwargs.items()))) if plain else ""
        if asked in known:
            return send_to_device(known[asked], device)
        with away(aside, device), offload_models(*encoders, device=device):
            embeddings = encode(*args, **kwargs)
        if plain:
            known[asked] = send_to_device(embeddings, "cpu")
        return embeddings

    pipe.encode_prompt = encode_once
    try:
        yield
    finally:
        del pipe.encode_prompt  # the class's own stands again


def is_plain(value: Any) -> bool:
    """Whether a value's `repr` says all of it."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float | torch.device)


@contextmanager
def away(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Inside, `model` is on the CPU; afterwards on `device`. Its parameters stay the same objects."""
    if model is None:
        yield
        return
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


@contextmanager
def cast_weights(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `model` computes in `dtype`; afterwards its weights are those from before, to the bit."""
    before = model.dtype
    kept = model.state_dict() if dtype != before else {}
    nn.Module.to(model, dtype)  # diffusers' own warns of an empty list of modules at every call
    try:
        yield
    finally:
        nn.Module.to(model, before)
        if kept:
            model.load_state_dict(kept)
