"""A gallery on a Qdrant server, for collections beyond one machine; a server of 1.16 or newer.

A subject is one point, written in one request. Two named vectors: `search`, which is indexed, and `photos`, which holds
the embeddings and is not.
"""

import os
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.gallery.store import RESERVED, Facts, Hit, Metadata, Row, Where

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

SEARCH, PHOTOS = "search", "photos"
"""Names of a point's vectors."""

_POINTS = uuid.UUID("8a1f5b0e-2f0e-4a53-9d0a-6c8ab6f0d2f4")  # ids of points are UUIDs of their keys in this namespace

PAGE = 1000
"""Points read at once."""

QUERIES_AT_ONCE = 100


class QdrantStore:
    """See `store.Store`.

    Args:
        client: a connected `QdrantClient`.
        collection: name of the subjects' collection; the negatives are in NAME-negatives.
    """

    def __init__(self, client: "QdrantClient", collection: str) -> None:
        self._client, self._collection, self._changes = client, collection, 0

    @classmethod
    def connect(cls, uri: str) -> "QdrantStore":
        """Connect to qdrant://host:port/collection, or qdrant+https://…; the key is in QDRANT_API_KEY.

        Raises InputError where qdrant-client is not installed, the URI is another, or no server answers.
        """
        try:
            from qdrant_client import QdrantClient
            from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
        except ImportError:
            raise InputError("gallery: Qdrant is not installed; pip install 'nearid-personalize[qdrant]'") from None
        scheme, host, port, collection = parse_uri(uri)
        client = QdrantClient(url=f"{scheme}://{host}:{port}", api_key=os.environ.get("QDRANT_API_KEY") or None)
        store = cls(client, collection)
        try:
            client.collection_exists(collection)
        except (ResponseHandlingException, UnexpectedResponse) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{uri}: no Qdrant server answers there ({reason}); is one running?") from None
        return store

    # --- what the gallery was made with ------------------------------------------------------------------------------

    def facts(self) -> Facts | None:
        """See `Store`."""
        if not self._client.collection_exists(self._collection):
            return None
        stored = (self._client.get_collection(self._collection).config.metadata or {}).get("nearid_gallery")
        if stored is None:
            raise InputError(f"collection {self._collection}: holds something else; give another name")
        return Facts(aggregation=stored["aggregation"], fingerprint=torch.tensor(stored["fingerprint"]))

    def create(self, facts: Facts) -> None:
        """See `Store`."""
        from qdrant_client import models

        width = facts.fingerprint.shape[1]
        search = models.VectorParams(size=width, distance=models.Distance.DOT)
        photos = models.VectorParams(
            size=width,
            distance=models.Distance.DOT,
            on_disk=True,
            hnsw_config=models.HnswConfigDiff(m=0),
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        )
        content = {"aggregation": facts.aggregation, "fingerprint": facts.fingerprint.tolist()}
        # The subjects' collection last: where it is, the gallery is whole.
        self._create(f"{self._collection}-negatives", vectors_config=search)
        self._create(
            self._collection, vectors_config={SEARCH: search, PHOTOS: photos}, metadata={"nearid_gallery": content}
        )
        with warnings.catch_warnings():  # the in-process mode of the tests has no such index
            warnings.simplefilter("ignore")
            self._client.create_payload_index(self._collection, "name", models.PayloadSchemaType.KEYWORD)

    def _create(self, collection: str, **settings: Any) -> None:
        from qdrant_client.http.exceptions import UnexpectedResponse

        try:
            self._client.create_collection(collection, **settings)
        except (UnexpectedResponse, ValueError):
            if not self._client.collection_exists(collection):  # else another writer was faster
                raise

    # --- rows --------------------------------------------------------------------------------------------------------

    def read(self, names: Sequence[str]) -> list[Row]:
        """See `Store`."""
        from qdrant_client import models

        wanted = models.Filter(must=[models.FieldCondition(key="name", match=models.MatchAny(any=[*names]))])
        rows = []
        for point in self._points(wanted, [SEARCH, PHOTOS]):
            rows.append(row_of(point.payload, torch.tensor(point.vector[PHOTOS]), torch.tensor(point.vector[SEARCH])))
        return rows

    def put(self, rows: Sequence[Row]) -> None:
        """See `Store`."""
        from qdrant_client import models

        self._changes += 1
        by_revision: dict[int, list[Row]] = {}
        for row in rows:
            by_revision.setdefault(row.revision, []).append(row)
        for revision, same in by_revision.items():
            # Points that are there are only overwritten where they match the filter; new ones are written.
            unchanged = models.FieldCondition(key="revision", match=models.MatchValue(value=revision - 1))
            self._client.upsert(
                self._collection,
                [point_of(row) for row in same],
                wait=True,
                update_filter=models.Filter(must=[unchanged]),
            )

    def remove(self, name: str) -> None:
        """See `Store`."""
        from qdrant_client import models

        self._changes += 1
        named = models.Filter(must=[models.FieldCondition(key="name", match=models.MatchValue(value=name))])
        self._client.delete(self._collection, models.FilterSelector(filter=named), wait=True)

    def rename(self, name: str, new_name: str) -> None:
        """See `Store`. Points cannot change their id: a stop between the two writes leaves both names."""
        renamed = []
        for row in self.read([name]):
            renamed.append(
                Row(
                    key=new_name + row.key[len(name) :],
                    name=new_name,
                    revision=1,
                    photos=row.photos,
                    embeddings=row.embeddings,
                    vector=row.vector,
                    metadata=row.metadata,
                )
            )
        self.put(renamed)
        self.remove(name)

    def rows(self, where: Where = None) -> Iterator[Row]:
        """See `Store`."""
        found = [
            row_of(point.payload, torch.empty(0), torch.empty(0)) for point in self._points(filter_of(where), False)
        ]
        yield from sorted(found, key=lambda row: row.name)

    def count(self, where: Where = None) -> int:
        """See `Store`."""
        return self._client.count(self._collection, count_filter=filter_of(where), exact=True).count

    # --- search ------------------------------------------------------------------------------------------------------

    def nearest(self, queries: Tensor, limit: int, where: Where = None, exact: bool = False) -> list[list[Hit]]:
        """See `Store`."""
        from qdrant_client import models

        requests = []
        for query in queries.tolist():
            requests.append(
                models.QueryRequest(
                    query=query,
                    using=SEARCH,
                    filter=filter_of(where),
                    params=models.SearchParams(exact=True) if exact else None,
                    limit=limit,
                    with_payload=True,
                )
            )
        found = []
        for start in range(0, len(requests), QUERIES_AT_ONCE):
            for answer in self._client.query_batch_points(self._collection, requests[start : start + QUERIES_AT_ONCE]):
                hits = []
                for point in answer.points:
                    payload = point.payload or {}
                    hits.append(Hit(name=payload["name"], score=point.score, metadata=metadata_of(payload)))
                found.append(hits)
        return found

    # --- negatives ---------------------------------------------------------------------------------------------------

    def put_negatives(self, hashes: Sequence[str], embeddings: Tensor) -> None:
        """See `Store`."""
        from qdrant_client import models

        self._changes += 1
        points = []
        for key, embedding in zip(hashes, embeddings.tolist()):
            points.append(models.PointStruct(id=str(uuid.uuid5(_POINTS, key)), vector=embedding, payload={}))
        for start in range(0, len(points), PAGE):
            self._client.upsert(f"{self._collection}-negatives", points[start : start + PAGE], wait=True)

    def negatives(self) -> Tensor:
        """See `Store`."""
        found = [point.vector for point in self._points(None, True, f"{self._collection}-negatives")]
        return torch.tensor(found) if found else torch.empty(0, 0)

    # --- care --------------------------------------------------------------------------------------------------------

    def version(self) -> str:
        """See `Store`. What others change without a change in numbers is not seen."""
        return f"{self.count()}-{self._changes}"

    def tend(self) -> None:
        """See `Store`: the server does so itself."""

    # --- inside ------------------------------------------------------------------------------------------------------

    def _points(self, wanted: "models.Filter | None", vectors: Any, collection: str | None = None) -> Iterator[Any]:
        offset = None
        while True:
            points, offset = self._client.scroll(
                collection or self._collection, wanted, limit=PAGE, offset=offset, with_vectors=vectors
            )
            yield from points
            if offset is None:
                return


