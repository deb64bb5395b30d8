"""Rows -> the tensors that training and measuring take."""

import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import ConcatDataset, Dataset

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
    """Distractors are drawn from these; None: from all, evenly and anew in each variant."""
    source_per: Literal["slot", "row"] = "slot"
    """Whether each slot's distractor comes from another source, as far as there are enough, or all of a row's from one;
    what a source lacks is taken from the next."""
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
        choices = (self.size, self.num_slots, self.seed, self.variant, self.sources, self.source_per, self.augmentation)
        return hashlib.sha256(f"{self.rows.fingerprint} {choices}".encode()).hexdigest()

    @property
    def view_mask(self) -> Tensor:
        """Bool `[N,V]`: which views of each row there are in this variant; no picture is decoded."""
        mask = torch.zeros(len(self), self.num_slots, dtype=torch.bool)
        for index, row in enumerate(self.rows):
            slots = self._drawn(row).slots
            mask[index, : len(slots)] = torch.tensor([_present(row.views, slot) for slot in slots])
        return mask

    def num_pictures(self, index: int) -> int:
        """How many views and distractors an item shows; no picture is decoded."""
        row = self._row(index)
        drawn = self._drawn(row)
        views = sum(_present(row.views, slot) for slot in drawn.slots)
        sources = (self._source(row, drawn, place) for place in range(len(drawn.slots)))
        return views + sum(source is not None for source in sources)

    def anchor_weights(self, index: int) -> Tensor:
        """Float `[V]`: how likely each view is to be the anchor; 0 where there is none. No picture is decoded.

        A view's weight is the probability that the backgrounds which are black in this variant are so when it is the
        anchor, see `Augmentation`; without blacked-out backgrounds, all weigh 1.
        """
        row, weights = self._row(index), torch.zeros(self.num_slots)
        drawn = self._drawn(row)
        chances = (self.augmentation.anchor_blackout, self.augmentation.positive_blackout)
        # For every view that could be black: how likely it is to be what it is, as the anchor and as a positive.
        likely = {}
        for slot in drawn.slots:
            if _present(row.views, slot) and _present(row.masks, slot) and chances[0] != chances[1]:
                black = self._view_draw(row, slot, drawn.anchor)[1]
                likely[slot] = [chance if black else 1 - chance for chance in chances]
        for place, slot in enumerate(drawn.slots):
            if _present(row.views, slot):
                weights[place] = math.prod(pair[slot != other] for other, pair in likely.items())
        return weights

    def __len__(self) -> int:
        assert isinstance(self.rows, Rows), "a stream has no length"
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.item(self._row(index))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.item, self.rows)

    def item(self, row: Row) -> dict[str, Tensor]:
        """The item of one row."""
        drawn = self._drawn(row)
        pictures = torch.zeros(2, self.num_slots, 3, self.size, self.size)
        valid = torch.zeros(2, self.num_slots, dtype=torch.bool)
        for place, slot in enumerate(drawn.slots):
            source = self._source(row, drawn, place)
            distractor = None if source is None else self._distractor(row, source, slot)
            found = [self._view(row, slot, drawn.anchor), distractor]
            for kind, picture in enumerate(found):
                if picture is not None:
                    pictures[kind, place], valid[kind, place] = picture, True
        return {
            "views": pictures[0],
            "distractors": pictures[1],
            "view_mask": valid[0],
            "distractor_mask": valid[1],
        }

    def _row(self, index: int) -> Row:
        assert isinstance(self.rows, Rows), "a stream can only be iterated"
        return self.rows[index]

    def _drawn(self, row: Row) -> "_Drawn":
        rng = self._rng(row.id)
        slots = _drawn_slots(row.views, self.num_slots, rng)
        sources = _shuffled(sorted(row.distractors if self.sources is None else self.sources), rng)
        anchors = _shuffled((slot for slot in slots if _present(row.views, slot)), self._rng(f"{row.id}/anchor"))
        return _Drawn(slots=slots, sources=sources, anchor=anchors[0] if anchors else None)

    def _source(self, row: Row, drawn: "_Drawn", place: int) -> str | None:
        """Where the distractor of the slot that is shown at `place` comes from; None: there is none."""
        sources = drawn.sources
        first = place % len(sources) if sources and self.source_per == "slot" else 0
        turned = (*sources[first:], *sources[:first])
        slot = drawn.slots[place]
        return next((name for name in turned if _present(row.distractors.get(name, ()), slot)), None)

    def _view_draw(self, row: Row, slot: int, anchor: int | None) -> tuple[random.Random, bool]:
        """A view's own generator, and whether its background is to be black."""
        rng, strength = self._rng(f"{row.id}/view/{slot}"), self.augmentation
        return rng, rng.random() < (strength.anchor_blackout if slot == anchor else strength.positive_blackout)

    def _view(self, row: Row, slot: int, anchor: int | None) -> Tensor | None:
        rng, black = self._view_draw(row, slot, anchor)
        return self._variant(row.view(slot), partial(row.mask, slot), black, rng)

    def _distractor(self, row: Row, source: str, slot: int) -> Tensor | None:
        rng = self._rng(f"{row.id}/{source}/{slot}")
        black = rng.random() < self.augmentation.distractor_blackout
        return self._variant(row.distractor(source, slot), partial(row.distractor_mask, source, slot), black, rng)

    def _variant(
        self, image: Image.Image | None, read_mask: Callable[[], Tensor | None], black: bool, rng: random.Random
    ) -> Tensor | None:
        """Float `[3,size,size]`."""
        if image is None:
            return None
        pixels = preprocess([image], self.size, mean=(0, 0, 0), std=(1, 1, 1))[0]
        mask = read_mask() if black else None
        if mask is not None:
            mask = interpolate(mask[None, None].byte(), size=pixels.shape[1:], mode="nearest-exact")[0, 0] > 0
        return augment(pixels, mask, self.augmentation, rng)

    def _rng(self, name: str) -> random.Random:
        """A generator of its own for each (seed, variant, name)."""
        return random.Random(f"{self.seed}/{self.variant}/{name}")


class JoinedItems(ConcatDataset[dict[str, Tensor]]):
    """The items of several data sets, one after another."""

    datasets: list[IdentityDataset]  # type: ignore[assignment]

    def anchor_weights(self, index: int) -> Tensor:
        """See `IdentityDataset.anchor_weights`."""
        which = bisect_right(self.cumulative_sizes, index)
        start = self.cumulative_sizes[which - 1] if which else 0
        return self.datasets[which].anchor_weights(index - start)


class _Drawn(NamedTuple):
    """What a variant draws of a row."""

    slots: list[int]
    """Which of its views, and distractors on their backgrounds, are shown."""
    sources: list[str]
    """In the order in which they are asked."""
    anchor: int | None
    """The slot whose background is blacked out as an anchor's; None: there is no view."""


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
