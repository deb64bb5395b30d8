"""`nearid score`: existing pictures against photos of a subject."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nearid_personalize.commands.console import DONE, NONE_ACCEPTED, Stopwatch, conclude, picture_paths, say, table
from nearid_personalize.commands.enrolment import enrolled, negative_paths
from nearid_personalize.commands.options import Score
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.images import load_image, load_images, save_image
from nearid_personalize.loading import choose_device
from nearid_personalize.report import UNREADABLE, Tile, contact_sheet, score_report, to_json, write_report
from nearid_personalize.scorer.ranking import rank_candidates

if TYPE_CHECKING:
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject

SHEET_LIMIT = 48  # tiles of a score sheet: six rows
BAR_FROM = 65  # pictures that take long enough for a progress bar


def run_score(options: Score) -> int:
    """`nearid score`. Files that cannot be read are listed last; when none can be, the input is wrong."""
    from nearid_personalize.scorer.scorer import IdentityScorer

    if options.embeddings is not None:
        return run_score_shards(options, options.embeddings)
    assert options.images is not None, "checked by the options"
    references = load_images(picture_paths(options.references))
    paths = picture_paths(options.images)
    negative_paths(options)
    if options.out is not None:
        check_writable(options.out)
    say(options.json, f"plan: score {len(paths)} pictures against {len(references)} references with {options.model}")

    clock = Stopwatch()
    with clock.stage("load"):
        scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    with clock.stage("score"):
        subject = enrolled(scorer, references, options)
        say(options.json, subject.describe())
        scored = score_files(scorer, subject, paths)
    tiles = [tile for _, tile in scored]
    for tile in tiles:
        if tile.status == UNREADABLE:
            say(options.json, f"not scored: {tile.reason}")
    report = score_report(tiles, subject.threshold, options.model, clock.seconds)
    if options.out is not None:
        sheet = contact_sheet(references, with_pictures(scored), str(options.images), subject.threshold)
        save_image(sheet, options.out / "contact_sheet.png")
        write_report(report, options.out / "report.json")
    rows = [(str(rank), tile.name, tile.score, tile.status) for rank, tile in enumerate(tiles, start=1)]
    return conclude(options.json, report, rows, subject.threshold, options.out)


def run_score_shards(options: Score, embeddings: Path) -> int:
    """`nearid score --embeddings`: no picture is read, so there is no contact sheet."""
    from nearid_personalize.scorer.scorer import IdentityScorer

    references = load_images(picture_paths(options.references))
    if options.out is not None:
        check_writable(options.out)
    clock = Stopwatch()
    with clock.stage("load"):
        scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    with clock.stage("score"):
        subject = enrolled(scorer, references, options)
        say(options.json, subject.describe())
        tiles = score_shards(scorer, subject, embeddings)
    report = score_report(tiles, subject.threshold, options.model, clock.seconds)
    if options.out is not None:
        write_report(report, options.out / "report.json")
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        print(
            table([(str(rank), tile.name, tile.score, tile.status) for rank, tile in enumerate(tiles[:SHEET_LIMIT], 1)])
        )
        accepted = sum(tile.status == "accepted" for tile in tiles)
        print(f"accepted {accepted} of {len(tiles)} (similarity {subject.threshold:.3f} or more)")
    return DONE if any(tile.status == "accepted" for tile in tiles) else NONE_ACCEPTED


def score_shards(scorer: "IdentityScorer", subject: "Subject", embeddings: Path) -> list[Tile]:
    """What became of each picture in shards, most alike first, those without an embedding last."""
    from nearid_personalize.bulk import read_shards
    from nearid_personalize.scorer.subject import identity_scores

    names, faults, scores = [], [], []
    for shard in read_shards(str(embeddings), scorer):
        found = identity_scores(shard.embeddings, subject.embeddings, subject.aggregation)
        found[[bool(error) for error in shard.errors]] = float("nan")
        names += shard.ids
        faults += shard.errors
        scores += found.tolist()
    tiles = []
    for verdict in rank_candidates(scores, subject.threshold):
        fault = faults[verdict.index]
        status = UNREADABLE if fault else "accepted" if verdict.accepted else "rejected"
        tiles.append(Tile(image=None, name=names[verdict.index], score=verdict.score, status=status, reason=fault))
    return tiles


def score_files(scorer: "IdentityScorer", subject: "Subject", paths: Sequence[Path]) -> list[tuple[Path, Tile]]:
    """Each file and what became of it, most alike first, those that cannot be read last; the tiles hold no pictures.

    Raises InputError when no file can be read.
    """
    faults: dict[int, str] = {}

    def note(index: int, error: InputError) -> None:
        faults[index] = str(error)

    progress = tqdm(paths, desc="score", disable=len(paths) < BAR_FROM)
    ranking = rank_candidates(scorer.score(progress, subject, note), subject.threshold)
    if len(faults) == len(paths):
        raise InputError(faults[0] if len(paths) == 1 else f"none of {len(paths)} files can be read; {faults[0]}")
    scored = []
    for verdict in ranking:
        path, fault = paths[verdict.index], faults.get(verdict.index, "")
        status = UNREADABLE if fault else "accepted" if verdict.accepted else "rejected"
        scored.append((path, Tile(image=None, name=path.name, score=verdict.score, status=status, reason=fault)))
    return scored


def with_pictures(scored: Sequence[tuple[Path, Tile]]) -> list[Tile]:
    """The first `SHEET_LIMIT` tiles with their pictures."""
    return [
        tile if tile.status == UNREADABLE else replace(tile, image=load_image(path))
        for path, tile in scored[:SHEET_LIMIT]
    ]
