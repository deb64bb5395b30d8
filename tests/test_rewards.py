"""Rewards: closer is better, gradients are true, and a picture's reward does not depend on its form."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from nearid_personalize import IdentityScorer, InputError
from nearid_personalize.floors.copies import CopyFloor
from nearid_personalize.images import to_tensor
from nearid_personalize.miniworld import example_references
from nearid_personalize.rewards import IdentityReward, identity_reward, require_other_head


@pytest.fixture(scope="module")
def scorer():
    return IdentityScorer.from_pretrained("miniworld")


@pytest.fixture(scope="module")
def photos():
    return example_references(0, "val", num_references=6)[0]


@pytest.fixture(scope="module")
def subject(scorer, photos):
    return scorer.enroll(photos[:4])


@pytest.fixture(scope="module")
def stranger():
    return example_references(1, "val")[0][0]


def test_closer_pictures_get_higher_rewards(scorer, photos, subject, stranger):
    blends = [Image.blend(stranger, photos[4], share) for share in (0.0, 0.5, 1.0)]
    for rewards in (IdentityReward(scorer, subject)(blends), identity_reward(to_tensor(blends), scorer, subject)):
        assert rewards[0] < rewards[1] < rewards[2]


def test_differentiable_reward_is_the_score(scorer, photos, subject):
    rewards = identity_reward(to_tensor(photos), scorer, subject)
    torch.testing.assert_close(rewards, scorer.score(photos, subject), atol=1e-5, rtol=0)


def test_climbing_the_gradient_raises_the_score(scorer, subject, stranger):
    pixels = to_tensor([stranger]).requires_grad_()
    scores = []
    for _ in range(10):
        reward = identity_reward(pixels, scorer, subject)
        (slope,) = torch.autograd.grad(reward.sum(), pixels)
        scores.append(reward.item())
        pixels = (pixels + 0.02 * slope / slope.abs().amax()).clamp(0, 1).detach().requires_grad_()
    assert scores[-1] > scores[0] + 0.1


@pytest.mark.parametrize("side", [64, 80])  # as the model sees it, and resized
def test_gradient_equals_finite_differences(side, scorer, subject, stranger):
    generator = torch.Generator().manual_seed(0)
    pixels = to_tensor([stranger.resize((side, side))]).mul(0.8).add(0.1).requires_grad_()  # off the clamps
    (slope,) = torch.autograd.grad(identity_reward(pixels, scorer, subject).sum(), pixels)
    directions = [slope, torch.randn(pixels.shape, generator=generator) * slope.abs()]
    with torch.no_grad():
        for direction in directions:
            step = 1e-2 * direction / direction.norm()
            ahead, behind = (identity_reward(pixels + sign * step, scorer, subject) for sign in (1, -1))
            expected = 2 * float((slope * step).sum())
            assert float(ahead - behind) == pytest.approx(expected, rel=0.03, abs=2e-6)


def test_scorers_weights_get_no_gradient(scorer, photos, subject):
    assert any(parameter.requires_grad for parameter in scorer.model.parameters())
    pixels = to_tensor(photos[:1]).requires_grad_()
    identity_reward(pixels, scorer, subject).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in scorer.model.parameters())


def test_a_picture_has_one_reward_in_all_forms(scorer, photos, subject):
    reward = IdentityReward(scorer, subject)
    arrays = np.stack([np.asarray(photo) for photo in photos])
    expected = reward(photos, ["a photo"] * 6, [{}] * 6)
    assert isinstance(expected, list) and all(isinstance(value, float) for value in expected)
    floats = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    whole = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    for form in (arrays, list(arrays), arrays / 255, floats, floats.half(), whole, list(whole)):
        assert reward(form) == expected
    assert reward(photos[::-1]) == pytest.approx(expected[::-1], abs=1e-5)


def test_a_copy_gets_the_stated_low_reward(scorer, photos, subject):
    reward = IdentityReward(scorer, subject, (CopyFloor.from_references(photos[:4]),), refused=-0.5)
    copy, own = ImageEnhance.Brightness(photos[1]).enhance(1.1), photos[4]
    rewards, details = reward.with_reasons([copy, own])
    assert rewards == [-0.5, details["identity"][1]]
    assert details["reason"][0].startswith("copies reference 2") and details["reason"][1] == ""
    assert details["identity"][0] > 0


class WordFloor:
    """Refuses pictures whose prompt holds a word."""

    def judge(self, images, prompt):
        return ["word" if "bad" in prompt else ""] * len(images)


def test_floors_see_each_pictures_own_prompt(scorer, photos, subject):
    reward = IdentityReward(scorer, subject, (WordFloor(),))
    refused = [value == -1 for value in reward(photos[:3], ["bad", "good", "bad"])]
    assert refused == [True, False, True]


def test_refusals(scorer, photos, subject):
    reward = IdentityReward(scorer, subject)
    with pytest.raises(InputError, match="prompts: 1 for 2"):
        reward(photos[:2], ["one"])
    with pytest.raises(InputError, match="float pixels from -1 to 1"):
        reward(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    with pytest.raises(InputError, match="empty"):
        reward([])
    with pytest.raises(InputError, match="refused 2"):
        IdentityReward(scorer, subject, refused=2)
    with pytest.raises(InputError, match="has no gradient"):
        identity_reward(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), scorer, subject)


def test_one_head_cannot_be_both(scorer, tiny_nearid_dir):
    with pytest.raises(InputError, match="--reward-model"):
        require_other_head(scorer, IdentityScorer.from_pretrained("miniworld"))
    require_other_head(scorer, IdentityScorer.from_pretrained(tiny_nearid_dir))
