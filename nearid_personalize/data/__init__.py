"""Rows of views and near-identity distractors: where they come from (`sources`, `tables`), what they are (`rows`),
how they are varied (`augment`) and made into tensors (`items`)."""

from .augment import OFF, Augmentation, augment
from .items import IdentityDataset, JoinedItems
from .rows import Row, Rows, RowStream, check_disjoint, hash_split
from .sources import load_rows, split_repeats, stream_rows

__all__ = [
    "OFF",
    "Augmentation",
    "IdentityDataset",
    "JoinedItems",
    "Row",
    "RowStream",
    "Rows",
    "augment",
    "check_disjoint",
    "hash_split",
    "load_rows",
    "split_repeats",
    "stream_rows",
]
