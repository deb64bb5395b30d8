"""Identity metrics: SSR and PA (NearID, arXiv 2604.01973), M-O (Mind-the-Glitch) and M-H (DreamBench++).

Shape letters: N identities, V views. Similarities: larger = more alike. Inputs are anything `torch.as_tensor` takes;
shares and correlations come back as Python floats, NaN where nothing was measured.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def identity_margins(view_similarity: Tensor, distractor_similarity: Tensor) -> Tensor:
    """[N,V,V], [N,V,V] -> margins [N, V(V-1)], NaN where a similarity is absent.

    Each pair of views i < j gives s(i,j) - c(i,i) and s(i,j) - c(j,j), where c(i,j) is view i against the distractor
    on view j's context: 2 terms for two views, 6 for three. A term is won when its margin is strictly positive.
    """
    views, distractors = _float64(view_similarity), _float64(distractor_similarity)
    if views.ndim != 3 or views.shape[1] != views.shape[2] or views.shape != distractors.shape:
        shapes = f"{list(views.shape)} and {list(distractors.shape)}"
        raise ValueError(f"view and distractor similarity must both be [N,V,V], got {shapes}")
    i, j = torch.triu_indices(views.shape[1], views.shape[1], offset=1)
    pair, own = views[:, i, j], distractors.diagonal(dim1=1, dim2=2)  # [N,pairs], [N,V]
    return torch.cat([pair - own[:, i], pair - own[:, j]], dim=1)


def won_and_valid(margins: Tensor) -> Tensor:
    """margins [N,terms] -> [N,2]: how many terms each identity wins, and how many it has."""
    return torch.stack([(margins > 0).sum(dim=1), (~margins.isnan()).sum(dim=1)], dim=1)


def sample_success_rate(view_similarity: Tensor, distractor_similarity: Tensor) -> float:
    """SSR in [0, 1]: the share of identities that win all their valid terms; those without a valid term drop out."""
    return share_of_perfect_rows(won_and_valid(identity_margins(view_similarity, distractor_similarity)))


def pairwise_accuracy(view_similarity: Tensor, distractor_similarity: Tensor) -> float:
    """PA in [0, 1]: won terms over valid terms, pooled over identities. A tie is lost."""
    return share_of_won_terms(won_and_valid(identity_margins(view_similarity, distractor_similarity)))


def published_pairwise_accuracy(view_similarity: Tensor, distractor_similarity: Tensor) -> float:
    """PA as printed in the paper's tables, in [0, 1]: one extra trial per identity, won when its mean margin is > 0."""
    return share_of_won_terms(published_won_and_valid(identity_margins(view_similarity, distractor_similarity)))


def published_won_and_valid(margins: Tensor) -> Tensor:
    """margins [N,terms] -> [N,2] as `won_and_valid`, with the mean margin of each identity as one more term."""
    return won_and_valid(torch.cat([margins, margins.nanmean(dim=1, keepdim=True)], dim=1))


def share_of_perfect_rows(counts: Tensor) -> float:
    """SSR of `won_and_valid` counts [...,2]: a statistic for `bootstrap_interval`."""
    won, valid = counts[counts[..., 1] > 0].unbind(dim=1)
    return _ratio(int((won == valid).sum()), len(valid))


def share_of_won_terms(counts: Tensor) -> float:
    """PA of `won_and_valid` counts [...,2]: a statistic for `bootstrap_interval`."""
    won, valid = counts.flatten(0, -2).sum(dim=0).tolist()
    return _ratio(won, valid)


def edit_oracle(part_mask: Tensor, object_mask: Tensor) -> float:
    """1 - |part| / |object| over pixels > 0: how much of a subject an edit of one part leaves as it was."""
    object_pixels = int((torch.as_tensor(object_mask) > 0).sum())
    return 1 - int((torch.as_tensor(part_mask) > 0).sum()) / object_pixels if object_pixels else float("nan")


