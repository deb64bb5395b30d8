"""Near enough and different enough: measures, limits from quantiles, refusals."""

import math

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image

from nearid_personalize.distractors.nearness import (
    Limits,
    Measuring,
    Pair,
    Quantiles,
    Scores,
    limits_from,
    refusal,
    same_subject_similarities,
    scores_from,
    seam_ratio,
    subject_alone,
    surroundings,
    to_fields,
    token_change,
)
from nearid_personalize.errors import InputError
from nearid_personalize.scorer.scorer import IdentityScorer


def square_mask(size: int = 48, left: int = 10, right: int = 38) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[left:right, left:right] = True
    return mask


def pasted(view: Image.Image, other: Image.Image, mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(mask[..., None], np.asarray(other), np.asarray(view)))


# --- limits and refusals ---------------------------------------------------------------------------------------------
def test_limits_refuse_the_stated_share_of_the_first_tries():
    values = np.random.default_rng(0).random(200)
    first = [Scores(trunk_similarity=v, identity_similarity=1 - v, visible_change=v, seam=v) for v in values]
    quantiles = Quantiles(not_near=0.1, too_alike=0.2, unchanged=0.0, seam=0.0)
    limits = limits_from(first, quantiles=quantiles)
    assert limits.min_visible_change is None and limits.max_seam is None
    assert sum(score.trunk_similarity < limits.min_trunk_similarity for score in first) == pytest.approx(20, abs=1)
    assert sum(score.identity_similarity > limits.max_identity_similarity for score in first) == pytest.approx(
        40, abs=1
    )


def test_of_few_tries_none_is_refused_for_its_rank_alone():
    first = [Scores(trunk_similarity=value, visible_change=value, seam=value) for value in (0.1, 0.2, 0.3)]
    limits = limits_from(first)
    assert all(not refusal(score, limits) for score in first)


def test_without_an_identity_head_the_trunk_says_what_is_too_alike():
    first = [Scores(trunk_similarity=value) for value in np.linspace(0, 1, 101)]
    limits = limits_from(first)
    assert limits.max_identity_similarity is None
    assert limits.min_trunk_similarity == pytest.approx(0.1) and limits.max_trunk_similarity == pytest.approx(0.9)


def test_a_distractor_may_not_be_as_alike_as_the_subjects_own_views():
    first = [Scores(identity_similarity=value) for value in np.linspace(0.5, 1, 51)]
    assert limits_from(first, same_subject=[0.7, 0.8, 0.9]).max_identity_similarity == pytest.approx(0.71)
    assert limits_from(first, same_subject=[0.99, 1.0]).max_identity_similarity == pytest.approx(0.95)


def test_limits_that_are_given_go_first():
    first = [Scores(trunk_similarity=value) for value in np.linspace(0, 1, 11)]
    assert limits_from(first, given=Limits(min_trunk_similarity=0.77)).min_trunk_similarity == 0.77


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (Scores(trunk_similarity=0.5), ""),
        (Scores(trunk_similarity=0.4), "not near enough (trunk similarity 0.400, limit 0.500)"),
        (Scores(identity_similarity=0.9), "too much the same subject (identity similarity 0.900, limit 0.800)"),
        (Scores(category_lead=-0.1, trunk_similarity=0.1), "not of the category (category lead -0.100, limit 0.000)"),
        (Scores(seam=3.0), "a seam shows (seam 3.000, limit 2.000)"),
        (Scores(visible_change=0.01), "hardly changed (visible change 0.010, limit 0.100)"),
        (Scores(quality=0.3), "not a good picture (quality 0.300, limit 0.500)"),
        (Scores(), ""),
    ],
)
def test_a_refusal_names_the_measure_and_its_limit(scores, reason):
    limits = Limits(
        min_trunk_similarity=0.5,
        max_identity_similarity=0.8,
        min_visible_change=0.1,
        min_category_lead=0.0,
        min_quality=0.5,
        max_seam=2.0,
    )
    assert refusal(scores, limits) == reason


def test_a_share_that_is_none_is_refused_by_its_flag():
    with pytest.raises(InputError, match="--too-alike 1"):
        Quantiles(too_alike=1)


def test_scores_return_from_their_fields():
    scores = Scores(trunk_similarity=0.25, seam=1.5)
    fields = to_fields(scores)
    assert fields["quality"] is None
    again = scores_from(fields)
    assert again.trunk_similarity == 0.25 and math.isnan(again.quality)


