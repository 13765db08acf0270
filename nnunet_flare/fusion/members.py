"""From the members' outputs of one case to one training label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nnunet_flare.labels import Group, ids_of

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
    label: np.ndarray, members: Sequence[np.ndarray], uncertain: Mapping[str, Sequence[int]], ignore_label: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Set every voxel that any member, or the fused label, gives to an uncertain organ to ``ignore_label``.

    Args:
        label: training label (Z, Y, X).
        members: the members' label maps (Z, Y, X).
        uncertain: label ids of the organs and regions whose agreement is too low, by name.
        ignore_label: one above the highest label.

    Returns:
        The new label and, by organ, the share of all voxels that became *ignore* because of it.
    """
    result = label.copy()
    shares: dict[str, float] = {}
    for organ, ids in uncertain.items():
        voxels = np.isin(label, ids)
        for member in members:
            voxels |= np.isin(member, ids)
        shares[organ] = float(voxels.mean())
        result[voxels] = ignore_label
    return result, shares


def class_locations(
    label: np.ndarray, groups: Iterable[Group], *, points: int = 1000, seed: int = 1234
) -> dict[Group, np.ndarray]:
    """Voxels for nnU-Net's oversampling: up to ``points`` per group, without replacement.

    Args:
        label: label map (Z, Y, X).
        groups: label ids, or tuples of several, as :func:`nnunet_flare.labels.sampled_groups` gives them.
        points: of each group at most.
        seed: of the choice.

    Returns:
        By group an int16 array (n, 4) of (channel 0, z, y, x), as the stock loader reads it; empty where absent. Int16
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
    found: dict[Group, np.ndarray] = {}
    for group in groups:
        ids = ids_of(group)
        if min(ids) > 0:
            parts = [np.searchsorted(values, [organ, organ + 1]) for organ in ids]
            voxels = np.concatenate([foreground[start:stop] for start, stop in parts])
        else:
            voxels = np.flatnonzero(np.isin(flat, ids))
        if len(voxels) > points:
            voxels = np.sort(rng.choice(voxels, points, replace=False))
        where = np.zeros((len(voxels), 1 + label.ndim), dtype=np.int16)
        for axis, index in enumerate(np.unravel_index(voxels, label.shape), start=1):
            where[:, axis] = index
        found[group] = where
    return found
