"""Gallery: many subjects, each with photos; which of them does a picture show, if any?

Shape letters: N pictures, M subjects, R photos of a subject, D width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.gallery.open_set import AcceptRule, accept_rule
from nearid_personalize.gallery.store import RESERVED, Facts, Hit, Metadata, Row, Store, Value, Where
from nearid_personalize.images import ImageSource, iterate_sources
from nearid_personalize.scorer.calibration import (
    DEFAULT_FALSE_ACCEPT_RATE,
    Aggregation,
    CalibrationBank,
    KnownScores,
    ThresholdOrigin,
)
from nearid_personalize.scorer.content import embed_distinct_photos, encoder_fingerprint, same_encoder
from nearid_personalize.scorer.scorer import IdentityScorer, Images
from nearid_personalize.scorer.subject import SINGLE_REFERENCE_THRESHOLD

T = TypeVar("T")
Query: TypeAlias = "ImageSource | Sequence[ImageSource]"
"""What one question is asked about: a picture, or several pictures of one item."""

SUBJECTS_AT_ONCE = 1000
"""Subjects written together when many are added."""

PROBES_PER_ERROR = 20
"""Subjects compared with all others are this many over the rate: so many of them then score above the threshold."""

SCORE_ROUNDING = 1e-6
"""By how much the score of a picture may differ between one search and another."""

RULES_KEPT = 64
"""Accept rules that are remembered: one for each filter and rate asked for."""

ATTEMPTS = 20
"""Times that a write is tried while other writers change the same subjects."""


@dataclass(frozen=True)
class Match:
    """A subject of the gallery and how much a query is like it."""

    name: str
    score: float
    """Cosine in [-1, 1], by the gallery's aggregation."""
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Finding:
    """The answer to one query."""

    name: str | None
    """The subject, None where it is none of the gallery's."""
    score: float
    """That of the subject most alike, in [-1, 1]."""
    matches: tuple[Match, ...]
    """The subjects most alike, the best first, whether accepted or not."""
    false_accept_rate: float | None
    """Smallest false-accept rate at which this would be accepted, in (0, 1]. None: nothing is known to tell it by."""
    rule: AcceptRule
    """What it was accepted by: the threshold, the rate that holds, and how many subjects were searched."""

    @property
    def runner_up(self) -> Match | None:
        """The second most alike."""
        return self.matches[1] if len(self.matches) > 1 else None

    @property
    def threshold(self) -> float:
        """Smallest score of a query of one picture that is accepted."""
        return self.rule.threshold

    @property
    def origin(self) -> ThresholdOrigin:
        """What the rate rests on."""
        return self.rule.origin


@dataclass(frozen=True, eq=False)
class Addition:
    """Photos to add to a subject, embedded already."""

    name: str
    photos: Mapping[str, Tensor]
    """Content hash -> unit embedding [D]."""
    metadata: Metadata = field(default_factory=dict)


