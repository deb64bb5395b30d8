"""How well an encoder tells identities apart: SSR, PA, M-O over rows of views and distractors, M-H over rated pictures.

Every figure has a 95 % bootstrap interval: `INTERVALS` says over what.
Shape letters: N identities, B batch, V views, S distractor sources, D width, m distinct pictures, M methods.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from nearid_personalize import metrics
from nearid_personalize.data import IdentityDataset, Rows
from nearid_personalize.data.cache import LiveTokens, TokenSource
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing

ROWS_PER_BATCH = 32
NUM_RESAMPLES = 2000

Interval = tuple[float, float]
"""Low and high end of a 95 % bootstrap interval; a resample draws whole identities, with all their pictures."""
INTERVALS = f"95 % bootstrap intervals over {{unit}}, {NUM_RESAMPLES} resamples"
"""What stands beside intervals wherever they are printed; unit: identities, or subjects."""


@dataclass(frozen=True)
class Retrieval:
    """How well an encoder tells identities from their near-identity distractors; fractions in [0, 1]."""

    ssr: float
    ssr_interval: Interval
    pa: float
    pa_interval: Interval
    published_pa: float
    """PA as the paper counts it, see `metrics.published_pairwise_accuracy`."""
    num_identities: int
    """Identities with at least one distractor."""
    m_o: float | None = None
    """Correlation with the size of edits, in [-1, 1]; only for rows with an oracle."""
    m_o_interval: Interval | None = None
    m_o_pair: float | None = None
    m_o_pair_interval: Interval | None = None
    published_pa_interval: Interval | None = None
    num_samples: int | None = None
    """Identities times the sources that have distractors for them: what SSR is a share of."""


def with_interval(value: float | None, interval: Interval | None) -> str:
    """A figure and its interval as text, "-" where there is none."""
    return "-" if value is None or interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def evaluate_rows(
    model: NearIDModel,
    preprocessing: Preprocessing,
    rows: Rows,
    num_views: int = 3,
    frozen: bool = False,
    show: bool = False,
) -> dict[str, Retrieval]:
    """A model's figures on rows, by distractor source; those of part edits with M-O. No picture is held for long.

    frozen: measure the trunk's own pooled output instead of the head's, see `NearIDModel.frozen_pool`.

    Raises InputError when a picture cannot be read.
    """
    oracles = [row.oracle for row in tqdm(rows, desc="oracle", disable=not show, leave=False)]
    oracle = None
    if all(found is not None and len(found) == 2 for found in oracles):
        oracle = torch.tensor([list(found) for found in oracles if found], dtype=torch.float64)
    measured = {}
    for name in rows.sources:
        dataset = IdentityDataset(rows, preprocessing.size, num_views, sources=(name,))
        live = LiveTokens(model, lambda _, dataset=dataset: dataset, dataset.view_mask, preprocessing)  # type: ignore[misc]
        measured[name] = evaluate_tokens(model, live, oracle, frozen=frozen, show=show)
    return measured


def evaluate_tokens(
    model: NearIDModel,
    source: TokenSource,
    oracle: Tensor | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    frozen: bool = False,
    show: bool = False,
) -> Retrieval:
    """SSR, PA and, given an oracle [N,2] for rows of two views, M-O of a model's head on tokens of its trunk.

    From a cache this takes seconds, and several heads can share it; live tokens need no room for any number of rows.
    """
    views, distractors = identity_similarities(model, source, frozen, show)
    return measure_retrieval(views, distractors[:, None], oracle, seed, num_resamples)


def measure_retrieval(
    views: Tensor,
    distractors: Tensor,
    oracle: Tensor | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Retrieval:
    """SSR and PA of cosines, pooled over sources, and M-O where there is an oracle.

    An identity counts once for each source that has distractors for it; a bootstrap resample draws it with all of them.

    Args:
        views: [N,V,V], between the views of an identity.
        distractors: [N,S,V,V], view i with a source's distractor on view j's context; NaN where absent.
        oracle: [N,2], `metrics.edit_oracle` of each view's edit, for rows of two views and one source.
    """
    identities, sources = distractors.shape[:2]
    margins = metrics.identity_margins(views.repeat_interleave(sources, dim=0), distractors.flatten(0, 1))
    counts = metrics.won_and_valid(margins).view(identities, sources, 2)
    published = metrics.published_won_and_valid(margins).view(identities, sources, 2)
    has_terms = counts[..., 1] > 0
    perfect = has_terms & (counts[..., 0] == counts[..., 1])

    def interval(sums: Tensor, statistic: Callable[[Tensor], Tensor]) -> Interval:
        return metrics.bootstrap_sums(sums, statistic, num_resamples, seed)

    correlations: dict[str, float | Interval] = {}
    if oracle is not None:
        edited = distractors[:, 0, :2, :2]
        sums = _edit_sums(edited, oracle)
        for name, count in (("m_o_pair", 2), ("m_o", 4)):
            correlations[name] = metrics.metric_oracle_correlation(edited, oracle, same_view_only=count == 2)
            correlations[f"{name}_interval"] = interval(sums[:, :count], _m_o)
    return Retrieval(
        ssr=metrics.share_of_perfect_rows(counts),
        ssr_interval=interval(torch.stack([perfect.sum(dim=1), has_terms.sum(dim=1)], dim=1), _share),
        pa=metrics.share_of_won_terms(counts),
        pa_interval=interval(counts.sum(dim=1), _share),
        published_pa=metrics.share_of_won_terms(published),
        published_pa_interval=interval(published.sum(dim=1), _share),
        num_identities=int(has_terms.any(dim=1).sum()),
        num_samples=int(has_terms.sum()),
        **correlations,  # type: ignore[arg-type]
    )


def _share(sums: Tensor) -> Tensor:
    """[R,2], won and valid -> shares [R]."""
    return sums[:, 0] / sums[:, 1]


def _edit_sums(edited: Tensor, oracle: Tensor) -> Tensor:
    """Cosines [N,2,2] and oracle [N,2] -> what each row adds to M-O's four correlations [N,4,6], same views first."""
    oracle = oracle.double()
    cosine = torch.stack([edited[:, 0, 0], edited[:, 1, 1], edited[:, 0, 1], edited[:, 1, 0]], dim=1).double()
    size = oracle[:, [0, 1, 1, 0]]
    centred = [(values - values.nanmean(dim=0))[..., None] for values in (cosine, size)]  # [N,4,1]
    return metrics.correlation_sums(*centred)


