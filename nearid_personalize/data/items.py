"""Rows -> the tensors that training and measuring take."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from nearid_personalize.errors import InputError
from nearid_personalize.images import preprocess

from .augment import OFF, Augmentation, augment
from .rows import Row, Rows, RowStream, Slots

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class IdentityDataset(Dataset[dict[str, Tensor]]):
    """Each item holds `views` and `distractors`, float `[V,3,size,size]` in [0, 1], and `view_mask` and
    `distractor_mask`, bool `[V]`: False (and zeros) where there is none. Distractor k lies on view k's background.

    An item is a pure function of (seed, variant, the row): not of its position, its neighbours or the worker.
    `dataclasses.replace(dataset, variant=k)` is the k-th variant of every row, for an epoch or for a cache. A stream
    gives the items that its rows would give when loaded; it can be iterated, by one process, and not indexed.

    Raises:
        InputError: no rows, a source that they do not have, sizes below 1.
    """

    rows: Rows | RowStream
    size: int
    """Side of the pictures, pixels; other shapes are squashed."""
    num_slots: int = 3
    """V. A row with more views shows V of them, drawn anew in each variant."""
    seed: int = 0
    variant: int = 0
    sources: tuple[str, ...] | None = None
    """Distractors are drawn from these; None: from all. A row's distractors come from one source, drawn evenly anew in
    each variant; slots that it lacks are filled from the others."""
    augmentation: Augmentation = OFF

    def __post_init__(self) -> None:
        for name in ("size", "num_slots"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if isinstance(self.rows, Rows) and not self.rows:
            raise InputError(f"{self.rows.name}: no rows")
        unknown = set(self.sources or ()) - set(self.rows.sources)
        if unknown:
            known = ", ".join(self.rows.sources) or "none"
            raise InputError(f"{self.rows.name}: no distractors called {min(unknown)!r}; there are: {known}")

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what the items are: rows and every choice of theirs."""
        assert isinstance(self.rows, Rows), "what a stream holds is known only once it has passed"
        choices = (self.size, self.num_slots, self.seed, self.variant, self.sources, self.augmentation)
        return hashlib.sha256(f"{self.rows.fingerprint} {choices}".encode()).hexdigest()

    @property
    def view_mask(self) -> Tensor:
        """Bool `[N,V]`: which views of each row there are in this variant; no picture is decoded."""
        mask = torch.zeros(len(self), self.num_slots, dtype=torch.bool)
        for index, row in enumerate(self.rows):
            rng = random.Random(f"{self.seed}/{self.variant}/{row.id}")
            slots = _drawn_slots(row.views, self.num_slots, rng)
            mask[index, : len(slots)] = torch.tensor([_present(row.views, slot) for slot in slots])
        return mask

    def __len__(self) -> int:
        assert isinstance(self.rows, Rows), "a stream has no length"
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert isinstance(self.rows, Rows), "a stream can only be iterated"
        return self.item(self.rows[index])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.item, self.rows)

    def item(self, row: Row) -> dict[str, Tensor]:
        """The item of one row."""
        rng = random.Random(f"{self.seed}/{self.variant}/{row.id}")
        slots = _drawn_slots(row.views, self.num_slots, rng)
        sources = _shuffled(sorted(row.distractors if self.sources is None else self.sources), rng)
        pictures = torch.zeros(2, self.num_slots, 3, self.size, self.size)
        valid = torch.zeros(2, self.num_slots, dtype=torch.bool)
        for place, slot in enumerate(slots):
            found = [self._view(row, slot), self._distractor(row, sources, slot)]
            for kind, picture in enumerate(found):
                if picture is not None:
                    pictures[kind, place], valid[kind, place] = picture, True
        return {
            "views": pictures[0],
            "distractors": pictures[1],
            "view_mask": valid[0],
            "distractor_mask": valid[1],
        }

    def _view(self, row: Row, slot: int) -> Tensor | None:
        blackout = self.augmentation.view_blackout
        return self._variant(row.view(slot), partial(row.mask, slot), blackout, f"{row.id}/view/{slot}")

    def _distractor(self, row: Row, sources: Sequence[str], slot: int) -> Tensor | None:
        source = next((name for name in sources if _present(row.distractors.get(name, ()), slot)), None)
        if source is None:
            return None
        image, mask = row.distractor(source, slot), partial(row.distractor_mask, source, slot)
        return self._variant(image, mask, self.augmentation.distractor_blackout, f"{row.id}/{source}/{slot}")

    def _variant(
        self, image: Image.Image | None, read_mask: Callable[[], Tensor | None], blackout: float, name: str
    ) -> Tensor | None:
        """Float `[3,size,size]`; `name` tells this picture's draws from all others'."""
        if image is None:
            return None
        pixels = preprocess([image], self.size, mean=(0, 0, 0), std=(1, 1, 1))[0]
        rng = random.Random(f"{self.seed}/{self.variant}/{name}")
        mask = read_mask() if rng.random() < blackout else None
        if mask is not None:
            mask = interpolate(mask[None, None].byte(), size=pixels.shape[1:], mode="nearest-exact")[0, 0] > 0
        return augment(pixels, mask, self.augmentation, rng)


def _present(slots: Slots, slot: int) -> bool:
    return slot < len(slots) and slots[slot] is not None


def _drawn_slots(views: Slots, count: int, rng: random.Random) -> list[int]:
    """Which slots of a row are shown: all, or `count` of those that are present, in order."""
    if len(views) <= count:
        return list(range(len(views)))
    return sorted(_shuffled([slot for slot in range(len(views)) if _present(views, slot)], rng)[:count])


def _shuffled(values: Iterable[T], rng: random.Random) -> list[T]:
    """`values` in random order, by `Random.random` alone, whose stream Python guarantees."""
    return sorted(values, key=lambda _: rng.random())
