"""How well a score ranks pseudo-labels by their true quality: rank correlation and the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """``spearman``: rank correlation with the quality; ``auc``: chance that a case above the median quality scores
    higher than one that is not. NaN where either does not vary."""

    spearman: float
    auc: float


def rank_quality(scores: Sequence[float], quality: Sequence[float]) -> Ranking:
    """Judge scores of cases by what the cases are worth; ties count half in the AUC.

    Raises:
        ValueError: for lists of different length.
    """
    from scipy.stats import spearmanr

    given, true = np.asarray(scores, dtype=float), np.asarray(quality, dtype=float)
    if given.shape != true.shape:
        raise ValueError(f"{given.size} scores for {true.size} cases")
    if given.size < 2 or np.ptp(given) == 0 or np.ptp(true) == 0:
        return Ranking(float("nan"), float("nan"))
    return Ranking(float(spearmanr(given, true).statistic), _auc(given, true > np.median(true)))


def _auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Mann and Whitney's U of the good cases' scores, as a share of all pairs."""
    from scipy.stats import rankdata

    positives = int(good.sum())
    negatives = good.size - positives
    if not positives or not negatives:
        return float("nan")
    u = rankdata(scores)[good].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))
