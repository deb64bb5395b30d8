import math

import pytest
import torch
import torch.nn.functional as F

from nearid_personalize.losses import discrimination_tier, gather_rows, info_nce_loss, ranking_tier, two_tier_loss

ANCHORS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
POSITIVES = torch.tensor([[[4, 3, 0, 0], [3, 0, 4, 0]], [[0, 4, 3, 0], [1, 1, 1, 1]]], dtype=torch.float64)
DISTRACTORS = torch.tensor(
    [
        [[3, 0, 0, 4], [0, 0, 0, 1], [1, 1, 1, 1]],
        [[0, 3, 0, 4], [0, -1, 0, 0], [1, 1, 1, 1]],
    ],
    dtype=torch.float64,
)
ALL = (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))
PADDED = (
    torch.tensor([[True, True], [True, False]]),
    torch.tensor([[True, True, False], [True, True, False]]),
)
UNEQUAL = (ALL[0], torch.tensor([[True, False, False], [True, True, True]]))

# Tier 1, tier 2, total (alpha .5), obtained by running the authors' code; the padding-excluded ones from the paper's
# definition. Columns: temperature, masks, exclude_padding.
WORKED = [
    (1.0, ALL, False, (1.708848, 1.207200, 2.312448)),
    (1.0, ALL, True, (1.708848, 1.207200, 2.312448)),
    (1.0, PADDED, False, (1.698415, 1.321900, 2.359365)),
    (1.0, PADDED, True, (1.342097, 1.056571, 1.870382)),
    (0.07, ALL, False, (1.918854, 5.541182, 4.689445)),
    (0.07, ALL, True, (1.918854, 5.541182, 4.689445)),
    (0.07, PADDED, False, (1.561713, 7.727499, 5.425463)),
    (0.07, PADDED, True, (1.537322, 6.060978, 4.567811)),
    # Rows with unequally many distractors tell a mean over all of them from a mean of the slots' means.
    (1.0, UNEQUAL, False, (1.708848, 1.247700, 2.332698)),
    (1.0, UNEQUAL, True, (1.573476, 1.247700, 2.197326)),
    (0.07, UNEQUAL, False, (1.918854, 6.352279, 5.094993)),
    (0.07, UNEQUAL, True, (1.912788, 6.352278, 5.088927)),
]


@pytest.mark.parametrize(("temperature", "masks", "exclude_padding", "expected"), WORKED)
def test_worked_values(temperature, masks, exclude_padding, expected):
    loss = two_tier_loss(
        ANCHORS,
        POSITIVES,
        DISTRACTORS,
        *masks,
        temperature=temperature,
        exclude_padding=exclude_padding,
        return_tiers=True,
    )
    tiers = (float(loss.discrimination), float(loss.ranking), float(loss.total))
    assert tiers == pytest.approx(expected, abs=2e-6)


def slow_loss(
    anchor,
    positives,
    distractors,
    positive_mask,
    distractor_mask,
    temperature,
    alpha,
    exclude_padding,
):
    """The definition in plain loops, a float at a time."""

    def logit(x, y):
        x, y = x.double().tolist(), y.double().tolist()
        dot = sum(p * q for p, q in zip(x, y))
        return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y)) / temperature

    def mean(values):
        return sum(values) / len(values)

    rows = range(len(anchor))
    gallery = [
        (b, p) for b in rows for p in range(positives.shape[1]) if bool(positive_mask[b, p]) or not exclude_padding
    ]
    tier1, tier2 = [], []
    for p in range(positives.shape[1]):
        terms = []
        for b in rows:
            if not positive_mask[b, p]:
                continue
            total = sum(math.exp(logit(anchor[b], positives[c, q])) for c, q in gallery)
            for k in range(distractors.shape[1]):
                if bool(distractor_mask[b, k]) or not exclude_padding:
                    total += math.exp(logit(anchor[b], distractors[b, k]))
            terms.append(math.log(total) - logit(anchor[b], positives[b, p]))
        if terms:
            tier1.append(mean(terms))
    for b in rows:
        for k in range(distractors.shape[1]):
            if not distractor_mask[b, k]:
                continue
            others = sum(math.exp(logit(anchor[b], positives[c, q])) for c, q in gallery if c != b)
            tier2.append(math.log(1 + others * math.exp(-logit(anchor[b], distractors[b, k]))))
    return mean(tier1) + alpha * mean(tier2)