def metric_oracle_correlation(edited_similarity: Tensor, oracle: Tensor, same_view_only: bool = False) -> float:
    """M-O in [-1, 1]: how well the score falls with the size of an edit to one part.

    edited_similarity [N,2,2]: entry i,j = view i against the edited version of view j; oracle [N,2]: `edit_oracle` of
    each view's edit. The four Pearson correlations over samples are averaged through atanh (clipped at .999);
    `same_view_only` keeps the two where a view meets its own edit (M-O_pair).
    """
    similarity, oracle = _float64(edited_similarity), _float64(oracle)
    if similarity.ndim != 3 or similarity.shape[1:] != (2, 2) or oracle.shape != similarity.shape[:2]:
        raise ValueError(
            f"edited similarity must be [N,2,2] and oracle [N,2], got {list(similarity.shape)}, {list(oracle.shape)}"
        )
    pairs = [(0, 0), (1, 1)] if same_view_only else [(0, 0), (1, 1), (0, 1), (1, 0)]
    return fisher_mean([pearson(similarity[:, i, j], oracle[:, j]) for i, j in pairs], clip=0.999)


class HumanCorrelation(NamedTuple):
    """M-H: the Fisher mean over methods, its standard error (sd / sqrt(methods)), and each method's correlation."""

    mean: float
    standard_error: float
    per_method: list[float]


def human_correlation(scores: Sequence[Tensor], group1: Sequence[Tensor], group2: Sequence[Tensor]) -> HumanCorrelation:
    """M-H in [-1, 1]: agreement with two groups of human raters, per generation method.

    Each argument holds one 1-D tensor per method. Per method, the Pearson correlations of the score with the two
    groups are averaged; methods are then averaged through atanh (clipped at .9999).
    """
    if not len(scores) == len(group1) == len(group2):
        raise ValueError(f"one entry per method, got {len(scores)} scores, {len(group1)} and {len(group2)} ratings")
    return summarise_methods(
        [(pearson(s, a) + pearson(s, b)) / 2 for s, a, b in zip(scores, group1, group2, strict=True)]
    )


def human_correlation_by_category(
    scores: Sequence[Tensor], group1: Sequence[Tensor], group2: Sequence[Tensor], categories: Sequence[Sequence[str]]
) -> dict[str, HumanCorrelation]:
    """M-H per category of the rated pictures, and over all of them under "pooled".

    The paper's headline is "object" alone (585 of 1,350 pairs of DreamBench++): print the table beside it.
    categories: per method, one name per score. Methods without pairs of a category drop out of it.
    """
    if not len(scores) == len(categories) or any(len(s) != len(c) for s, c in zip(scores, categories)):
        raise ValueError("categories must name one category per score of every method")
    table = {"pooled": human_correlation(scores, group1, group2)}
    for wanted in sorted({name for names in categories for name in names}):
        chosen = [torch.tensor([name == wanted for name in names]) for names in categories]
        of_category = ([_float64(x)[c] for x, c in zip(xs, chosen, strict=True)] for xs in (scores, group1, group2))
        table[wanted] = human_correlation(*of_category)
    return table


