"""Which of mine is it, if any? `python benchmarks/gallery.py strangers`, and `python benchmarks/gallery.py speed`.

strangers: galleries of mini-world subjects that no model was trained on, of growing size. Queries are new pictures of
subjects in the gallery, and pictures of strangers. Measured at each false-accept rate asked: the share of strangers who
are taken for a subject; the share of the gallery's own who are named rightly. Beside it what a threshold for one
comparison gives, set on as many pairs of strangers. Intervals are 95 % bootstrap over queries.

speed: a hundred thousand subjects of synthetic vectors in LanceDB: rate of adding, time of a query, what the index
finds of the true nearest, memory; beside it FAISS's flat index on the same vectors.
"""

import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, TypeAlias

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.gallery import Finding, Gallery
from nearid_personalize.gallery.gallery import Addition
from nearid_personalize.gallery.lance import LanceStore
from nearid_personalize.gallery.store import Facts
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, render, sample_pet, sample_view
from nearid_personalize.scorer.calibration import conformal_threshold
from nearid_personalize.scorer.content import encoder_fingerprint
from nearid_personalize.scorer.scorer import IdentityScorer


@dataclass(frozen=True)
class Strangers:
    """Galleries of mini-world subjects."""

    sizes: tuple[int, ...] = (10, 100, 1000, 10000)
    """Subjects of the galleries; each holds the one before."""
    num_photos: int = 1
    """Photos of each subject."""
    num_queries: int = 500
    """Queries of subjects in the gallery (of all, where there are fewer), and as many of strangers."""
    num_negatives: int = 999
    """Pictures of other strangers that are given as negatives."""
    rates: tuple[float, ...] = (0.01, 0.05)
    """False-accept rates asked for, in (0, 1)."""
    draws: int = 20
    """Galleries of each size below 1,000, cut from the largest."""
    embeddings: Path | None = None
    """File to keep the embeddings in, or to read them from."""


@dataclass(frozen=True)
class Speed:
    """A gallery of synthetic vectors."""

    num_subjects: int = 100_000
    """Subjects."""
    width: int = 256
    """Width of an embedding."""
    num_photos: int = 2
    """Photos of each."""
    num_queries: int = 200
    """Queries: noisy photos of subjects."""
    index: Literal["HnswSq", "IvfPq", "IvfSq", "IvfFlat"] = "HnswSq"
    """LanceDB's kind of index."""


Options: TypeAlias = (
    Annotated[Strangers, tyro.conf.subcommand("strangers")] | Annotated[Speed, tyro.conf.subcommand("speed")]
)


# --- strangers -------------------------------------------------------------------------------------------------------


def pets(start: int) -> Iterator[Pet]:
    """Distinct subjects of the validation and test splits, which no model was trained on."""
    seen = set()
    for number in range(start, 10_000_000):
        pet = sample_pet("test" if number % 2 else "val", number, seed="gallery")
        if pet not in seen:
            seen.add(pet)
            yield pet


def photograph(pet: Pet, number: int, photo: int) -> Image.Image:
    """One picture of a subject: a scene and a view of its own."""
    rng = random.Random(f"gallery/{number}/{photo}")
    context = CONTEXTS[int(rng.random() * len(CONTEXTS))]
    return Image.fromarray(render(pet, context, sample_view(rng)).image)


def embed_world(options: Strangers, scorer: IdentityScorer) -> dict[str, Tensor]:
    """Unit embeddings: gallery [M,R,D]; own [Q,D], new pictures of the first; strangers [Q,D]; negatives [n,D]."""
    largest, asked = max(options.sizes), options.num_queries
    wanted = largest + asked + options.num_negatives
    drawn = pets(0)
    subjects = [next(drawn) for _ in range(wanted)]

    def pictures() -> Iterator[Image.Image]:
        for number, pet in enumerate(tqdm(subjects, mininterval=30)):
            for photo in range(options.num_photos if number < largest else 1):
                yield photograph(pet, number, photo)
        for number in range(asked):
            yield photograph(subjects[number], number, options.num_photos)

    embedded = scorer.embed(pictures())
    counts = [largest * options.num_photos, asked, options.num_negatives, asked]
    gallery, strangers, negatives, own = embedded.split(counts)
    gallery = gallery.unflatten(0, (largest, options.num_photos))
    return {"gallery": gallery, "own": own, "strangers": strangers, "negatives": negatives}


def world(options: Strangers, scorer: IdentityScorer) -> dict[str, Tensor]:
    """`embed_world`, kept in a file where one is named."""
    from safetensors.torch import load_file, save_file

    if options.embeddings is not None and options.embeddings.is_file():
        return load_file(options.embeddings)
    found = embed_world(options, scorer)
    if options.embeddings is not None:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, options.embeddings)
    return found