class Gallery:
    """Many subjects in a store, and open-set search among them. Make one with `Gallery.open`.

    Args:
        store: where they are.
        facts: what the gallery was made with.
        scorer: the encoder; None: pictures can be neither added nor searched.
    """

    def __init__(self, store: Store, facts: Facts, scorer: IdentityScorer | None = None) -> None:
        self.store, self.facts, self.scorer = store, facts, scorer
        self._rules: dict[tuple[str, str, float | None], AcceptRule] = {}

    @classmethod
    def open(
        cls, uri: str | Path, scorer: IdentityScorer | None = None, aggregation: Aggregation | None = None
    ) -> "Gallery":
        """Open a gallery, or make one.

        Args:
            uri: a folder, or what else LanceDB opens (s3://...); or qdrant://host:port/collection, qdrant+https://...
            scorer: the encoder. Without one the gallery must be there, and can only be listed and tidied.
            aggregation: how a subject's photos give one score. Default: the gallery's, for a new one as `enroll`.

        Raises InputError where there is no store, or the gallery was made with another encoder or aggregation.
        """
        return cls.of_store(open_store(uri, create=scorer is not None), scorer, aggregation, str(uri))

    @classmethod
    def of_store(
        cls,
        store: Store,
        scorer: IdentityScorer | None = None,
        aggregation: Aggregation | None = None,
        name: str = "gallery",
    ) -> "Gallery":
        """`open` for a store that is open already; `name` stands in error messages."""
        facts = store.facts()
        if scorer is None:
            if facts is None:
                raise InputError(f"{name}: no gallery there; add a subject first")
            return cls(store, facts)
        fingerprint = encoder_fingerprint(scorer)
        if facts is None:
            usual = scorer.calibration.aggregation if scorer.calibration else "mean"
            store.create(Facts(aggregation=aggregation or usual, fingerprint=fingerprint))
            facts = store.facts()
            assert facts is not None, "a gallery that was just made has facts"
        if not same_encoder(facts.fingerprint, fingerprint):
            raise InputError(f"{name}: made with another encoder; open it with that one, or make another gallery")
        if aggregation not in (None, facts.aggregation):
            raise InputError(f"{name}: made with aggregation {facts.aggregation!r}, not {aggregation!r}; leave it out")
        return cls(store, facts, scorer)

    # --- what is in it -----------------------------------------------------------------------------------------------

    def add(self, name: str, photos: Images, /, **metadata: Value) -> int:
        """Add photos to a subject, new or not; returns how many of them are new.

        A photo that the subject has already, pixel for pixel, is not added again. Metadata are set on the subject.

        Raises InputError for a name or metadata that cannot be stored, no photos, and one that cannot be read.
        """
        check_name(name)
        found = embed_distinct_photos(self._encoder, photos)
        return self.add_embedded([Addition(name=name, photos=found, metadata=metadata)])

    def add_embedded(self, additions: Iterable[Addition]) -> int:
        """`add` for many subjects whose photos are embedded already; returns how many photos are new.

        Subjects are written a thousand at a time. Each is written whole or not at all, so that a run that was stopped
        can be begun again.
        """
        added = 0
        for chunk in chunks(additions, SUBJECTS_AT_ONCE):
            for addition in chunk:
                check_name(addition.name)
                check_metadata(addition.metadata)
            added += self._write(together(chunk))
        self.store.tend()
        return added

    def add_negatives(self, pictures: Images) -> None:
        """Keep pictures that show none of the subjects: what `search` sets its threshold by.

        n of them can state a false-accept rate of 1 / (n + 1). They are best of the kind that will be asked about.
        """
        self.add_embedded_negatives(embed_distinct_photos(self._encoder, pictures))

    def add_embedded_negatives(self, pictures: Mapping[str, Tensor]) -> None:
        """`add_negatives` for pictures that are embedded already: content hash -> unit embedding [D]."""
        if pictures:
            self.store.put_negatives([*pictures], torch.stack([*pictures.values()]))

    def remove(self, name: str) -> None:
        """Remove a subject. Raises InputError where there is none of that name."""
        self._must_be_there(name)
        self.store.remove(name)

    def rename(self, name: str, new_name: str) -> None:
        """Give a subject another name. Raises InputError where there is none of that name, or the new one is taken."""
        check_name(new_name)
        self._must_be_there(name)
        if self.store.read([new_name]):
            raise InputError(f"name {new_name!r}: another subject has it; remove that one first, or choose another")
        self.store.rename(name, new_name)

    def subjects(self, where: Where = None) -> Iterator[tuple[str, int, Metadata]]:
        """Each subject by name: its name, its number of photos, its metadata."""
        current: tuple[str, int, Metadata] | None = None
        for row in self.store.rows(where):
            if current is not None and current[0] == row.name:
                current = (row.name, current[1] + len(row.photos), row.metadata)
                continue
            if current is not None:
                yield current
            current = (row.name, len(row.photos), row.metadata)
        if current is not None:
            yield current

    def __len__(self) -> int:
        return self._size(None)

    # --- search ------------------------------------------------------------------------------------------------------

    def search(
        self,
        images: Iterable[Query] | Images,
        false_accept_rate: float | None = 0.01,
        where: Where = None,
        limit: int = 5,
        exact: bool = False,
    ) -> list[Finding]:
        """For each query, which subject it shows, if any.

        Args:
            images: pictures; a sequence inside is several pictures of one item, and one query.
            false_accept_rate: share in (0, 1) of strangers that may be taken for a subject, whatever the number of
                subjects. None: 0.01, or the smallest that can be stated; `Finding.rule.rate` says which.
            where: search only subjects with these metadata, {"owner": "me"} or {"owner": ["me", "you"]}, or what a
                filter of the store's own says.
            limit: subjects named for each query, at least 1.
            exact: look at every subject, where an index would look at the nearest.

        Raises InputError for a rate that cannot be stated (the message says how many negatives that takes), for no
        pictures, for one that cannot be read, and where no subject is searched.
        """
        items = queries_of(images)
        embeddings = self._encoder.embed(list(chain.from_iterable(items)))
        return self.search_embedded(
            list(embeddings.split([len(item) for item in items])), false_accept_rate, where, limit, exact
        )

    def search_embedded(
        self,
        queries: Sequence[Tensor],
        false_accept_rate: float | None = 0.01,
        where: Where = None,
        limit: int = 5,
        exact: bool = False,
    ) -> list[Finding]:
        """`search` for queries that are embedded already: unit embeddings [N,D] of each one's pictures."""
        if limit < 1:
            raise InputError(f"limit {limit}: must be 1 or more")
        rule = self.accept_rule(false_accept_rate, where)
        centres = torch.stack([pictures.mean(dim=0) for pictures in queries])
        matches = self._nearest_subjects(centres, max(limit, 2), where, exact)
        largest = [torch.tensor([found[0].score]) for found in matches]
        several = [number for number, pictures in enumerate(queries) if len(pictures) > 1]
        for number in several:
            alone = self._nearest_subjects(queries[number], 1, where, exact)
            largest[number] = torch.tensor([found[0].score for found in alone])
        findings = []
        for found, scores in zip(matches, largest):
            findings.append(
                Finding(
                    name=found[0].name if rule.accepts(found[0].score, scores) else None,
                    score=found[0].score,
                    matches=tuple(found[:limit]),
                    false_accept_rate=rule.rate_of(scores),
                    rule=rule,
                )
            )
        return findings

    def accept_rule(self, false_accept_rate: float | None = 0.01, where: Where = None) -> AcceptRule:
        """What `search` accepts by. Raises InputError as `search`."""
        if false_accept_rate is not None and not 0 < false_accept_rate < 1:
            raise InputError(f"false_accept_rate {false_accept_rate}: give a share between 0 and 1, such as 0.01")
        asked = (self.store.version(), repr(where), false_accept_rate)
        if asked not in self._rules:
            if len(self._rules) >= RULES_KEPT:
                self._rules.clear()
            self._rules[asked] = self._new_rule(false_accept_rate, where)
        return self._rules[asked]

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _encoder(self) -> IdentityScorer:
        if self.scorer is None:
            raise InputError("gallery: opened without an encoder; give Gallery.open a scorer to add or search pictures")
        return self.scorer

    def _must_be_there(self, name: str) -> None:
        if not self.store.read([name]):
            raise InputError(f"name {name!r}: no such subject in the gallery")

    def _size(self, where: Where) -> int:
        if self.facts.aggregation != "max":
            return self.store.count(where)
        return len({row.name for row in self.store.rows(where)})

    def _write(self, additions: Mapping[str, Addition]) -> int:
        """Write until every photo is there; returns how many were not."""
        missing: int | None = None
        for _ in range(ATTEMPTS):
            stored: dict[str, list[Row]] = {name: [] for name in additions}
            for row in self.store.read([*additions]):
                stored[row.name].append(row)
            rows = []
            left = 0
            for name, addition in additions.items():
                left += len(addition.photos.keys() - {photo for row in stored[name] for photo in row.photos})
                rows += changed_rows(stored[name], addition, self.facts.aggregation)
            missing = left if missing is None else missing
            if not rows:
                return missing
            # A row that another writer has changed since it was read is skipped: the next attempt reads it again.
            self.store.put(rows)
        raise InputError(f"gallery: {len(additions)} subjects are being changed by others all the time; try again")

    def _nearest_subjects(self, queries: Tensor, limit: int, where: Where, exact: bool) -> list[list[Match]]:
        """Queries [N,D] -> the `limit` subjects with the largest scores, the best first."""
        rows = limit if self.facts.aggregation != "max" else 4 * limit
        while True:
            hits = self.store.nearest(queries, rows, where, exact)
            found = [best_of_each(row_hits)[:limit] for row_hits in hits]
            exhausted = all(len(row_hits) < rows for row_hits in hits)
            if exhausted or all(len(matches) == limit for matches in found):
                return found
            rows *= 4

    def _new_rule(self, false_accept_rate: float | None, where: Where) -> AcceptRule:
        photos: dict[str, int] = {}
        for name, number, _ in self.subjects(where):
            photos[name] = number
        if not photos:
            raise InputError("gallery: no subject to search; add some" + (", or ask for others" if where else ""))
        negatives = self._negatives_largest(where)
        probes = int(PROBES_PER_ERROR / (false_accept_rate or DEFAULT_FALSE_ACCEPT_RATE))
        use_own = len(photos) > 1 and not len(negatives)
        return accept_rule(
            size=len(photos),
            false_accept_rate=false_accept_rate,
            negatives=negatives,
            own=self._own_largest(spread([*photos], probes), where) if use_own else torch.empty(0),
            bank=self._bank_scores(min(photos.values()), max(photos.values())),
            uncalibrated=SINGLE_REFERENCE_THRESHOLD,
        )

    def _negatives_largest(self, where: Where) -> Tensor:
        """Each negative's largest score over the gallery: [n]."""
        negatives = self.store.negatives()
        if not len(negatives):
            return torch.empty(0)
        found = self._nearest_subjects(negatives, 1, where, exact=True)
        return torch.tensor([matches[0].score for matches in found]) + SCORE_ROUNDING

    def _own_largest(self, names: Sequence[str], where: Where) -> Tensor:
        """The largest score of the first photo of each of these subjects over the others: [n]."""
        photos: dict[str, Tensor] = {}
        for chunk in chunks(names, SUBJECTS_AT_ONCE):
            for row in self.store.read(chunk):
                photos.setdefault(row.name, row.embeddings[0])
        found = self._nearest_subjects(torch.stack([*photos.values()]), 2, where, exact=True)
        largest = []
        for name, matches in zip(photos, found):
            largest.append(max(match.score for match in matches if match.name != name))
        return torch.tensor(largest) + SCORE_ROUNDING

    def _bank_scores(self, fewest: int, most: int) -> KnownScores | None:
        """What near-identities are known to score against subjects with so many photos."""
        bank = self.scorer.calibration if self.scorer else None
        if not isinstance(bank, CalibrationBank):
            return None
        known = [bank.known_scores(count, self.facts.aggregation) for count in (fewest, most)]
        # How high they score rises or falls with the number of photos, by the aggregation: the higher end serves all.
        return max(known, key=lambda scores: float(scores.impostor.quantile(0.99)))