def random_batch(seed, rows=5, num_positives=3, num_distractors=4, width=6):
    generator = torch.Generator().manual_seed(seed)
    positive_mask = torch.rand(rows, num_positives, generator=generator) < 0.6
    distractor_mask = torch.rand(rows, num_distractors, generator=generator) < 0.6
    positive_mask[:, 0] = True
    distractor_mask[:, 0] = True
    return (
        torch.randn(rows, width, generator=generator),
        torch.randn(rows, num_positives, width, generator=generator),
        torch.randn(rows, num_distractors, width, generator=generator),
        positive_mask,
        distractor_mask,
    )


@pytest.mark.parametrize("exclude_padding", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_plain_loops(seed, exclude_padding):
    batch = random_batch(seed)
    loss = two_tier_loss(*batch, temperature=0.3, alpha=0.7, exclude_padding=exclude_padding)
    assert float(loss) == pytest.approx(slow_loss(*batch, 0.3, 0.7, exclude_padding), abs=1e-5)


def test_every_valid_distractor_has_the_same_weight_in_the_ranking_tier():
    to_positives = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0))
    to_distractors = torch.zeros(4, 3, requires_grad=True)
    distractor_mask = torch.tensor([[True, True, True]] + [[True, False, False]] * 3)
    ranking_tier(to_positives, to_distractors, torch.ones(4, 2, dtype=torch.bool), distractor_mask).backward()
    first = to_distractors.grad[0]
    assert torch.equal(first, first[:1].expand(3)) and (to_distractors.grad[~distractor_mask] == 0).all()


def moved(x, towards, amount):
    return F.normalize(x, dim=-1) + amount * F.normalize(towards, dim=-1)


def test_more_similar_positive_lowers_the_loss():
    # One positive per row: with more, a closer one also sits in its siblings' denominators, as the paper intends.
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(1, num_positives=1)
    losses = []
    for amount in (0.0, 0.5, 1.0, 2.0):
        closer = positives.clone()
        closer[0, 0] = moved(positives[0, 0], anchor[0], amount)
        loss = two_tier_loss(
            anchor,
            closer,
            distractors,
            positive_mask,
            distractor_mask,
            temperature=0.5,
            alpha=0,
        )
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_more_similar_distractor_raises_tier_one_and_lowers_tier_two():
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(2)
    before = two_tier_loss(
        anchor,
        positives,
        distractors,
        positive_mask,
        distractor_mask,
        return_tiers=True,
    )
    closer = distractors.clone()
    closer[0, 0] = moved(distractors[0, 0], anchor[0], 1.0)
    after = two_tier_loss(anchor, positives, closer, positive_mask, distractor_mask, return_tiers=True)
    assert after.discrimination > before.discrimination
    assert after.ranking < before.ranking


def test_more_similar_random_negative_raises_both_tiers():
    to_positives, to_distractors = torch.randn(3, 3, 2), torch.randn(3, 4)
    positive_valid, distractor_valid = (
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(3, 4, dtype=torch.bool),
    )
    raised = to_positives.clone()
    raised[0, 2, 1] += 1  # anchor 0 against another row's positive
    masks = (positive_valid, positive_valid, distractor_valid)
    tier1 = [discrimination_tier(x, to_distractors, *masks) for x in (to_positives, raised)]
    tier2 = [ranking_tier(x, to_distractors, positive_valid, distractor_valid) for x in (to_positives, raised)]
    assert tier1[1] > tier1[0] and tier2[1] > tier2[0]


@pytest.mark.parametrize("content", [0.0, 7.0, float("nan"), float("inf")])
def test_padding_content_never_matters_when_excluded(content):
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(4)
    expected = two_tier_loss(anchor, positives, distractors, positive_mask, distractor_mask)
    filled_positives = positives.masked_fill(~positive_mask[..., None], content).requires_grad_()
    filled_distractors = distractors.masked_fill(~distractor_mask[..., None], content).requires_grad_()
    loss = two_tier_loss(anchor, filled_positives, filled_distractors, positive_mask, distractor_mask)
    assert torch.equal(loss, expected)
    loss.backward()
    assert filled_positives.grad.isfinite().all() and filled_distractors.grad.isfinite().all()
    assert (filled_positives.grad[~positive_mask] == 0).all()
    assert (filled_distractors.grad[~distractor_mask] == 0).all()


