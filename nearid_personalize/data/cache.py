"""Frozen-trunk tokens on disk: the trunk runs once over every picture, and training reads what it said.

A cache is a folder of safetensors shards, one per block of rows and variant (an augmented version of every picture),
each written whole or not at all. So writing goes on where it was killed, several processes write side by side, and
reading maps the files into memory. The folder's name is a digest of trunk, preprocessing and data: when any of them
changes, another folder is meant, and an outdated cache can never be read.

Shape letters: N rows (identities), K variants, V views, m pictures, T tokens, D width.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from nearid_personalize.encoder import NearIDModel
from nearid_personalize.errors import InputError
from nearid_personalize.images import write_atomically
from nearid_personalize.preprocessing import Preprocessing

Items = Dataset[dict[str, Tensor]]
"""Items: `views`, `distractors` float [V,3,H,W] in [0, 1]; `view_mask`, `distractor_mask` bool [V]."""

PixelTransform = Callable[[Tensor, int], Tensor]
"""Pictures float [m,3,H,W] in [0, 1] and a seed -> such pictures: an augmentation that needs a model."""


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


@dataclass(frozen=True)
class TokenCache:
    """Tokens of every valid picture of N rows, in K variants that are taken in turn.

    shards: per variant, float16 [m,T,D] each, memory-mapped when on disk. slots: int64 [K,N,2,V], the picture in each
    slot, counted through the variant's shards; -1 where it is padding.
    """

    shards: tuple[tuple[Tensor, ...], ...]
    slots: Tensor

    def __len__(self) -> int:
        return self.slots.shape[1]

    @property
    def view_mask(self) -> Tensor:
        """Bool [N,V]."""
        return self.slots[0, :, 0] >= 0

    def read(self, rows: Tensor, variant: int = 0) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        variant %= len(self.shards)
        slots = self.slots[variant, rows]
        pictures = slots[slots >= 0]
        shards = self.shards[variant]
        ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
        places = torch.searchsorted(ends, pictures, right=True)
        tokens = torch.empty(len(pictures), *shards[0].shape[1:], dtype=shards[0].dtype)
        for place in places.unique().tolist():
            here = places == place
            tokens[here] = shards[place][pictures[here] - (ends[place] - len(shards[place]))]
        return tokens, slots >= 0


@dataclass(frozen=True, eq=False)
class LiveTokens:
    """The trunk run anew for every batch: no disk, fresh augmentation each epoch, and many times slower."""

    model: NearIDModel
    variants: Callable[[int], Items]
    """Variant number -> the rows in it."""
    view_mask: Tensor
    preprocessing: Preprocessing
    transform: PixelTransform | None = None
    threads: int = 4
    """Threads that decode pictures."""

    def __len__(self) -> int:
        return len(self.view_mask)

    @torch.no_grad()
    def read(self, rows: Tensor, variant: int = 0) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        dataset = self.variants(variant)
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            batch = torch.utils.data.default_collate(list(pool.map(dataset.__getitem__, rows.tolist())))
        seed = int(rows[0]) + len(self) * variant
        return tokens_of(self.model, batch, self.preprocessing, self.transform, seed)


def tokens_of(
    model: NearIDModel,
    batch: dict[str, Tensor],
    preprocessing: Preprocessing,
    transform: PixelTransform | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A collated batch of rows -> trunk tokens [m,T,D] of its valid pictures, and bool [B,2,V]."""
    pictures = torch.stack([batch["views"], batch["distractors"]], dim=1)  # [B,2,V,3,H,W]
    valid = torch.stack([batch["view_mask"], batch["distractor_mask"]], dim=1).bool()  # [B,2,V]
    chosen = pictures[valid].to(model.device)
    if transform:
        chosen = transform(chosen, seed)
    return model.tokens(preprocessing(chosen)), valid


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheKey:
    """What a cache holds. Two caches with one digest are interchangeable."""

    trunk: str
    """Fingerprint of the trunk's weights."""
    preprocessing: Preprocessing
    variants: tuple[str, ...]
    """Per variant, the fingerprint of its rows: which pictures, how augmented."""
    rows_per_shard: int

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def cache_in_memory(
    model: NearIDModel,
    rows: Items,
    preprocessing: Preprocessing,
    rows_per_batch: int = 16,
    num_workers: int = 0,
) -> TokenCache:
    """One variant of `rows` as tokens in RAM: 2 bytes per value, so 24,000 pictures of 64 x 192 take 0.6 GB."""
    tokens, slots = _run_trunk(model, rows, preprocessing, None, 0, rows_per_batch, num_workers, "trunk tokens")
    return TokenCache(((tokens,),), slots[None])