# --- pure ------------------------------------------------------------------------------------------------------------


def rows_of(name: str, photos: Mapping[str, Tensor], metadata: Metadata, aggregation: Aggregation) -> list[Row]:
    """The rows of a subject, by key; see `store`. Revisions are 1."""
    if aggregation == "max":
        rows = []
        for photo, embedding in photos.items():
            rows.append(
                Row(
                    key=f"{name}/{photo}",
                    name=name,
                    revision=1,
                    photos=(photo,),
                    embeddings=embedding[None],
                    vector=embedding,
                    metadata=metadata,
                )
            )
        return rows
    embeddings = torch.stack([*photos.values()])
    vector = search_vector(embeddings, aggregation)
    return [
        Row(
            key=name,
            name=name,
            revision=1,
            photos=tuple(photos),
            embeddings=embeddings,
            vector=vector,
            metadata=metadata,
        )
    ]


def search_vector(embeddings: Tensor, aggregation: Aggregation) -> Tensor:
    """Unit rows [R,D] -> the vector [D] whose product with a query is `aggregate`'s score, for mean and centroid."""
    mean = embeddings.mean(dim=0)
    # The mean's length is the root of the mean likeness, by which `aggregate` divides.
    return mean / mean.norm().clamp_min(1e-6) if aggregation == "centroid" else mean