def test_padding_content_matters_in_the_reference_form():
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(4)
    changed = positives.clone()
    changed[~positive_mask] = anchor[0]
    masks = (positive_mask, distractor_mask)
    losses = [two_tier_loss(anchor, p, distractors, *masks, exclude_padding=False) for p in (positives, changed)]
    assert losses[0] != losses[1]


def test_gradients_flow_and_agree_with_finite_differences():
    anchor, positives, distractors, *masks = random_batch(5, rows=3)
    inputs = [x.double().requires_grad_() for x in (anchor, positives, distractors)]
    assert torch.autograd.gradcheck(lambda a, p, d: two_tier_loss(a, p, d, *masks, temperature=0.5), inputs)
    two_tier_loss(*inputs, *masks).backward()
    assert all(x.grad.abs().sum() > 0 for x in inputs)


def test_order_of_rows_and_length_of_vectors_change_nothing():
    batch = random_batch(6)
    order = torch.tensor([3, 1, 4, 0, 2])
    expected = two_tier_loss(*batch)
    assert torch.allclose(two_tier_loss(*(x[order] for x in batch)), expected, atol=1e-6)
    anchor, positives, distractors, *masks = batch
    assert torch.allclose(
        two_tier_loss(9 * anchor, 0.1 * positives, 3 * distractors, *masks),
        expected,
        atol=1e-5,
    )


def test_one_row_alone_has_no_ranking_tier_and_finite_gradients():
    anchor, positives, distractors, *masks = random_batch(7, rows=1)
    anchor.requires_grad_()
    loss = two_tier_loss(anchor, positives, distractors, *masks, return_tiers=True)
    assert float(loss.ranking.detach()) == 0 and loss.discrimination > 0
    loss.total.backward()
    assert anchor.grad.isfinite().all()


def test_nothing_valid_is_zero():
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(8)
    anchor.requires_grad_()
    loss = two_tier_loss(
        anchor,
        positives,
        distractors,
        torch.zeros_like(positive_mask),
        torch.zeros_like(distractor_mask),
    )
    loss.backward()
    assert float(loss.detach()) == 0 and anchor.grad.isfinite().all()


def test_half_precision_inputs_are_computed_in_float32():
    anchor, positives, distractors, *masks = random_batch(9)
    loss = two_tier_loss(anchor.half(), positives.half(), distractors.half(), *masks)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(two_tier_loss(anchor, positives, distractors, *masks)), rel=1e-2)


def test_wrong_shapes_are_named():
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(0)
    with pytest.raises(ValueError, match="positive_mask"):
        two_tier_loss(anchor, positives, distractors, positive_mask[:, :1], distractor_mask)
    with pytest.raises(ValueError, match="distractors must be"):
        two_tier_loss(anchor, positives, distractors[:-1], positive_mask, distractor_mask[:-1])
    with pytest.raises(ValueError, match="anchor must be"):
        two_tier_loss(positives, positives, distractors, positive_mask, distractor_mask)
    with pytest.raises(ValueError, match="temperature"):
        two_tier_loss(
            anchor,
            positives,
            distractors,
            positive_mask,
            distractor_mask,
            temperature=0,
        )


# --- the baseline without distractors


def test_info_nce_agrees_with_the_slow_definition():
    generator = torch.Generator().manual_seed(5)
    anchor, positives = torch.randn(4, 6, generator=generator), torch.randn(4, 2, 6, generator=generator)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    terms = {0: [], 1: []}
    for b in range(4):
        logits = {
            (c, p): float(torch.cosine_similarity(anchor[b], positives[c, p], dim=0)) / 0.2
            for c in range(4)
            for p in range(2)
            if mask[c, p]
        }
        total = sum(math.exp(logit) for logit in logits.values())
        for p in range(2):
            if mask[b, p]:
                terms[p].append(-math.log(math.exp(logits[b, p]) / total))
    expected = sum(sum(values) / len(values) for values in terms.values()) / 2
    assert info_nce_loss(anchor, positives, mask, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_gathering_in_a_single_process_changes_nothing():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows


def test_a_misspelt_option_fails():
    anchor, positives, distractors, positive_mask, distractor_mask = random_batch(0)
    with pytest.raises(TypeError, match="alhpa"):
        two_tier_loss(anchor, positives, distractors, positive_mask, distractor_mask, alhpa=1.0)
