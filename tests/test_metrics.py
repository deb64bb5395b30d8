import math
import statistics

import pytest
import torch

from nearid_personalize import metrics

NAN = float("nan")


def square(entries, size=3):
    out = torch.full((size, size), NAN, dtype=torch.float64)
    for (i, j), value in entries.items():
        out[i, j] = value
    return out


# Four identities: three views with two distractors and one exact tie (s12 == c11), then two views each, the last
# without a distractor.
VIEWS = torch.stack([square({(0, 1): 0.80, (0, 2): 0.60, (1, 2): 0.70})] + [square({(0, 1): 0.90}) for _ in range(3)])
DISTRACTORS = torch.stack(
    [
        square({(0, 0): 0.65, (1, 1): 0.70}),
        square({(0, 0): 0.50, (1, 1): 0.95}),
        square({(0, 0): 0.50, (1, 1): 0.40}),
        square({}),
    ]
)


def test_worked_ssr_and_pa():
    margins = metrics.identity_margins(VIEWS, DISTRACTORS)
    assert sorted(margins[0][~margins[0].isnan()].tolist()) == pytest.approx([-0.05, 0, 0.10, 0.15])
    assert metrics.won_and_valid(margins).tolist() == [[2, 4], [1, 2], [2, 2], [0, 0]]
    assert 100 * metrics.sample_success_rate(VIEWS, DISTRACTORS) == pytest.approx(33.3333, abs=1e-4)
    assert 100 * metrics.pairwise_accuracy(VIEWS, DISTRACTORS) == pytest.approx(62.5)
    assert 100 * metrics.published_pairwise_accuracy(VIEWS, DISTRACTORS) == pytest.approx(72.7273, abs=1e-4)


def slow_ssr_and_pa(views, distractors):
    perfect, won, valid = [], 0, 0
    for s, c in zip(views.tolist(), distractors.tolist()):
        row = []
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                for k in (i, j):
                    margin = s[i][j] - c[k][k]
                    if not math.isnan(margin):
                        row.append(margin > 0)
        won, valid = won + sum(row), valid + len(row)
        if row:
            perfect.append(all(row))
    return sum(perfect) / len(perfect), won / valid


@pytest.mark.parametrize("views", [2, 3, 5])
def test_ssr_and_pa_agree_with_plain_loops(views):
    generator = torch.Generator().manual_seed(views)
    s = torch.rand(40, views, views, generator=generator) + 0.3
    c = torch.rand(40, views, views, generator=generator)
    s[torch.rand(s.shape, generator=generator) < 0.2] = NAN
    c[torch.rand(c.shape, generator=generator) < 0.2] = NAN
    expected = slow_ssr_and_pa(s, c)
    assert (
        metrics.sample_success_rate(s, c),
        metrics.pairwise_accuracy(s, c),
    ) == pytest.approx(expected)


def test_more_similar_views_never_lower_ssr_or_pa_and_more_similar_distractors_never_raise_them():
    generator = torch.Generator().manual_seed(0)
    s, c = (
        torch.rand(50, 3, 3, generator=generator),
        torch.rand(50, 3, 3, generator=generator),
    )
    for metric in (
        metrics.sample_success_rate,
        metrics.pairwise_accuracy,
        metrics.published_pairwise_accuracy,
    ):
        by_views = [metric(s + shift, c) for shift in (-2, -0.2, 0, 0.2, 2)]
        by_distractors = [metric(s, c + shift) for shift in (-2, -0.2, 0, 0.2, 2)]
        assert by_views == sorted(by_views) and (by_views[0], by_views[-1]) == (0, 1)
        assert by_distractors == sorted(by_distractors, reverse=True)


def test_all_ties_lose():
    equal = torch.full((3, 2, 2), 0.5)
    assert metrics.sample_success_rate(equal, equal) == metrics.pairwise_accuracy(equal, equal) == 0


