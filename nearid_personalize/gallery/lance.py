"""A gallery in LanceDB: files in a folder, or on object storage, for any number of readers and writers.

A write is one commit, seen whole or not at all. Writers of the same row do not see each other's; the key is declared to
Lance as a primary key, so that a row is not inserted twice, and a row changes only from the revision that was read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.gallery.store import RESERVED, Facts, Hit, Metadata, Row, Value, Where

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.table import Table

SUBJECTS, NEGATIVES = "subjects", "negatives"
"""The tables."""

_FACTS = b"nearid_gallery"  # the key of the facts in the schema's metadata
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}

SCANNED_FROM = 8
"""Queries asked at once from which on one pass over all vectors is cheaper than a search for each."""

BATCH_ROWS = 8192
"""Rows read at once."""

INDEXED_FROM = 50_000
"""Rows from which on there is an index; see docs/measured.md."""

COMPACTED_FROM = 100
"""Small files from which on they are made one."""

REFINED = 10
"""Candidates whose true scores are computed, as a multiple of those asked for."""


class LanceStore:
    """See `store.Store`."""

    def __init__(self, database: Any, subjects: "Table | None" = None, negatives: "Table | None" = None) -> None:
        self._database, self._subjects, self._negatives = database, subjects, negatives

    @classmethod
    def connect(cls, uri: str, create: bool) -> "LanceStore":
        """Open the gallery at a folder or URI.

        Raises InputError where lancedb is not installed, or there is no such folder (create: it cannot be made).
        """
        try:
            import lancedb
        except ImportError:
            raise InputError("gallery: LanceDB is not installed; pip install 'nearid-personalize[gallery]'") from None
        if "://" not in uri:
            if create:
                check_writable(Path(uri), "gallery")
            elif not Path(uri).is_dir():
                raise InputError(f"{uri}: no such folder; give that of a gallery")
        database = lancedb.connect(uri)
        names = {*database.list_tables().tables}
        if SUBJECTS not in names:
            return cls(database)
        return cls(database, database.open_table(SUBJECTS), database.open_table(NEGATIVES))

    # --- what the gallery was made with ------------------------------------------------------------------------------

    def facts(self) -> Facts | None:
        """See `Store`."""
        if self._subjects is None:
            return None
        stored = json.loads((self._subjects.schema.metadata or {})[_FACTS])
        return Facts(aggregation=stored["aggregation"], fingerprint=torch.tensor(stored["fingerprint"]))

    def create(self, facts: Facts) -> None:
        """See `Store`."""
        width = facts.fingerprint.shape[1]
        # The subjects' table last: where it is, the gallery is whole.
        self._negatives = self._table(NEGATIVES, negatives_schema(width))
        self._subjects = self._table(SUBJECTS, subjects_schema(width, facts))

    def _table(self, name: str, schema: "pa.Schema") -> "Table":
        try:
            return self._database.create_table(name, schema=schema)
        except ValueError:  # another writer was faster
            return self._database.open_table(name)

    # --- rows --------------------------------------------------------------------------------------------------------

    def read(self, names: Sequence[str]) -> list[Row]:
        """See `Store`."""
        found = self._latest().search().where(f"name IN ({', '.join(literal(name) for name in names)})").to_arrow()
        rows = []
        for values in found.to_pylist():
            photos = tuple(values["photos"])
            rows.append(
                Row(
                    key=values["key"],
                    name=values["name"],
                    revision=values["revision"],
                    photos=photos,
                    embeddings=torch.tensor(values["embeddings"]).view(len(photos), -1),
                    vector=torch.tensor(values["vector"]),
                    metadata=metadata_of(values),
                )
            )
        return rows

    def put(self, rows: Sequence[Row]) -> None:
        """See `Store`."""
        table = self._latest()
        self._add_columns(table, rows)
        merge = table.merge_insert("key").when_matched_update_all(where="target.revision = source.revision - 1")
        merge.when_not_matched_insert_all().execute(to_arrow(rows, table.schema))

    def remove(self, name: str) -> None:
        """See `Store`."""
        self._latest().delete(f"name = {literal(name)}")

    def rename(self, name: str, new_name: str) -> None:
        """See `Store`."""
        prefix = len(name) + 1
        key = f"concat({literal(new_name)}, substr(key, {prefix}))"  # what follows the name in a key stays
        self._latest().update(where=f"name = {literal(name)}", values_sql={"name": literal(new_name), "key": key})

    def rows(self, where: Where = None) -> Iterator[Row]:
        """See `Store`."""
        table = self._latest()
        columns = [name for name in table.schema.names if name not in ("embeddings", "vector")]
        found = self._query(table.search(), where).select(columns).to_arrow().sort_by("name")
        for batch in found.to_batches(max_chunksize=BATCH_ROWS):
            for values in batch.to_pylist():
                yield Row(
                    key=values["key"],
                    name=values["name"],
                    revision=values["revision"],
                    photos=tuple(values["photos"]),
                    embeddings=torch.empty(0),
                    vector=torch.empty(0),
                    metadata=metadata_of(values),
                )

    def count(self, where: Where = None) -> int:
        """See `Store`."""
        table = self._latest()
        sql = sql_of(where, table.schema.names)
        try:
            return table.count_rows(sql)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"where {where!r}: {first_line(error)}") from None

    # --- search ------------------------------------------------------------------------------------------------------

    def nearest(self, queries: Tensor, limit: int, where: Where = None, exact: bool = False) -> list[list[Hit]]:
        """See `Store`."""
        table = self._latest()
        if len(queries) >= SCANNED_FROM and (exact or not vector_indices(table)):
            return self._scan(table, queries, limit, where)
        shown = ["name", "_distance", *metadata_names(table.schema.names)]
        found = []
        for query in queries:
            search = table.search(query.numpy(), vector_column_name="vector").distance_type("dot")
            search = search.bypass_vector_index() if exact else search.refine_factor(REFINED)
            hits = self._query(search, where).select(shown).limit(limit).to_list()
            found.append([hit_of(values, 1 - values["_distance"]) for values in hits])
        return found

    def _scan(self, table: "Table", queries: Tensor, limit: int, where: Where) -> list[list[Hit]]:
        """Every row's product with every query, in one pass that holds a batch of rows at a time."""
        shown = ["name", *metadata_names(table.schema.names)]
        batches = self._query(table.search(), where).select([*shown, "vector"]).to_batches(BATCH_ROWS)
        scores = torch.empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.long)
        seen: list[Mapping[str, Any]] = []
        for batch in batches:
            vectors = torch.from_numpy(matrix(batch.column("vector")))
            products = queries @ vectors.T  # [N,rows]
            numbers = torch.arange(len(seen), len(seen) + len(vectors)).expand_as(products)
            scores, places = torch.cat([scores, products], 1), torch.cat([places, numbers], 1)
            scores, order = scores.topk(min(limit, scores.shape[1]), dim=1)
            places = places.gather(1, order)
            seen += batch.select(shown).to_pylist()
        return [
            [hit_of(seen[place], score) for place, score in zip(row_places, row_scores)]
            for row_places, row_scores in zip(places.tolist(), scores.tolist())
        ]

    # --- negatives ---------------------------------------------------------------------------------------------------

    def put_negatives(self, hashes: Sequence[str], embeddings: Tensor) -> None:
        """See `Store`."""
        import pyarrow as pa

        table = self._negatives
        assert table is not None, "negatives are put into a gallery that was made"
        table.checkout_latest()
        content = pa.table({"key": [*hashes], "vector": vectors(embeddings)}, schema=table.schema)
        table.merge_insert("key").when_not_matched_insert_all().execute(content)

    def negatives(self) -> Tensor:
        """See `Store`."""
        assert self._negatives is not None, "negatives are read from a gallery that was made"
        self._negatives.checkout_latest()
        column = self._negatives.to_arrow().column("vector").combine_chunks()
        return torch.from_numpy(matrix(column))

    # --- care --------------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """See `Store`."""
        table = self._latest()
        assert self._negatives is not None, "a gallery with subjects has a table of negatives"
        self._negatives.checkout_latest()
        return f"{table.version}-{self._negatives.version}"

    def tend(self) -> None:
        """See `Store`."""
        table = self._latest()
        rows = table.count_rows()
        stale = table.stats()["fragment_stats"]["num_small_fragments"] >= COMPACTED_FROM
        indices = vector_indices(table)
        if not indices:
            if rows >= INDEXED_FROM:
                from lancedb.index import HnswSq

                table.create_index("vector", config=HnswSq(distance_type="dot"))
        else:
            statistics = table.index_stats(indices[0])
            stale = stale or statistics is None or statistics.num_unindexed_rows > rows // 5
        if stale:
            table.optimize()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _latest(self) -> "Table":
        assert self._subjects is not None, "rows are those of a gallery that was made"
        self._subjects.checkout_latest()
        return self._subjects

    def _query(self, search: Any, where: Where) -> Any:
        sql = sql_of(where, self._latest().schema.names)
        return search if sql is None else search.where(sql, prefilter=True)

    def _add_columns(self, table: "Table", rows: Sequence[Row]) -> None:
        """A column for each metadata key that is new. Raises InputError for a value that does not fit its column."""
        import pyarrow as pa

        kinds: dict[str, Any] = {field.name: field.type for field in table.schema}
        new: dict[str, Any] = {}
        for row in rows:
            for key, value in row.metadata.items():
                kind = arrow_type(value)
                known = kinds.get(key) or new.setdefault(key, kind)
                if kind != known and (kind, known) != (pa.int64(), pa.float64()):
                    raise InputError(f"metadata {key}={value!r}: the gallery's {key} is {known}; give one of these")
        if new:
            table.add_columns([pa.field(key, kind) for key, kind in new.items()])


