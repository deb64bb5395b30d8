"""`nearid score`: existing pictures against photos of a subject."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from nearid_personalize.commands.console import Stopwatch, conclude, picture_paths, say
from nearid_personalize.commands.options import Score
from nearid_personalize.images import check_writable, load_image, load_images, save_image
from nearid_personalize.loading import choose_device
from nearid_personalize.report import Tile, contact_sheet, score_report, write_report
from nearid_personalize.selection import rank_candidates

if TYPE_CHECKING:
    from nearid_personalize.scorer import IdentityScorer, Subject

SHEET_LIMIT = 48  # tiles of a score sheet: six rows
SCORE_CHUNK = 64  # pictures in memory at once


def run_score(options: Score) -> int:
    """`nearid score`."""
    from nearid_personalize.scorer import IdentityScorer

    references = load_images(picture_paths(options.references))
    paths = picture_paths(options.images)
    if options.out is not None:
        check_writable(options.out)
    say(options.json, f"plan: score {len(paths)} pictures against {len(references)} references with {options.model}")

    clock = Stopwatch()
    with clock.stage("load"):
        scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    with clock.stage("score"):
        subject = scorer.enroll(references, false_accept_rate=options.false_accept_rate)
        say(options.json, subject.describe())
        ranking = rank_candidates(score_files(scorer, subject, paths), subject.threshold)
    verdicts = [(paths[v.index], v.score, "accepted" if v.accepted else "rejected") for v in ranking]
    report = score_report(
        [Tile(None, path.name, score, status) for path, score, status in verdicts],
        subject.threshold,
        options.model,
        clock.seconds,
    )
    if options.out is not None:
        tiles = [Tile(load_image(path), path.name, score, status) for path, score, status in verdicts[:SHEET_LIMIT]]
        sheet = contact_sheet(references, tiles, str(options.images), subject.threshold)
        save_image(sheet, options.out / "contact_sheet.png")
        write_report(report, options.out / "report.json")
    rows = [(str(rank), path.name, score, status) for rank, (path, score, status) in enumerate(verdicts, start=1)]
    return conclude(options.json, report, rows, subject.threshold, options.out)


def score_files(scorer: "IdentityScorer", subject: "Subject", paths: Sequence[Path]) -> torch.Tensor:
    """Similarities `[N]`; never more than `SCORE_CHUNK` pictures are in memory."""
    chunks = [paths[start : start + SCORE_CHUNK] for start in range(0, len(paths), SCORE_CHUNK)]
    progress = tqdm(chunks, desc="score", disable=len(chunks) == 1)
    return torch.cat([scorer.score([load_image(path) for path in chunk], subject) for chunk in progress])
