"""Frozen-trunk tokens on disk: the trunk runs once over every picture, and training reads what it said.

A cache is a folder for each variant (an augmented version of every picture) of each data set, with a shard for each
block of rows, written whole or not at all. So writing goes on where it was killed, several processes write side by
side, and another run reuses the variants and data sets that it shares. A folder's name is a digest of trunk, its
precision, preprocessing and rows: when any of them changes, another folder is meant, and no outdated cache is read.

Shape letters: N rows (identities), K variants, V views, m pictures, T tokens, D width.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.files import write_atomically

from .items import IdentityDataset
from .shards import ShardFile, Span, TokenRows, open_shard, write_shard

Items = Dataset[dict[str, Tensor]]
"""Items: `views`, `distractors` float [V,3,H,W] in [0, 1]; `view_mask`, `distractor_mask` bool [V]."""

PixelTransform = Callable[[Tensor, int], Tensor]
"""Pictures float [m,3,H,W] in [0, 1] and a seed -> such pictures: an augmentation that needs a model."""

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the trunk's arithmetic; its weights stay in float32, since they are exported with the head."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ROWS_PER_BATCH = 16
"""Rows that are decoded and collated at a time: 96 pictures with three views."""

PICTURES_PER_PASS = 96
"""Pictures that pass through the trunk at a time."""

ROWS_PER_SHARD = 256

MAX_WORKERS = 8

_ABANDONED_AFTER = 3600
"""Seconds without a write after which a half-written shard is taken for one of a run that was killed."""


class TokenSource(Protocol):
    """Where the head's training gets its tokens: a cache, or the trunk itself."""

    @property
    def view_mask(self) -> Tensor:
        """Bool [N,V]: which views there are."""

    def __len__(self) -> int: ...

    def read(self, rows: Tensor, variant: int) -> tuple[Tensor, Tensor]:
        """Rows int64 [B] -> tokens [m,T,D] of their valid pictures, in order, and bool [B,2,V]: which are valid.

        [:,0] are views, [:,1] the distractors on those views' contexts. `variant` counts up without end.
        """

    def anchor_weights(self, rows: Tensor, variant: int) -> Tensor:
        """Rows int64 [B] -> float [B,V]: how likely each view is to be the anchor; 0 where there is none."""


@runtime_checkable
class DrawsAnchors(Protocol):
    """Items whose views are not equally likely to be the anchor, see `IdentityDataset.anchor_weights`."""

    def anchor_weights(self, index: int) -> Tensor:
        """Float [V]."""


@dataclass(frozen=True)
class TokenCache:
    """Tokens of every valid picture of N rows, in K variants that are taken in turn.

    shards: per variant, float16 [m,T,D] each, in memory or on disk. slots: int64 [K,N,2,V], the picture in each slot,
    counted through the variant's shards; -1 where it is padding. weights: float [K,N,V], see `anchor_weights`; None:
    every view weighs the same.
    """

    shards: tuple[tuple[Tensor | ShardFile, ...], ...]
    slots: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.slots.shape[1]

    @property
    def view_mask(self) -> Tensor:
        """Bool [N,V]."""
        return self.slots[0, :, 0] >= 0

    def read(self, rows: Tensor, variant: int = 0) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        variant %= len(self.shards)
        shards, slots = self.shards[variant], self.slots[variant, rows]
        pictures = slots[slots >= 0]
        # Page-locked where there is a GPU: the copy to it then runs beside the arithmetic.
        pinned = torch.cuda.is_available()
        tokens = torch.empty(len(pictures), *shards[0].shape[1:], dtype=torch.float16, pin_memory=pinned)
        for place, spans in _spans(pictures, [len(shard) for shard in shards]).items():
            shard = shards[place]
            if isinstance(shard, ShardFile):
                shard.read_into(tokens, spans)
                continue
            for span in spans:
                tokens[span.target : span.target + span.count] = shard[span.start : span.start + span.count]
        return tokens, slots >= 0

    def anchor_weights(self, rows: Tensor, variant: int = 0) -> Tensor:
        """See `TokenSource`."""
        if self.weights is None:
            return self.view_mask[rows].float()
        return self.weights[variant % len(self.weights), rows]


def _spans(pictures: Tensor, lengths: Sequence[int]) -> dict[int, list[Span]]:
    """Pictures int64 [m], counted through shards of some lengths -> by shard, what follows each other in it."""
    ends = torch.tensor(lengths).cumsum(0)
    places = torch.searchsorted(ends, pictures, right=True)
    starts = pictures - (ends - torch.tensor(lengths))[places]
    begins = torch.ones(len(pictures), dtype=torch.bool)
    begins[1:] = (starts.diff() != 1) | (places.diff() != 0)
    targets = begins.nonzero()[:, 0].tolist()
    spans: dict[int, list[Span]] = {}
    for target, end in zip(targets, [*targets[1:], len(pictures)], strict=True):
        span = Span(start=int(starts[target]), count=end - target, target=target)
        spans.setdefault(int(places[target]), []).append(span)
    return spans