# --- measures --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measure(tiny_nearid_dir):
    return Measuring(scorer=IdentityScorer.from_pretrained(tiny_nearid_dir))


def test_a_distractor_more_like_the_view_scores_higher_and_changes_less(measure):
    """The monotonicity of every similarity: larger = more alike."""
    view, other, mask = checkered(1), checkered(2), square_mask()
    blends = [
        Image.blend(view, other, share) for share in (0.0, 0.05, 0.1, 0.2)
    ]  # a tiny random model is monotone nearby only
    found = measure([Pair(view, pasted(view, blend, mask), mask, mask) for blend in blends])
    for name in ("trunk_similarity", "identity_similarity"):
        values = [getattr(scores, name) for scores in found]
        assert values[0] == pytest.approx(1, abs=1e-5) and values == sorted(values, reverse=True)
    changes = [scores.visible_change for scores in found]
    assert changes[0] == pytest.approx(0, abs=1e-5) and changes == sorted(changes)


def test_the_background_plays_no_part_in_similarities(measure):
    mask = square_mask()
    first, second = (pasted(checkered(seed), checkered(1), mask) for seed in (7, 8))
    other = checkered(2)
    pairs = [Pair(view, pasted(view, other, mask), mask, mask) for view in (first, second)]
    (a, b) = measure(pairs)
    assert a.trunk_similarity == pytest.approx(b.trunk_similarity, abs=1e-6)
    assert a.identity_similarity == pytest.approx(b.identity_similarity, abs=1e-6)


def test_the_category_is_told_from_the_others():
    from nearid_personalize.floors.adherence import TextImageEncoder
    from nearid_personalize.miniworld import CATEGORIES, identity_row

    measure = Measuring(text_image=TextImageEncoder.from_pretrained("miniworld"), categories=CATEGORIES)
    pairs, own = [], []
    for number in range(6):
        row = identity_row("test", number, 1)
        view, mask = Image.fromarray(row.views[0].image), row.views[0].mask
        wrong = next(name for name in CATEGORIES if name != row.pet.category)
        for category in (row.pet.category, wrong):
            pairs.append(Pair(view, Image.fromarray(row.distractors[0].image), mask, mask, category))
            own.append(category == row.pet.category)
    leads = [scores.category_lead for scores in measure(pairs)]
    # A packaged text-image model, on pictures of its own world: right ones lead, wrong ones never do
    assert sum(lead > 0 for lead, right in zip(leads, own, strict=True) if right) >= 5
    assert all(lead < 0 for lead, right in zip(leads, own, strict=True) if not right)


def test_without_models_only_the_seam_is_measured():
    view, mask = checkered(1), square_mask()
    (scores,) = Measuring()([Pair(view, pasted(view, checkered(2), mask), mask, mask)])
    assert not math.isnan(scores.seam)
    assert all(math.isnan(value) for name, value in vars(scores).items() if name != "seam")


def test_a_step_along_the_border_is_a_seam():
    row = np.linspace(60, 160, 48)
    smooth = Image.fromarray(np.tile(row, (48, 1)).astype(np.uint8)).convert("RGB")
    mask = square_mask()
    inside = Image.eval(smooth, lambda value: min(value + 40, 255))
    assert seam_ratio(smooth, smooth, mask) == pytest.approx(1)
    assert seam_ratio(smooth, pasted(smooth, inside, mask), mask) > 10
    assert math.isnan(seam_ratio(smooth, smooth, np.ones((48, 48), bool)))


def test_token_change_counts_places_inside_only():
    before = torch.eye(4)
    after = before.clone()
    after[3] = -before[3]  # the last of 2 x 2 patches is turned round
    white, corner = Image.new("L", (8, 8), 255), Image.new("L", (8, 8))
    corner.paste(255, (4, 4, 8, 8))
    assert token_change(before, after, corner) == pytest.approx(2)
    assert token_change(before, after, white) == pytest.approx(0.5)


def test_a_subject_alone_is_square_and_grey_around():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 5:45] = True
    alone = np.asarray(subject_alone(checkered(1, 60).crop((0, 0, 60, 40)), mask))
    assert alone.shape == (40, 40, 3) and (alone[:14] == 128).all() and (alone[26:] == 128).all()
    assert surroundings(checkered(1, 60).crop((0, 0, 60, 40)), mask).size == (55, 30)


def test_pairs_of_one_subjects_views():
    views = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert same_subject_similarities([views, views[:1]]) == pytest.approx([0.6, 0.0, 0.8])