@dataclass(frozen=True)
class Asked:
    """A gallery's answers: 1 or 0 for each query."""

    accepted: list[float]
    """Strangers who are taken for a subject."""
    named: list[float]
    """Own queries that are named rightly, threshold included."""
    first: list[float]
    """Own queries whose best match is right, threshold aside."""


def ask(
    gallery: Gallery, rate: float, found: dict[str, Tensor], chosen: list[int], threshold: float | None = None
) -> Asked:
    """Ask about every stranger, and about these subjects' own queries; by another threshold where one is given."""

    def accepted(answer: Finding) -> bool:
        return answer.name is not None if threshold is None else answer.score >= threshold

    strangers = gallery.search_embedded(list(found["strangers"].split(1)), rate, limit=2)
    known = [number for number in chosen if number < len(found["own"])]
    own = gallery.search_embedded([found["own"][number][None] for number in known], rate, limit=2)
    return Asked(
        accepted=[float(accepted(answer)) for answer in strangers],
        named=[float(accepted(a) and a.matches[0].name == str(number)) for a, number in zip(own, known)],
        first=[float(answer.matches[0].name == str(number)) for answer, number in zip(own, known)],
    )


def with_interval(values: list[float]) -> str:
    """A mean and its interval."""
    low, high = bootstrap_interval(torch.tensor(values, dtype=torch.float64))
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def naive_threshold(found: dict[str, Tensor], rate: float) -> float:
    """What a threshold for one comparison is: conformal on a negative's score with one subject each."""
    count = min(len(found["negatives"]), len(found["gallery"]))
    vectors = normalize(found["gallery"][:count].mean(dim=1), dim=-1)
    return conformal_threshold((found["negatives"][:count] * vectors).sum(dim=-1)[:, None], rate)


def cuts(size: int, options: Strangers) -> list[list[int]]:
    """The subjects of each gallery of this size: many small galleries, all with subjects that are asked about."""
    largest = max(options.sizes)
    if size >= min(1000, largest):
        return [list(range(size))]
    rng = random.Random(size)
    return [rng.sample(range(options.num_queries), size) for _ in range(options.draws)]


def gallery_of(folder: Path, found: dict[str, Tensor], chosen: list[int], facts: Facts, scorer) -> Gallery:
    """A gallery of these subjects."""
    store = LanceStore.connect(str(folder), create=True)
    store.create(facts)
    gallery = Gallery(store, facts, scorer)
    gallery.add_embedded(
        Addition(str(number), {f"{number}/{i}": row for i, row in enumerate(found["gallery"][number])})
        for number in chosen
    )
    return gallery


def measure_strangers(options: Strangers) -> None:
    """Print a line for each size, rate and way of setting the threshold."""
    scorer = IdentityScorer.from_pretrained("miniworld")
    bare = IdentityScorer.from_pretrained("miniworld")
    bare.calibration = None
    found = world(options, scorer)
    facts = Facts(aggregation=scorer.calibration.aggregation, fingerprint=encoder_fingerprint(scorer))
    negatives = {str(number): row for number, row in enumerate(found["negatives"])}
    for size in options.sizes:
        pooled: dict[tuple[float, str], list[Asked]] = {}
        for chosen in cuts(size, options):
            with TemporaryDirectory() as folder:
                gallery = gallery_of(Path(folder), found, chosen, facts, bare)
                add_answers(pooled, "the gallery itself", gallery, found, chosen, options)
                gallery.add_embedded_negatives(negatives)
                add_answers(pooled, "negatives", gallery, found, chosen, options)
                shipped = Gallery(gallery.store, facts, scorer)
                add_answers(pooled, "negatives, and the bank", shipped, found, chosen, options)
                for rate in options.rates:
                    naive = naive_threshold(found, rate)
                    pooled.setdefault((rate, "one comparison"), []).append(ask(gallery, rate, found, chosen, naive))
        report_size(size, pooled)


def add_answers(
    pooled: dict[tuple[float, str], list[Asked]],
    way: str,
    gallery: Gallery,
    found: dict[str, Tensor],
    chosen: list[int],
    options: Strangers,
) -> None:
    """Ask a gallery at each rate; where it cannot state one, nothing is added."""
    for rate in options.rates:
        try:
            gallery.accept_rule(rate)
        except InputError:
            continue
        pooled.setdefault((rate, way), []).append(ask(gallery, rate, found, chosen))


def report_size(size: int, pooled: dict[tuple[float, str], list[Asked]]) -> None:
    """The lines of one size."""
    for (rate, way), answers in sorted(pooled.items()):
        # A stranger is one unit, asked of several galleries
        accepted = np.mean([answer.accepted for answer in answers], axis=0).tolist()
        named = [value for answer in answers for value in answer.named]
        first = [value for answer in answers for value in answer.first]
        print(
            f"{size:6} asked {rate:.2f} {way:24} strangers accepted {with_interval(accepted)}  own named "
            f"{with_interval(named)}  (n {len(named)}; best match right {np.mean(first):.3f})",
            flush=True,
        )


