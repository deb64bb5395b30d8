"""`nearid evaluate --benchmark`: the tables of the NearID paper (arXiv 2604.01973), the frozen trunk beside."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nearid_personalize.commands.console import DONE, Stopwatch, aligned, deliver, say
from nearid_personalize.commands.options import RELEASED_MODEL, RELEASED_TRUNK, Evaluate
from nearid_personalize.data import Rows
from nearid_personalize.data.benchmarks import RatedPictures, load_rated_pictures, nearid_rows, part_edit_rows
from nearid_personalize.embedding import Embedded, Pool, Reader, embed_distinct
from nearid_personalize.encoder.checkpoints import head_trunk, holds_head_alone, load_encoder, trunk_fingerprint
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.encoder.trunks import has_class_token
from nearid_personalize.errors import InputError
from nearid_personalize.evaluation import INTERVALS, measure_agreement, measure_sources
from nearid_personalize.images import load_image
from nearid_personalize.loading import choose_device, choose_dtype
from nearid_personalize.names import packaged
from nearid_personalize.report import evaluation_report

ENCODER, FROZEN, MEAN_TOKEN = "encoder", "frozen trunk", "frozen trunk, mean token"
PEOPLE = "people, group 1 and 2"

Result = dict[str, object]


@dataclass(frozen=True, eq=False)
class Reading:
    """A trunk and the ways in which its tokens become embeddings, by the name of the row in the table."""

    model: NearIDModel
    preprocessing: Preprocessing
    pools: Mapping[str, Pool]


def run_benchmark(options: Evaluate) -> int:
    """`nearid evaluate --benchmark`."""
    measure = _measure_pictures if options.benchmark == "dreambench++" else _measure_rows
    clock = Stopwatch()
    with clock.stage("data"):
        data = load_benchmark(options)
    say(options.json, f"plan: {_plan(options, data)}")
    with clock.stage("models"):
        readings, models = load_readings(options)
    results = []
    for reading in readings:
        with clock.stage(", ".join(reading.pools)):
            results += measure(options, data, reading)
    if isinstance(data, RatedPictures):
        results += _measure_people(data)
    intervals = INTERVALS.format(unit="subjects" if isinstance(data, RatedPictures) else "identities")
    report = evaluation_report(
        data=options.data,
        split=None if isinstance(data, RatedPictures) else options.split,
        results=results,
        encoders=models,
        seconds=clock.seconds,
        intervals=intervals,
        benchmark=options.benchmark,
    )
    deliver(options, report, f"{benchmark_table(options.benchmark, results)}\n[low, high]: {intervals}")
    return DONE


# --- what is measured ------------------------------------------------------------------------------------------------


def load_benchmark(options: Evaluate) -> Rows | RatedPictures:
    """The rows, or rated pictures, of the benchmark that `options` name.

    Raises:
        InputError: they are not there, or not in the layout of that benchmark.
    """
    if options.benchmark == "dreambench++":
        pictures = load_rated_pictures(Path(options.data), options.ratings)
        return pictures.first_subjects(options.limit) if options.limit else pictures
    if options.data == "miniworld":
        return _toy_rows(options)
    split = None if options.split == "all" else options.split
    if options.benchmark == "mtg":
        rows = part_edit_rows(options.data, split, options.hash_splits)
    else:
        rows = nearid_rows(options.data, options.distractors, split, options.hash_splits, show=not options.json)
    return rows[: options.limit] if options.limit else rows


def _toy_rows(options: Evaluate) -> Rows:
    from nearid_personalize import miniworld

    if options.split == "all":
        raise InputError("--split all: the toy world is endless; give train, val or test")
    count = options.limit or 500
    if options.benchmark == "mtg":
        return miniworld.part_edits(options.split, count)
    return miniworld.rows(options.split, count, options.num_views)


def _plan(options: Evaluate, data: Rows | RatedPictures) -> str:
    if isinstance(data, RatedPictures):
        left_out = f"; not rated and left out: {', '.join(data.unrated)}" if data.unrated else ""
        return (
            f"{len(data.pictures)} rated pictures of {len(data.subjects)} subjects, "
            f"{len(data.methods)} methods{left_out}"
        )
    return f"{len(data)} identities of {data.name}, distractors {', '.join(data.sources)}"


def load_readings(options: Evaluate) -> tuple[list[Reading], dict[str, str]]:
    """The encoder and its frozen trunk, sharing one pass of the trunk where its weights are the encoder's; their names.

    The mean token needs no weights beside the encoder's, and neither does a class token. SigLIP's own head does, since
    the encoder's was trained further: that one is read from the trunk's checkpoint.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    model, preprocessing, folder = load_encoder(packaged(options.model, "nearid"))
    models = {ENCODER: options.model}
    pools: dict[str, Pool] = {ENCODER: model.pool}
    readings = [Reading(model.to(device), preprocessing, pools)]
    trunk = _load_trunk(options, folder)
    if trunk is None:
        pools |= _frozen_pools(model, own_head=has_class_token(model.config.vision_config))
    else:
        name, frozen, its_preprocessing = trunk
        models[FROZEN] = name
        frozen.to(device)
        # Told by fingerprints before weights are cast: those of bfloat16 weights cannot be compared.
        if its_preprocessing == preprocessing and trunk_fingerprint(frozen) == trunk_fingerprint(model):
            pools |= _frozen_pools(frozen)
        else:
            say(options.json, f"--trunk {name} is not the trunk of {options.model}: pictures are run through both")
            readings.append(Reading(frozen, its_preprocessing, _frozen_pools(frozen)))
    for reading in readings:
        reading.model.cast_trunk(dtype)
    return readings, models


