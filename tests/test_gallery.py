"""The gallery: one contract for every store, open-set thresholds against their definition, kills and rival writers.

Qdrant's in-process mode stands in for its server; NEARID_TEST_QDRANT=http://localhost:6333 asks a server instead.
"""

import os
import subprocess
import sys
import threading
import uuid

import pytest
import torch
from conftest import checkered
from torch.nn.functional import normalize

from nearid_personalize import Gallery, InputError
from nearid_personalize.gallery import lance
from nearid_personalize.gallery.gallery import Addition
from nearid_personalize.gallery.lance import LanceStore
from nearid_personalize.gallery.open_set import accept_rule, by_negatives, by_the_gallery
from nearid_personalize.gallery.qdrant import QdrantStore, parse_uri
from nearid_personalize.gallery.store import Facts
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.scorer.calibration import KnownScores
from nearid_personalize.scorer.content import encoder_fingerprint, same_encoder
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import identity_scores

WIDTH = 16
SERVER = os.environ.get("NEARID_TEST_QDRANT")


@pytest.fixture(scope="module")
def scorer():
    return IdentityScorer.from_pretrained("miniworld")


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(params=["lance", "qdrant"])
def store(request, tmp_path):
    """An empty store."""
    if request.param == "lance":
        yield LanceStore.connect(str(tmp_path / "gallery"), create=True)
        return
    from qdrant_client import QdrantClient

    client = QdrantClient(url=SERVER) if SERVER else QdrantClient(":memory:")
    name = f"test-{uuid.uuid4().hex}"
    yield QdrantStore(client, name)
    for collection in (name, f"{name}-negatives"):
        client.delete_collection(collection)


def synthetic(store, aggregation="centroid"):
    """A gallery without an encoder."""
    facts = Facts(aggregation=aggregation, fingerprint=unit(4, WIDTH))
    store.create(facts)
    return Gallery(store, facts)


def addition(name, embeddings, **metadata):
    photos = {f"{name}-{number}": embedding for number, embedding in enumerate(embeddings)}
    return Addition(name=name, photos=photos, metadata=metadata)


def crowd(count, photos=3, seed=0, spread=0.3):
    """Subjects far apart, whose photos are near each other: [count,photos,WIDTH]."""
    return normalize(unit(count, 1, WIDTH, seed=seed) + spread * unit(count, photos, WIDTH, seed=seed + 1), dim=-1)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["mean", "max", "centroid"])
def test_scores_are_those_of_a_subject_and_the_best_comes_first(store, aggregation):
    gallery = synthetic(store, aggregation)
    subjects = crowd(12)
    gallery.add_embedded(addition(f"s{number}", photos) for number, photos in enumerate(subjects))
    queries = unit(5, WIDTH, seed=9)
    for query, found in zip(queries, gallery.search_embedded(queries.split(1), None, limit=12)):
        expected = {f"s{i}": float(identity_scores(query[None], own, aggregation)) for i, own in enumerate(subjects)}
        assert {match.name: pytest.approx(match.score, abs=1e-5) for match in found.matches} == expected
        assert [match.score for match in found.matches] == sorted(
            (match.score for match in found.matches), reverse=True
        )
        assert found.score == found.matches[0].score == pytest.approx(max(expected.values()), abs=1e-5)
        assert found.runner_up.score == pytest.approx(sorted(expected.values())[-2], abs=1e-5)


@pytest.mark.parametrize("aggregation", ["max", "centroid"])
def test_what_is_added_twice_is_there_once(store, aggregation):
    gallery = synthetic(store, aggregation)
    photos = crowd(1)[0]
    assert gallery.add_embedded([addition("rex", photos[:2])]) == 2
    assert gallery.add_embedded([addition("rex", photos[:2])]) == 0
    assert gallery.add_embedded([addition("rex", photos), addition("rex", photos)]) == 1
    assert list(gallery.subjects()) == [("rex", 3, {})]
    found = gallery.search_embedded([photos[:1]], None)[0]
    assert found.score == pytest.approx(float(identity_scores(photos[:1], photos, aggregation)), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["max", "centroid"])
def test_subjects_are_removed_and_renamed(store, aggregation):
    gallery = synthetic(store, aggregation)
    subjects = crowd(3)
    gallery.add_embedded(addition(name, photos, owner="me") for name, photos in zip(("a", "b", "it's"), subjects))
    gallery.rename("it's", "ça va")
    gallery.remove("a")
    assert list(gallery.subjects()) == [("b", 3, {"owner": "me"}), ("ça va", 3, {"owner": "me"})]
    assert gallery.search_embedded([subjects[2][:1]], None)[0].matches[0].name == "ça va"
    assert gallery.add_embedded([addition("it's", subjects[2])]) == 3  # the old name is free again
    assert len(gallery) == 3
    for wrong in (lambda: gallery.remove("a"), lambda: gallery.rename("a", "x"), lambda: gallery.rename("b", "ça va")):
        with pytest.raises(InputError, match="name '"):
            wrong()