# --- speed -----------------------------------------------------------------------------------------------------------


def memory_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mb() -> float:
    """The memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def synthetic(options: Speed, generator: torch.Generator) -> Tensor:
    """[M,R,D]: subjects in families of fifty, as real ones are in kinds."""
    families = normalize(torch.randn(options.num_subjects // 50 + 1, options.width, generator=generator), dim=-1)
    family = torch.randint(len(families), (options.num_subjects,), generator=generator)
    noise = torch.randn(options.num_subjects, options.width, generator=generator) / options.width**0.5
    centres = normalize(families[family] + 0.8 * noise, dim=-1)
    spread = torch.randn(options.num_subjects, options.num_photos, options.width, generator=generator)
    return normalize(centres[:, None] + 0.5 * spread / options.width**0.5, dim=-1)


def seconds_each(gallery: Gallery, queries: Tensor, exact: bool, where=None) -> tuple[float, list[list[str]]]:
    """Median seconds of a query of the store, and the names found."""
    times, names = [], []
    for query in queries:
        started = time.perf_counter()
        (hits,) = gallery.store.nearest(query[None], 10, where, exact=exact)
        times.append(time.perf_counter() - started)
        names.append([hit.name for hit in hits])
    return float(np.median(times)), names


def recall(found: list[list[str]], true: list[list[str]], depth: int) -> float:
    """Share of the `depth` true nearest that were found among as many."""
    shares = [len(set(one[:depth]) & set(other[:depth])) / depth for one, other in zip(found, true)]
    return float(np.mean(shares))


def measure_speed(options: Speed) -> None:
    """Print what adding and asking cost."""
    import faiss
    import lancedb.index

    from nearid_personalize.gallery import lance

    lance.INDEXED_FROM = 10**9  # the index is built by hand, to be timed
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    photos = synthetic(options, generator)
    asked = torch.randint(options.num_subjects, (options.num_queries,), generator=generator)
    noise = torch.randn(options.num_queries, options.width, generator=generator) / options.width**0.5
    queries = normalize(photos[asked, 0] + 0.5 * noise, dim=-1)
    held = now_mb()
    with TemporaryDirectory() as folder:
        store = LanceStore.connect(folder, create=True)
        facts = Facts(aggregation="centroid", fingerprint=torch.eye(options.width)[:4])
        store.create(facts)
        gallery = Gallery(store, facts)
        started, cpu = time.perf_counter(), time.process_time()
        gallery.add_embedded(
            Addition(f"s{number}", dict(zip((f"{number}a", f"{number}b"), rows)), {"shop": number % 10})
            for number, rows in enumerate(photos)
        )
        wall, used = time.perf_counter() - started, time.process_time() - cpu
        print(f"add: {options.num_subjects / wall:.0f} subjects/s, {options.num_subjects / used:.0f} per core second")
        exact, true = seconds_each(gallery, queries, exact=True)
        filtered, _ = seconds_each(gallery, queries[:50], exact=True, where={"shop": 3})
        print(f"exact query: {1e3 * exact:.1f} ms; of a tenth of the subjects {1e3 * filtered:.1f} ms")
        started, cpu = time.perf_counter(), time.process_time()
        rule = gallery.accept_rule(0.01)
        print(
            f"threshold: {time.perf_counter() - started:.1f} s, {time.process_time() - cpu:.1f} core seconds, "
            f"{len(rule.stated_by.scores)} subjects against all"
        )
        started, cpu = time.perf_counter(), time.process_time()
        kind = getattr(lancedb.index, options.index)
        store._latest().create_index("vector", config=kind(distance_type="dot"))
        print(f"index: {time.perf_counter() - started:.1f} s, {time.process_time() - cpu:.1f} core seconds")
        indexed, near = seconds_each(gallery, queries, exact=False)
        print(
            f"indexed query: {1e3 * indexed:.1f} ms, recall at 1 {recall(near, true, 1):.3f}, "
            f"at 10 {recall(near, true, 10):.3f}"
        )
        print(f"memory: {now_mb() - held:.0f} MB more than the vectors alone, {memory_mb():.0f} MB at most")
        files = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        print(f"on disk: {files / 2**20:.0f} MB")
    flat = faiss.IndexFlatIP(options.width)
    flat.add(normalize(photos.mean(dim=1), dim=-1).numpy())
    times = []
    for query in queries:
        started = time.perf_counter()
        flat.search(query[None].numpy(), 10)
        times.append(time.perf_counter() - started)
    print(f"FAISS flat: {1e3 * float(np.median(times)):.1f} ms a query")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=f"{Path(__file__).name}: see its docstring")
    if isinstance(chosen, Strangers):
        measure_strangers(chosen)
    else:
        measure_speed(chosen)