def _frozen_pools(trunk: NearIDModel, own_head: bool = True) -> dict[str, Pool]:
    """The ways to pool a trunk's tokens without a trained head."""
    mean: dict[str, Pool] = {MEAN_TOKEN: trunk.mean_pool}
    return {FROZEN: trunk.frozen_pool, **mean} if own_head else mean


def _load_trunk(options: Evaluate, model_folder: Path) -> tuple[str, NearIDModel, Preprocessing] | None:
    """The frozen trunk that is asked for, or that is known to be the model's; None: there is none."""
    if options.trunk is not None:
        return options.trunk, *load_encoder(packaged(options.trunk, "siglip"))[:2]
    known = {"miniworld": packaged("miniworld", "siglip"), RELEASED_MODEL: RELEASED_TRUNK}.get(options.model)
    if known is None and holds_head_alone(model_folder):
        known = head_trunk(model_folder)[0]
    if known is None:
        return None
    try:
        return known, *load_encoder(known)[:2]
    except InputError as error:
        say(options.json, f"measured without the frozen trunk's own head: {error}")
        return None


# --- SSR, PA, M-O ----------------------------------------------------------------------------------------------------


def _measure_rows(options: Evaluate, data: Rows | RatedPictures, reading: Reading) -> list[Result]:
    assert isinstance(data, Rows), "nearid and mtg are rows"
    num_views = 2 if options.benchmark == "mtg" else options.num_views
    kinds = 1 + len(data.sources)
    oracle = _oracle(data, not options.json) if options.benchmark == "mtg" else None
    total = len(data) * kinds * num_views
    embedded = _embed(options, reading, _row_readers(data, num_views), total)
    slots = embedded.slots.view(len(data), kinds, num_views)
    results: list[Result] = []
    for name, embeddings in embedded.embeddings.items():
        measured = measure_sources(embeddings, slots, data.sources, oracle)
        results += [{"encoder": name, "source": source, **asdict(found)} for source, found in measured.items()]
    return results


def _row_readers(rows: Rows, num_views: int) -> Iterator[Reader]:
    """Readers of the views and then of each source's distractors, row by row: [N,1+S,V]."""
    for row in rows:
        for slot in range(num_views):
            yield partial(row.view, slot)
        for source in rows.sources:
            for slot in range(num_views):
                yield partial(row.distractor, source, slot)


def _oracle(rows: Rows, show: bool) -> Tensor:
    """[N,2]: how much of each view its edit leaves as it was."""
    oracles = [row.oracle for row in tqdm(rows, desc="masks", disable=not show, leave=False)]
    return torch.tensor([found or (float("nan"),) * 2 for found in oracles], dtype=torch.float64)


