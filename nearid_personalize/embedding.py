"""Embeddings of many pictures: every distinct picture passes the trunk once, and its tokens are pooled in several ways.

Shape letters: n pictures as they are listed, m distinct pictures, T tokens, D width, S pixels of the model's side.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.images import to_square

Reader: TypeAlias = Callable[[], Image.Image | None]
"""Decodes one picture; None: there is no picture in this place."""
Pool: TypeAlias = Callable[[Tensor], Tensor]
"""Tokens [m,T,D] -> embeddings [m,D] of unit length."""

BATCH_SIZE = 64
DECODING_THREADS = 4


@dataclass(frozen=True, eq=False)
class Embedded:
    """What `embed_distinct` found."""

    slots: Tensor
    """int64 [n]: the row of each listed picture in `embeddings`; -1 where there was none."""
    embeddings: Mapping[str, Tensor]
    """By pool: float32 [m,D] on the CPU, unit length."""


@torch.no_grad()
def embed_distinct(
    model: NearIDModel,
    preprocessing: Preprocessing,
    pools: Mapping[str, Pool],
    readers: Iterable[Reader],
    total: int | None = None,
    batch_size: int = BATCH_SIZE,
    show: bool = False,
) -> Embedded:
    """Embed pictures; those that are the same to the last pixel once shrunk to what the model sees are run once.

    Pictures are read as they are needed and not kept: three batches of them at most are held.

    Args:
        pools: by name, the ways in which the trunk's tokens become embeddings; the trunk runs once for all of them.
        total: how many readers there are, for the progress bar.

    Raises:
        InputError: a picture cannot be read.
    """
    seen: dict[bytes, int] = {}
    slots: list[int] = []
    embeddings: dict[str, list[Tensor]] = {name: [] for name in pools}
    decode = partial(_decode, preprocessing)
    with (
        ThreadPoolExecutor(DECODING_THREADS) as threads,
        tqdm(total=total, desc="embed", unit="picture", disable=not show, leave=False) as progress,
    ):
        pictures = _ahead(threads, decode, readers, 2 * batch_size)
        while batch := list(islice(pictures, batch_size)):
            fresh: list[Tensor] = []
            for pixels in batch:
                slots.append(_slot(pixels, seen, fresh))
            if fresh:
                tokens = model.tokens(preprocessing(torch.stack(fresh).to(model.device)))
                for name, pool in pools.items():
                    embeddings[name].append(pool(tokens).cpu())
            progress.update(len(batch))
    return Embedded(
        slots=torch.tensor(slots, dtype=torch.long),
        embeddings={name: torch.cat(parts) if parts else torch.zeros(0, 1) for name, parts in embeddings.items()},
    )


def _decode(preprocessing: Preprocessing, read: Reader) -> Tensor | None:
    """uint8 [3,S,S]: the picture as the model sees it."""
    image = read()
    return None if image is None else to_square(image, preprocessing.size, preprocessing.resample)


def _slot(pixels: Tensor | None, seen: dict[bytes, int], fresh: list[Tensor]) -> int:
    """The number of a picture among the distinct ones; one that was not seen before is added to `fresh`."""
    if pixels is None:
        return -1
    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()
    if digest not in seen:
        seen[digest] = len(seen)
        fresh.append(pixels)
    return seen[digest]


def _ahead(
    threads: ThreadPoolExecutor, work: Callable[[Reader], Tensor | None], readers: Iterable[Reader], count: int
) -> Iterator[Tensor | None]:
    """`work` done on every reader, in order, at most `count` of them ahead of what is asked for."""
    waiting: deque[Future[Tensor | None]] = deque()
    for reader in readers:
        waiting.append(threads.submit(work, reader))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
