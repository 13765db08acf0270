"""How well a score ranks pseudo-labels by their true quality."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, spearmanr

from nnunet_flare.selection.ranking import rank_quality

LISTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=20)


def test_a_score_in_the_order_of_quality_ranks_perfectly_and_its_reverse_not_at_all():
    found = rank_quality([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8])
    assert (found.spearman, found.auc) == pytest.approx((1, 1))
    found = rank_quality([0.4, 0.3, 0.2, 0.1], [0.5, 0.6, 0.7, 0.8])
    assert (found.spearman, found.auc) == pytest.approx((-1, 0))


@given(LISTS)
def test_both_measures_are_scipys(pairs):
    scores, quality = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    found = rank_quality(scores, quality)
    if np.ptp(scores) == 0 or np.ptp(quality) == 0:
        assert np.isnan(found.spearman) and np.isnan(found.auc)
        return
    assert found.spearman == pytest.approx(spearmanr(scores, quality).statistic)
    good = quality > np.median(quality)
    if not good.any():
        assert np.isnan(found.auc)
        return
    expected = mannwhitneyu(scores[good], scores[~good]).statistic / (good.sum() * (~good).sum())
    assert found.auc == pytest.approx(expected)


def test_a_score_that_does_not_vary_ranks_nothing():
    found = rank_quality([1, 1, 1], [0.1, 0.2, 0.3])
    assert np.isnan(found.spearman) and np.isnan(found.auc)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 scores for 3 cases"):
        rank_quality([1, 2], [1, 2, 3])
