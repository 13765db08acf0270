"""Class weights for the cross-entropy part of nnU-Net's loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

MAX_CASES_COUNTED = 50
"""Cases whose labels are read for the frequencies: more would cost minutes on thousands of cases and change little."""


def evenly_spaced(cases: list[str], count: int) -> list[str]:
    """At most ``count`` of the cases, evenly spread over the list."""
    if len(cases) <= count:
        return list(cases)
    return [cases[index * len(cases) // count] for index in range(count)]


def count_labels(label_maps: Iterable[np.ndarray], n_classes: int) -> np.ndarray:
    """Voxels of each class 0 ... ``n_classes - 1`` over all maps; negative (outside) and higher values are left out."""
    counts = np.zeros(n_classes, dtype=np.int64)
    for labels in label_maps:
        known = labels[(labels >= 0) & (labels < n_classes)]
        counts += np.bincount(known.astype(np.int64), minlength=n_classes)
    return counts


def frequencies(counts: Sequence[np.ndarray], annotated: Sequence[Collection[int] | None]) -> np.ndarray:
    """(n_classes,) share of the voxels that each class has; the background has what the organs leave.

    The map of a case that lacks the annotation of an organ calls it background: such a case says nothing about how
    frequent the organ is, nor the background.

    Args:
        counts: of each case, (n_classes,) voxels, background first.
        annotated: of each case, the organs that its map names; None: all.
    """
    table = np.asarray(counts, dtype=np.float64).reshape(len(counts), -1)
    organs = range(1, table.shape[1])
    known = np.array([[found is None or organ in found for organ in organs] for found in annotated]).reshape(
        len(table), -1
    )
    seen = (table.sum(axis=1, keepdims=True) * known).sum(axis=0)
    shares = (table[:, 1:] * known).sum(axis=0) / np.maximum(seen, 1)
    return np.concatenate(([max(0.0, 1.0 - shares.sum())], shares))


def inverse_sqrt_frequency(counts: np.ndarray) -> np.ndarray:
    """Weights (n_classes,) proportional to 1 / sqrt(voxels, or their share), of mean 1.

    An absent class gets the rarest one's weight.

    Without weights a small organ (an adrenal has 1 in 10 000 voxels) is not learnt in a short training; plain inverse
    frequencies overdo it, because Dice already balances the classes.
    """
    present = counts > 0
    if not present.any():
        return np.ones(len(counts))
    weights = np.zeros(len(counts))
    weights[present] = 1.0 / np.sqrt(counts[present])
    weights[~present] = weights.max()
    return np.asarray(weights / weights.mean())