def test_nothing_measured_is_nan():
    absent = torch.full((2, 3, 3), NAN)
    for metric in (
        metrics.sample_success_rate,
        metrics.pairwise_accuracy,
        metrics.published_pairwise_accuracy,
    ):
        assert math.isnan(metric(absent, absent))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[N,V,V\]"):
        metrics.pairwise_accuracy(torch.zeros(2, 3, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[N,2,2\]"):
        metrics.metric_oracle_correlation(torch.zeros(4, 3, 3), torch.zeros(4, 2))


# Part edits of two views: s12 between the originals; s11' s22' s12' s21' against the edited versions.
S12 = torch.tensor([0.90, 0.80, 0.85, 0.70])
EDITED = torch.stack(
    [
        torch.stack(
            [
                torch.tensor([0.95, 0.70, 0.80, 0.72]),
                torch.tensor([0.80, 0.75, 0.55, 0.60]),
            ],
            dim=1,
        ),
        torch.stack(
            [
                torch.tensor([0.85, 0.60, 0.75, 0.66]),
                torch.tensor([0.88, 0.85, 0.60, 0.65]),
            ],
            dim=1,
        ),
    ],
    dim=1,
)  # [N,2,2]
ORACLE = torch.tensor([[0.90, 0.80], [0.50, 0.85], [0.70, 0.40], [0.60, 0.50]])


def test_worked_part_edits():
    assert metrics.metric_oracle_correlation(EDITED, ORACLE) == pytest.approx(0.983992, abs=1e-6)
    assert metrics.metric_oracle_correlation(EDITED, ORACLE, same_view_only=True) == pytest.approx(0.983635, abs=1e-6)
    views = S12[:, None, None].expand(-1, 2, 2)
    assert metrics.sample_success_rate(views, EDITED) == 0.25
    assert metrics.pairwise_accuracy(views, EDITED) == 0.625


def test_a_score_that_follows_the_oracle_correlates_better():
    generator = torch.Generator().manual_seed(0)
    oracle = torch.rand(200, 2, generator=generator)
    noise = torch.randn(200, 2, 2, generator=generator)
    results = [metrics.metric_oracle_correlation(oracle[:, None] + amount * noise, oracle) for amount in (2, 0.5, 0)]
    assert results == sorted(results) and results[-1] == pytest.approx(0.999)
    assert metrics.metric_oracle_correlation(-oracle[:, None].expand(-1, 2, 2), oracle) == pytest.approx(-0.999)


def test_edit_oracle_counts_positive_pixels():
    subject = torch.zeros(8, 8)
    subject[:4] = 255
    part = torch.zeros(8, 8)
    part[0] = 1
    assert metrics.edit_oracle(part, subject) == 0.75
    assert math.isnan(metrics.edit_oracle(part, torch.zeros(8, 8)))


def test_worked_human_correlation():
    summary = metrics.summarise_methods((0.675, 0.655, 0.546, 0.382, 0.768, 0.306, 0.316))
    assert summary.mean == pytest.approx(0.5449, abs=5e-5)
    assert summary.standard_error == pytest.approx(0.0709, abs=5e-5)


def test_human_correlation_agrees_with_plain_loops():
    generator = torch.Generator().manual_seed(1)
    scores, first, second = ([torch.rand(n, generator=generator) for n in (9, 12)] for _ in range(3))
    per_method = [
        (statistics.correlation(s.tolist(), a.tolist()) + statistics.correlation(s.tolist(), b.tolist())) / 2
        for s, a, b in zip(scores, first, second)
    ]
    result = metrics.human_correlation(scores, first, second)
    assert result.per_method == pytest.approx(per_method)
    assert result.mean == pytest.approx(math.tanh(statistics.mean(math.atanh(r) for r in per_method)))


def test_score_that_follows_the_raters_has_a_higher_human_correlation():
    ratings = [torch.arange(10.0), torch.arange(12.0)]
    noise = [torch.randn(len(r), generator=torch.Generator().manual_seed(3)) for r in ratings]
    means = [
        metrics.human_correlation([r + a * n for r, n in zip(ratings, noise)], ratings, ratings).mean
        for a in (20, 3, 0)
    ]
    assert means == sorted(means) and means[-1] == pytest.approx(0.9999)


def test_pearson_drops_nan_and_has_no_value_without_variation():
    x = torch.tensor([1.0, 2.0, NAN, 4.0])
    assert metrics.pearson(x, torch.tensor([2.0, 4.0, 5.0, 8.0])) == pytest.approx(1)
    assert math.isnan(metrics.pearson(torch.ones(4), torch.arange(4)))
    assert math.isnan(metrics.pearson(torch.ones(1), torch.ones(1)))


def test_bootstrap_is_seeded_and_brackets_the_statistic():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    low, high = metrics.bootstrap_interval(values, num_resamples=500)
    assert (low, high) == metrics.bootstrap_interval(values, num_resamples=500)
    assert low < float(values.mean()) < high
    # Close to the normal interval of a mean: 2 x 1.96 sd / sqrt(N).
    assert high - low == pytest.approx(3.92 * float(values.std()) / 200**0.5, rel=0.15)
    wide = metrics.bootstrap_interval(values[:20], num_resamples=500)
    assert wide[1] - wide[0] > high - low


def test_bootstrap_resamples_whole_identities():
    counts = metrics.won_and_valid(metrics.identity_margins(VIEWS, DISTRACTORS))
    low, high = metrics.bootstrap_interval(counts, metrics.share_of_won_terms, num_resamples=300)
    assert 0 < low < 0.625 < high <= 1
    assert metrics.bootstrap_interval(torch.ones(5), num_resamples=10) == (1, 1)
    with pytest.raises(ValueError, match="at least one row"):
        metrics.bootstrap_interval(torch.zeros(0))


def test_human_correlation_by_category_is_that_of_each_categorys_pairs():
    generator = torch.Generator().manual_seed(3)
    scores, first, second = (torch.rand(2, 12, generator=generator) for _ in range(3))
    names = [["object", "style", "living"] * 4, ["living"] * 6 + ["object"] * 6]
    table = metrics.human_correlation_by_category(scores.unbind(), first.unbind(), second.unbind(), names)
    assert list(table) == ["pooled", "living", "object", "style"]
    assert table["pooled"] == metrics.human_correlation(scores.unbind(), first.unbind(), second.unbind())
    objects = [torch.tensor([name == "object" for name in of_method]) for of_method in names]
    expected = metrics.human_correlation(*([x[m] for x, m in zip(xs, objects)] for xs in (scores, first, second)))
    assert table["object"] == expected
    alone = table["style"]  # the second method has none
    assert math.isnan(alone.per_method[1]) and alone.mean == pytest.approx(alone.per_method[0])
    with pytest.raises(ValueError, match="one category per score"):
        metrics.human_correlation_by_category(scores.unbind(), first.unbind(), second.unbind(), names[:1])


def test_bootstrap_of_sums_is_that_of_rows_drawn_one_resample_at_a_time():
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    y = y + 0.5 * x
    y[7] = float("nan")

    def slow(rows):
        return metrics.pearson(rows[:, 0], rows[:, 1])

    def fast(sums):
        return metrics.correlation_of_sums(sums)

    sums = metrics.correlation_sums(x[:, None], y[:, None])
    assert sums.shape == (60, 6)
    expected = metrics.bootstrap_interval(torch.stack([x, y], dim=1), slow, num_resamples=300, seed=9)
    assert metrics.bootstrap_sums(sums, fast, num_resamples=300, seed=9) == pytest.approx(expected, abs=1e-12)


def test_correlation_of_sums_of_a_constant_is_nothing():
    x, constant = torch.arange(5.0), torch.full((5,), 0.1)
    for pair in ((x, constant), (constant, x), (constant, constant), (x, torch.full((5,), float("nan")))):
        assert metrics.correlation_of_sums(metrics.correlation_sums(*pair)).isnan()
    assert metrics.correlation_of_sums(metrics.correlation_sums(x, -x)) == -1


# --- shares of pictures


def test_a_share_of_pictures_is_as_uncertain_as_its_subjects():
    hits = [subject < 5 for subject in range(20) for _ in range(10)]
    alike = metrics.share_interval(hits, [subject for subject in range(20) for _ in range(10)])
    apart = metrics.share_interval(hits, range(200))
    # The definition, slowly: subjects drawn with replacement bring all their pictures.
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2000):
        drawn = torch.randint(20, (20,), generator=generator).tolist()
        pictures = [hit for subject in drawn for hit in hits[10 * subject : 10 * subject + 10]]
        shares.append(sum(pictures) / len(pictures))
    shares.sort()
    assert alike == pytest.approx((shares[50], shares[-51]), abs=0.051)  # one subject's share
    assert alike[1] - alike[0] > 2 * (apart[1] - apart[0])
    assert alike[0] < 0.25 < alike[1] and apart[0] < 0.25 < apart[1]


def test_where_none_or_all_count_the_interval_is_that_of_the_subjects():
    subjects = [subject for subject in range(20) for _ in range(10)]
    assert metrics.share_interval([False] * 200, subjects) == metrics.wilson_interval(0, 20)
    assert metrics.share_interval([True] * 200, subjects) == metrics.wilson_interval(20, 20)
    with pytest.raises(ValueError, match="subject for each"):
        metrics.share_interval([True], [])