def summarise_methods(correlations: Sequence[float]) -> HumanCorrelation:
    """Correlations of single methods -> their M-H summary. Methods whose correlation is NaN drop out of the means."""
    measured = [value for value in correlations if not math.isnan(value)]
    spread = torch.tensor(measured, dtype=torch.float64)
    standard_error = float(spread.std()) / len(spread) ** 0.5 if len(spread) > 1 else float("nan")
    return HumanCorrelation(fisher_mean(measured, clip=0.9999), standard_error, list(correlations))


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two 1-D tensors over entries where neither is NaN; NaN when one of them does not vary."""
    x, y = _float64(x), _float64(y)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"two 1-D tensors of one length, got {list(x.shape)} and {list(y.shape)}")
    both = ~(x.isnan() | y.isnan())
    if both.sum() < 2:
        return float("nan")
    x, y = x[both] - x[both].mean(), y[both] - y[both].mean()
    # Cut at +-1: rounding must not carry a perfect correlation past it.
    return float(((x * y).sum() / (x.norm() * y.norm())).clamp(-1, 1))


def correlation_sums(x: Tensor, y: Tensor) -> Tensor:
    """Two tensors of one shape [...,n] -> [...,6], what their correlation needs: count and sums of x, y, xx, yy, xy.

    Entries where either is NaN are left out. Sums of disjoint sets add up, so that a bootstrap over groups of entries
    sums a few numbers instead of reading the entries again. Subtract the means before, or float64 loses digits.
    """
    x, y = _float64(x), _float64(y)
    both = ~(x.isnan() | y.isnan())
    x, y = x.where(both, 0.0), y.where(both, 0.0)
    return torch.stack([both.double(), x, y, x * x, y * y, x * y]).sum(dim=-1).movedim(0, -1)


def correlation_of_sums(sums: Tensor) -> Tensor:
    """`correlation_sums` [...,6] -> Pearson correlations [...]; NaN where one of the two does not vary."""
    count, x, y, xx, yy, xy = sums.unbind(dim=-1)
    covariance, x_variance, y_variance = xy - x * y / count, xx - x * x / count, yy - y * y / count
    varies = (x_variance > 1e-12 * xx) & (y_variance > 1e-12 * yy)  # what rounding leaves of a constant does not
    return (covariance / (x_variance * y_variance).sqrt()).clamp(-1, 1).where(varies, float("nan"))


def fisher_mean(correlations: Sequence[float], clip: float) -> float:
    """tanh of the mean of atanh, correlations clipped to +-clip first, so that a perfect one stays finite."""
    return float(torch.tensor(correlations, dtype=torch.float64).clamp(-clip, clip).atanh().mean().tanh())


def _mean(values: Tensor) -> float:
    return float(values.mean())


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], float] = _mean,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `statistic`, resampling identities: the rows of values [N,...].

    `statistic` maps rows [N,...] to a float. NaN results (a resample that measured nothing) are left out.
    """
    values = torch.as_tensor(values)
    if not values.is_floating_point():
        values = values.double()
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("bootstrap_interval needs at least one row")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"need num_resamples >= 1 and 0 < confidence < 1, got {num_resamples} and {confidence}")
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(num_resamples))
    results = torch.tensor([statistic(values[r]) for r in rows], dtype=torch.float64)
    tail = (1 - confidence) / 2
    low, high = results.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def bootstrap_sums(
    sums: Tensor,
    statistic: Callable[[Tensor], Tensor],
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """`bootstrap_interval` of a statistic of sums over identities, many resamples at once: the same draws, much faster.

    Args:
        sums: [N,...], what each identity adds.
        statistic: sums of R resamples [R,...] -> [R]; NaN where a resample measured nothing.
    """
    sums = _float64(sums)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        drawn = torch.zeros(min(_RESAMPLES_AT_ONCE, num_resamples - start), len(sums), dtype=torch.float64)
        for times in drawn:  # how often each identity is drawn
            rows = torch.randint(len(sums), (len(sums),), generator=generator)
            times.copy_(torch.bincount(rows, minlength=len(sums)))
        results.append(statistic((drawn @ sums.flatten(1)).view(len(drawn), *sums.shape[1:])))
    tail = (1 - confidence) / 2
    low, high = torch.cat(results).nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


_RESAMPLES_AT_ONCE = 200


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, from `hits` of `count` >= 1 (E. B. Wilson, JASA 22, 1927); within [0, 1]."""
    z = 1.959964  # the normal distribution's 97.5 % quantile
    share, spread = hits / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return (max(middle - half, 0.0) if hits else 0.0), (min(middle + half, 1.0) if hits < count else 1.0)


def share_interval(hits: Sequence[bool], subjects: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of a share of pictures, resampling their subjects: pictures of one subject err together.

    hits, subjects: of each picture, whether it counts and whom it shows. Where all or none count, resampling shows no
    spread: the interval is Wilson's, as if each subject were one picture.
    """
    if not hits or len(hits) != len(subjects):
        raise ValueError(f"share_interval needs a subject for each of its pictures, got {len(hits)}, {len(subjects)}")
    places = {subject: place for place, subject in enumerate(dict.fromkeys(subjects))}
    if sum(hits) in (0, len(hits)):
        return wilson_interval(len(places) if hits[0] else 0, len(places))
    sums = torch.zeros(len(places), 2)  # hits and pictures of each subject
    for hit, subject in zip(hits, subjects):
        sums[places[subject]] += torch.tensor([float(hit), 1.0])
    return bootstrap_sums(sums, lambda drawn: drawn[:, 0] / drawn[:, 1])


def _float64(x: Tensor) -> Tensor:
    return torch.as_tensor(x).double()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
