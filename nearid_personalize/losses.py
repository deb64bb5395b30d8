"""The two-tier objective of NearID (Cvejic et al., arXiv 2604.01973, section 3), as functions of embeddings.

It enforces: same identity > near-identity distractor > random negative.

Shape letters: B batch, P positives per row, K distractors per row, D width. Similarities are cosines divided by the
temperature; larger = more alike. Tensors in, tensors out: over several processes, `gather_rows` the arguments first.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor


class TwoTierLoss(NamedTuple):
    """The objective and the two terms it is made of; each a scalar tensor >= 0."""

    total: Tensor
    discrimination: Tensor
    ranking: Tensor


@overload
def two_tier_loss(
    anchor: Tensor,
    positives: Tensor,
    distractors: Tensor,
    positive_mask: Tensor,
    distractor_mask: Tensor,
    temperature: float = ...,
    alpha: float = ...,
    exclude_padding: bool = ...,
    return_tiers: Literal[False] = ...,
) -> Tensor: ...


@overload
def two_tier_loss(
    anchor: Tensor,
    positives: Tensor,
    distractors: Tensor,
    positive_mask: Tensor,
    distractor_mask: Tensor,
    temperature: float = ...,
    alpha: float = ...,
    exclude_padding: bool = ...,
    *,
    return_tiers: Literal[True],
) -> TwoTierLoss: ...


def two_tier_loss(
    anchor: Tensor,
    positives: Tensor,
    distractors: Tensor,
    positive_mask: Tensor,
    distractor_mask: Tensor,
    temperature: float = 0.07,
    alpha: float = 0.5,
    exclude_padding: bool = True,
    return_tiers: bool = False,
) -> Tensor | TwoTierLoss:
    """Discrimination + alpha * ranking, a scalar (or all three as a `TwoTierLoss` when `return_tiers`).

    anchor [B,D], positives [B,P,D], distractors [B,K,D] of any length: they are normalised here, in at least float32.
    positive_mask [B,P] and distractor_mask [B,K]: True where a slot holds a picture, False where it is padding.
    exclude_padding=False leaves padded slots in the denominators, as the authors' code does; terms are averaged over
    valid slots either way. The first tier is averaged over rows for each positive slot first, then over slots; the
    second over all valid distractors at once, also as theirs.

    Raises ValueError when shapes disagree or the temperature is not positive.
    """
    _check_shapes(anchor, positives, distractors, positive_mask, distractor_mask)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    positive_valid, distractor_valid = positive_mask.bool(), distractor_mask.bool()
    if exclude_padding:
        positive_counted, distractor_counted = positive_valid, distractor_valid
        # Zeroed, so that even NaN in a padded slot reaches neither the loss nor a gradient.
        positives = positives.masked_fill(~positive_valid[..., None], 0)
        distractors = distractors.masked_fill(~distractor_valid[..., None], 0)
    else:
        positive_counted, distractor_counted = torch.ones_like(positive_valid), torch.ones_like(distractor_valid)

    a, g, r = _unit(anchor), _unit(positives), _unit(distractors)
    to_positives = torch.einsum("bd,cpd->bcp", a, g) / temperature  # [B,B,P]: anchor b against row c's positives
    to_distractors = torch.einsum("bd,bkd->bk", a, r) / temperature  # [B,K]: against the row's own distractors

    discrimination = discrimination_tier(
        to_positives, to_distractors, positive_valid, positive_counted, distractor_counted
    )
    ranking = ranking_tier(to_positives, to_distractors, positive_counted, distractor_valid)
    total = discrimination + alpha * ranking
    return TwoTierLoss(total, discrimination, ranking) if return_tiers else total


def info_nce_loss(anchor: Tensor, positives: Tensor, positive_mask: Tensor, temperature: float = 0.07) -> Tensor:
    """Plain InfoNCE, the paper's baseline without distractors: the first tier alone, over positives alone.

    Shapes and errors as `two_tier_loss`. (InfoNCE with distractors is `two_tier_loss` with alpha=0.)
    """
    none = positives[:, :0]
    return two_tier_loss(anchor, positives, none, positive_mask, positive_mask[:, :0], temperature, alpha=0)


def gather_rows(rows: Tensor) -> Tensor:
    """[B,...] of every process -> [W*B,...] on each, in rank order, with gradients; itself in a single process.

    Every process must hold equally many rows. When each then computes the same loss of all rows, and gradients are
    averaged over processes as DistributedDataParallel does, the result is the single-process gradient.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # Every process's loss depends on these rows: their owner gets the sum of what all of them ask for.
        gradient = gradients[0].contiguous()
        torch.distributed.all_reduce(gradient)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return gradient.chunk(world)[rank]


