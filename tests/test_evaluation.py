import pytest
import torch
from tiles import PREPROCESSING, Tiles, tiny_model

from nearid_personalize import metrics
from nearid_personalize.data.cache import LiveTokens, cache_in_memory
from nearid_personalize.evaluation import evaluate_tokens, identity_similarities
from nearid_personalize.images import preprocess


def test_retrieval_agrees_with_embedding_each_row_by_itself():
    model, rows = tiny_model(), Tiles(12)
    views, distractors = torch.full((2, 12, 3, 3), float("nan"))
    with torch.no_grad():
        for n in range(12):
            item = rows[n]
            pixels = {k: preprocess(item[k], 32, (0.5,) * 3, (0.5,) * 3) for k in ("views", "distractors")}
            v, d = (model.get_image_features(pixels[k]) for k in ("views", "distractors"))
            for i in range(3):
                for j in range(3):
                    if item["view_mask"][i] and item["view_mask"][j]:
                        views[n, i, j], distractors[n, i, j] = v[i] @ v[j], v[i] @ d[j]
    cache = cache_in_memory(model, rows, PREPROCESSING)
    ours = identity_similarities(model, cache)
    for measured, expected in zip(ours, (views, distractors), strict=True):
        assert torch.allclose(measured, expected, atol=1e-3, equal_nan=True)
    result = evaluate_tokens(model, cache)
    assert result.ssr == pytest.approx(metrics.sample_success_rate(*ours))
    assert result.pa == pytest.approx(metrics.pairwise_accuracy(*ours))
    assert result.ssr_interval[0] <= result.ssr <= result.ssr_interval[1]
    assert result.pa_interval[0] <= result.pa <= result.pa_interval[1]
    assert result.num_identities == 12


def test_live_tokens_measure_the_same():
    model, rows = tiny_model(), Tiles(9)
    cache = cache_in_memory(model, rows, PREPROCESSING)
    live = LiveTokens(model, lambda variant: rows, cache.view_mask, PREPROCESSING)
    for cached, fresh in zip(identity_similarities(model, cache), identity_similarities(model, live), strict=True):
        assert torch.allclose(cached, fresh, atol=1e-3, equal_nan=True)


def test_correlation_with_the_size_of_edits():
    model, rows = tiny_model(), Tiles(12)
    cache = cache_in_memory(model, rows, PREPROCESSING)
    _, edited = identity_similarities(model, cache)
    # An oracle that is the score itself: the pair's correlation is perfect, the crossed ones need not be.
    oracle = edited[:, :2, :2].diagonal(dim1=1, dim2=2)
    measured = evaluate_tokens(model, cache, oracle, num_resamples=50)
    assert measured.m_o_pair > 0.998
    assert measured.m_o == pytest.approx(metrics.metric_oracle_correlation(edited[:, :2, :2], oracle))
    assert measured.m_o_interval[0] <= measured.m_o <= measured.m_o_interval[1]
    assert evaluate_tokens(model, cache, -oracle, num_resamples=50).m_o_pair < -0.998
    assert evaluate_tokens(model, cache, num_resamples=50).m_o is None
