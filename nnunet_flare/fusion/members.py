"""From the members' outputs of one case to one training label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OUTSIDE = -1
"""nnU-Net's value for voxels outside the non-zero crop mask; only background is ever marked so."""


def training_label(fused: np.ndarray, crop_mask_seg: np.ndarray) -> np.ndarray:
    """The ``_seg`` array that nnU-Net's own preprocessing would have written for this label map.

    Args:
        fused: label map on the network grid, (Z, Y, X).
        crop_mask_seg: the unlabelled case's ``_seg``, 0 inside and -1 outside the non-zero mask, (Z, Y, X).

    Returns:
        int16 (Z, Y, X): the labels, and -1 where the label is background outside the mask.
    """
    label = fused.astype(np.int16)
    label[(label == 0) & (crop_mask_seg == OUTSIDE)] = OUTSIDE
    return label


def ignore_uncertain(
    label: np.ndarray, members: Sequence[np.ndarray], uncertain: Sequence[int], ignore_label: int
) -> tuple[np.ndarray, dict[int, float]]:
    """Set every voxel that any member, or the fused label, gives to an uncertain organ to ``ignore_label``.

    Args:
        label: training label (Z, Y, X).
        members: the members' label maps (Z, Y, X).
        uncertain: organ ids whose agreement is too low.
        ignore_label: one above the highest label.

    Returns:
        The new label and, by organ id, the share of all voxels that became *ignore* because of it.
    """
    result = label.copy()
    shares: dict[int, float] = {}
    for organ in uncertain:
        voxels = label == organ
        for member in members:
            voxels |= member == organ
        shares[organ] = float(voxels.mean())
        result[voxels] = ignore_label
    return result, shares


def class_locations(
    label: np.ndarray, labels: Sequence[int], *, points: int = 1000, seed: int = 1234
) -> dict[int, np.ndarray]:
    """Foreground voxels for nnU-Net's oversampling: up to ``points`` per label, without replacement.

    Returns:
        By label an int16 array (n, 4) of (channel 0, z, y, x), as the stock loader reads it; empty where absent. Int16
        holds every axis of a CT on the network grid and keeps the pickles of thousands of cases small.
    """
    if max(label.shape) > np.iinfo(np.int16).max:
        raise ValueError(f"label of shape {label.shape} has an axis too long for int16 coordinates")
    rng = np.random.default_rng(seed)
    flat = label.reshape(-1)
    foreground = np.flatnonzero(flat > 0)
    values = flat[foreground]
    order = np.argsort(values, kind="stable")
    values, foreground = values[order], foreground[order]
    found: dict[int, np.ndarray] = {}
    for organ in labels:
        start, stop = np.searchsorted(values, [organ, organ + 1])
        voxels = foreground[start:stop]
        if len(voxels) > points:
            voxels = np.sort(rng.choice(voxels, points, replace=False))
        where = np.zeros((len(voxels), 1 + label.ndim), dtype=np.int16)
        for axis, index in enumerate(np.unravel_index(voxels, label.shape), start=1):
            where[:, axis] = index
        found[int(organ)] = where
    return found