def discrimination_tier(
    to_positives: Tensor,
    to_distractors: Tensor,
    positive_valid: Tensor,
    positive_counted: Tensor,
    distractor_counted: Tensor,
) -> Tensor:
    """Tier 1: minus log of the share that each positive takes among all positives and the row's own distractors.

    to_positives [B,B,P], to_distractors [B,K]; positive_valid [B,P] says which terms are averaged, the two `counted`
    masks [B,P], [B,K] which logits enter the denominator. The anchor's other positives stay in it, as in the paper.
    """
    denominator = torch.cat(
        [_hide(to_positives, ~positive_counted).flatten(1), _hide(to_distractors, ~distractor_counted)], dim=1
    ).logsumexp(dim=1)  # [B]
    own = to_positives.diagonal(dim1=0, dim2=1).T  # [B,P]
    return _mean_over_slots(denominator[:, None] - own, positive_valid)


def ranking_tier(
    to_positives: Tensor, to_distractors: Tensor, positive_counted: Tensor, distractor_valid: Tensor
) -> Tensor:
    """Tier 2: softplus(LSE over other rows' positives - distractor): a distractor still beats random negatives.

    to_positives [B,B,P], to_distractors [B,K], positive_counted [B,P], distractor_valid [B,K]. The mean over all valid
    (row, distractor) pairs, so that a distractor weighs the same whichever slot it is in. Zero for a batch of one.
    """
    own = torch.eye(len(to_positives), dtype=torch.bool, device=to_positives.device)
    negatives = _hide(to_positives, own[:, :, None] | ~positive_counted).flatten(1).logsumexp(dim=1)  # [B]
    terms = F.softplus(negatives[:, None] - to_distractors)  # [B,K]
    return terms.masked_fill(~distractor_valid, 0).sum() / distractor_valid.sum().clamp(min=1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _hide(logits: Tensor, hidden: Tensor) -> Tensor:
    """Take entries out of a logsumexp. The lowest finite number rather than -inf: all hidden must not give NaN."""
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def _mean_over_slots(terms: Tensor, valid: Tensor) -> Tensor:
    """terms [B,S], valid [B,S] -> mean over the valid rows of each slot, then over slots with a valid row; else 0."""
    rows = valid.sum(dim=0)  # [S]
    per_slot = terms.masked_fill(~valid, 0).sum(dim=0) / rows.clamp(min=1)
    return per_slot.sum() / (rows > 0).sum().clamp(min=1)


def _check_shapes(
    anchor: Tensor, positives: Tensor, distractors: Tensor, positive_mask: Tensor, distractor_mask: Tensor
) -> None:
    if anchor.ndim != 2:
        raise ValueError(f"anchor must be [B,D], got {list(anchor.shape)}")
    rows, width = anchor.shape
    for name, slots, mask in (
        ("positive", positives, positive_mask),
        ("distractor", distractors, distractor_mask),
    ):
        if slots.ndim != 3 or (slots.shape[0], slots.shape[2]) != (rows, width):
            raise ValueError(f"{name}s must be [{rows}, slots, {width}] to match the anchor, got {list(slots.shape)}")
        if mask.shape != slots.shape[:2]:
            raise ValueError(f"{name}_mask must be {list(slots.shape[:2])}, got {list(mask.shape)}")
