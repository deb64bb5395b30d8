"""IdentityGuard around a tiny real pipeline: the same pictures, an honest account, nothing left behind."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.errors import InputError
from nearid_personalize.guard import IdentityGuard, counted_rows
from nearid_personalize.scorer import IdentityScorer

STEPS = 3


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_dir) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scorer(tiny_nearid_dir) -> IdentityScorer:
    return IdentityScorer.from_pretrained(str(tiny_nearid_dir))


@pytest.fixture
def guard(pipe, scorer, photo_dir) -> IdentityGuard:
    return IdentityGuard(pipe, scorer, scorer.enroll(photo_dir))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def with_threshold(guard: IdentityGuard, threshold: float) -> IdentityGuard:
    subject = dataclasses.replace(guard.subject, threshold=threshold)
    return IdentityGuard(guard.pipe, guard.scorer, subject, guard.max_batch_size)


@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_candidate_k_is_the_plain_pipelines_picture(guard, pipe, max_batch_size):
    guard = IdentityGuard(pipe, guard.scorer, guard.subject, max_batch_size)
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "negative_prompt": "blurry"}
    result = guard("sks dog", num_images=1, num_candidates=3, seed=5, **kwargs)
    assert [candidate.seed for candidate in result.candidates] == [5, 6, 7]
    for candidate in result.candidates:
        plain = pipe("sks dog", generator=torch.Generator().manual_seed(candidate.seed), **kwargs).images[0]
        assert np.abs(pixels(candidate.image) - pixels(plain)).max() <= 1
    assert np.abs(pixels(result.candidates[0].image) - pixels(result.candidates[1].image)).max() > 1


def test_scores_and_split_follow_the_scorer(guard):
    first = guard("sks dog", num_images=2, num_candidates=4, num_inference_steps=STEPS)
    scores = guard.scorer.score([candidate.image for candidate in first.candidates], guard.subject)
    assert [candidate.score for candidate in first.candidates] == pytest.approx(scores.tolist(), abs=1e-5)

    ordered = sorted((candidate.score for candidate in first.candidates), reverse=True)
    result = with_threshold(guard, (ordered[2] + ordered[3]) / 2)(
        "sks dog", num_images=2, num_candidates=4, num_inference_steps=STEPS
    )
    assert [candidate.score for candidate in result.accepted] == ordered[:3]
    assert [candidate.score for candidate in result.rejected] == ordered[3:]
    assert "below threshold" in result.rejected[0].reason and result.accepted[0].reason == ""
    assert [id(image) for image in result.images] == [id(candidate.image) for candidate in result.accepted[:2]]
    assert result.best == result.accepted[0]


def test_raising_the_threshold_never_accepts_more(guard):
    counts = []
    for threshold in (-1.0, 0.0, 0.5, 1.1):
        result = with_threshold(guard, threshold)("sks dog", num_images=1, num_candidates=3, num_inference_steps=1)
        counts.append(len(result.accepted))
    assert counts == sorted(counts, reverse=True) and counts[0] == 3 and counts[-1] == 0
    assert result.images == [] and result.best.status == "rejected"


@pytest.mark.parametrize(("guidance_scale", "rows_per_step"), [(1.0, 1), (3.0, 2)])
def test_cost_counts_denoiser_rows(guard, guidance_scale, rows_per_step):
    guard.max_batch_size = 2
    result = guard("sks dog", num_images=1, num_candidates=3, num_inference_steps=STEPS, guidance_scale=guidance_scale)
    assert result.cost.denoiser_rows == result.cost.denoiser_rows_best_of_n == 3 * STEPS * rows_per_step
    assert set(result.cost.seconds) == {"generate", "score"} and min(result.cost.seconds.values()) > 0


def test_four_candidates_per_image_by_default(guard):
    assert len(guard("sks dog", num_images=1, num_inference_steps=1).candidates) == 4


def test_hooks_come_off_also_on_an_exception(guard, pipe):
    def fail(pipe, step, timestep, kwargs):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        guard("sks dog", num_inference_steps=STEPS, callback_on_step_end=fail)
    guard("sks dog", num_images=1, num_candidates=1, num_inference_steps=1)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_pre_hooks_with_kwargs


def test_rows_are_counted_when_the_sample_goes_by_name(pipe):
    noise, embeddings = torch.randn(3, 4, 8, 8), torch.randn(3, 2, 32)
    with torch.no_grad(), counted_rows(pipe.unet) as counter:
        pipe.unet(sample=noise, timestep=1, encoder_hidden_states=embeddings)
    assert counter.rows == 3


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("generator", {"generator": torch.Generator()}),
        ("latents", {"latents": torch.zeros(1)}),
        ("num_images_per_prompt", {"num_images_per_prompt": 2}),
        ("output_type", {"output_type": "latent"}),
        ("return_dict", {"return_dict": False}),
        ("num_images", {"num_images": 0}),
        ("num_candidates", {"num_images": 4, "num_candidates": 3}),
        ("seed", {"seed": -1}),
        ("prompt", {"prompt": ["a", "b"]}),
    ],
)
def test_impossible_calls_are_refused_by_name(guard, argument, kwargs):
    with pytest.raises(InputError, match=f"^{argument} "):
        guard(**{"prompt": "sks dog", **kwargs})


def test_unusable_pipelines_and_batch_sizes_are_refused(guard, pipe):
    with pytest.raises(InputError, match="unet nor a transformer"):
        IdentityGuard(object(), guard.scorer, guard.subject)
    with pytest.raises(InputError, match="max_batch_size"):
        IdentityGuard(pipe, guard.scorer, guard.subject, max_batch_size=0)