def test_a_filter_is_the_stores_and_the_threshold_follows_it(store):
    gallery = synthetic(store)
    subjects = crowd(60)
    additions = []
    for number, photos in enumerate(subjects):
        facts = {"owner": "me" if number < 20 else "you", "age": number, "size": number / 2, "sold": number % 2 == 0}
        additions.append(addition(f"s{number:02}", photos, **facts))
    gallery.add_embedded(additions)
    query = [subjects[30][:1]]
    assert gallery.search_embedded(query, 0.1)[0].name == "s30"
    mine = gallery.search_embedded(query, 0.1, where={"owner": "me"})[0]
    assert mine.name is None and mine.rule.size == 20 and mine.matches[0].metadata["owner"] == "me"
    assert mine.threshold < gallery.search_embedded(query, 0.1)[0].threshold
    for where, size in (
        ({"age": [1, 2, 99]}, 2),
        ({"size": 1.5}, 1),
        ({"sold": True, "owner": "me"}, 10),
        ({"age": []}, 0),
        ({"colour": "red"}, 0),
        (None, 60),
    ):
        assert len(list(gallery.subjects(where))) == size
    with pytest.raises(InputError, match="no subject to search"):
        gallery.search_embedded(query, 0.1, where={"owner": "nobody"})
    with pytest.raises(InputError, match="where"):
        gallery.search_embedded(query, 0.1, where=7)


def test_negatives_state_the_rate_and_count_once(store):
    gallery = synthetic(store)
    gallery.add_embedded(addition(f"s{number}", photos) for number, photos in enumerate(crowd(5)))
    query = [crowd(5)[2][:1]]
    with pytest.raises(InputError, match=r"takes 99 negatives.*here are 0"):
        gallery.search_embedded(query)
    negatives = unit(99, WIDTH, seed=5)
    for _ in range(2):
        gallery.add_embedded_negatives({str(number): row for number, row in enumerate(negatives)})
    assert len(store.negatives()) == 99
    found = gallery.search_embedded(query)[0]
    assert found.name == "s2" and found.rule.rate == 0.01 and found.origin.guaranteed
    largest = [row.score for row in gallery.search_embedded(list(negatives.split(1)))]
    assert found.threshold > max(largest)
    assert all(answer.name is None for answer in gallery.search_embedded(list(negatives.split(1))))


def test_metadata_are_kept_changed_and_checked(store):
    gallery = synthetic(store)
    photos = crowd(1)[0]
    gallery.add_embedded([addition("rex", photos, owner="me")])
    gallery.add_embedded([addition("rex", photos, owner="you", age=3)])
    assert list(gallery.subjects()) == [("rex", 3, {"owner": "you", "age": 3})]
    for wrong in ({"vector": 1}, {"a b": 1}, {"owner": None}):
        with pytest.raises(InputError, match="metadata"):
            gallery.add_embedded([addition("rex", photos, **wrong)])
    for name in ("", "two\nlines"):
        with pytest.raises(InputError, match="name"):
            gallery.add_embedded([addition(name, photos)])


def test_what_another_writer_changed_meanwhile_is_not_overwritten(store):
    gallery = synthetic(store)
    photos = crowd(1, photos=5)[0]
    gallery.add_embedded([addition("rex", photos[:2])])
    (stale,) = store.read(["rex"])
    gallery.add_embedded([addition("rex", photos[:4])])
    store.put([stale])  # revision 1 upon revision 2
    assert list(gallery.subjects()) == [("rex", 4, {})]


class OneCallAtATime:
    """A store whose calls wait for each other: Qdrant's in-process mode bears no threads. Writers still interleave."""

    def __init__(self, store):
        self._store, self._lock = store, threading.Lock()

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*arguments, **named):
            with self._lock:
                found = method(*arguments, **named)
                return list(found) if name == "rows" else found

        return call