def _m_o(sums: Tensor) -> Tensor:
    """Sums of resamples [R,pairs,6] -> M-O [R]."""
    return metrics.correlation_of_sums(sums).clamp(-0.999, 0.999).atanh().mean(dim=1).tanh()


@torch.no_grad()
def identity_similarities(
    model: NearIDModel, source: TokenSource, frozen: bool = False, show: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines [N,V,V] between views, and of view i with the distractor on view j's context; NaN where absent."""
    pool = model.frozen_pool if frozen else model.pool
    views: list[Tensor] = []
    distractors: list[Tensor] = []
    batches = torch.arange(len(source)).split(ROWS_PER_BATCH)
    for rows in tqdm(batches, desc="embed", disable=not show, leave=False):
        tokens, valid = source.read(rows, 0)
        embeddings = into_slots(pool(tokens.to(model.device)), valid).cpu()
        for kind, out in ((0, views), (1, distractors)):
            cosine = embeddings[:, 0] @ embeddings[:, kind].transpose(1, 2)  # [B,V,V]
            out.append(cosine.masked_fill(~(valid[:, 0, :, None] & valid[:, kind, None, :]), float("nan")))
    return torch.cat(views), torch.cat(distractors)


def into_slots(embeddings: Tensor, valid: Tensor) -> Tensor:
    """Embeddings [m,D] of the valid slots of bool [B,2,V] -> [B,2,V,D], zeros elsewhere."""
    slots = embeddings.new_zeros(*valid.shape, embeddings.shape[-1])
    slots[valid.to(embeddings.device)] = embeddings
    return slots


# --- distinct pictures, each embedded once ---------------------------------------------------------------------------


def measure_sources(
    embeddings: Tensor, slots: Tensor, sources: Sequence[str], oracle: Tensor | None = None
) -> dict[str, Retrieval]:
    """Retrieval by source and, where there are several, over all of them under "pooled".

    Args:
        embeddings: [m,D], unit length.
        slots: int64 [N,1+S,V]: which of them each view is, then each source's distractors; -1 where absent.
        oracle: [N,2], where a row is a part edit; see `measure_retrieval`.
    """
    views, distractors = slot_similarities(embeddings, slots)
    measured = {name: measure_retrieval(views, distractors[:, [place]], oracle) for place, name in enumerate(sources)}
    return measured if len(sources) == 1 else {**measured, "pooled": measure_retrieval(views, distractors)}


def slot_similarities(embeddings: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [m,D] and slots [N,1+S,V] -> cosines [N,V,V] between views, [N,S,V,V] of views with distractors."""
    parts = []
    for some in slots.split(ROWS_PER_BATCH):
        pictures = embeddings[some.clamp(min=0)]  # [B,1+S,V,D]
        cosine = torch.einsum("bvd,bkwd->bkvw", pictures[:, 0], pictures)
        present = (some >= 0)[:, :1, :, None] & (some >= 0)[:, :, None, :]
        parts.append(cosine.masked_fill(~present, float("nan")))
    cosines = torch.cat(parts)
    return cosines[:, 0], cosines[:, 1:]


# --- agreement with people -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """M-H: how well scores go with people's ratings; correlations in [-1, 1]."""

    m_h: float
    m_h_interval: Interval
    """Over subjects: the methods are the benchmark's and are not resampled."""
    standard_error: float
    """Over methods: sd / sqrt(methods)."""
    per_method: Mapping[str, float]
    num_subjects: int
    num_pictures: int
    """Of all methods together."""


ALL_PICTURES, CATEGORY_MEAN = "pooled", "mean of categories"


def measure_agreement(
    scores: Tensor,
    ratings: Tensor,
    methods: Sequence[str],
    subjects: Sequence[str],
    categories: Sequence[str],
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Agreement]:
    """M-H per category, over all pictures, and as the Fisher mean of the categories.

    Per method the Pearson correlations with the groups of raters are averaged; methods are averaged through atanh.
    A bootstrap resample draws subjects, each with its pictures by all methods.

    Args:
        scores: [n], one per rated picture. ratings: [n,G], by group of raters.
        methods, subjects, categories: n names each; a subject has one category.
    """
    names, where_method = _numbered(methods)
    kinds, where_category = _numbered(categories)
    people, where_subject = _numbered(subjects)
    # Each subject's share of every correlation: [subjects, categories, methods, G, 6].
    entries = metrics.correlation_sums(
        (scores.double() - scores.double().nanmean())[:, None, None].expand(-1, ratings.shape[1], 1),
        (ratings.double() - ratings.double().nanmean())[..., None],
    )
    sums = entries.new_zeros(len(people), len(kinds), len(names), *entries.shape[1:])
    sums.index_put_((where_subject, where_category, where_method), entries, accumulate=True)
    measure = partial(_agreement, methods=names, seed=seed, num_resamples=num_resamples)
    table = {}
    for place, kind in enumerate(kinds):
        own = where_subject[where_category == place].unique()
        table[kind] = measure(sums[own][:, [place]], _pooled_m_h, categories.count(kind))
    if len(kinds) > 1:
        table[CATEGORY_MEAN] = replace(
            measure(sums, _category_mean_m_h, len(scores)), standard_error=float("nan"), per_method={}
        )
        table[ALL_PICTURES] = measure(sums, _pooled_m_h, len(scores))
    return table


def _agreement(
    sums: Tensor,
    statistic: Callable[[Tensor], Tensor],
    num_pictures: int,
    methods: Sequence[str],
    seed: int,
    num_resamples: int,
) -> Agreement:
    whole = sums.sum(dim=0, keepdim=True)
    correlations = _method_correlations(whole.sum(dim=1))[0].tolist()
    return Agreement(
        m_h=float(statistic(whole)),
        m_h_interval=metrics.bootstrap_sums(sums, statistic, num_resamples, seed),
        standard_error=metrics.summarise_methods(correlations).standard_error,
        per_method=dict(zip(methods, correlations, strict=True)),
        num_subjects=len(sums),
        num_pictures=num_pictures,
    )


def _numbered(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct names, sorted, and the place of each of `names` among them."""
    distinct = sorted(set(names))
    places = {name: place for place, name in enumerate(distinct)}
    return distinct, torch.tensor([places[name] for name in names], dtype=torch.long)


def _method_correlations(sums: Tensor) -> Tensor:
    """Sums [...,M,G,6] -> each method's correlation, the mean over groups of raters, [...,M]."""
    return metrics.correlation_of_sums(sums).mean(dim=-1)


def _fisher_mean(correlations: Tensor) -> Tensor:
    """[...,M] -> [...]; correlations that are NaN drop out."""
    return correlations.clamp(-0.9999, 0.9999).atanh().nanmean(dim=-1).tanh()


def _pooled_m_h(sums: Tensor) -> Tensor:
    """Sums of resamples [R,categories,M,G,6] -> M-H over all their pictures, [R]."""
    return _fisher_mean(_method_correlations(sums.sum(dim=1)))


def _category_mean_m_h(sums: Tensor) -> Tensor:
    """The same -> the Fisher mean of the categories' M-H, [R]."""
    return _fisher_mean(_fisher_mean(_method_correlations(sums)))