class ReadAhead:
    """A token cache whose next batch is read in a thread while this one trains."""

    def __init__(self, source: TokenCache) -> None:
        self.source, self.view_mask = source, source.view_mask
        self._pool = ThreadPoolExecutor(1)
        self._expected: dict[tuple[int, ...], Future[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, rows: Tensor, variant: int) -> None:
        """Begin to read what `read` will be asked for after what it is asked for now."""
        self._expected[_batch_key(rows, variant)] = self._pool.submit(self.source.read, rows, variant)

    def read(self, rows: Tensor, variant: int) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        expected = self._expected.pop(_batch_key(rows, variant), None)
        return self.source.read(rows, variant) if expected is None else expected.result()

    def anchor_weights(self, rows: Tensor, variant: int) -> Tensor:
        """See `TokenSource`."""
        return self.source.anchor_weights(rows, variant)


def _batch_key(rows: Tensor, variant: int) -> tuple[int, ...]:
    return (variant, *rows.tolist())


@dataclass(frozen=True, eq=False)
class LiveTokens:
    """The trunk run anew for every batch: no disk, fresh augmentation each epoch, and many times slower."""

    model: NearIDModel
    variants: Callable[[int], Items]
    """Variant number -> the rows in it."""
    view_mask: Tensor
    preprocessing: Preprocessing
    transform: PixelTransform | None = None
    threads: int | None = None
    """Threads that decode pictures; None: one for each core, at most 8."""
    precision: Precision = "fp32"

    def __len__(self) -> int:
        return len(self.view_mask)

    def read(self, rows: Tensor, variant: int = 0) -> tuple[Tensor, Tensor]:
        """See `TokenSource`. Rows are decoded, and pass through the trunk, a few at a time."""
        dataset, tokens, valid = self.variants(variant), [], []
        trunk = Trunk(self.model, self.preprocessing, self.transform, self.precision)
        batches = [batch.tolist() for batch in rows.split(ROWS_PER_BATCH)]
        for batch, items in zip(batches, _decoded(dataset, batches, self.threads), strict=True):
            seed = batch[0] + len(self) * variant
            new = trunk.tokens_of(items, seed)
            tokens.append(new[0])
            valid.append(new[1])
        return torch.cat(tokens), torch.cat(valid)

    def anchor_weights(self, rows: Tensor, variant: int = 0) -> Tensor:
        """See `TokenSource`."""
        return _anchor_weights(self.variants(variant), rows.tolist(), self.view_mask[rows])


def _anchor_weights(dataset: Items, rows: Sequence[int], view_mask: Tensor) -> Tensor:
    """Float [B,V] of some rows, whose views bool [B,V] weigh the same unless the data set says otherwise."""
    if not isinstance(dataset, DrawsAnchors):
        return view_mask.float()
    return torch.stack([dataset.anchor_weights(row) for row in rows])


@dataclass(frozen=True, eq=False)
class Trunk:
    """A model's frozen trunk, and how pictures are prepared for it."""

    model: NearIDModel
    preprocessing: Preprocessing
    transform: PixelTransform | None = None
    precision: Precision = "fp32"

    @torch.no_grad()
    def tokens_of(self, items: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Collated items -> tokens [m,T,D] of their valid pictures, and bool [B,2,V]; `seed` is the transform's."""
        pictures = torch.stack([items["views"], items["distractors"]], dim=1)  # [B,2,V,3,H,W]
        valid = torch.stack([items["view_mask"], items["distractor_mask"]], dim=1).bool()  # [B,2,V]
        tokens = []
        for number, part in enumerate(pictures[valid].split(PICTURES_PER_PASS)):
            part = part.to(self.model.device)
            if self.transform:
                part = self.transform(part, seed + number * 1_000_003)
            tokens.append(self._pass(part))
        return torch.cat(tokens), valid

    def _pass(self, pictures: Tensor) -> Tensor:
        kind, half = self.model.device.type, self.precision != "fp32"
        # Switched off for fp32: training in mixed precision may be what asks for these tokens.
        with torch.autocast(kind, dtype=_DTYPES[self.precision] if half else None, enabled=half):
            tokens = self.model.tokens(self.preprocessing(pictures))
        return tokens.half() if half else tokens

    @torch.no_grad()
    def picture_shape(self) -> tuple[int, int]:
        """(T, D) of one picture's tokens."""
        size = self.preprocessing.size
        tokens = self._pass(torch.zeros(1, 3, size, size, device=self.model.device))
        return tokens.shape[1], tokens.shape[2]


def _decoded(dataset: Items, batches: Sequence[Sequence[int]], threads: int | None) -> Iterator[dict[str, Tensor]]:
    """Collated items, batch after batch; threads decode the next two batches meanwhile. 0 threads: none do.

    Threads rather than processes: decoding and resizing let go of Python's lock, nothing has to be pickled or pass
    through shared memory (64 MB in a container), and none of them is forked beside a GPU.
    """
    threads = default_workers() if threads is None else threads
    if threads == 0:
        for batch in batches:
            yield torch.utils.data.default_collate([dataset[index] for index in batch])
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[list[Future[dict[str, Tensor]]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(dataset.__getitem__, index) for index in batch])
            if len(waiting) > 2:
                yield torch.utils.data.default_collate([item.result() for item in waiting.popleft()])
        while waiting:
            yield torch.utils.data.default_collate([item.result() for item in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers(processes: int = 1) -> int:
    """Threads that decode, in each of some processes on this machine: one for each core, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // processes))


# --- planning and writing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheKey:
    """What one folder of shards holds. Two folders of one digest are interchangeable."""

    trunk: str
    """Fingerprint of the trunk's weights."""
    preprocessing: Preprocessing
    rows: str
    """Fingerprint of the rows: which pictures, how varied."""
    precision: Precision = "fp32"
    """Of the trunk's arithmetic."""
    rows_per_shard: int = ROWS_PER_SHARD

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class CachePart:
    """One variant of one data set."""

    key: CacheKey
    rows: Items
    variant: int = 0


@dataclass(frozen=True, eq=False)
class _Shard:
    """A block of rows of a part, and where its tokens are or will be."""

    part: CachePart
    start: int
    stop: int
    path: Path


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Which shards a cache has and lacks, and what they take on disk: the one estimate there is."""

    folder: Path
    parts: tuple[CachePart, ...]
    shards: tuple[_Shard, ...]
    missing: tuple[_Shard, ...]
    picture_shape: tuple[int, int]
    """(T, D) of one picture's tokens."""
    total_bytes: int
    """Of the whole cache."""
    missing_bytes: int
    """Of what is to be written."""

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is missing."""
        return not self.missing or self.missing_bytes <= free_bytes(self.folder)

    def __str__(self) -> str:
        return (
            f"{self.total_bytes / 1e9:.2f} GB in {self.folder}, {len(self.shards) - len(self.missing)} of "
            f"{len(self.shards)} shards are there, {self.missing_bytes / 1e9:.2f} GB to write, "
            f"{free_bytes(self.folder) / 1e9:.2f} GB free"
        )


def plan_cache(folder: Path, trunk: Trunk, parts: Sequence[CachePart]) -> CachePlan:
    """What a cache under `folder` takes and lacks; writes nothing.

    parts: every variant of a data set, then every variant of the next, as many of each.
    """
    picture_shape = trunk.picture_shape()
    picture_bytes = math.prod(picture_shape) * 2
    shards, missing, total_bytes, missing_bytes = [], [], 0, 0
    for part in parts:
        count, home = _length(part.rows), folder / part.key.digest
        row_bytes = _pictures_per_row(part.rows) * picture_bytes if count else 0
        for start in range(0, count, part.key.rows_per_shard):
            stop = min(start + part.key.rows_per_shard, count)
            shard = _Shard(part, start, stop, home / f"rows-{start:08d}.safetensors")
            shards.append(shard)
            total_bytes += math.ceil((stop - start) * row_bytes)
            if not shard.path.is_file():
                missing.append(shard)
                missing_bytes += math.ceil((stop - start) * row_bytes)
    return CachePlan(
        folder=folder,
        parts=tuple(parts),
        shards=tuple(shards),
        missing=tuple(missing),
        picture_shape=picture_shape,
        total_bytes=total_bytes,
        missing_bytes=missing_bytes,
    )


def _pictures_per_row(rows: Items, sample: int = 1024) -> float:
    """Valid pictures per row: the mean over rows spread evenly over the data; over all of them when they are few."""
    if not isinstance(rows, IdentityDataset):
        return 2 * len(rows[0]["views"])
    count = min(sample, len(rows))
    return sum(rows.num_pictures(number * len(rows) // count) for number in range(count)) / count


def cache_in_memory(
    model: NearIDModel,
    rows: Items,
    preprocessing: Preprocessing,
    rows_per_batch: int = ROWS_PER_BATCH,
    num_workers: int | None = None,
    precision: Precision = "fp32",
) -> TokenCache:
    """One variant of `rows` as tokens in RAM: 2 bytes per value, so 24,000 pictures of 64 x 192 take 0.6 GB."""
    if _length(rows) == 0:
        raise InputError("the data set has no rows")
    trunk, count = Trunk(model, preprocessing, precision=precision), _length(rows)
    batches = [range(start, min(start + rows_per_batch, count)) for start in range(0, count, rows_per_batch)]
    tokens, slots, weights, used = [], [], [], 0
    with tqdm(total=count, desc="trunk tokens", unit="row", leave=False) as progress:
        for batch, items in zip(batches, _decoded(rows, batches, num_workers), strict=True):
            new, valid = trunk.tokens_of(items)
            tokens.append(new.half().cpu())
            slots.append(torch.full(valid.shape, -1).masked_scatter(valid, torch.arange(used, used + len(new))))
            weights.append(_anchor_weights(rows, batch, valid[:, 0]))
            used += len(new)
            progress.update(len(batch))
    return TokenCache(((torch.cat(tokens),),), torch.cat(slots)[None], torch.cat(weights)[None])


def cache_on_disk(
    plan: CachePlan,
    trunk: Trunk,
    num_workers: int | None = None,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> TokenCache:
    """Write what is missing of a planned cache, then open all of it.

    Args:
        plan: made by every process before any of them is here.
        num_workers: threads that decode pictures; None: one for each core, at most 8.
        process: (index, count): each process writes every count-th shard.
        wait: blocks until every process is here.

    Raises InputError when the disk is too small.
    """
    try:
        if plan.missing and process[0] == 0:
            _prepare(plan)
        wait()
        _write_shards(plan.missing[process[0] :: process[1]], trunk, num_workers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{plan.folder}: the disk is full; {_MORE_ROOM}") from None
    wait()
    return _open_shards(plan)


def _prepare(plan: CachePlan) -> None:
    """Check the disk and make the cache's folders; each says what it holds."""
    _remove_abandoned(plan)
    _check_space(plan)
    for part in plan.parts:
        home = plan.folder / part.key.digest
        home.mkdir(parents=True, exist_ok=True)
        write_atomically(home / "key.json", json.dumps(asdict(part.key), indent=2) + "\n")


_MORE_ROOM = "give --token-folder on another disk, fewer --variants, or --tokens live"


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds `folder` (or will hold it)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_space(plan: CachePlan) -> None:
    print(f"token cache {plan}", flush=True)
    if not plan.fits:
        raise InputError(
            f"{plan.folder}: the tokens need {plan.missing_bytes / 1e9:.1f} GB and "
            f"{free_bytes(plan.folder) / 1e9:.1f} GB are free; {_MORE_ROOM}"
        )


def _remove_abandoned(plan: CachePlan) -> None:
    """Delete what runs that were killed left half written; another run may be writing here at this moment."""
    for part in plan.parts:
        for path in (plan.folder / part.key.digest).glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                path.unlink(missing_ok=True)


def _write_shards(shards: Sequence[_Shard], trunk: Trunk, num_workers: int | None) -> None:
    for number, shard in enumerate(shards, start=1):
        with tqdm(
            total=shard.stop - shard.start, desc=f"tokens {number}/{len(shards)}", unit="row", leave=False
        ) as bar:
            write_shard(shard.path, shard.stop - shard.start, _token_rows(shard, trunk, num_workers, bar))


def _token_rows(shard: _Shard, trunk: Trunk, num_workers: int | None, progress: Any) -> Iterator[TokenRows]:
    """The tokens of a shard's rows, a batch at a time."""
    rows, starts = shard.part.rows, range(shard.start, shard.stop, ROWS_PER_BATCH)
    batches = [range(start, min(start + ROWS_PER_BATCH, shard.stop)) for start in starts]
    for batch, items in zip(batches, _decoded(rows, batches, num_workers), strict=True):
        tokens, valid = trunk.tokens_of(items, batch.start + shard.part.variant * _length(rows))
        yield TokenRows(tokens, valid, _anchor_weights(rows, batch, valid[:, 0]))
        progress.update(len(batch))


def _open_shards(plan: CachePlan) -> TokenCache:
    """The whole cache: per variant, the shards of all data sets one after another."""
    variants = sorted({part.variant for part in plan.parts})
    shards, slots, weights = [], [], []
    for variant in variants:
        found = [open_shard(shard.path) for shard in plan.shards if shard.part.variant == variant]
        start, moved = 0, []
        for shard in found:
            moved.append(torch.where(shard.slots >= 0, shard.slots + start, -1))
            start += len(shard)
        shards.append(tuple(found))
        slots.append(torch.cat(moved))
        weights.append(torch.cat([shard.anchor_weights for shard in found]))
    return TokenCache(tuple(shards), torch.stack(slots), torch.stack(weights))


def _length(rows: Any) -> int:
    return len(rows)