# --- pure ------------------------------------------------------------------------------------------------------------


def parse_uri(uri: str) -> tuple[str, str, int, str]:
    """qdrant://host:port/collection -> scheme of HTTP, host, port, collection. Raises InputError for another form."""
    wanted = "give qdrant://host:port/collection, or qdrant+https://host:port/collection"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or 6333
    except ValueError:
        host, port = None, 0
    collection = parts.path.strip("/") if host else ""
    if not host or not collection or "/" in collection:
        raise InputError(f"{uri}: not the address of a collection on a Qdrant server; {wanted}")
    return "https" if parts.scheme == "qdrant+https" else "http", host, port, collection


def point_of(row: Row) -> "models.PointStruct":
    """A row as Qdrant keeps it."""
    from qdrant_client import models

    payload: dict[str, Any] = {
        **row.metadata,
        "key": row.key,
        "name": row.name,
        "revision": row.revision,
        "photos": list(row.photos),
    }
    vector: Any = {SEARCH: row.vector.tolist(), PHOTOS: row.embeddings.tolist()}
    return models.PointStruct(id=str(uuid.uuid5(_POINTS, row.key)), vector=vector, payload=payload)


def row_of(payload: Mapping[str, Any], embeddings: Tensor, vector: Tensor) -> Row:
    """The inverse of `point_of`."""
    return Row(
        key=payload["key"],
        name=payload["name"],
        revision=payload["revision"],
        photos=tuple(payload["photos"]),
        embeddings=embeddings,
        vector=vector,
        metadata=metadata_of(payload),
    )


def metadata_of(payload: Mapping[str, Any]) -> Metadata:
    """What of a payload the user gave."""
    return {key: value for key, value in payload.items() if key not in RESERVED}


def filter_of(where: Where) -> "models.Filter | None":
    """A filter as Qdrant's."""
    from qdrant_client import models

    if where is None or isinstance(where, models.Filter):
        return where
    if not isinstance(where, Mapping):
        raise InputError(f"where {where!r}: give a mapping such as {{'owner': 'me'}}, or a qdrant_client Filter")
    conditions: list[Any] = []
    for key, wanted in where.items():
        values = [wanted] if isinstance(wanted, (str, int, float, bool)) else list(wanted)
        one_of: list[Any] = []
        for value in values:
            if isinstance(value, float):
                one_of.append(models.FieldCondition(key=key, range=models.Range(gte=value, lte=value)))
            else:
                one_of.append(models.FieldCondition(key=key, match=models.MatchValue(value=value)))
        # A filter without conditions lets everything through, and one of no values nothing.
        nothing = models.HasIdCondition(has_id=[])
        conditions.append(models.Filter(should=one_of) if one_of else nothing)
    return models.Filter(must=conditions) if conditions else None
