"""`nearid gallery`: many subjects, and which of them a picture shows, if any."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from nearid_personalize.commands.console import DONE, NONE_ACCEPTED, Stopwatch, aligned, picture_paths, say
from nearid_personalize.commands.options import Gallery as GalleryOptions
from nearid_personalize.commands.options import GalleryAdd, GalleryList, GalleryRename, GallerySearch
from nearid_personalize.commands.verify import Item, items_of
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.images import list_images
from nearid_personalize.loading import choose_device
from nearid_personalize.report import rounded, to_json, versions, write_report

if TYPE_CHECKING:
    from nearid_personalize.gallery import Finding, Gallery
    from nearid_personalize.gallery.gallery import Addition
    from nearid_personalize.scorer.scorer import IdentityScorer

BAR_FROM = 65  # things that take long enough for a progress bar


def run_gallery(options: GalleryOptions) -> int:
    """`nearid gallery add`, `search`, `list`, `rename` and `remove`."""
    from nearid_personalize.gallery import Gallery

    command = options.command
    if isinstance(command, GalleryAdd):
        return add(command)
    if isinstance(command, GallerySearch):
        return search(command)
    gallery = Gallery.open(command.gallery)
    if isinstance(command, GalleryList):
        return show(command, gallery)
    if isinstance(command, GalleryRename):
        gallery.rename(command.name, command.to)
        return tell(command.json, {"renamed": command.name, "to": command.to}, f"{command.name} is {command.to} now")
    gallery.remove(command.name)
    return tell(command.json, {"removed": command.name}, f"removed {command.name}")


# --- add -------------------------------------------------------------------------------------------------------------


def add(options: GalleryAdd) -> int:
    """`nearid gallery add`."""
    metadata = facts_of("--metadata", options.metadata)
    folders = {} if options.photos is None else folders_of(options.photos, options.name)
    negatives = None if options.negatives is None else picture_paths(options.negatives)
    clock = Stopwatch()
    with clock.stage("load"):
        gallery = opened(options)
    with clock.stage("add"):
        added = gallery.add_embedded(photographed(gallery.scorer, folders, metadata))
        if options.embeddings is not None:
            added += gallery.add_embedded(from_shards(gallery.scorer, options.embeddings, options.name, metadata))
        if negatives is not None:
            gallery.add_negatives(negatives)
    report = {
        "photos_added": added,
        "negatives": len(negatives or ()),
        "subjects": len(gallery),
        "cost": {"seconds": rounded(clock.seconds)},
        "models": {"scorer": options.model},
        "versions": versions(),
    }
    what = [f"{added} photos"] if folders or options.embeddings else []
    what += [f"{len(negatives)} negatives"] if negatives else []
    return tell(options.json, report, f"added {' and '.join(what)}; {report['subjects']} subjects")


def opened(options: Any) -> "Gallery":
    """The gallery of a command, with its encoder."""
    from nearid_personalize.gallery import Gallery
    from nearid_personalize.scorer.scorer import IdentityScorer

    scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    return Gallery.open(options.gallery, scorer)


def folders_of(photos: Path, name: str | None) -> dict[str, list[Path]]:
    """The photos of each subject, see `GalleryAdd.photos`. Raises InputError where there are none."""
    if name is not None:
        return {name: picture_paths(photos)}
    if not photos.is_dir():
        raise InputError(f"--photos {photos}: give --name, the subject that it shows")
    folders = sorted(path for path in photos.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"--photos {photos}: no folders in it; give --name, the subject that all of it shows")
    return {folder.name: list_images(folder) for folder in folders}


def photographed(
    scorer: "IdentityScorer | None", folders: dict[str, list[Path]], metadata: dict[str, Any]
) -> Iterator["Addition"]:
    """Each subject with its photos embedded, as they are asked for."""
    from nearid_personalize.gallery.gallery import Addition
    from nearid_personalize.scorer.content import embed_distinct_photos

    assert scorer is not None, "the gallery was opened with an encoder"
    for name, paths in tqdm(folders.items(), desc="add", unit="subject", disable=len(folders) < BAR_FROM):
        yield Addition(name=name, photos=embed_distinct_photos(scorer, paths), metadata=metadata)


def from_shards(
    scorer: "IdentityScorer | None", embeddings: Path, name: str | None, metadata: dict[str, Any]
) -> Iterator["Addition"]:
    """The subjects of shards: the folder of a picture is its subject, unless all of it is `name`."""
    from nearid_personalize.bulk import read_shards
    from nearid_personalize.gallery.gallery import Addition

    for shard in read_shards(str(embeddings), scorer):
        photos: dict[str, dict[str, torch.Tensor]] = {}
        for place, path in enumerate(shard.ids):
            if not shard.errors[place]:
                subject = name or subject_of(path)
                photos.setdefault(subject, {})[shard.hashes[place]] = shard.embeddings[place]
        for subject, found in photos.items():
            yield Addition(name=subject, photos=found, metadata=metadata)


def subject_of(path: str) -> str:
    """The folder that a picture lies in; of one that lies in none its own name without the suffix."""
    folder, _, file = path.rpartition("/")
    return folder.rpartition("/")[2] or Path(file).stem


# --- search ----------------------------------------------------------------------------------------------------------


def search(options: GallerySearch) -> int:
    """`nearid gallery search`. Queries with a file that cannot be read are told, and the others answered."""
    where = facts_of("--where", options.where) or None
    items = items_of(options.images)
    if options.out is not None:
        check_writable(options.out)
    clock = Stopwatch()
    with clock.stage("load"):
        gallery = opened(options)
    with clock.stage("embed"):
        queries, faults = embedded(gallery, items)
    for fault in faults.values():
        say(options.json, f"not searched: {fault}")
    if not queries:
        raise InputError(next(iter(faults.values())))
    with clock.stage("search"):
        found = answered(gallery, [*queries.values()], options, where)
    answers = dict(zip(queries, found))
    report = report_of(options, answers, faults, clock.seconds)
    if options.out is not None:
        write_report(report, options.out / "report.json")
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        print(table_of(answers))
        rule = found[0].rule
        print(f"{report['found']} of {len(answers)} found among {rule.size} subjects ({rule.threshold:.3f} or more)")
        print(f"the threshold {rule.origin}")
    return DONE if report["found"] else NONE_ACCEPTED


def embedded(gallery: "Gallery", items: Sequence[Item]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """By query: the embeddings [N,D] of its pictures, or why they cannot be had."""
    assert gallery.scorer is not None, "the gallery was opened with an encoder"
    paths = [path for item in items for path in item.paths]
    unreadable: dict[int, str] = {}

    def note(index: int, error: InputError) -> None:
        unreadable[index] = str(error)

    progress = tqdm(paths, desc="embed", unit="picture", disable=len(paths) < BAR_FROM)
    embeddings = gallery.scorer.embed(progress, note)
    queries: dict[str, torch.Tensor] = {}
    faults: dict[str, str] = {}
    start = 0
    for item in items:
        places = range(start, start + len(item.paths))
        start += len(item.paths)
        wrong = [unreadable[place] for place in places if place in unreadable]
        if wrong:
            faults[item.name] = wrong[0]
        else:
            queries[item.name] = embeddings[places.start : places.stop]
    return queries, faults


def answered(
    gallery: "Gallery", queries: list[torch.Tensor], options: GallerySearch, where: dict[str, Any] | None
) -> "list[Finding]":
    """The answers. Raises InputError that names the flags."""
    try:
        return gallery.search_embedded(queries, options.false_accept_rate, where, options.limit, options.exact)
    except InputError as error:
        raise InputError(str(error).replace("false_accept_rate", "--false-accept-rate", 1)) from None


def report_of(
    options: GallerySearch, answers: dict[str, "Finding"], faults: dict[str, str], seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of report.json."""
    rows = []
    for query, found in answers.items():
        matches = []
        for match in found.matches:
            matches.append({"name": match.name, "score": match.score, "metadata": dict(match.metadata)})
        rows.append(
            {
                "query": query,
                "name": found.name,
                "score": found.score,
                "false_accept_rate": found.false_accept_rate,
                "matches": matches,
            }
        )
    rule = next(iter(answers.values())).rule
    return {
        "queries": rows,
        "not_searched": faults,
        "found": sum(found.name is not None for found in answers.values()),
        "threshold": rule.threshold,
        "false_accept_rate": rule.rate,
        "rests_on": str(rule.origin),
        "subjects": rule.size,
        "cost": {"seconds": rounded(seconds)},
        "models": {"scorer": options.model},
        "versions": versions(),
    }


