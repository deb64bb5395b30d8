"""`nearid evaluate --benchmark`: the paper's tables on small data of the published layouts, beside plain loops."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from hub_server import HubServer
from PIL import Image
from test_cli import nearid
from torch import Tensor

from nearid_personalize import metrics
from nearid_personalize.cli import parse
from nearid_personalize.data import benchmarks
from nearid_personalize.data.benchmarks import NEARID, TABLE_SOURCES, load_rated_pictures
from nearid_personalize.encoder.checkpoints import load_encoder, save_head
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.errors import InputError
from nearid_personalize.evaluation import measure_agreement, measure_sources

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402

from nearid_personalize.data.parts import copy_rows  # noqa: E402

ENCODERS = ["encoder", "frozen trunk", "frozen trunk, mean token"]
SIDE = 40
"""Side of the pictures, pixels: not the encoder's, so that they are resized."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cached in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="session")
def tiny_trained_dir(tiny_nearid_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of `tiny_nearid_dir` with another head on the same trunk, as training leaves one."""
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models") / "tiny-trained"
    model.reset_head().save_pretrained(folder)
    preprocessing.save(folder)
    return folder


@contextmanager
def counted_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pictures each run of any trunk took."""
    runs: list[int] = []
    tokens = NearIDModel.tokens

    def counting(model: NearIDModel, pixel_values: Tensor) -> Tensor:
        runs.append(len(pixel_values))
        return tokens(model, pixel_values)

    monkeypatch.setattr(NearIDModel, "tokens", counting)
    yield runs


def embeddings(model_dir: Path, trunk_dir: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """[n,D] by encoder, one picture at a time, by the heads as transformers runs them."""
    model, preprocessing, _ = load_encoder(model_dir)
    trunk, *_ = load_encoder(trunk_dir)
    found: dict[str, list[Tensor]] = {name: [] for name in ENCODERS}
    with torch.no_grad():
        for image in images:
            tokens = model.tokens(preprocessing([image]))
            for name, vector in zip(ENCODERS, (model.head(tokens), trunk.head(tokens), tokens.mean(dim=1))):
                found[name].append(vector[0] / vector[0].norm())
    return {name: torch.stack(vectors) for name, vectors in found.items()}


def encoded(image: Image.Image) -> dict[str, object]:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    """A parquet file as the Hub holds it: numbers, text and pictures."""
    kinds = {}
    for name, cells in columns.items():
        sample = next((cell for cell in cells if cell is not None), {})
        kinds[name] = (
            datasets.Image() if isinstance(sample, dict) else datasets.Value({int: "int64"}.get(type(sample), "string"))
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(path)
    return path


def run_json(capsys: pytest.CaptureFixture[str], *flags: object) -> dict:
    assert nearid("evaluate", *flags, "--json") == 0
    return json.loads(capsys.readouterr().out)


def assert_last_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    """After what progress bars leave, stderr is one line that holds `words`; stdout tells of no result."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "SSR" not in captured.out and "M-H" not in captured.out
    errors = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(errors) == 1 and words in errors[0] and captured.err.strip().endswith(errors[0].strip()), captured.err


# --- NearID ----------------------------------------------------------------------------------------------------------

IDENTITIES, SOURCES = 8, ("Flux", "SDXL_1024")


def view_picture(row: int, slot: int) -> Image.Image | None:
    """Every other identity has two views; the first view of identity 3 is that of identity 0, to the pixel."""
    if slot == 2 and row % 2:
        return None
    return checkered(0 if (row, slot) == (3, 0) else 10 * row + slot, SIDE)


def distractor_picture(source: int, row: int, slot: int) -> Image.Image | None:
    """Alike to the view on its background, more or less; of identity 5 SDXL_1024 has none, of 1 Flux has one."""
    view = view_picture(row, slot)
    if view is None or (source == 1 and row == 5) or (source == 0 and row == 1 and slot):
        return None
    return Image.blend(view, checkered(1000 + 100 * source + 10 * row + slot, SIDE), 0.2 + 0.07 * row)


@pytest.fixture
def nearid_dir(tmp_path: Path) -> Path:
    """Copies of the Hub's sets in one folder: the positives, and two sources of distractors."""
    home, ids = tmp_path / "hub", list(range(100, 100 + IDENTITIES))

    def column(picture, slot: int) -> list:
        images = [picture(row, slot) for row in range(IDENTITIES)]
        return [image and encoded(image) for image in images]

    views = {"id": ids, "category": ["cup"] * IDENTITIES, "objaverse_id": ["x"] * IDENTITIES}
    views |= {"n_images": [2 if row % 2 else 3 for row in range(IDENTITIES)], "quality": ["good"] * IDENTITIES}
    views |= {f"images{slot + 1}": column(view_picture, slot) for slot in range(3)}
    write_parquet(home / "NearID/data/test-00000-of-00001.parquet", views)
    for number, source in enumerate(SOURCES):
        pictures = {
            f"nimg{slot + 1}": column(lambda row, slot, n=number: distractor_picture(n, row, slot), slot)
            for slot in range(3)
        }
        write_parquet(home / f"NearID-{source}/data/test-00000-of-00001.parquet", {"id": ids} | pictures)
    return home


def slow_figures(vectors: dict[tuple, Tensor], sources: range) -> dict[str, float]:
    """SSR, PA and published PA in plain loops; a sample is an identity with one source."""
    samples = perfect = won = trials = published_won = published_trials = 0
    for row in range(IDENTITIES):
        for source in sources:
            margins = []
            for i in range(3):
                for j in range(i + 1, 3):
                    for k in (i, j):
                        names = (("view", row, i), ("view", row, j), ("view", row, k), (source, row, k))
                        if all(name in vectors for name in names):
                            a, b, own, other = (vectors[name] for name in names)
                            margins.append(float(a @ b) - float(own @ other))
            if not margins:
                continue
            samples += 1
            wins = sum(margin > 0 for margin in margins)
            perfect += wins == len(margins)
            won, trials = won + wins, trials + len(margins)
            published_won += wins + (sum(margins) > 0)
            published_trials += len(margins) + 1
    return {
        "num_samples": samples,
        "ssr": perfect / samples,
        "pa": won / trials,
        "published_pa": published_won / published_trials,
    }


def test_nearid_table_is_that_of_plain_loops_and_embeds_each_picture_once(
    nearid_dir: Path,
    tiny_trained_dir: Path,
    tiny_nearid_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    pictures: dict[tuple, Image.Image] = {}
    for row in range(IDENTITIES):
        for slot in range(3):
            listed = {("view", row, slot): view_picture(row, slot)}
            listed |= {(source, row, slot): distractor_picture(source, row, slot) for source in range(2)}
            pictures |= {name: image for name, image in listed.items() if image is not None}
    flags = ("--benchmark", "nearid", "--data", nearid_dir, "--out", tmp_path / "out")
    with counted_pictures(monkeypatch) as runs:
        report = run_json(capsys, *flags, "--model", tiny_trained_dir, "--trunk", tiny_nearid_dir)
    # One view is another's twin; head, trunk's head and mean token share the trunk's one pass.
    assert sum(runs) == len(pictures) - 1
    assert report["intervals"].startswith("95 % bootstrap intervals over identities")
    assert report["benchmark"] == "nearid" and report["split"] == "test"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report

    names = list(pictures)
    slow = embeddings(tiny_trained_dir, tiny_nearid_dir, list(pictures.values()))
    found = {(result["encoder"], result["source"]): result for result in report["results"]}
    assert list(found) == [(name, source) for name in ENCODERS for source in (*SOURCES, "pooled")]
    for encoder in ENCODERS:
        vectors = dict(zip(names, slow[encoder], strict=True))
        for source, which in zip((*SOURCES, "pooled"), (range(1), range(1, 2), range(2)), strict=True):
            result = found[encoder, source]
            for name, value in slow_figures(vectors, which).items():
                assert result[name] == pytest.approx(value), (encoder, source, name)
            for name in ("ssr", "pa", "published_pa"):
                low, high = result[f"{name}_interval"]
                assert low <= result[name] <= high
    # Otherwise nothing above could tell one source, or one encoder, from another.
    assert len({found[name, source]["pa"] for name in ENCODERS for source in SOURCES}) > 3
    assert found["encoder", "Flux"]["num_identities"] == 8 and found["encoder", "SDXL_1024"]["num_identities"] == 7


def test_pooled_intervals_draw_an_identity_with_all_its_sources():
    """Two sources that say the same are no more evidence than one."""
    torch.manual_seed(0)
    slots = torch.arange(40 * 6).view(40, 2, 3)
    vectors = torch.nn.functional.normalize(torch.randn(240, 4), dim=1)
    once = measure_sources(vectors, slots, ["a"])["a"]
    twice = measure_sources(vectors, torch.cat([slots, slots[:, 1:]], dim=1), ["a", "b"])
    assert twice["pooled"].ssr_interval == once.ssr_interval and twice["pooled"].pa == once.pa
    assert twice["pooled"].num_samples == 80 and twice["pooled"].num_identities == once.num_identities == 40


def test_table_prints_percent_its_counts_and_what_intervals_are_of(
    nearid_dir: Path, tiny_nearid_dir: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("--benchmark", "nearid", "--data", nearid_dir, "--model", tiny_nearid_dir, "--limit", 4)
    assert nearid("evaluate", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan: 4 identities of") and lines[0].endswith("distractors Flux, SDXL_1024")
    headings = ("encoder", "distractors", "identities", "samples", "SSR %", "PA %", "PA % as published")
    starts = [lines[1].index(heading) for heading in headings]
    rows = lines[2:-1]
    # Without --trunk, what the frozen trunk of a SigLIP can say is its mean token.
    assert [row[: starts[1]].strip() for row in rows] == ["encoder"] * 3 + ["frozen trunk, mean token"] * 3
    assert rows[2][starts[1] :].split()[:3] == ["pooled", "4", "8"]
    assert lines[-1] == "[low, high]: 95 % bootstrap intervals over identities, 2000 resamples"


def published_sets(home: Path, names: list[str]) -> None:
    """NearID's sets at their true length, in two files each; only the last 500 rows have pictures, 12 distinct ones."""
    cells = [encoded(checkered(seed, 16)) for seed in range(12)]
    empty = [None] * 18_886
    for number, name in enumerate(names):
        prefix = "images" if name == "NearID" else "nimg"
        columns = {"id": list(range(19_386))}
        for slot in (1, 2):
            columns[f"{prefix}{slot}"] = [*empty, *(cells[(row * (number + 1) + slot) % 12] for row in range(500))]
        if name == "NearID":
            columns |= {"category": ["cup"] * 19_386, "split": ["train"] * 19_386}
        for part, rows in enumerate((slice(0, 9_700), slice(9_700, None))):
            file = home / name / f"data/train-0000{part}-of-00002.parquet"
            write_parquet(file, {column: values[rows] for column, values in columns.items()})


RUN_TWO = """
import sys
from nearid_personalize.cli import main
for flags in sys.argv[1].split(";"):
    try:
        main([*sys.argv[2:], *flags.split()])
    except SystemExit as done:
        print(f"exit {done.code}", flush=True)
"""


def run_with(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that knows no hub but ours."""
    environment = hub.environment(home, PYTHONPATH=str(Path(__file__).parents[1]))
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_of_the_hubs_own_data_the_test_rows_alone_are_fetched_and_only_once(
    hub: HubServer, tiny_nearid_dir: Path, tmp_path: Path
):
    names = ["NearID", "NearID-Flux", "NearID-SDXL"]
    published_sets(tmp_path / "sets", names)
    for name in names:
        hub.publish(f"Aleksandar/{name}", tmp_path / "sets" / name, "datasets")
    flags = ["evaluate", "--benchmark", "nearid", "--data", NEARID, "--model", str(tiny_nearid_dir)]
    flags += ["--distractors", *(f"Aleksandar/{name}" for name in names[1:])]
    first = run_with(hub, tmp_path / "home", "-c", RUN_TWO, f"--json --out {tmp_path / 'out'}", *flags)
    assert first.stdout.endswith("exit 0\n"), first.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [result["source"] for result in report["results"]] == ["Flux", "SDXL", "pooled"] * 2
    assert report["results"][2]["num_identities"] == 500 and report["results"][2]["num_samples"] == 1000

    hub.stop()
    again = run_with(hub, tmp_path / "home", "-c", RUN_TWO, "--limit 5;--split val", *flags)
    assert "plan: 5 identities" in again.stdout and again.stdout.count("exit 0") == 1, again.stderr
    assert again.stdout.endswith("exit 2\n") and "Traceback" not in again.stderr
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: {NEARID}: the Hub cannot be reached")


def test_without_named_sets_the_hubs_own_data_bring_the_seven_of_the_papers_table(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def fetched(repository: str, *_: object) -> Path:
        asked.append(repository)
        return Path("nowhere") / repository

    monkeypatch.setattr(benchmarks, "_published", fetched)
    with pytest.raises(InputError, match="nowhere/Aleksandar/NearID"):
        benchmarks.nearid_rows(NEARID)
    assert asked == [NEARID, *(f"{NEARID}-{source}" for source in TABLE_SOURCES)]


def test_rows_are_copied_by_position_and_no_other_group_of_rows_is_read(tmp_path: Path):
    paths = []
    for number, count in enumerate((25, 10, 30)):
        first = (0, 25, 35)[number]
        table = pyarrow.table(
            {"id": range(first, first + count), "split": ["train"] * count, "x": [b"x" * 4000] * count}
        )
        paths.append(str(tmp_path / f"{number}.parquet"))
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=10)
    files = LocalFileSystem()
    for start, stop in ((0, 65), (18, 23), (24, 36), (33, 61), (60, 65)):
        copy_rows(files, paths, start, stop, tmp_path / "out" / "part.parquet", expected_rows=65)
        copied = pyarrow.parquet.read_table(tmp_path / "out" / "part.parquet")
        assert copied["id"].to_pylist() == list(range(start, stop)) and copied.column_names == ["id", "x"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part.parquet"]
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:-9])
    with pytest.raises(pyarrow.ArrowException):
        copy_rows(files, paths, 0, 30, tmp_path / "out" / "other.parquet", expected_rows=65)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part.parquet"]


def test_sets_of_another_length_have_no_splits_by_position(tmp_path: Path):
    paths = [str(tmp_path / "0.parquet")]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(65)}), paths[0])
    files = LocalFileSystem()
    with pytest.raises(InputError, match="65 rows, where 64 were published"):
        copy_rows(files, paths, 0, 5, tmp_path / "out" / "part.parquet", expected_rows=64)


# --- Mind-the-Glitch -------------------------------------------------------------------------------------------------

SAMPLES = 7


def mask(width: int) -> Image.Image:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[4:36, 4 : 4 + width] = 255
    return Image.fromarray(pixels)


def edit_case(row: int) -> tuple[list[Image.Image], list[Image.Image], list[int]]:
    """Originals and edited pictures of two views, and the widths of the edited parts, of objects 30 pixels wide."""
    originals = [checkered(50 * row + view, SIDE) for view in range(2)]
    originals[1] = Image.blend(originals[0], originals[1], 0.05 + 0.1 * row)
    widths = [3 + (5 * row + 3 * view) % 14 for view in range(2)]
    edited = []
    for view, width in enumerate(widths):
        image = originals[view].copy()
        image.paste(checkered(50 * row + 20 + view, SIDE), (0, 0), mask(width))
        edited.append(image)
    return originals, edited, widths


@pytest.fixture
def mtg_dir(tmp_path: Path) -> Path:
    """Mind-the-Glitch as its card tells: no ids, a split `test`."""
    cases = [edit_case(row) for row in range(SAMPLES)]
    columns = {}
    for view in range(2):
        columns |= {
            f"image_{view + 1}_original": [encoded(originals[view]) for originals, _, _ in cases],
            f"image_{view + 1}_inpainted": [encoded(edited[view]) for _, edited, _ in cases],
            f"image_{view + 1}_object_mask": [encoded(mask(30)) for _ in cases],
            f"image_{view + 1}_part_mask": [encoded(mask(widths[view])) for _, _, widths in cases],
        }
    return write_parquet(tmp_path / "mtg-dataset/data/test-00000-of-00001.parquet", columns).parents[1]


def test_mtg_table_is_that_of_plain_loops(
    mtg_dir: Path,
    tiny_trained_dir: Path,
    tiny_nearid_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    flags = ("--benchmark", "mtg", "--data", mtg_dir, "--model", tiny_trained_dir, "--trunk", tiny_nearid_dir)
    with counted_pictures(monkeypatch) as runs:
        report = run_json(capsys, *flags)
    assert sum(runs) == 4 * SAMPLES
    cases = [edit_case(row) for row in range(SAMPLES)]
    slow = embeddings(tiny_trained_dir, tiny_nearid_dir, [image for a, b, _ in cases for image in (*a, *b)])
    assert [result["encoder"] for result in report["results"]] == ENCODERS
    for result in report["results"]:
        s12, s11, s22, s12_edited, s21_edited, o1, o2 = ([] for _ in range(7))
        for row, (_, _, widths) in enumerate(cases):
            one, two, one_edited, two_edited = slow[result["encoder"]][4 * row : 4 * row + 4].double()
            s12.append(float(one @ two))
            s11.append(float(one @ one_edited))
            s22.append(float(two @ two_edited))
            s12_edited.append(float(one @ two_edited))
            s21_edited.append(float(two @ one_edited))
            o1.append(1 - widths[0] / 30)
            o2.append(1 - widths[1] / 30)
        pair = [np.corrcoef(s11, o1)[0, 1], np.corrcoef(s22, o2)[0, 1]]
        four = [*pair, np.corrcoef(s12_edited, o2)[0, 1], np.corrcoef(s21_edited, o1)[0, 1]]
        assert result["m_o_pair"] == pytest.approx(np.tanh(np.mean(np.arctanh(pair))), abs=1e-4)
        assert result["m_o"] == pytest.approx(np.tanh(np.mean(np.arctanh(four))), abs=1e-4)
        wins = [(a > b) + (a > c) for a, b, c in zip(s12, s11, s22)]
        assert result["ssr"] == pytest.approx(sum(won == 2 for won in wins) / SAMPLES)
        assert result["pa"] == pytest.approx(sum(wins) / (2 * SAMPLES))
        assert result["num_identities"] == SAMPLES
        for name in ("m_o", "m_o_pair", "ssr", "pa"):
            assert result[f"{name}_interval"][0] <= result[name] <= result[f"{name}_interval"][1]
    assert 0 < report["results"][0]["pa"] < 1
    assert nearid("evaluate", *flags, "--limit", 5) == 0
    table = capsys.readouterr().out
    assert "M-O pair" in table and "over identities" in table and f"{report['results'][0]['m_o']:.3f}" not in table


# --- DreamBench++ ----------------------------------------------------------------------------------------------------

RUNS = {  # the folders as they were published, and in the ratings' spelling
    "emu2_gs3_step50_seed42_torch_bfloat16": "emu2",
    "dreambooth_sd_gs7_5_step100_seed42_torch_float16": "dreambooth_sd",
    "ip_adapter_plus_vit_huge_sdxl_scale0_6_gs7_5_step100_seed42_torch_float16": "ip_adapter_plus_vit_h_sdxl",
}
RATED_SUBJECTS = (
    "live_subject_animal_00_kitten",
    "live_subject_animal_13_polar_bear",
    "object_19_mug",
    "object_20_magic_cube",
    "object_33_shoe",
)
PROMPTS = 4


def sample_name(subject: str) -> str:
    return "object_20_rubik's_cube" if subject == "object_20_magic_cube" else subject


def drawn_picture(method: int, subject: int, prompt: int) -> Image.Image:
    other = checkered(700 + 100 * method + 10 * subject + prompt, SIDE)
    return Image.blend(checkered(subject, SIDE), other, 0.1 + 0.2 * ((prompt + method + subject) % 4))


def rating(group: int, method: int, subject: int, prompt: int) -> int:
    """0 to 4, by chance and by how much of the subject is left."""
    chance = np.random.default_rng([group, method, subject, prompt]).integers(0, 2)
    return int(3 - (prompt + method + subject) % 4 + chance)


@pytest.fixture
def dreambench_dir(tmp_path: Path) -> Path:
    """The two published archives, unpacked into one folder."""
    home = tmp_path / "dreambench_plus"
    merged = home / "data_human_rating" / "merged_data"
    for method, (run, rated_as) in enumerate(RUNS.items()):
        groups: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for number, subject in enumerate(RATED_SUBJECTS):
            for prompt in range(PROMPTS):
                for kind, image in (
                    ("src_image", checkered(number, SIDE)),
                    ("tgt_image", drawn_picture(method, number, prompt)),
                ):
                    path = home / "samples" / run / kind / sample_name(subject) / f"{prompt}_0.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
                for group in range(2):
                    groups[group][f"{subject}-{prompt}"] = rating(group, method, number, prompt)
        for group, ratings in enumerate(groups, start=1):
            (merged / f"group{group}").mkdir(parents=True, exist_ok=True)
            (merged / f"group{group}" / f"{rated_as}-cp.json").write_text(json.dumps(ratings, indent=4))
            (merged / f"group{group}" / f"{rated_as}-pf.json").write_text("{}")
    return home


def category_of(subject: str) -> str:
    return "object" if subject.startswith("object") else "live_subject_animal"


def test_dreambench_table_is_that_of_plain_loops_and_embeds_each_reference_once(
    dreambench_dir: Path,
    tiny_trained_dir: Path,
    tiny_nearid_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    flags = ("--benchmark", "dreambench++", "--data", dreambench_dir)
    flags += ("--model", tiny_trained_dir, "--trunk", tiny_nearid_dir)
    with counted_pictures(monkeypatch) as runs:
        report = run_json(capsys, *flags)
    # 5 references, though each lies there 12 times, and what 3 methods drew.
    assert sum(runs) == 5 + 3 * 5 * PROMPTS
    assert report["intervals"].startswith("95 % bootstrap intervals over subjects")
    found = {(result["encoder"], result["category"]): result for result in report["results"]}
    categories = ["live_subject_animal", "object", "mean of categories", "pooled"]
    assert list(found) == [(name, kind) for name in (*ENCODERS, "people, group 1 and 2") for kind in categories]

    places = [(m, s, p) for m in range(3) for s in range(5) for p in range(PROMPTS)]
    references = embeddings(tiny_trained_dir, tiny_nearid_dir, [checkered(s, SIDE) for s in range(5)])
    drawn = embeddings(tiny_trained_dir, tiny_nearid_dir, [drawn_picture(*place) for place in places])
    for encoder in ENCODERS:
        scores = {
            place: float(references[encoder][place[1]] @ vector)
            for place, vector in zip(places, drawn[encoder], strict=True)
        }
        for wanted in ("live_subject_animal", "object", "pooled"):
            by_method = []
            for method in range(3):
                kept = [
                    place
                    for place in places
                    if place[0] == method and wanted in ("pooled", category_of(RATED_SUBJECTS[place[1]]))
                ]
                mine = [scores[place] for place in kept]
                with_groups = [np.corrcoef(mine, [rating(g, *place) for place in kept])[0, 1] for g in range(2)]
                by_method.append(sum(with_groups) / 2)
            result = found[encoder, wanted]
            expected = np.tanh(np.mean(np.arctanh(by_method)))
            assert result["m_h"] == pytest.approx(expected, abs=1e-4), (encoder, wanted)
            assert result["standard_error"] == pytest.approx(np.std(by_method, ddof=1) / math.sqrt(3), abs=1e-4)
            assert [result["per_method"][name] for name in RUNS.values()] == pytest.approx(by_method, abs=1e-4)
            assert result["m_h_interval"][0] <= result["m_h"] <= result["m_h_interval"][1]
    assert found["encoder", "object"]["num_subjects"] == 3
    assert found["encoder", "object"]["num_pictures"] == 3 * 3 * PROMPTS
    assert found["encoder", "pooled"]["num_pictures"] == 3 * 5 * PROMPTS

    assert nearid("evaluate", *flags, "--limit", 1) == 0
    table = capsys.readouterr().out
    assert "24 rated pictures of 2 subjects, 3 methods" in table and "over subjects" in table


def test_agreement_is_that_of_the_metrics_and_follows_the_raters():
    generator = torch.Generator().manual_seed(3)
    shape = (3, 8, 5)  # methods, subjects, prompts
    first, noise, other = torch.randn(3, *shape, generator=generator)
    second = first + 0.5 * noise
    methods = [f"method-{m}" for m in range(3) for _ in range(40)]
    subjects = [f"subject-{s}" for _ in range(3) for s in range(8) for _ in range(5)]
    categories = ["object" if s < 5 else "style" for _ in range(3) for s in range(8) for _ in range(5)]
    ratings = torch.stack([first, second], dim=-1).reshape(-1, 2)
    means = []
    for share in (0.0, 1.0, 4.0):
        scores = (share * first + other + 100).double()  # far from 0: sums of squares must not eat the digits
        ours = measure_agreement(scores.flatten(), ratings, methods, subjects, categories, num_resamples=200)
        of_method = [categories[:40]] * 3
        theirs = metrics.human_correlation_by_category(
            list(scores.flatten(1)), list(first.flatten(1)), list(second.flatten(1)), of_method
        )
        for name in ("object", "style", "pooled"):
            assert ours[name].m_h == pytest.approx(theirs[name].mean, abs=1e-9)
            assert ours[name].standard_error == pytest.approx(theirs[name].standard_error, abs=1e-9)
        expected = metrics.fisher_mean([theirs["object"].mean, theirs["style"].mean], clip=0.9999)
        assert ours["mean of categories"].m_h == pytest.approx(expected, abs=1e-9)
        means.append(ours["pooled"].m_h)
    assert means == sorted(means) and means[-1] > 0.8


def test_a_subjects_pictures_are_drawn_together():
    """Pictures of one subject that all say the same are no more evidence than one of them."""
    torch.manual_seed(1)
    scores, ratings = torch.randn(12), torch.randn(12, 2)
    names = ([*"mm"] * 6, [f"s{n}" for n in range(12)], ["object"] * 12)
    once = measure_agreement(scores, ratings, *names)["object"]
    thrice = measure_agreement(scores.repeat(3), ratings.repeat(3, 1), *(name * 3 for name in names))["object"]
    assert thrice.m_h == pytest.approx(once.m_h) and thrice.m_h_interval == pytest.approx(once.m_h_interval)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--benchmark", "nearid", "--distractors", "nowhere/else"], "nowhere/else"),
        (["--benchmark", "mtg", "--distractors", "x"], "--distractors x"),
        (["--benchmark", "nearid", "--ratings", "x"], "--ratings x"),
        (["--benchmark", "mtg"], "image_1_original"),
        (["--benchmark", "dreambench++"], "src_image"),
        (["--benchmark", "nearid", "--split", "val"], "'val'"),
        (["--benchmark", "fid"], "--benchmark"),
    ],
)
def test_wrong_input_is_one_line(
    flags: list, words: str, nearid_dir: Path, tiny_nearid_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert nearid("evaluate", "--data", nearid_dir, "--model", tiny_nearid_dir, *flags) == 2
    assert_last_line(capsys, words)


def test_views_alone_and_ids_that_differ_are_one_line(
    nearid_dir: Path, tiny_nearid_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("evaluate", "--benchmark", "nearid", "--data", nearid_dir / "NearID", "--model", tiny_nearid_dir)
    assert nearid(*flags) == 2
    assert_last_line(capsys, "--distractors")
    picture = encoded(checkered(1, SIDE))
    other = write_parquet(tmp_path / "NearID-Other.parquet", {"id": [*range(8)], "nimg1": [picture] * 8})
    assert nearid(*flags, "--distractors", other) == 2
    assert_last_line(capsys, "'100'")


def spoil_rating(home: Path) -> None:
    path = home / "data_human_rating/merged_data/group2/emu2-cp.json"
    ratings = json.loads(path.read_text())
    del ratings["object_19_mug-2"]
    path.write_text(json.dumps(ratings))


def spoil_all(home: Path, kind: str, text: str) -> None:
    for path in home.rglob(kind):
        path.write_text(text)


def remove_method(home: Path) -> None:
    for path in home.rglob("emu2-cp.json"):
        path.unlink()


SPOILT = {
    "a picture without a rating": (spoil_rating, "object_19_mug-2"),
    "a reference without a picture": (
        lambda home: next(home.rglob("emu2*/tgt_image/object_19_mug/2_0.png")).unlink(),
        "object_19_mug-2",
    ),
    "a prompt with two pictures": (
        lambda home: next(home.rglob("emu2*/tgt_image/object_19_mug/2_0.png")).with_name("2_1.png").write_bytes(b""),
        "second picture",
    ),
    "no ratings at all": (lambda home: [path.unlink() for path in home.rglob("*.json")], "--ratings"),
    "ratings of one group only": (
        lambda home: next(home.rglob("group2")).rename(home / "elsewhere"),
        "group2",
    ),
    "ratings that are no JSON": (lambda home: spoil_all(home, "emu2-cp.json", "{"), "no JSON"),
    "ratings of both kinds in one": (lambda home: spoil_all(home, "emu2-cp.json", '{"a": [1, 2]}'), "one number"),
    "a picture that cannot be read": (lambda home: spoil_all(home, "src_image/*/2_0.png", "x"), "2_0.png"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_wrong_with_dreambench_is_one_line(
    how: str, dreambench_dir: Path, tiny_nearid_dir: Path, capsys: pytest.CaptureFixture[str]
):
    spoil, words = SPOILT[how]
    spoil(dreambench_dir)
    flags = ("--benchmark", "dreambench++", "--data", dreambench_dir, "--model", tiny_nearid_dir)
    assert nearid("evaluate", *flags) == 2
    assert_last_line(capsys, words)


def test_samples_that_nobody_rated_are_left_out_by_name_and_ratings_may_lie_elsewhere(
    dreambench_dir: Path, tmp_path: Path
):
    remove_method(dreambench_dir)
    (dreambench_dir / "data_human_rating").rename(tmp_path / "people")
    found = load_rated_pictures(dreambench_dir / "samples", tmp_path / "people")
    assert found.methods == ("dreambooth_sd", "ip_adapter_plus_vit_h_sdxl")
    assert found.unrated == ("emu2_gs3_step50_seed42_torch_bfloat16",)
    cube = next(picture for picture in found.pictures if picture.subject == "object_20_magic_cube")
    assert cube.category == "object" and cube.picture.parent.name == "object_20_rubik's_cube"


# --- encoders --------------------------------------------------------------------------------------------------------


def test_a_head_alone_brings_the_trunk_that_it_names_and_half_precision_says_the_same(
    nearid_dir: Path, tiny_nearid_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    torch.manual_seed(5)
    save_head(model.reset_head(), tmp_path / "head", str(tiny_nearid_dir), preprocessing)
    flags = ("--benchmark", "nearid", "--data", nearid_dir, "--model", tmp_path / "head")
    whole, half = (run_json(capsys, *flags, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert whole["models"] == {"encoder": str(tmp_path / "head"), "frozen trunk": str(tiny_nearid_dir)}
    assert [result["encoder"] for result in whole["results"]][::3] == ENCODERS
    for one, other in zip(whole["results"], half["results"], strict=True):
        assert one["num_samples"] == other["num_samples"] and abs(one["pa"] - other["pa"]) < 0.2


def test_another_trunk_is_measured_by_itself(
    nearid_dir: Path,
    tiny_nearid_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    torch.manual_seed(6)
    other = type(model)(model.config)
    other.save_pretrained(tmp_path / "other")
    preprocessing.save(tmp_path / "other")
    flags = ("--benchmark", "nearid", "--data", nearid_dir, "--model", tiny_nearid_dir)
    alone = run_json(capsys, *flags)
    with counted_pictures(monkeypatch) as runs:
        both = run_json(capsys, *flags, "--trunk", tmp_path / "other")
    assert sum(runs) % 2 == 0 and [result["encoder"] for result in both["results"]][::3] == ENCODERS
    assert both["results"][:3] == alone["results"][:3]
    assert both["results"][6:] != alone["results"][3:]  # the other trunk's mean token, not the encoder's
    assert nearid("evaluate", *flags, "--trunk", "nowhere") == 2
    assert_last_line(capsys, "nowhere")


def test_the_commands_of_the_guide_are_commands():
    guide = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in guide.splitlines() if line.startswith("nearid evaluate")]
    parsed = [parse(command) for command in commands]
    assert [command.benchmark for command in parsed] == ["nearid", "mtg", "dreambench++"]
    assert [command.data for command in parsed] == [NEARID, benchmarks.MTG, "dreambench_plus"]