def changed_rows(stored: Sequence[Row], addition: Addition, aggregation: Aggregation) -> list[Row]:
    """The rows to write so that a subject has these photos and metadata too; none where it has them."""
    photos: dict[str, Tensor] = {}
    metadata: dict[str, Value] = {}
    for row in stored:
        photos |= dict(zip(row.photos, row.embeddings))
        metadata |= row.metadata
    rows = rows_of(addition.name, {**photos, **addition.photos}, {**metadata, **addition.metadata}, aggregation)
    before = {row.key: row for row in stored}
    changed = []
    for row in rows:
        old = before.get(row.key)
        if old is None:
            changed.append(row)
        elif set(old.photos) != set(row.photos) or dict(old.metadata) != dict(row.metadata):
            changed.append(replace(row, revision=old.revision + 1))
    return changed


def together(additions: Sequence[Addition]) -> dict[str, Addition]:
    """One addition a subject."""
    merged: dict[str, Addition] = {}
    for addition in additions:
        before = merged.get(addition.name)
        if before is not None:
            addition = replace(
                addition,
                photos={**before.photos, **addition.photos},
                metadata={**before.metadata, **addition.metadata},
            )
        merged[addition.name] = addition
    return merged


def best_of_each(hits: Sequence[Hit]) -> list[Match]:
    """Rows, the best first -> subjects, the best first."""
    best: dict[str, Match] = {}
    for hit in hits:
        best.setdefault(hit.name, Match(name=hit.name, score=max(-1.0, min(1.0, hit.score)), metadata=hit.metadata))
    return [*best.values()]


