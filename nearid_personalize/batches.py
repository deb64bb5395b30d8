"""Batches that are made smaller when memory runs out."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Items = TypeVar("Items", bound=Sequence)
Result = TypeVar("Result")


def in_halves(
    work: Callable[[Items], Result], items: Items, on_halved: Callable[[int], None] | None = None
) -> list[Result]:
    """What `work` returns for all items at once, or for halves of them where memory runs out.

    on_halved: told the size of the larger half. An error on a lone item is raised, as is any other error.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        return [work(items)]
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if len(items) == 1 or not should_reduce_batch_size(error):
            raise
    # Outside the handler: the exception's traceback keeps the failed batch in memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(items) + 1) // 2
    if on_halved is not None:
        on_halved(half)
    return in_halves(work, items[:half], on_halved) + in_halves(work, items[half:], on_halved)  # type: ignore[arg-type]
