"""Half precision: every judge of pictures runs in bfloat16 and float16, and says nearly what it says in float32."""

import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SiglipVisionConfig

from nearid_personalize import IdentityScorer, NearIDModel
from nearid_personalize.driftmap import drift_maps
from nearid_personalize.encoder.model import NearIDConfig
from nearid_personalize.floors.adherence import AdherenceFloor
from nearid_personalize.floors.quality import QualityFloor
from nearid_personalize.guard.guard import IdentityGuard
from nearid_personalize.guard.policy import FixedSchedule
from nearid_personalize.guard.result import NothingAcceptedWarning
from nearid_personalize.images import to_tensor
from nearid_personalize.miniworld import example_references, photos, sample_pet, similar_pet
from nearid_personalize.photos import check_photos
from nearid_personalize.rewards import IdentityReward, identity_reward
from nearid_personalize.scorer.subject import Subject

NEAR = 0.01
"""By how much scores may differ, of cosines in [-1, 1]; bfloat16 keeps three digits."""
PROMPT = "a photo of a dog in park"


class Judges(NamedTuple):
    """All that a guarded run judges pictures with, in one precision."""

    scorer: IdentityScorer
    subject: Subject
    quality: QualityFloor
    adherence: AdherenceFloor


@pytest.fixture(scope="module")
def references() -> list[Image.Image]:
    return example_references(0, "val")[0]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """The subject elsewhere, another subject, and a near-identity."""
    own, other = example_references(0, "val")[2], sample_pet("val", 7)
    near = similar_pet(own, random.Random(0), 2)
    return [Image.fromarray(photos(pet, 6)[5][0].image) for pet in (own, other, near)]


def judges_in(dtype: torch.dtype, references: list[Image.Image]) -> Judges:
    scorer = IdentityScorer.from_pretrained("miniworld", dtype=dtype)
    return Judges(
        scorer=scorer,
        subject=scorer.enroll(references),
        quality=QualityFloor.from_pretrained("miniworld", scorer),
        adherence=AdherenceFloor.from_pretrained("miniworld", references=references, dtype=dtype),
    )


@pytest.fixture(scope="module")
def whole(references) -> Judges:
    return judges_in(torch.float32, references)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half(request, references) -> Judges:
    return judges_in(request.param, references)


def test_scores_and_thresholds(whole, half, pictures):
    embeddings = half.scorer.embed(pictures)
    assert half.scorer.model.dtype != torch.float32 and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-6)
    for source in (pictures, to_tensor(pictures), to_tensor(pictures).to(half.scorer.model.dtype)):
        scores, expected = half.scorer.score(source, half.subject), whole.scorer.score(source, whole.subject)
        assert scores.dtype == torch.float32 and (scores - expected).abs().max() < NEAR
        # What another precision enrolled is of use, too: a subject's file outlives the machine that wrote it.
        assert (half.scorer.score(source, whole.subject) - expected).abs().max() < NEAR
    assert half.subject.threshold == pytest.approx(whole.subject.threshold, abs=NEAR)


def test_floors(whole, half, pictures):
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    shown = [*pictures, noise]
    assert torch.allclose(half.quality.scores(shown), whole.quality.scores(shown), atol=NEAR)
    assert half.quality.judge(shown)[3] and not any(half.quality.judge(pictures))
    apart = half.adherence.scores(pictures, PROMPT) - whole.adherence.scores(pictures, PROMPT)
    assert apart.abs().max() < 2 * NEAR  # a difference of two cosines


