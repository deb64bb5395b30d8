"""When to stop a training that no longer improves."""

from collections.abc import Sequence


def out_of_patience(improved: Sequence[bool], patience: int) -> bool:
    """Whether none of the last `patience` measurements improved on those before; 0: never.

    improved: whether each measurement so far was better than all before it.
    """
    return 0 < patience <= len(improved) and not any(improved[-patience:])
