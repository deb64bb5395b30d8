"""Ranking and accepting candidates by score."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from nearid_personalize.selection import best_accepted, rank_candidates

NAN = float("nan")


def test_a_better_score_ranks_higher():
    ranked = rank_candidates(torch.tensor([0.2, 0.9, 0.5]), threshold=0.4)
    assert [verdict.index for verdict in ranked] == [1, 2, 0]
    assert [verdict.accepted for verdict in ranked] == [True, True, False]


def test_a_score_at_the_threshold_is_accepted():
    assert rank_candidates([0.5], 0.5)[0].accepted


def test_reasons_tell_score_and_threshold():
    accepted, rejected, unscored = rank_candidates([0.25, NAN, 0.75], 0.5)
    assert accepted.reason == ""
    assert rejected.reason == "score 0.250 below threshold 0.500"
    assert unscored.reason == "not scored" and math.isnan(unscored.score)


def test_equal_scores_keep_their_order():
    assert [verdict.index for verdict in rank_candidates([0.3, 0.7, 0.3, 0.7], 0.5)] == [1, 3, 0, 2]


@pytest.mark.parametrize("scores", list(itertools.permutations([0.1, 0.4, 0.8, NAN])))
def test_order_of_candidates_changes_nothing_but_the_index(scores):
    ranked = rank_candidates(scores, 0.3)
    assert [verdict.score for verdict in ranked[:3]] == [0.8, 0.4, 0.1] and math.isnan(ranked[3].score)
    assert all(scores[verdict.index] == verdict.score for verdict in ranked[:3])


def test_raising_the_threshold_never_accepts_more():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    accepted = [
        {verdict.index for verdict in rank_candidates(scores, threshold) if verdict.accepted}
        for threshold in torch.linspace(-0.1, 1.1, 25).tolist()
    ]
    assert all(higher <= lower for lower, higher in itertools.pairwise(accepted))


def test_best_accepted_takes_at_most_what_was_asked():
    ranked = rank_candidates([0.9, 0.1, 0.8, 0.7], 0.5)
    assert [verdict.index for verdict in best_accepted(ranked, 2)] == [0, 2]
    assert [verdict.index for verdict in best_accepted(ranked, 9)] == [0, 2, 3]
    assert best_accepted(rank_candidates([], 0.5), 3) == ()


def test_guard_and_selection_import_no_pipeline_library():
    code = "import sys, nearid_personalize.guard; sys.exit(any(m in sys.modules for m in ('diffusers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
