"""Which attention a denoiser or a trunk computes with, chosen by name and undone after use.

A UNet has one processor per attention layer, and diffusers one processor class per way of computing it. Most
transformers have processors that ask a dispatcher instead, by the name of a backend; Stable Diffusion 3's do not.

| | UNet, Stable Diffusion 3 | other transformers | vision trunk |
|---|---|---|---|
| sdpa | PyTorch's scaled dot product attention | backend `native` | `sdpa` |
| xformers | memory-efficient attention | backend `xformers` | refused |
| flash | refused: on a GPU sdpa runs flash kernels | backend `flash` | `flash_attention_2` |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from nearid_personalize.errors import InputError

Attention: TypeAlias = Literal["auto", "sdpa", "xformers", "flash"]

_PACKAGES = {
    "xformers": ("xformers", "pip install 'nearid-personalize[xformers]'"),
    "flash": ("flash_attn", "pip install flash-attn"),
}
_BACKENDS = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}


def check_attention(wanted: Attention, device: torch.device | str) -> None:
    """Refuse, before anything is loaded, what this device or installation lacks; raises InputError."""
    if wanted not in _PACKAGES:
        return
    kind = torch.device(device).type
    if kind != "cuda":
        raise InputError(f"--attention {wanted}: needs a CUDA GPU, and this runs on {kind}; give sdpa or auto")
    package, command = _PACKAGES[wanted]
    if find_spec(package) is None:
        raise InputError(f"--attention {wanted}: {package} is not installed; {command}, or give sdpa or auto")


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline calls in every denoising step."""
    return getattr(pipe, "transformer", None) or pipe.unet


@contextmanager
def using_attention(denoiser: nn.Module, wanted: Attention, device: torch.device | str) -> Iterator[None]:
    """Let a diffusers denoiser compute with `wanted` inside; "auto" leaves it as it is.

    Raises InputError for what the device, the installation, or the kind of denoiser does not have.
    """
    check_attention(wanted, device)
    if wanted == "auto":
        yield
        return
    with _restored(denoiser):
        if _dispatches(denoiser):
            denoiser.set_attention_backend(_BACKENDS[wanted])  # type: ignore[operator]
        elif wanted == "flash":
            name = type(denoiser).__name__
            raise InputError(f"--attention flash: {name} has none; give sdpa, which runs flash kernels on a GPU")
        elif wanted == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        else:
            _use_sdpa(denoiser)
        yield


@contextmanager
def using_trunk_attention(trunk: nn.Module, wanted: Attention, device: torch.device | str) -> Iterator[None]:
    """Let a transformers model compute with `wanted` inside; "auto" leaves it as it is. Raises InputError likewise."""
    check_attention(wanted, device)
    if wanted == "auto":
        yield
        return
    if wanted == "xformers":
        raise InputError("--attention xformers: vision trunks have none; give sdpa, flash or auto")
    before = trunk.config._attn_implementation  # type: ignore[union-attr]
    trunk.set_attn_implementation({"sdpa": "sdpa", "flash": "flash_attention_2"}[wanted])  # type: ignore[operator]
    try:
        yield
    finally:
        trunk.set_attn_implementation(before)  # type: ignore[operator]


def _layers(denoiser: nn.Module) -> list[Any]:
    return [module for module in denoiser.modules() if getattr(module, "processor", None) is not None]


def _dispatches(denoiser: nn.Module) -> bool:
    return any(hasattr(layer.processor, "_attention_backend") for layer in _layers(denoiser))


def _use_sdpa(denoiser: nn.Module) -> None:
    """Give the plain and the xformers' layers PyTorch's attention; processors of other kinds compute more than that."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    for layer in _layers(denoiser):
        if isinstance(layer.processor, AttnProcessor | XFormersAttnProcessor):
            layer.set_processor(AttnProcessor2_0())


@contextmanager
def _restored(denoiser: nn.Module) -> Iterator[None]:
    """Give every layer its processor and backend back, and the process its default.

    `set_attention_backend` changes the default of the whole process too, and `reset_attention_backend` leaves it so.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    default, _ = Registry.get_active_backend()
    before = [(layer, layer.processor) for layer in _layers(denoiser)]
    backends = [getattr(processor, "_attention_backend", None) for _, processor in before]
    try:
        yield
    finally:
        for (layer, processor), backend in zip(before, backends):
            layer.processor = processor
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = backend
        Registry.set_active_backend(default)
