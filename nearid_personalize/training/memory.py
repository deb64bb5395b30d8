"""What a step would need of a device's memory, told on fake tensors: these have shapes and nothing else.

The bytes of all tensors that are alive at once are counted. Not counted: an accelerator's own context, for which
`OVERHEAD` stands, and what its allocator leaves unused.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GB = 1e9


OVERHEAD = 1.0e9  # bytes, of an accelerator's context and kernels


FLOAT32_UNDER_AUTOCAST = ("layer_norm", "group_norm", "softmax")


class PeakMemory(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that operations make, for as long as each is alive.

    peak: the most that were alive at once. beforehand: tensors that are not counted, weights say.
    """

    def __init__(self, beforehand: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in beforehand}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is freed."""
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, place: int, size: int) -> None:
        """A storage is freed."""
        self.known.discard(place)
        self.now -= size


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Inside, autocast normalises in float32 as CUDA's does; on the CPU it would do so in half precision."""
    plain = {name: getattr(F, name) for name in FLOAT32_UNDER_AUTOCAST}
    for name, function in plain.items():
        setattr(F, name, partial(widened, function))  # a function mode would not see what backward passes recompute
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(F, name, function)


def widened(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call a function, under autocast with its half-precision tensors in float32."""
    if not torch.is_autocast_enabled("cpu"):
        return function(*args, **kwargs)
    wide = [value.float() if isinstance(value, Tensor) else value for value in args]
    named = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return function(*wide, **named)


def emptied(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a model new, empty weights of the same shapes: on `device`, and where `dtype` is given, in it.

    Inside a `FakeTensorMode` those on the "cpu" are fake ones, which autocast knows, unlike those on "meta".
    """

    def empty(tensor: Tensor) -> Tensor:
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(empty(weight), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer)
    return model


def bytes_of(model: nn.Module) -> int:
    """How large a model's weights are."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
