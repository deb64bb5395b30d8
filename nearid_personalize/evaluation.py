"""How well an encoder tells identities apart: SSR, PA, M-O over rows of views and distractors, with intervals.

Shape letters: N identities, B batch, V views, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nearid_personalize import metrics
from nearid_personalize.data import IdentityDataset, Rows
from nearid_personalize.data.cache import Items, LiveTokens, TokenSource, cache_in_memory
from nearid_personalize.encoder import NearIDModel
from nearid_personalize.preprocessing import Preprocessing

ROWS_PER_BATCH = 32

Interval = tuple[float, float]
"""Low and high end of a 95 % bootstrap interval over identities."""


@dataclass(frozen=True)
class Retrieval:
    """How well an encoder tells identities from their near-identity distractors; fractions in [0, 1]."""

    ssr: float
    ssr_interval: Interval
    pa: float
    pa_interval: Interval
    published_pa: float
    num_identities: int
    m_o: float | None = None
    """Correlation with the size of edits, in [-1, 1]; only for rows with an oracle."""
    m_o_interval: Interval | None = None
    m_o_pair: float | None = None
    m_o_pair_interval: Interval | None = None


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


def evaluate_retrieval(
    model: NearIDModel, rows: Items, preprocessing: Preprocessing, num_workers: int = 0, seed: int = 0
) -> Retrieval:
    """SSR and PA of a model on rows of pictures; `seed` is the bootstrap's."""
    return evaluate_tokens(model, cache_in_memory(model, rows, preprocessing, num_workers=num_workers), seed=seed)


def evaluate_tokens(
    model: NearIDModel,
    source: TokenSource,
    oracle: Tensor | None = None,
    seed: int = 0,
    num_resamples: int = 2000,
    frozen: bool = False,
    show: bool = False,
) -> Retrieval:
    """SSR, PA and, given an oracle [N,2] for rows of two views, M-O of a model's head on tokens of its trunk.

    From a cache this takes seconds, and several heads can share it; live tokens need no room for any number of rows.
    """
    views, distractors = identity_similarities(model, source, frozen, show)
    counts = metrics.won_and_valid(metrics.identity_margins(views, distractors))

    def interval(values: Tensor, statistic) -> Interval:
        return metrics.bootstrap_interval(values, statistic, num_resamples, seed)

    correlations: dict[str, float | Interval] = {}
    if oracle is not None:
        edits = torch.cat([distractors[:, :2, :2].double(), oracle.double()[:, None]], dim=1)  # [N,3,2]
        for name, statistic in (("m_o", _m_o), ("m_o_pair", _m_o_pair)):
            correlations |= {name: statistic(edits), f"{name}_interval": interval(edits, statistic)}
    return Retrieval(
        ssr=metrics.share_of_perfect_rows(counts),
        ssr_interval=interval(counts, metrics.share_of_perfect_rows),
        pa=metrics.share_of_won_terms(counts),
        pa_interval=interval(counts, metrics.share_of_won_terms),
        published_pa=metrics.published_pairwise_accuracy(views, distractors),
        num_identities=int((counts[:, 1] > 0).sum()),
        **correlations,  # type: ignore[arg-type]
    )


def _m_o(edits: Tensor) -> float:
    return metrics.metric_oracle_correlation(edits[:, :2], edits[:, 2])


def _m_o_pair(edits: Tensor) -> float:
    return metrics.metric_oracle_correlation(edits[:, :2], edits[:, 2], same_view_only=True)


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
