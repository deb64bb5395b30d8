"""The quality probe's pictures and its fit, and the trainer as a command."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from diffusers import StableDiffusionPipeline

from nearid_personalize.errors import InputError
from nearid_personalize.floors.quality import QualityFloor
from nearid_personalize.training.quality import (
    DAMAGES,
    QualityOptions,
    centre_at_half,
    draw,
    fit_probe,
    for_validation,
    make_pictures,
    measure,
    miniworld_photos,
    miniworld_prompts,
    qualities,
    slightly_varied,
)

SMALL = QualityOptions(num_photos=24, num_drawn=8, drawing_steps=4, fit_steps=60)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_dir) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(a, b) -> float:
    """Mean absolute difference of two pictures, in [0, 1]."""
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255)


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("size", [32, 61])
def test_damages_change_the_picture_and_follow_their_seed(name, size):
    image, other = (next(iter(miniworld_photos("train", 1))), checkered(1))
    image, other = image.resize((size, size)), other.resize((size, size))
    damaged, again, different = (DAMAGES[name](image, random.Random(seed), other) for seed in (0, 0, 1))
    assert damaged.size == image.size and damaged.mode == "RGB"
    assert difference(damaged, image) > 0.01
    assert difference(damaged, again) == 0 < difference(damaged, different)


def test_slight_variation_stays_slight():
    image = next(iter(miniworld_photos("train", 1)))
    changes = [difference(slightly_varied(image, random.Random(seed)), image) for seed in range(40)]
    assert max(changes) < 0.12 and min(changes) == 0


def test_a_picture_broken_off_differs_and_the_pipeline_is_itself_again(pipe):
    prompts, seeds = ["a dog", "a cat"], [3, 4]
    finished = draw(pipe, prompts, seeds, 4, 1.0)
    broken = draw(pipe, prompts, seeds, 4, 1.0, stop_after=1)
    assert len(broken) == 2 and difference(finished[0], broken[0]) > 0
    whole = draw(pipe, prompts, seeds, 4, 1.0, stop_after=4)
    assert [difference(a, b) for a, b in zip(finished, whole)] == [0, 0]
    assert difference(draw(pipe, prompts, seeds, 4, 1.0)[1], finished[1]) == 0


def test_every_kind_of_picture_is_made_at_the_encoders_size(pipe):
    photos, prompts = miniworld_photos("train", 24), miniworld_prompts("train", 8)
    good, bad = make_pictures(pipe, photos, prompts, 32, SMALL)
    assert list(good) == ["photos", "reconstructed", "finished"]
    assert [len(images) for images in good.values()] == [8, 16, 8]
    assert set(DAMAGES) < set(bad) and {"noisy latents", "one step", "two steps", "broken off"} < set(bad)
    for images in (good | bad).values():
        assert images and {image.size for image in images} == {(32, 32)}


def test_too_few_photos_are_refused(pipe):
    with pytest.raises(InputError, match="--data: 3 photos"):
        make_pictures(pipe, miniworld_photos("train", 3), ["a dog"] * 8, 32, SMALL)


@pytest.mark.parametrize(
    ("field", "value"), [("num_photos", 3), ("num_drawn", 1), ("drawing_steps", 1), ("fit_steps", 0)]
)
def test_impossible_numbers_are_refused_by_flag(field, value):
    with pytest.raises(InputError, match="^--" + field.replace("_", "-")):
        QualityOptions(**{field: value})
    with pytest.raises(InputError, match=r"^--false-alarm-rate"):
        QualityOptions(false_alarm_rate=1.5)


def clusters(shift: float, num: int = 200, seed: int = 0) -> torch.Tensor:
    """Tokens [num,5,8], the first channel moved by `shift`."""
    tokens = torch.randn(num, 5, 8, generator=torch.Generator().manual_seed(seed))
    tokens[:, :, 0] += shift
    return tokens


def test_the_fit_tells_good_from_bad_and_the_threshold_keeps_its_rate():
    good = {"reconstructed": clusters(1.5), "finished": clusters(1.5, seed=1)}
    bad = {"blur": clusters(-1.5, seed=2)}
    options = QualityOptions(fit_steps=150, false_alarm_rate=0.1)
    probe = fit_probe(good, bad, options)
    centre_at_half(probe, good, options)
    rates = measure(probe, good, bad, 0.5, "clusters")
    assert rates.miss["blur"] < 0.05 and rates.num_bad == {"blur": 200}
    pooled = torch.cat([qualities(probe, tokens) for tokens in good.values()])
    assert float((pooled < 0.5).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert rates.false_alarm["finished"] == float((qualities(probe, good["finished"]) < 0.5).double().mean())


def test_the_fit_follows_its_seed():
    good, bad = {"photos": clusters(1)}, {"blur": clusters(-1, seed=1)}
    one, same, other = (
        fit_probe(good, bad, QualityOptions(fit_steps=5, seed=seed)).decide.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_validation_draws_other_pictures():
    options = for_validation(SMALL)
    assert options.seed != SMALL.seed and options.num_photos == 24
    assert for_validation(QualityOptions()).num_photos == QualityOptions().num_photos // 3
    assert set(miniworld_prompts("val", 8)).isdisjoint(miniworld_prompts("train", 8))


def run_trainer(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "trainers/train_quality.py", *map(str, arguments)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_leaves_a_floor_that_loads(tiny_nearid_dir, tiny_pipeline_dir, tmp_path):
    folder = shutil.copytree(tiny_nearid_dir, tmp_path / "model")
    few = ("--num-photos", "24", "--num-drawn", "8", "--drawing-steps", "4", "--fit-steps", "5")
    done = run_trainer("--model", folder, "--pipeline", tiny_pipeline_dir, *few)
    assert done.returncode == 0, done.stderr[-2000:]
    floor = QualityFloor.from_pretrained(folder)
    assert floor.threshold == 0.5 and "validation pictures of miniworld" in floor.rates.measured_on
    assert set(floor.rates.num_bad) > set(DAMAGES) and "one step" in done.stdout

    photos = tmp_path / "photos"
    for subject in range(30):
        (photos / f"subject-{subject}").mkdir(parents=True)
        for view in range(8):
            checkered(8 * subject + view).save(photos / f"subject-{subject}" / f"{view}.png")
    wrong = run_trainer("--model", folder, "--pipeline", tiny_pipeline_dir, "--data", photos, *few)
    assert wrong.returncode == 2 and "error: --prompts: needed" in wrong.stderr