def spread(names: Iterable[str], count: int) -> list[str]:
    """At most `count` of the names, evenly over their order."""
    ordered = sorted(names)
    if len(ordered) <= count:
        return ordered
    return [ordered[number * len(ordered) // count] for number in range(count)]


def chunks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` things, the last one shorter."""
    rest = iter(things)
    while chunk := list(islice(rest, size)):
        yield chunk


def queries_of(images: Any) -> list[list[Any]]:
    """The pictures of each query."""
    items: list[list[Any]] = []
    for number, item in enumerate(iterate_sources(images)):
        pictures = list(item) if isinstance(item, (list, tuple)) else [item]
        if not pictures:
            raise InputError(f"images: query {number} has no pictures; give at least one of each")
        items.append(pictures)
    if not items:
        raise InputError("images: empty; give at least one picture")
    return items


def check_name(name: str) -> None:
    """Raise InputError for what cannot be a subject's name."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"name {name!r}: give a line of text, such as 'my dog'")


def check_metadata(metadata: Metadata) -> None:
    """Raise InputError for keys or values that cannot be stored."""
    for key, value in metadata.items():
        if key in RESERVED or not key.isidentifier():
            raise InputError(f"metadata {key!r}: give a plain word that is none of {', '.join(sorted(RESERVED))}")
        if not isinstance(value, (str, int, float, bool)):
            raise InputError(f"metadata {key}={value!r}: give text, a number, or true or false")


def open_store(uri: str | Path, create: bool) -> Store:
    """The store that a URI names. create: make the folder where there is none."""
    text = str(uri)
    if text.startswith(("qdrant:", "qdrant+https:")):
        from nearid_personalize.gallery.qdrant import QdrantStore

        return QdrantStore.connect(text)
    from nearid_personalize.gallery.lance import LanceStore

    return LanceStore.connect(text, create)