def test_two_writers_lose_nothing_and_double_nothing(store):
    gallery = synthetic(store)
    shared = store if isinstance(store, LanceStore) else OneCallAtATime(store)
    subjects = crowd(12, photos=4)

    def write(shown):
        for number, photos in enumerate(subjects):
            gallery_of_its_own = Gallery(shared, gallery.facts)
            gallery_of_its_own.add_embedded([Addition(f"s{number:02}", {str(i): photos[i] for i in shown})])

    writers = [threading.Thread(target=write, args=(shown,)) for shown in ((0, 1), (1, 2), (2, 3))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [(name, count) for name, count, _ in gallery.subjects()] == [(f"s{n:02}", 4) for n in range(12)]


def test_pictures_of_an_own_encoder(store, scorer, tmp_path):
    gallery = Gallery.of_store(store, scorer)
    for name in range(4):
        assert gallery.add(str(name), [checkered(name), checkered(name + 100)], kind="toy") == 2
    checkered(0).save(tmp_path / "again.png")
    checkered(0).save(tmp_path / "again.bmp")
    assert gallery.add("0", tmp_path) == 0  # the same pixels
    alone, together = gallery.search([checkered(2), [checkered(3), checkered(103)]], None)
    assert (alone.matches[0].name, together.matches[0].name) == ("2", "3")
    assert alone.matches[0].metadata == {"kind": "toy"}
    again = Gallery.of_store(store, scorer)
    assert len(again) == 4 and again.facts.aggregation == scorer.calibration.aggregation
    with pytest.raises(InputError, match="another encoder"):
        Gallery.of_store(store, IdentityScorer.from_pretrained(weights_dir("siglip")))
    with pytest.raises(InputError, match="aggregation"):
        Gallery.of_store(store, scorer, "max")
    with pytest.raises(InputError, match="without an encoder"):
        Gallery.of_store(store).add("x", [checkered(0)])
    with pytest.raises(InputError, match="no pictures"):
        gallery.search([[]])


# --- what a URI may be -----------------------------------------------------------------------------------------------


def test_a_gallery_is_made_by_an_encoder_alone(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Gallery.open(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no gallery there"):
        Gallery.open(tmp_path / "empty")


@pytest.mark.parametrize("uri", ["qdrant://:memory:/x", "qdrant:///x", "qdrant://host:6333", "qdrant://host:6333/a/b"])
def test_qdrant_in_this_process_is_no_store(uri):
    with pytest.raises(InputError, match="not the address of a collection"):
        Gallery.open(uri)


def test_the_address_of_a_collection():
    assert parse_uri("qdrant://host/c") == ("http", "host", 6333, "c")
    assert parse_uri("qdrant+https://host:7/c") == ("https", "host", 7, "c")


def test_a_server_that_is_not_there_is_the_users_to_start():
    with pytest.raises(InputError, match="no Qdrant server answers"):
        Gallery.open("qdrant://127.0.0.1:9/c")


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_encoders_apart_and_not_precisions(scorer):
    own = encoder_fingerprint(scorer)
    assert same_encoder(own, encoder_fingerprint(IdentityScorer.from_pretrained("miniworld", dtype=torch.bfloat16)))
    assert not same_encoder(own, encoder_fingerprint(IdentityScorer.from_pretrained(weights_dir("nearid-reward"))))
    assert not same_encoder(own, own[:, :8])


# --- the threshold ---------------------------------------------------------------------------------------------------


def rule(size, rate, negatives=(), own=(), bank=None):
    return accept_rule(size, rate, torch.tensor(negatives), torch.tensor(own), bank, uncalibrated=0.7)


def test_negatives_are_the_conformal_threshold_on_their_largest_scores():
    negatives = unit(1, 199)[0]
    found = rule(50, 0.05, negatives.tolist())
    assert sum(float(score) >= found.threshold for score in negatives) == 9  # 5 % of 200, the new one included
    assert found.rate == 0.05 and found.origin.source == "negatives" and found.origin.guaranteed


def test_the_gallery_itself_states_what_its_size_allows():
    own = torch.linspace(0, 0.5, 100)
    found = rule(100, 0.05, own=own.tolist())
    assert found.origin.source == "gallery" and not found.origin.guaranteed
    assert (own >= found.threshold).sum() == 3  # 5 % of 101, less what one comparison more costs
    with pytest.raises(InputError, match=r"gallery of 100 it takes 999 negatives.*ask for 0.0101 or more"):
        rule(100, 0.001, own=own.tolist())


def test_without_a_rate_the_smallest_is_stated():
    assert rule(10, None, own=torch.linspace(0, 0.5, 10).tolist()).rate == pytest.approx(10 / 9 / 11)
    assert rule(1, None).rate is None and rule(1, None).threshold == 0.7
    assert str(rule(1, None).origin) == "not calibrated, error rates unknown"


def test_the_bank_is_a_floor_and_spends_its_rate_over_the_gallery():
    bank = KnownScores("bank", torch.linspace(0.4, 0.8, 999)[:, None], torch.empty(0))
    own = torch.linspace(0, 0.3, 200).tolist()
    floored = rule(200, 0.05, own=own, bank=bank)
    assert floored.origin.source == "gallery" and floored.threshold == pytest.approx(0.78, abs=0.001)
    assert floored.rate_of(torch.tensor([0.7])) == pytest.approx(0.25, abs=0.01)
    spent = rule(10, 0.01, own=own[:10], bank=bank)
    assert spent.origin.source == "bank" and spent.threshold > 0.7995
    assert rule(1, None, bank=bank).origin.source == "bank"


def test_several_pictures_are_one_question():
    negatives = torch.linspace(0, 0.5, 199)
    found = rule(50, 0.05, negatives.tolist())
    assert found.accepts(0.6, torch.tensor([0.6, 0.6])) and not found.accepts(0.49, torch.tensor([0.6, 0.38]))
    assert found.rate_of(torch.tensor([0.6, 0.6])) == pytest.approx(1 / 200)
    assert found.rate_of(torch.tensor([0.6, 0.498])) == pytest.approx(3 / 200)


def test_two_pictures_find_their_subject_where_one_does_at_the_least_rate():
    found = rule(3, None, own=[0.1, 0.2, 0.3])
    assert found.accepts(0.9, torch.tensor([0.9])) and found.accepts(0.9, torch.tensor([0.9, 0.8]))
    assert not found.accepts(0.9, torch.tensor([0.9, 0.15]))


@pytest.mark.parametrize("size", [5, 40])
def test_the_rate_holds_for_strangers_of_the_whole_gallery(size):
    """Galleries drawn anew: asked 20 %, per comparison it would be far more."""
    wrong = {"gallery": 0, "negatives": 0, "one comparison": 0}
    trials = 600
    for trial in range(trials):
        drawn = unit(size + 20 + 1, WIDTH, seed=trial)
        subjects, strangers, stranger = drawn[:size], drawn[size:-1], drawn[-1]
        among = (subjects @ subjects.T).fill_diagonal_(-1).amax(dim=1)
        score = float((subjects @ stranger).max())
        wrong["gallery"] += by_the_gallery(among, size).threshold(0.2 * (1 if size > 5 else 2)) <= score
        wrong["negatives"] += by_negatives((strangers @ subjects.T).amax(dim=1)).threshold(0.2) <= score
        wrong["one comparison"] += by_negatives(strangers @ subjects[0]).threshold(0.2) <= score
    allowed = 0.2 + 3 * (0.2 * 0.8 / trials) ** 0.5
    assert wrong["gallery"] / trials <= allowed * (1 if size > 5 else 2)
    assert wrong["negatives"] / trials <= allowed
    assert wrong["one comparison"] / trials > 0.4


# --- LanceDB on disk -------------------------------------------------------------------------------------------------

WRITER = """
import sys, lancedb, torch
from nearid_personalize.gallery.gallery import Addition, Gallery
from nearid_personalize.gallery.lance import LanceStore

def add_all(folder, done, first):
    store = LanceStore.connect(folder, create=False)
    gallery = Gallery(store, store.facts())
    for number in range(first, 60):
        photos = {f"{number}-{place}": row for place, row in enumerate(torch.eye(16)[:3])}
        gallery.add_embedded([Addition(f"s{number:02}", photos)])
        print(number, file=done, flush=True)
"""

KILLED = (
    WRITER
    + """
import signal, random, os, time
folder, log = sys.argv[1:]
random.seed(0)
for life in range(20):
    before = os.path.getsize(log)
    child = os.fork()
    if child == 0:
        add_all(folder, open(log, "a"), life)  # the first of these are there already
        os._exit(0)
    while os.path.getsize(log) == before:
        time.sleep(0.002)
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
)


def test_twenty_kills_lose_nothing_and_leave_no_half_subject(tmp_path):
    gallery = synthetic(LanceStore.connect(str(tmp_path / "gallery"), create=True))
    log = tmp_path / "done"
    log.touch()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "gallery"), str(log)], check=True, timeout=300)
    finished = {f"s{int(line):02}" for line in log.read_text().split()}
    there = {name: count for name, count, _ in gallery.subjects()}
    assert finished <= there.keys() and set(there.values()) == {3}
    assert 0 < len(finished) <= 60
    gallery.add_embedded([addition("new", crowd(1)[0])])
    assert len(gallery) == len(there) + 1


def test_the_index_is_built_by_itself_and_finds_what_came_later(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "INDEXED_FROM", 300)
    gallery = synthetic(LanceStore.connect(str(tmp_path / "gallery"), create=True))
    subjects = crowd(400, photos=1)
    gallery.add_embedded(addition(f"s{number}", photos) for number, photos in enumerate(subjects[:290]))
    assert not lance.vector_indices(gallery.store._latest())
    gallery.add_embedded(addition(f"s{number}", photos) for number, photos in enumerate(subjects[:310]))
    assert lance.vector_indices(gallery.store._latest())
    gallery.add_embedded(addition(f"s{number}", photos) for number, photos in enumerate(subjects))
    found = gallery.search_embedded(list(subjects[[0, 305, 399]]), 0.05)
    assert [answer.name for answer in found] == ["s0", "s305", "s399"]
    exact = gallery.search_embedded(list(subjects[[0, 305, 399]]), 0.05, exact=True)
    assert [answer.score for answer in found] == pytest.approx([answer.score for answer in exact], abs=1e-5)
