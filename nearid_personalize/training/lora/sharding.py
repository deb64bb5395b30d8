"""FSDP for the frozen weights: they are sharded over the processes, the LoRA stays whole in each.

torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277) splits the denoiser's frozen weights and gathers them a
block at a time. The LoRA's gradients are averaged before each step, so that optimizer, checkpoints and files are
those of any other run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast,
    broadcast_object_list,
    patch_environment,
    send_to_device,
    str_to_bool,
)
from diffusers import ModelMixin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nearid_personalize.errors import InputError

REQUESTED = "ACCELERATE_USE_FSDP"  # how `accelerate launch` hands its configuration on


@contextmanager
def requested_sharding() -> Iterator[FullyShardedDataParallelPlugin | None]:
    """Lend the FSDP part of `accelerate launch`'s configuration, None without; inside, accelerate does no FSDP itself.

    Raises InputError for settings that have no meaning here.
    """
    if not str_to_bool(os.environ.get(REQUESTED, "false")):
        yield None
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version {plugin.fsdp_version}: choose version 2 in `accelerate config`")
    if plugin.activation_checkpointing:
        raise InputError("fsdp_activation_checkpointing true: give the trainer --gradient-checkpointing on instead")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise InputError("fsdp_offload_params true: the weights stay on the GPUs; give false, and more processes")
    with patch_environment(**{REQUESTED: "false"}):
        yield plugin


def shard_frozen(denoiser: ModelMixin, device: torch.device, plugin: FullyShardedDataParallelPlugin) -> None:
    """Leave each process its share of the frozen weights on `device`; trained parameters go there whole."""
    trained = {parameter for parameter in denoiser.parameters() if parameter.requires_grad}
    denoiser.to(memory_format=torch.contiguous_format)  # no other can be sharded
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    blocks = denoiser._no_split_modules or ()
    for module in reversed(list(denoiser.modules())):  # inner ones first
        if module is denoiser or type(module).__name__ in blocks:
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, ignored_params=trained)


def same_everywhere(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the main process's values."""
    vector_to_parameters(broadcast(parameters_to_vector(parameters).detach()), parameters)


def everywhere(holds: bool, accelerator: Accelerator) -> bool:
    """Whether something holds in every process."""
    if accelerator.num_processes == 1:
        return holds
    return bool(accelerator.reduce(torch.tensor(float(holds), device=accelerator.device)) == accelerator.num_processes)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean of the processes' gradients, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(parameters_to_vector(gradients), "mean")
    vector_to_parameters(mean, gradients)


@contextmanager
def lead(denoiser: nn.Module) -> Iterator[None]:
    """In the main process: have the others `follow` each call of a sharded denoiser, which needs their shares.

    Raises InputError where a call that ran out of memory is tried again: the others are still in it.
    """
    under_way = False

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal under_way
        if under_way:
            raise InputError("--validation-batch-size: a batch did not fit into memory; give a smaller one")
        under_way = True
        broadcast_object_list([send_to_device((args, kwargs), "cpu")])

    def done(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal under_way
        under_way = False

    # The first of all hooks: told before the weights are gathered
    hooks = [denoiser.register_forward_pre_hook(tell, prepend=True, with_kwargs=True)]
    hooks.append(denoiser.register_forward_hook(done))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if not under_way:
            broadcast_object_list([None])


@torch.no_grad()
def follow(denoiser: nn.Module, device: torch.device) -> None:
    """In every other process: make the calls that the main process makes inside `lead`, for the sake of the shares."""
    while True:
        told = broadcast_object_list([None])[0]
        if told is None:
            return
        args, kwargs = send_to_device(told, device)
        denoiser(*args, **kwargs)  # the answer is the main process's; here only the weights had to be handed out
