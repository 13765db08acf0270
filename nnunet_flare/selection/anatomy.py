"""What the labelled cases say of each organ: how often it is there, beside which others it lies, how large it is.

Whether an organ that no member found is really absent depends on two things: some patients lack it (a gallbladder), and
a scan may end before it. The second shows in its neighbours: where the organs are missing that share its slices in the
labelled cases, it is probably not in the field of view either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST_FOR_A_RANGE = 2
"""Labelled cases with an organ below which nothing is said of its size."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Of the labelled cases, for organs 0 .. K - 1.

    Attributes:
        prevalence: (K,) share of the cases that have the organ, by Laplace's rule: (with + 1) / (annotated + 2).
        overlap: (K, K) mean share of the slices of organ i in which organ j lies too; 0 on the diagonal, and where no
            case has both.
        log_volume: (K, 2) mean and standard deviation of the logarithm of the volume in mm3; NaN of too few cases.
    """

    prevalence: np.ndarray
    overlap: np.ndarray
    log_volume: np.ndarray


def anatomy_of(volumes_mm3: np.ndarray, slices: np.ndarray, annotated: np.ndarray) -> Anatomy:
    """Learn from labelled cases.

    Args:
        volumes_mm3: (cases, K), 0 where the organ is absent.
        slices: (cases, K, 2) first slice of the organ and the one after its last; not read where it is absent.
        annotated: (cases, K) bool: False where nobody annotated the organ, so that its absence means nothing.
    """
    there = (volumes_mm3 > 0) & annotated
    prevalence = (there.sum(axis=0) + 1) / (annotated.sum(axis=0) + 2)
    low, high = slices[..., 0], slices[..., 1]
    shared = np.minimum(high[:, :, None], high[:, None, :]) - np.maximum(low[:, :, None], low[:, None, :])
    share = np.clip(shared, 0, None) / np.maximum(high - low, 1)[:, :, None]
    both = there[:, :, None] & there[:, None, :]
    overlap = (share * both).sum(axis=0) / np.maximum(both.sum(axis=0), 1)
    np.fill_diagonal(overlap, 0.0)
    logs = np.log(np.where(there, volumes_mm3, 1.0))
    enough = there.sum(axis=0) >= FEWEST_FOR_A_RANGE
    count = np.maximum(there.sum(axis=0), FEWEST_FOR_A_RANGE)
    mean = (logs * there).sum(axis=0) / count
    spread = np.sqrt((np.square(logs - mean) * there).sum(axis=0) / (count - 1))
    return Anatomy(prevalence, overlap, np.where(enough[:, None], np.stack([mean, spread], axis=1), np.nan))


def presence(anatomy: Anatomy, found: np.ndarray) -> np.ndarray:
    """(cases, K) probability that each organ is in a scan, by its prevalence and its neighbours in the field of view.

    Prevalence times the share of its neighbours that were found, each weighted by how much of the organ's slices it
    shares in the labelled cases; of an organ without neighbours, the prevalence alone.

    Args:
        anatomy: of the labelled cases.
        found: (cases, K) bool, which organs any member found.
    """
    weights = anatomy.overlap.sum(axis=1)
    in_view = (found @ anatomy.overlap.T) / np.where(weights > 0, weights, 1.0)
    return np.asarray(anatomy.prevalence * np.where(weights > 0, in_view, 1.0))
