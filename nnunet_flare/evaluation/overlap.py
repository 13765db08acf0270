"""Voxel overlap of two label maps: one joint histogram per slice, from which every Dice follows.

Counting the pairs (reference label, predicted label) slice by slice costs one pass over the volume however many
structures there are, keeps the work in cache, and makes any range of slices a plain sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def compact(labels: np.ndarray, label_ids: Sequence[int]) -> np.ndarray:
    """The label map as uint8 with ``label_ids[i]`` renumbered to i + 1 and every other id to 0."""
    largest = max(int(labels.max(initial=0)), *label_ids)
    table = np.zeros(largest + 1, dtype=np.uint8)
    table[list(label_ids)] = np.arange(1, len(label_ids) + 1)
    if labels.dtype == np.uint8 and np.array_equal(table, np.arange(largest + 1)):
        return labels
    return table[labels]


def annotated_alone(reference: np.ndarray, other: np.ndarray, ignored: int | None) -> list[np.ndarray]:
    """Both label maps with background where the reference is not annotated, so that nothing there counts.

    Args:
        reference: label map (Z, Y, X) by a person.
        other: another one of the same shape.
        ignored: the id of voxels without annotation; None: there are none, and both are given back as they are.
    """
    if ignored is None or not (unknown := reference == ignored).any():
        return [reference, other]
    return [np.where(unknown, 0, reference), np.where(unknown, 0, other)]


def joint_counts(reference: np.ndarray, prediction: np.ndarray, n_labels: int) -> np.ndarray:
    """Voxel counts (Z, n_labels + 1, n_labels + 1) of each (reference, prediction) pair in each slice.

    Both maps are (Z, Y, X) uint8 with values up to ``n_labels``, at most 254. Only voxels that one of the
    maps labels are visited one by one.
    """
    size = n_labels + 1
    counts = np.zeros((reference.shape[0], size * size), dtype=np.int64)
    for place, (ref, pred) in enumerate(zip(reference, prediction, strict=True)):
        labelled = np.flatnonzero(ref | pred)
        pairs = ref.ravel()[labelled].astype(np.intp) * size + pred.ravel()[labelled]
        counts[place] = np.bincount(pairs, minlength=size * size)
        counts[place, 0] = ref.size - labelled.size
    return counts.reshape(-1, size, size)


def dice_of_counts(reference: int, prediction: int, both: int) -> float:
    """Dice of two voxel sets by their sizes: 1 when both are empty, as the challenge counts it."""
    total = int(reference) + int(prediction)
    return 2 * int(both) / total if total else 1.0


def dice(reference: np.ndarray, prediction: np.ndarray, label_ids: Sequence[int]) -> dict[int, float]:
    """Plain Dice per label id over the whole volume: absent in both = 1, absent in one = 0.

    Raises:
        ValueError: when the two maps differ in shape.
    """
    return dict(zip(label_ids, region_dice(reference, prediction, [(label,) for label in label_ids]), strict=True))


def region_dice(reference: np.ndarray, prediction: np.ndarray, organs: Sequence[Sequence[int]]) -> list[float]:
    """Plain Dice of every organ or region, the labels of a region counting as one; see :func:`dice`.

    Raises:
        ValueError: when the two maps differ in shape.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"label maps of shapes {reference.shape} and {prediction.shape} cannot be compared")
    known = sorted({label for ids in organs for label in ids})
    counts = joint_counts(compact(reference, known), compact(prediction, known), len(known)).sum(axis=0)
    sizes, predicted = counts.sum(axis=1), counts.sum(axis=0)
    places = [[known.index(label) + 1 for label in ids] for ids in organs]
    return [dice_of_counts(sizes[of].sum(), predicted[of].sum(), counts[np.ix_(of, of)].sum()) for of in places]
