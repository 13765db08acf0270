"""Copies of a scan that a good model labels like the scan itself: moved a little, brighter, darker.

Members of an ensemble learnt from the same cases and share errors: on a scan unlike these, they may agree and be wrong.
How much their label changes when the scan is changed in ways that change no anatomy says something else about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

SHIFT_VOXELS = 2
"""Along every axis, there and back."""
CHANGES = ((1.15, 0.1), (0.85, -0.1))
"""Gain and offset of the normalised intensities, of standard deviation about 1: brighter, darker."""


def moved(array: np.ndarray, voxels: int) -> np.ndarray:
    """An array (..., Z, Y, X) whose content is moved by ``voxels`` along each of the last three axes.

    What comes in from outside repeats the border.
    """
    for axis in range(array.ndim - 3, array.ndim):
        places = np.clip(np.arange(array.shape[axis]) - voxels, 0, array.shape[axis] - 1)
        array = array.take(places, axis=axis)
    return array


def labels_of_copies(label: Callable[[np.ndarray], np.ndarray], scan: np.ndarray) -> list[np.ndarray]:
    """The label maps (Z, Y, X) of each copy of a scan, moved back onto it.

    Args:
        label: makes the label map of a scan (C, Z, Y, X).
        scan: normalised.
    """
    shifted = moved(label(moved(scan, SHIFT_VOXELS)), -SHIFT_VOXELS)
    return [shifted, *(label(gain * scan + np.asarray(offset, scan.dtype)) for gain, offset in CHANGES)]


def steadiness(
    labels: np.ndarray, copies: list[np.ndarray], num_labels: int, organs: Sequence[Sequence[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How alike the labels of a scan and of its copies are.

    Args:
        labels: label map of the scan.
        copies: label maps of its copies.
        num_labels: number of labels, background included.
        organs: label ids of each organ or region; None: one for each label above 0.

    Returns:
        (organs,) mean Dice of each organ over the copies, 1 where scan and copy both lack it; and the share of the
        copies in which that is so.
    """
    from nnunet_flare.selection.agreement import pairwise_dice

    found = [pairwise_dice([labels, copy], num_labels, organs) for copy in copies]
    return np.mean([each.per_organ for each in found], axis=0), np.mean([each.absent for each in found], axis=0)
