"""What a gallery needs of a store. `lance` and `qdrant` are the two that there are.

A subject is one row, whose vector is such that its dot product with a query is the subject's score; where the score is
that of the nearest photo, it is a row for each photo, and the largest product counts.

Shape letters: N queries, R photos of a row, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from nearid_personalize.scorer.calibration import Aggregation

Value: TypeAlias = str | int | float | bool
Metadata: TypeAlias = Mapping[str, Value]
Where: TypeAlias = Any
"""A mapping from a metadata key to the value that it must have, or to a list of them; or the store's own filter: SQL
text for LanceDB, a `Filter` for Qdrant."""

RESERVED = frozenset({"key", "name", "revision", "photos", "embeddings", "vector", "metadata"})
"""What metadata may not be called: the store's own fields."""


@dataclass(frozen=True, eq=False)
class Row:
    """What is stored of a subject, or of one photo of it."""

    key: str
    """Unique in the store."""
    name: str
    revision: int
    """1 when it was first written, one more each time that it changed."""
    photos: tuple[str, ...]
    """Content hashes of its photos [R], in the order of `embeddings`."""
    embeddings: Tensor
    """float32 [R,D], unit rows."""
    vector: Tensor
    """float32 [D]: its dot product with a query is the score."""
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a gallery was made with."""

    aggregation: Aggregation
    fingerprint: Tensor
    """[P,D], see `encoder_fingerprint`."""


@dataclass(frozen=True)
class Hit:
    """A row that a query came near."""

    name: str
    score: float
    metadata: Metadata


class Store(Protocol):
    """Where the rows are. A row is written whole or not at all."""

    def facts(self) -> Facts | None:
        """What the gallery was made with; None: there is none yet."""

    def create(self, facts: Facts) -> None:
        """Make an empty gallery, unless another writer did so meanwhile."""

    def read(self, names: Sequence[str]) -> list[Row]:
        """All rows of these subjects."""

    def put(self, rows: Sequence[Row]) -> None:
        """Write each row whose key is new, or whose stored revision is one less than its own; skip the others."""

    def remove(self, name: str) -> None:
        """Remove all rows of a subject."""

    def rename(self, name: str, new_name: str) -> None:
        """Give a subject another name."""

    def rows(self, where: Where = None) -> Iterator[Row]:
        """Every row, by name; embeddings and vectors are empty."""

    def count(self, where: Where = None) -> int:
        """How many rows."""

    def nearest(self, queries: Tensor, limit: int, where: Where = None, exact: bool = False) -> list[list[Hit]]:
        """Queries [N,D] -> at most `limit` rows each, largest score first. exact: without an index."""

    def put_negatives(self, hashes: Sequence[str], embeddings: Tensor) -> None:
        """Keep pictures [N,D] that show no subject, those that are not there yet."""

    def negatives(self) -> Tensor:
        """Embeddings [n,D] of the pictures that show no subject."""

    def version(self) -> str:
        """Differs when rows have changed."""

    def tend(self) -> None:
        """Compact what many small writes left, and build or renew the index where it pays."""