def cache_on_disk(
    folder: Path,
    key: CacheKey,
    model: NearIDModel,
    variants: Sequence[Items],
    preprocessing: Preprocessing,
    transform: PixelTransform | None = None,
    rows_per_batch: int = 16,
    num_workers: int = 0,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> TokenCache:
    """Write what is missing of the cache `folder/<digest>`, then map all of it.

    Args:
        process: (index, count): each process writes every count-th shard.
        wait: blocks until every process is here.

    Raises InputError when the disk is too small.
    """
    home = folder / key.digest
    home.mkdir(parents=True, exist_ok=True)
    jobs = [
        (variant, start, home / f"variant-{variant:02d}-rows-{start:08d}.safetensors")
        for variant, rows in enumerate(variants)
        for start in range(0, _length(rows), key.rows_per_shard)
    ]
    missing = [job for job in jobs if not job[2].is_file()]
    if missing and process[0] == 0:
        write_atomically(home / "key.json", json.dumps(asdict(key), indent=2) + "\n")
        needed = bytes_needed(model, variants[0], preprocessing, len(missing) * key.rows_per_shard)
        _check_space(home, needed, f"{len(jobs) - len(missing)} of {len(jobs)} shards are there")
    wait()
    for number, (variant, start, path) in enumerate(missing):
        if number % process[1] != process[0]:
            continue
        block = Subset(variants[variant], range(start, min(start + key.rows_per_shard, _length(variants[variant]))))
        seed = start + variant * _length(variants[variant])
        label = f"tokens {number + 1}/{len(missing)}"
        tokens, slots = _run_trunk(model, block, preprocessing, transform, seed, rows_per_batch, num_workers, label)
        write_atomically(path, save({"tokens": tokens, "slots": slots}))
    wait()
    return _map_shards([[path for v, _, path in jobs if v == variant] for variant in range(len(variants))])


def bytes_needed(model: NearIDModel, rows: Items, preprocessing: Preprocessing, num_rows: int) -> int:
    """Upper bound, in bytes, of the tokens of `num_rows` rows of one variant: as if no slot were padding."""
    item = rows[0]
    blank = torch.zeros(1, 3, preprocessing.size, preprocessing.size, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        per_picture = model.tokens(blank)[0].numel() * 2
    return num_rows * 2 * len(item["views"]) * per_picture


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds `folder` (or will hold it)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_space(home: Path, needed: int, state: str) -> None:
    free = free_bytes(home)
    print(f"token cache {home}: {state}, at most {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free", flush=True)
    if needed > free:
        raise InputError(
            f"{home}: the tokens need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "give --token-folder on another disk, fewer --variants, or --tokens live"
        )


@torch.no_grad()
def _run_trunk(
    model: NearIDModel,
    rows: Items,
    preprocessing: Preprocessing,
    transform: PixelTransform | None,
    seed: int,
    rows_per_batch: int,
    num_workers: int,
    label: str,
) -> tuple[Tensor, Tensor]:
    """Tokens float16 [m,T,D] of the rows' valid pictures and their slots int64 [N,2,V]; padding is never run."""
    tokens, slots, used = [], [], 0
    loader = DataLoader(rows, batch_size=rows_per_batch, num_workers=num_workers)
    with tqdm(total=_length(rows), desc=label, unit="row", leave=False) as progress:
        for number, batch in enumerate(loader):
            new, valid = tokens_of(model, batch, preprocessing, transform, seed + number * rows_per_batch)
            tokens.append(new.half().cpu())
            where = torch.full(valid.shape, -1)
            where[valid] = torch.arange(used, used + len(new))
            slots.append(where)
            used += len(new)
            progress.update(len(valid))
    if not tokens:
        raise InputError("the data set has no rows")
    return torch.cat(tokens), torch.cat(slots)


def _map_shards(paths: list[list[Path]]) -> TokenCache:
    shards, slots = [], []
    for of_variant in paths:
        loaded = [load_file(path) for path in of_variant]  # mapped, not read
        start, moved = 0, []
        for shard in loaded:
            moved.append(torch.where(shard["slots"] >= 0, shard["slots"] + start, -1))
            start += len(shard["tokens"])
        shards.append(tuple(shard["tokens"] for shard in loaded))
        slots.append(torch.cat(moved))
    return TokenCache(tuple(shards), torch.stack(slots))


def _length(rows: Any) -> int:
    return len(rows)
