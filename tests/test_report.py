"""The contact sheet shows what happened, and the report says it in JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import checkered
from PIL import Image

from nearid_personalize import report
from nearid_personalize.guard.result import Candidate, Cost, GuardResult
from nearid_personalize.report import TILE, Tile

GREEN, RED, GREY = (report._STATUS_COLOR[status] for status in ("accepted", "rejected", "stopped"))


def plain(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def sheet_of(tiles: list[Tile], num_references: int = 4, **options: object) -> np.ndarray:
    references = [checkered(seed, 64) for seed in range(num_references)]
    return np.asarray(report.contact_sheet(references, tiles, "a photo of sks dog", 0.5, **options))


def count(sheet: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((sheet == color).all(axis=-1).sum())


@pytest.fixture
def result() -> GuardResult:
    """Seeds 5 … 8: two accepted, one rejected, one never scored."""
    candidates = (
        Candidate(5, 0.25, "rejected", None, plain(10), "score 0.250 below threshold 0.500"),
        Candidate(6, 0.75, "accepted", None, plain(20), ""),
        Candidate(7, 0.9, "accepted", None, plain(30), ""),
        Candidate(8, float("nan"), "stopped", 12, None, "stopped at step 12"),
    )
    seconds = {"generate": 1.23456, "score": 0.5}
    return GuardResult([plain(30)], candidates, Cost(100, 120, seconds), 0.5, "a photo of sks dog", 5)


def test_candidates_become_tiles_best_first(result: GuardResult):
    tiles = report.candidate_tiles(result)
    assert [tile.name for tile in tiles] == ["seed 7", "seed 6", "seed 5", "seed 8, step 12"]
    assert [tile.status for tile in tiles] == ["accepted", "accepted", "rejected", "stopped"]


def test_small_pictures_are_enlarged_and_large_ones_fitted_whole():
    assert TILE >= 160
    for size in ((64, 64), (1024, 1024)):
        assert (np.asarray(report.fitted(plain(90, size))) == 90).all()
    wide = np.asarray(report.fitted(plain(90, (400, 100))))
    assert wide.shape == (TILE, TILE, 3)
    assert count(wide, (90, 90, 90)) == TILE * TILE // 4


def test_accepted_is_framed_green_and_rejected_red():
    accepted = sheet_of([Tile(plain(90), "seed 0", 0.9, "accepted")])
    rejected = sheet_of([Tile(plain(90), "seed 0", 0.1, "rejected")])
    frame = 4 * TILE * 5  # five pixels on each of four sides
    assert count(accepted, GREEN) > frame
    assert count(accepted, RED) == 0
    assert count(rejected, RED) > frame
    assert count(rejected, GREEN) == 0


def test_an_accepted_picture_is_shown_as_it_is_and_a_rejected_one_marked():
    grey = (90, 90, 90)
    shown = count(sheet_of([Tile(plain(90), "seed 0", 0.9, "accepted")]), grey)
    assert shown > 0.95 * TILE * TILE
    assert count(sheet_of([Tile(plain(90), "seed 0", 0.1, "rejected")]), grey) == 0


def test_every_tile_is_on_the_sheet_whatever_their_number():
    for number in (0, 1, 8, 9, 17):
        sheet = sheet_of([Tile(plain(90), f"seed {i}", 0.9, "accepted") for i in range(number)])
        assert count(sheet, (90, 90, 90)) >= 0.95 * number * TILE * TILE


def test_tiles_keep_their_order():
    values = [40, 80, 120]
    sheet = sheet_of([Tile(plain(value), "seed", 0.9, "accepted") for value in values])
    centres = [np.argwhere((sheet == value).all(axis=-1))[:, 1].mean() for value in values]
    assert centres == sorted(centres)


def test_a_candidate_without_a_picture_has_its_place():
    sheet = sheet_of([Tile(None, "seed 3", float("nan"), "stopped")])
    assert count(sheet, GREY) > 4 * TILE * 5


def test_many_references_and_long_titles_stay_on_the_sheet():
    references = [plain(90)] * 30
    tiles = [Tile(plain(10), "a-very-long-file-name-" * 5 + ".png", 0.9, "accepted")]
    sheet = np.asarray(report.contact_sheet(references, tiles, "a very long prompt\n" * 40, 0.5))
    assert count(sheet, (90, 90, 90)) == (report.COLUMNS - 2) * TILE * TILE
    margin = sheet[:, -8:]
    assert (margin == margin[0, 0]).all()


def test_heat_is_painted_where_it_is_and_nowhere_else():
    heat = np.zeros((8, 8))
    heat[2, 5], heat[6, 1] = 1.0, 0.4
    picture = Image.new("RGB", (80, 80), (40, 160, 90))
    painted = np.asarray(report.heat_overlay(picture, heat)).astype(int)
    cold, warm, hot = painted[75, 75], painted[64, 15], painted[24, 54]
    assert cold[0] == cold[1] == cold[2], "cold places are grey"
    assert hot[0] > 180 and max(hot[1], hot[2]) < 70, "the hottest is red"
    assert warm[0] > warm[1] > warm[2] and warm[1] > hot[1], "less heat is yellower"
    assert (np.asarray(report.heat_overlay(picture, np.zeros((3, 3)))) == cold).all()


def test_a_drift_sheet_shows_picture_reference_and_overlay_beside_each_other():
    heat = np.zeros((4, 4), np.float32)
    heat[:, :2] = 1
    sheet = np.asarray(report.drift_sheet(plain(90), plain(30, (200, 100)), heat, side=100))
    assert count(sheet, (90, 90, 90)) == 100 * 100
    assert count(sheet, (30, 30, 30)) == 100 * 50
    own, reference = (np.argwhere((sheet == value).all(axis=-1))[:, 1] for value in (90, 30))
    reddish = np.argwhere((sheet[..., 0] > 150) & (sheet[..., 1] < 90) & (sheet[..., 2] < 90))[:, 1]
    assert own.max() < reference.min() and reference.max() < reddish.min()
    assert len(reddish) > 0.4 * 100 * 100


def test_the_report_says_everything_the_run_did(result: GuardResult):
    models = {"base": "miniworld", "lora": None, "scorer": "miniworld"}
    written = report.generation_report(result, {7: "candidate-7.png"}, models, {"train_lora": 3.0004})
    assert written["prompt"] == "a photo of sks dog"
    assert (written["seed"], written["threshold"]) == (5, 0.5)
    assert [c["seed"] for c in written["candidates"]] == [7, 6, 5, 8]
    assert written["candidates"][0] == {
        "seed": 7,
        "score": 0.9,
        "status": "accepted",
        "reason": "",
        "stopped_at_step": None,
        "image": "candidate-7.png",
    }
    assert written["candidates"][3] == {
        "seed": 8,
        "score": None,
        "status": "stopped",
        "reason": "stopped at step 12",
        "stopped_at_step": 12,
        "image": None,
    }
    assert written["cost"] == {
        "denoiser_rows": 100,
        "denoiser_rows_best_of_n": 120,
        "seconds": {"train_lora": 3.0, "generate": 1.235, "score": 0.5},
    }
    assert written["models"] == models
    assert {"python", "torch", "diffusers", "nearid-personalize"} <= set(written["versions"])


def test_the_report_is_strict_json_on_disk(result: GuardResult, tmp_path: Path):
    written = report.generation_report(result, {}, {}, {})
    report.write_report(written, tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse) == written
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_score_report_keeps_the_ranking():
    tiles = [Tile(None, "b.png", 0.9, "accepted"), Tile(None, "a.png", 0.2, "rejected")]
    written = report.score_report(tiles, 0.5, "miniworld", {"score": 0.1})
    assert written["images"] == [
        {"image": "b.png", "score": 0.9, "status": "accepted"},
        {"image": "a.png", "score": 0.2, "status": "rejected"},
    ]
    assert written["models"] == {"scorer": "miniworld"}
