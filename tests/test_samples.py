"""Grids of samples: each cell is the plain pipeline's picture, and each figure is what a slow loop says."""

import json
import math

import pytest
import torch
from conftest import checkered
from tiny_pipelines import flux, sd, sdxl

from nearid_personalize import IdentityScorer
from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.floors.copies import COPY_LIMIT, copy_similarity, diversity, thumbnails
from nearid_personalize.guard.hooks import find_denoiser
from nearid_personalize.images import to_tensor
from nearid_personalize.lora.samples import SampleScores, default_prompts, draw_samples, measure_samples
from nearid_personalize.miniworld import context_prompts, example_references


@pytest.mark.parametrize("living", [True, False])
def test_default_prompts_name_the_subject_each_in_its_own_way(living):
    prompts = default_prompts("sks dog", living)
    assert 6 <= len(set(prompts)) == len(prompts) <= 8
    assert all(prompt.count("sks dog") == 1 for prompt in prompts)
    assert set(default_prompts("sks dog", True)) != set(default_prompts("sks dog", False))


@pytest.mark.parametrize(
    ("build", "more"),
    [(sd, {"negative_prompt": "blurry"}), (sdxl, {"negative_prompt": "blurry"}), (flux, {})],
    ids=["sd", "sdxl", "flux"],
)
def test_every_cell_is_the_plain_pipelines_picture(build, more):
    pipe, arguments = build()
    pipe.set_progress_bar_config(disable=True)
    more = {**arguments, **more, "num_inference_steps": 2}
    more.pop("prompt")
    prompts, seeds = ["sks dog", "a sks dog in snow"], [3, 1, 8]
    grid = draw_samples(pipe, prompts, seeds, max_batch_size=4, **more)
    for row, prompt in zip(grid, prompts, strict=True):
        for cell, seed in zip(row, seeds, strict=True):
            plain = pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **more).images[0]
            assert (to_tensor([cell]) - to_tensor([plain])).abs().max() <= 1 / 255


def test_a_batch_too_large_for_memory_is_halved():
    pipe, arguments = sd()
    pipe.set_progress_bar_config(disable=True)
    more = {key: value for key, value in arguments.items() if key != "prompt"} | {"num_inference_steps": 1}
    whole = draw_samples(pipe, ["sks"], range(3), **more)
    rows: list[int] = []

    def scarce(module, args):
        rows.append(len(args[0]))
        if len(args[0]) > 2:  # two halves of guidance for one picture
            raise torch.OutOfMemoryError("CUDA out of memory.")

    find_denoiser(pipe).register_forward_pre_hook(scarce)
    halved = draw_samples(pipe, ["sks"], range(3), **more)
    assert (to_tensor(halved[0]) - to_tensor(whole[0])).abs().max() <= 1 / 255
    assert max(rows) == 6 and rows.count(2) == 3


@pytest.mark.parametrize(
    ("prompts", "seeds", "more", "named"),
    [([], [0], {}, "0 prompts"), (["a"], [], {}, "0 seeds"), (["a"], [0], {"generator": 1}, "generator")],
)
def test_a_grid_that_cannot_be_drawn_is_refused(prompts, seeds, more, named):
    pipe, _ = sd()
    with pytest.raises(InputError, match=named):
        draw_samples(pipe, prompts, seeds, **more)


@pytest.fixture(scope="module")
def world():
    references, category, _ = example_references()
    scorer = IdentityScorer.from_pretrained("miniworld")
    return references, category, scorer, scorer.enroll(references)


def test_figures_are_those_of_slow_loops(world):
    references, category, scorer, subject = world
    others, _, _ = example_references(1)
    images = [[references[0], others[0]], [others[1], checkered(1, 64)]]
    prompts = context_prompts(category)[:2]
    encoder = TextImageEncoder.from_pretrained("miniworld")
    scores = measure_samples(images, prompts, scorer, subject, references, encoder)

    for p, row in enumerate(images):
        for s, image in enumerate(row):
            identity = float(scorer.score([image], subject))
            copy = float(copy_similarity(thumbnails([image]), thumbnails(references)).max())
            adherence = float(encoder.embed_images([image])[0] @ encoder.embed_texts([prompts[p]])[0])
            assert math.isclose(scores.identity[p, s], identity, abs_tol=1e-5)
            assert bool(scores.accepted[p, s]) == (identity >= subject.threshold)
            assert bool(scores.copied[p, s]) == (copy >= COPY_LIMIT)
            assert math.isclose(scores.adherence[p, s], adherence, abs_tol=1e-5)
    assert scores.copied.tolist() == [[True, False], [False, False]]
    assert scores.copy_rate == 0.25 and scores.accept_rate == float(scores.accepted.float().mean())
    assert math.isclose(scores.diversity, sum(map(diversity, images)) / 2, rel_tol=1e-5)
    assert scores.identity[0, 0] > scores.identity[0, 1]


def test_the_right_place_adheres_more(world):
    _, category, scorer, subject = world
    references, _, _ = example_references()
    images = [[references[0]]]
    encoder = TextImageEncoder.from_pretrained("miniworld")
    adherence = {
        prompt: measure_samples(images, [prompt], scorer, subject, references, encoder).adherence_mean
        for prompt in context_prompts(category)
    }
    wrong = [value for prompt, value in adherence.items() if prompt.endswith("in space")]
    assert max(adherence.values()) > wrong[0]  # no reference is in space


def test_scores_are_json_even_of_a_single_seed(world):
    references, category, scorer, subject = world
    scores = measure_samples([[references[0]]], [category], scorer, subject, references)
    told = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert math.isnan(scores.diversity) and told["diversity"] is None and told["adherence"] is None
    assert told["samples"]["copied"] == [[True]] and told["copy_rate"] == 1


def test_rows_must_be_full(world):
    references, _, scorer, subject = world
    for images, prompts in (([], []), ([references[:1], references[:2]], ["a", "b"]), ([references], ["a", "b"])):
        with pytest.raises(InputError, match="images"):
            measure_samples(images, prompts, scorer, subject, references)


def test_means_of_a_known_grid():
    scores = SampleScores(
        torch.tensor([[0.5, 1.0]]), torch.tensor([[False, True]]), torch.zeros(1, 2).bool(), None, 0.3
    )
    assert (scores.identity_mean, scores.accept_rate, scores.copy_rate) == (0.75, 0.5, 0.0)
    assert scores.adherence_mean is None
