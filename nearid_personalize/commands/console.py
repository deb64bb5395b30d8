"""What the commands share: exit statuses, pictures in, a clock, and lines and tables out."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nearid_personalize.commands.options import Evaluate
from nearid_personalize.images import list_images
from nearid_personalize.report import UNREADABLE, to_json, write_report

DONE, WRONG_INPUT, NONE_ACCEPTED = 0, 2, 3


class Stopwatch:
    """Wall time by stage, seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to stage `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def picture_paths(path: Path) -> list[Path]:
    """The pictures that a flag means: those of a folder, or the one file."""
    return [path] if path.is_file() else list_images(path)


def say(as_json: bool, text: str) -> None:
    """A line for the reader; stdout belongs to the report when that is asked for."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def conclude(
    as_json: bool, report: dict, rows: Sequence[tuple[str, str, float, str]], threshold: float, out: Path | None
) -> int:
    """Print the report or a table of (rank, name, score, status); returns the exit status."""
    accepted = sum(status == "accepted" for *_, status in rows)
    unreadable = sum(status == UNREADABLE for *_, status in rows)
    if as_json:
        sys.stdout.write(to_json(report))
    else:
        print(table(rows))
        missed = f", {unreadable} could not be read" if unreadable else ""
        print(f"accepted {accepted} of {len(rows)} (similarity {threshold:.3f} or more){missed}")
        print("  ".join(f"{stage} {value:.1f} s" for stage, value in report["cost"]["seconds"].items()))
        if out is not None:
            print(f"look at {out / 'contact_sheet.png'}")
    return DONE if accepted else NONE_ACCEPTED


def table(rows: Sequence[tuple[str, str, float, str]]) -> str:
    """(rank, name, score, status) rows as aligned text under a heading."""
    cells = [("rank", "picture", "score", "status")]
    cells += [(rank, name, "-" if math.isnan(score) else f"{score:.3f}", status) for rank, name, score, status in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        f"{rank:>{widths[0]}}  {name:<{widths[1]}}  {score:>{widths[2]}}  {status}"
        for rank, name, score, status in cells
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells as text, every column as wide as its widest cell; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def deliver(options: Evaluate, report: dict, table: str) -> None:
    """Write the report where that is asked for, and print it or the table."""
    if options.out is not None:
        write_report(report, options.out / "report.json")
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        print(table)