def test_drift_maps(whole, half, pictures, references):
    expected = drift_maps(whole.scorer, pictures[1:], references, shifts=2)
    for found, true in zip(drift_maps(half.scorer, pictures[1:], references, shifts=2), expected):
        assert found.heat.dtype == torch.float32 and found.heat.isfinite().all() and found.heat.min() >= 0
        assert found.score == pytest.approx(true.score, abs=NEAR)
        assert found.peak_rise == pytest.approx(true.peak_rise, abs=NEAR)
        assert F.cosine_similarity(found.heat.flatten(), true.heat.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("of_pixels", [torch.float32, None], ids=["float32 pixels", "half pixels"])
def test_rewards_and_their_gradients(whole, half, pictures, of_pixels):
    pixels = to_tensor(pictures)
    true = pixels.clone().requires_grad_()
    identity_reward(true, whole.scorer, whole.subject).sum().backward()
    given = pixels.to(of_pixels or half.scorer.model.dtype).requires_grad_()
    rewards = identity_reward(given, half.scorer, half.subject)
    rewards.sum().backward()
    assert (rewards - whole.scorer.score(pictures, whole.subject)).abs().max() < NEAR
    assert given.grad is not None and true.grad is not None and given.grad.dtype == given.dtype
    assert F.cosine_similarity(given.grad.float().flatten(), true.grad.flatten(), dim=0) > 0.95


def test_rewards_behind_floors(whole, half, pictures):
    calls = [IdentityReward(j.scorer, j.subject, floors=(j.quality, j.adherence)) for j in (whole, half)]
    expected, found = (call.with_reasons(pictures, [PROMPT] * 3) for call in calls)
    assert found[1]["identity"] == pytest.approx(expected[1]["identity"], abs=NEAR)
    assert [bool(reason) for reason in found[1]["reason"]] == [bool(reason) for reason in expected[1]["reason"]]


def test_checked_photos(whole, half, pictures, references):
    mixed = [*references, pictures[1]]
    expected, found = (check_photos(j.scorer, mixed, floors=(j.quality,)) for j in (whole, half))
    assert found.good == expected.good == (0, 1, 2, 3)
    assert found.consistency == pytest.approx(expected.consistency, abs=NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_released_shape_gives_float32_embeddings(dtype):
    """428 million parameters on the meta device: types and shapes are computed, numbers are not."""
    shape = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    with torch.device("meta"):
        model = NearIDModel(NearIDConfig(vision_config=shape)).cast_trunk(dtype).eval()
        scorer = IdentityScorer(model, 384, (0.5,) * 3, (0.5,) * 3, device="meta", dtype=dtype)
        subject = Subject(torch.empty(4, 1152), threshold=0.5)
        pixels = torch.empty(2, 3, 512, 512, dtype=dtype, requires_grad=True)
        tokens = model.tokens(scorer.preprocessing(pixels))
        rewards = identity_reward(pixels, scorer, subject)
    assert math.isclose(sum(p.numel() for p in model.parameters()), 428e6, rel_tol=0.01)
    assert tokens.shape == (2, 729, 1152) and tokens.dtype == dtype
    assert rewards.shape == (2,) and rewards.dtype == torch.float32


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_survivors_of_a_race_are_the_plain_pictures(family, dtype, whole):
    """Those of the pipeline's own batch of the same seeds, up to the rounding of kernels that depend on the batch."""
    pipe, arguments = tiny_pipelines.build(family)
    prompt, call = arguments.pop("prompt"), {**arguments, "num_inference_steps": 4}
    pipe.to(dtype)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    plain = pipe([prompt] * 4, generator=generators, **call).images
    guard = IdentityGuard(pipe, whole.scorer, whole.subject, policy=FixedSchedule({0.5: 0.5}))
    with pytest.warns(NothingAcceptedWarning):
        result = guard(prompt, num_images=1, num_candidates=4, seed=0, **call)
    assert np.abs(np.asarray(plain[0], int) - np.asarray(plain[1], int)).max() > 40
    finished = [candidate for candidate in result.candidates if candidate.status != "stopped"]
    assert len(finished) == 2
    for candidate in finished:
        apart = np.abs(np.asarray(candidate.image, int) - np.asarray(plain[candidate.seed], int))
        assert apart.max() <= 4