def _embed(options: Evaluate, reading: Reading, readers: Iterator[Reader], total: int) -> Embedded:
    return embed_distinct(reading.model, reading.preprocessing, reading.pools, readers, total, show=not options.json)


# --- M-H -------------------------------------------------------------------------------------------------------------


def _measure_pictures(options: Evaluate, data: Rows | RatedPictures, reading: Reading) -> list[Result]:
    assert isinstance(data, RatedPictures), "dreambench++ is rated pictures"
    embedded = _embed(options, reading, _picture_readers(data), 2 * len(data.pictures))
    pairs = embedded.slots.view(-1, 2)
    results: list[Result] = []
    for name, embeddings in embedded.embeddings.items():
        scores = (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(dim=1)
        results += _agreements(name, data, scores, torch.tensor([picture.ratings for picture in data.pictures]))
    return results


def _picture_readers(data: RatedPictures) -> Iterator[Reader]:
    """Readers of each reference and the picture made after it: [n,2]."""
    for picture in data.pictures:
        yield partial(load_image, picture.reference)
        yield partial(load_image, picture.picture)


def _measure_people(data: RatedPictures) -> list[Result]:
    """How well the two groups of people agree with each other: what no score can be expected to pass by much."""
    first, second = torch.tensor([picture.ratings for picture in data.pictures]).unbind(dim=1)
    return _agreements(PEOPLE, data, first, second[:, None])


def _agreements(name: str, data: RatedPictures, scores: Tensor, ratings: Tensor) -> list[Result]:
    measured = measure_agreement(
        scores,
        ratings,
        methods=[picture.method for picture in data.pictures],
        subjects=[picture.subject for picture in data.pictures],
        categories=[picture.category for picture in data.pictures],
    )
    return [{"encoder": name, "category": category, **asdict(found)} for category, found in measured.items()]


# --- the table -------------------------------------------------------------------------------------------------------


Cell = Callable[[Mapping], str]
"""What a measurement shows in one column."""


def benchmark_table(benchmark: str | None, results: Sequence[Mapping]) -> str:
    """Measurements as aligned text; SSR and PA in percent as in the paper, correlations in [-1, 1]."""
    columns = COLUMNS[benchmark or "nearid"]
    rows = [list(columns)]
    for measured in results:
        rows.append([cell(measured) for cell in columns.values()])
    return aligned(rows)


def _text(name: str) -> Cell:
    return lambda measured: str(measured[name])


def _percent(name: str) -> Cell:
    """A share in [0, 1] and its interval, times 100."""

    def cell(measured: Mapping) -> str:
        low, high = measured[f"{name}_interval"]
        share = _number(100 * measured[name], ".2f")
        return f"{share} [{_number(100 * low, '.1f')}, {_number(100 * high, '.1f')}]"

    return cell


def _correlation(name: str) -> Cell:
    """A correlation and its interval."""

    def cell(measured: Mapping) -> str:
        low, high = measured[f"{name}_interval"]
        return f"{_number(measured[name])} [{_number(low)}, {_number(high)}]"

    return cell


def _number(value: float, form: str = ".3f") -> str:
    """A number as text, "-" where nothing was measured."""
    return "-" if math.isnan(value) else format(value, form)


COLUMNS: dict[str, dict[str, Cell]] = {
    "nearid": {
        "encoder": _text("encoder"),
        "distractors": _text("source"),
        "identities": _text("num_identities"),
        "samples": _text("num_samples"),
        "SSR %": _percent("ssr"),
        "PA %": _percent("pa"),
        "PA % as published": _percent("published_pa"),
    },
    "mtg": {
        "encoder": _text("encoder"),
        "identities": _text("num_identities"),
        "M-O": _correlation("m_o"),
        "M-O pair": _correlation("m_o_pair"),
        "SSR %": _percent("ssr"),
        "PA %": _percent("pa"),
    },
    "dreambench++": {
        "encoder": _text("encoder"),
        "category": _text("category"),
        "subjects": _text("num_subjects"),
        "pictures": _text("num_pictures"),
        "M-H": _correlation("m_h"),
        "s.e. over methods": lambda measured: _number(measured["standard_error"]),
    },
}
"""Headings and cells of each benchmark's table."""