def table_of(answers: dict[str, "Finding"]) -> str:
    """What each query shows."""
    rows: list[Sequence[str]] = [("query", "subject", "score", "most alike", "next")]
    for query, found in answers.items():
        after = "-" if found.runner_up is None else f"{found.runner_up.name} {found.runner_up.score:.3f}"
        rows.append((query, found.name or "none of them", f"{found.score:.3f}", found.matches[0].name, after))
    return aligned(rows)


# --- list, and what all share ----------------------------------------------------------------------------------------


def show(options: GalleryList, gallery: "Gallery") -> int:
    """`nearid gallery list`."""
    subjects = list(gallery.subjects(facts_of("--where", options.where) or None))
    rows: list[Sequence[str]] = [("subject", "photos", "metadata")]
    for name, count, metadata in subjects:
        rows.append((name, str(count), "  ".join(f"{key}={value}" for key, value in sorted(metadata.items()))))
    listed = [{"name": name, "photos": count, "metadata": dict(facts)} for name, count, facts in subjects]
    report = {"subjects": listed, "aggregation": gallery.facts.aggregation}
    return tell(options.json, report, f"{aligned(rows)}\n{len(subjects)} subjects")


def tell(as_json: bool, report: dict[str, Any], text: str) -> int:
    """Print the report or the text; returns the exit status."""
    if as_json:
        sys.stdout.write(to_json(report))
    else:
        print(text)
    return DONE


def facts_of(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """owner=me age=3 -> a mapping; a key that is given twice has a list of values. Raises InputError for other text."""
    facts: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{flag} {text}: give KEY=VALUE, such as owner=me")
        if key in facts and flag == "--metadata":
            raise InputError(f"{flag} {text}: {key} is given twice; give it once")
        facts[key] = [*facts[key], value_of(value)] if key in facts else [value_of(value)]
    return {key: values[0] if len(values) == 1 else values for key, values in facts.items()}


def value_of(text: str) -> str | int | float | bool:
    """A number or a truth value where the text is one."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?\d*\.\d+", text) else text
