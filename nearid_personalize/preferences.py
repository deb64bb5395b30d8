"""Preference pairs from guarded generations: which of two pictures of one prompt shows the subject better.

What `nearid generate` leaves in its folder, candidates and report.json, becomes what DPO-like trainers read:

- OUT/metadata.jsonl beside OUT/images, as `datasets.load_dataset("imagefolder", data_dir=OUT)` reads them: one row per
  pair, `winner_file_name` and `loser_file_name`, the caption, both identity scores.
- OUT/pairs.parquet, where `datasets` is installed, in the columns of Pick-a-Pic that Diffusion-DPO (Wallace et al.
  2023, arXiv:2311.12908) trains on: `jpg_0`, `jpg_1` (encoded pictures), `label_0` (1: the first is better, 0: the
  second), `label_1`, `caption`.
"""

import importlib.util
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json, write_atomically

REPORT, METADATA, PARQUET, IMAGES = "report.json", "metadata.jsonl", "pairs.parquet", "images"


@dataclass(frozen=True)
class Picture:
    """A finished candidate: its file, identity score in [-1, 1], status in the report, and generator seed."""

    path: Path
    score: float
    status: str
    seed: int


@dataclass(frozen=True)
class Run:
    """One guarded generation: what was drawn, from what, scored by what, and its finished candidates, best first."""

    folder: Path
    prompt: str
    models: Mapping[str, Any]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt; the winner is the one that was accepted, or the more alike of the two."""

    prompt: str
    winner: Picture
    loser: Picture

    @property
    def margin(self) -> float:
        """How much more alike the winner is, > 0."""
        return self.winner.score - self.loser.score


# --- reading ---------------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run in the folders, in order; a folder is a run itself, or its subfolders are.

    Raises InputError for a folder without one, a report that cannot be read, and runs scored by different models:
    their scores do not compare.
    """
    runs = [read_run(found) for folder in folders for found in run_folders(folder)]
    scorers = sorted({str(run.models.get("scorer")) for run in runs})
    if len(scorers) > 1:
        raise InputError(f"runs: scored by {' and '.join(scorers)}; pair those of one scorer at a time")
    return runs


def run_folders(folder: Path) -> list[Path]:
    """The folder, or those of its subfolders, that hold a report; InputError when none does."""
    if (folder / REPORT).is_file():
        return [folder]
    found = sorted(report.parent for report in folder.glob(f"*/{REPORT}"))
    if not found:
        raise InputError(f"{folder}: no {REPORT} in it or its subfolders; give a folder written by nearid generate")
    return found


def read_run(folder: Path) -> Run:
    """Read a run's report; candidates that were stopped or have no score have no picture to pair."""
    path = folder / REPORT
    try:
        report = parse_json(path.read_text(encoding="utf-8"))
        pictures = [
            Picture(folder / found["image"], found["score"], found["status"], found["seed"])
            for found in report["candidates"]
            if found["image"] is not None and found["score"] is not None
        ]
        run = Run(folder, report["prompt"], report["models"], tuple(pictures))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the report of nearid generate ({type(error).__name__} {error})") from None
    missing = [picture.path for picture in run.pictures if not picture.path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: named in {REPORT}, but not there; generate again")
    return run


# --- pairing ---------------------------------------------------------------------------------------------------------


def pairs_of(run: Run, min_margin: float, max_pairs: int, accepted_only: bool = True) -> list[Pair]:
    """Pairs of a run: every picture loses once at most, to the best pictures in turn, largest margins first.

    min_margin: smallest difference of the scores, > 0: a smaller one is noise. max_pairs: at most so many, the
    clearest; 0: all. accepted_only: winners are accepted pictures and losers rejected ones, so that every pair says
    "this is the subject, that is not"; else all finished pictures may win. A picture refused for another reason than
    its score (a copy, damage) is a loser only to a better-scored one.
    """
    winners = [picture for picture in run.pictures if picture.status == "accepted" or not accepted_only]
    losers = [picture for picture in run.pictures if picture.status == "rejected" or not accepted_only]
    pairs = []
    for number, loser in enumerate(sorted(losers, key=lambda picture: picture.score)):
        better = [winner for winner in winners if winner.score - loser.score >= min_margin]
        if better:
            pairs.append(Pair(run.prompt, better[number % len(better)], loser))
    pairs.sort(key=lambda pair: -pair.margin)
    return pairs[:max_pairs] if max_pairs else pairs


# --- writing ---------------------------------------------------------------------------------------------------------


def write_pairs(pairs: Sequence[Pair], out: Path, seed: int = 0) -> list[Path]:
    """Write pairs as pictures with metadata.jsonl, and as parquet where `datasets` is installed; returns both files.

    seed: of the coin that says whether a pair's winner comes first in the parquet. Raises InputError without pairs, and
    for a folder that holds pairs already.
    """
    if not pairs:
        raise InputError("pairs: none; lower --min-margin, or give runs with accepted and rejected pictures")
    if (out / METADATA).exists() or (out / IMAGES).exists():
        raise InputError(f"--out {out}: holds pairs already; give another folder")
    (out / IMAGES).mkdir(parents=True)
    names: dict[Path, str] = {}
    for picture in (picture for pair in pairs for picture in (pair.winner, pair.loser)):
        if picture.path not in names:
            names[picture.path] = f"{IMAGES}/{len(names):06d}{picture.path.suffix}"
            shutil.copyfile(picture.path, out / names[picture.path])
    written = [out / METADATA]
    if importlib.util.find_spec("datasets"):
        written.append(write_parquet(pairs, out / PARQUET, seed))
    rows = [json.dumps(row_of(pair, names), ensure_ascii=False) for pair in pairs]
    write_atomically(out / METADATA, "\n".join(rows) + "\n")
    return written


def row_of(pair: Pair, names: Mapping[Path, str]) -> dict[str, Any]:
    """A pair's line of metadata.jsonl."""
    row: dict[str, Any] = {"caption": pair.prompt, "margin": pair.margin}
    for role, picture in (("winner", pair.winner), ("loser", pair.loser)):
        told = {name: value for name, value in asdict(picture).items() if name != "path"}
        row |= {f"{role}_file_name": names[picture.path]} | {f"{role}_{name}": value for name, value in told.items()}
    return row


def write_parquet(pairs: Sequence[Pair], path: Path, seed: int) -> Path:
    """The table that Diffusion-DPO reads; which of the two comes first is drawn, so that no place means "better"."""
    import datasets  # an optional dependency ([train])

    coin = random.Random(seed)
    rows = []
    for pair in pairs:
        first = coin.random() < 0.5
        pictures = (pair.winner, pair.loser) if first else (pair.loser, pair.winner)
        encoded = {f"jpg_{place}": picture.path.read_bytes() for place, picture in enumerate(pictures)}
        labels = {"label_0": float(first), "label_1": float(not first), "has_label": True, "are_different": True}
        rows.append({"caption": pair.prompt} | encoded | labels)
    kinds = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "label_1": "float64"}
    kinds |= {"has_label": "bool", "are_different": "bool"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    partial = path.with_name(f".{path.name}.partial")
    datasets.Dataset.from_list(rows, features=features).to_parquet(partial)
    partial.replace(path)
    return path
