"""One shard of a token cache: a safetensors file, written as its tokens come and read at any place.

Writing holds one batch of tokens at a time, whatever the shard's size; `safetensors` itself would need all of them, and
a copy. Reading asks the file for the bytes of the pictures wanted: mapped into memory, each page would be fetched by a
fault of its own, which is slower for pictures from all over a large cache.

Shape letters: N rows (identities), V views, m pictures, T tokens, D width.
"""

import json
import math
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json

_HEADER_BYTES = 1024
"""Room for the file's header, which can be told only once the last picture has come."""

_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


class TokenRows(NamedTuple):
    """Tokens of some rows: [m,T,D] of their valid pictures in order, which are valid, and the views' anchor weights."""

    tokens: Tensor
    valid: Tensor
    """Bool [N,2,V]: [:,0] are views, [:,1] distractors."""
    anchor_weights: Tensor
    """Float [N,V]."""


@dataclass(frozen=True)
class Span:
    """Pictures that follow each other, both in a shard and where they are wanted."""

    start: int
    """First picture in the shard."""
    count: int
    target: int
    """Where the first one goes."""


@dataclass(frozen=True, eq=False)
class ShardFile:
    """A shard on disk: float16 tokens [m,T,D], read where they are asked for."""

    path: Path
    shape: tuple[int, int, int]
    """m, T, D."""
    offset: int = field(repr=False)
    """Of the first token in the file, bytes."""
    slots: Tensor = field(repr=False)
    """Int64 [N,2,V]: the picture in each slot; -1: none."""
    anchor_weights: Tensor = field(repr=False)
    """Float32 [N,V]."""

    def __len__(self) -> int:
        return self.shape[0]

    def read_into(self, tokens: Tensor, spans: Iterable[Span]) -> None:
        """Fill places of `tokens`, float16 [m,T,D], with pictures of this shard."""
        size = self.shape[1] * self.shape[2] * 2
        wanted = tokens.numpy().reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            for span in spans:
                file.seek(self.offset + span.start * size)
                _fill(file, wanted[span.target * size : (span.target + span.count) * size], self.path)


def _fill(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise InputError(f"{path}: ends too early; delete this file, and its tokens are computed again")
        buffer = buffer[count:]


def write_shard(path: Path, num_rows: int, batches: Iterable[TokenRows]) -> None:
    """Write the tokens of `num_rows` rows as they come, whole or not at all; padding is not stored."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(file, num_rows, batches)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, num_rows: int, batches: Iterable[TokenRows]) -> None:
    # Made for all rows at once: small pieces that stay, one for each batch, would keep the memory of every batch's
    # tokens from being used again.
    slots, weights = torch.empty(0), torch.empty(0)
    done, shape = 0, (0, 0, 0)
    for batch in batches:
        tokens = batch.tokens.detach().to("cpu", torch.float16).contiguous()
        if done == 0:
            num_slots = batch.valid.shape[-1]
            slots, weights = torch.full((num_rows, 2, num_slots), -1), torch.zeros(num_rows, num_slots)
            file.seek(_HEADER_BYTES + slots.nbytes + weights.nbytes)
        rows = slice(done, done + len(batch.valid))
        slots[rows][batch.valid] = torch.arange(shape[0], shape[0] + len(tokens))
        weights[rows] = batch.anchor_weights
        file.write(tokens.numpy().reshape(-1).view(np.uint8).data)
        done, shape = rows.stop, (shape[0] + len(tokens), *tokens.shape[1:])
    assert done == num_rows, "every row of a shard is in one of its batches"
    file.seek(0)
    file.write(
        _header(
            {
                "slots": (slots.dtype, slots.shape),
                "anchor_weights": (weights.dtype, weights.shape),
                "tokens": (torch.float16, shape),
            }
        )
    )
    for value in (slots, weights):
        file.write(value.numpy().tobytes())


def _header(tensors: dict[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """The head of a safetensors file that holds some tensors one after another, padded to its fixed length."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode().ljust(_HEADER_BYTES - 8)
    assert len(text) == _HEADER_BYTES - 8, "three tensors fit the header"
    return len(text).to_bytes(8, "little") + text


def open_shard(path: Path) -> ShardFile:
    """A shard that `write_shard` wrote; its tokens are not read yet.

    Raises InputError when the file is cut short or something else.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            entries = parse_json(file.read(min(length, 100 * _HEADER_BYTES)))
            tokens, start = entries["tokens"], 8 + length
            facts = [_small_tensor(file, entries[name], start) for name in ("slots", "anchor_weights")]
            whole = path.stat().st_size == start + tokens["data_offsets"][1]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            whole = False
    if not whole:
        raise InputError(f"{path}: no whole shard of tokens; delete this file, and its tokens are computed again")
    return ShardFile(
        path=path,
        shape=tuple(tokens["shape"]),
        offset=start + tokens["data_offsets"][0],
        slots=facts[0],
        anchor_weights=facts[1],
    )


def _small_tensor(file: BinaryIO, entry: dict, start: int) -> Tensor:
    first, end = entry["data_offsets"]
    file.seek(start + first)
    content = bytearray(file.read(end - first))
    return torch.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).view(entry["shape"])