def vector_indices(table: "Table") -> list[str]:
    """Names of the indices of the vectors; at most one."""
    return [index.name for index in table.list_indices() if index.columns == ["vector"]]


# --- pure ------------------------------------------------------------------------------------------------------------


def subjects_schema(width: int, facts: Facts) -> "pa.Schema":
    """Columns of the subjects, before any metadata."""
    import pyarrow as pa

    content = {"aggregation": facts.aggregation, "fingerprint": facts.fingerprint.tolist()}
    fields = [
        pa.field("key", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
        pa.field("name", pa.string()),
        pa.field("revision", pa.int64()),
        pa.field("photos", pa.list_(pa.string())),
        pa.field("embeddings", pa.list_(pa.float32())),
        pa.field("vector", pa.list_(pa.float32(), width)),
    ]
    return pa.schema(fields, metadata={_FACTS: json.dumps(content)})


def negatives_schema(width: int) -> "pa.Schema":
    """Columns of the negatives: content hash and embedding."""
    import pyarrow as pa

    key = pa.field("key", pa.string(), nullable=False, metadata=_PRIMARY_KEY)
    return pa.schema([key, pa.field("vector", pa.list_(pa.float32(), width))])


def to_arrow(rows: Sequence[Row], schema: "pa.Schema") -> "pa.Table":
    """Rows as a table with all the columns of `schema`."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "key": [row.key for row in rows],
        "name": [row.name for row in rows],
        "revision": [row.revision for row in rows],
        "photos": [list(row.photos) for row in rows],
        "embeddings": [row.embeddings.flatten().numpy() for row in rows],
        "vector": vectors(torch.stack([row.vector for row in rows])),
    }
    for name in metadata_names(schema.names):
        columns[name] = [row.metadata.get(name) for row in rows]
    return pa.table(columns, schema=schema)


def vectors(embeddings: Tensor) -> "pa.Array":
    """[N,D] as a column."""
    import pyarrow as pa

    flat = pa.array(embeddings.float().contiguous().numpy().reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])


def matrix(column: "pa.FixedSizeListArray") -> np.ndarray:
    """A column of vectors as [N,D]."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.array(values, np.float32).reshape(len(column), column.type.list_size)


def arrow_type(value: Value) -> "pa.DataType":
    """The type of a metadata column that begins with this value."""
    import pyarrow as pa

    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64()
    return pa.float64() if isinstance(value, float) else pa.string()


def metadata_names(columns: Iterable[str]) -> list[str]:
    """The columns that are metadata."""
    return [name for name in columns if name not in RESERVED]


def metadata_of(values: Mapping[str, Any]) -> Metadata:
    """The metadata of a row as it was read."""
    kept = {}
    for name, value in values.items():
        if name not in RESERVED and not name.startswith("_") and value is not None:
            kept[name] = value
    return kept


def hit_of(values: Mapping[str, Any], score: float) -> Hit:
    """A row as it was found."""
    return Hit(name=values["name"], score=score, metadata=metadata_of(values))


def sql_of(where: Where, columns: Sequence[str]) -> str | None:
    """A filter as SQL; a metadata key that no subject has matches none."""
    if where is None or isinstance(where, str):
        return where or None
    if not isinstance(where, Mapping):
        raise InputError(f"where {where!r}: give a mapping such as {{'owner': 'me'}}, or LanceDB's SQL as text")
    conditions = []
    for key, wanted in where.items():
        values = [wanted] if isinstance(wanted, (str, int, float, bool)) else list(wanted)
        if key not in columns or not values:
            conditions.append("false")
            continue
        conditions.append(f"{key} IN ({', '.join(literal(value) for value in values)})")
    return " AND ".join(conditions) or None


def literal(value: Value) -> str:
    """A value in SQL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, (int, float)) else "'" + value.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """The part of a library's message that is for the reader."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
