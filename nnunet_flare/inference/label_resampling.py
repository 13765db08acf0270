"""Resampling a label map as stock nnU-Net does: what a cascade's second stage sees of the first one.

Each label's indicator is interpolated on its own, and a voxel gets the label that scores most there. Where two score
the same, the nearest voxel's label decides if it is one of them, else the lowest. Where one axis is coarse, slices are
resampled so, and nearest neighbours are taken between them. SciPy's ``zoom`` interpolates, as it does for stock's
function; the result is that of batchgenerators 0.25.5, voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.inference.grids import nearest
from nnunet_flare.inference.resampling import KNOWN_ARGUMENTS, NO_RESAMPLING, STOCK, coarse_axis
from nnunet_flare.inference.workers import in_parallel


def resample_labels(
    labels: np.ndarray,
    shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    configuration_manager: Any,
) -> np.ndarray:
    """A label map (z, y, x) of whole numbers on a new grid, as the plans' ``resampling_fn_seg`` makes it.

    Args:
        labels: it is not changed.
        shape: the new shape; a function that does not resample leaves the old one.
        current_spacing: of the label map (z, y, x), mm.
        new_spacing: the new spacing (z, y, x), mm.
        configuration_manager: stock nnU-Net's, with the function's name and arguments.

    Raises:
        InputError: when the plans name a resampling function that does not exist.
    """
    configuration, shape = configuration_manager.configuration, tuple(int(n) for n in shape)
    if not labels_are_ours(configuration):
        try:
            resample = configuration_manager.resampling_fn_seg
        except RuntimeError as error:
            raise InputError(f"the plans resample label maps with an unknown function ({error})") from error
        return np.asarray(resample(labels[None], shape, current_spacing, new_spacing)[0])
    if configuration["resampling_fn_seg"] == NO_RESAMPLING or labels.shape == shape:
        return labels
    arguments = configuration["resampling_fn_seg_kwargs"]
    axis, order = coarse_axis(arguments, current_spacing, new_spacing), int(arguments.get("order", 3))
    return _resized(labels, shape, order) if axis is None else _slice_by_slice(labels, shape, axis, order)


def labels_are_ours(configuration: Mapping[str, Any]) -> bool:
    """Whether label maps of a configuration are resampled here, or not at all, and not by a function that it names."""
    name, arguments = configuration["resampling_fn_seg"], configuration["resampling_fn_seg_kwargs"]
    return name == NO_RESAMPLING or (
        name == STOCK
        and KNOWN_ARGUMENTS.issuperset(arguments)
        and bool(arguments.get("is_seg", False))
        and arguments.get("order_z", 0) == 0
        and 0 <= arguments.get("order", 3) <= 5
    )


def _slice_by_slice(labels: np.ndarray, shape: tuple[int, ...], axis: int, order: int) -> np.ndarray:
    """Each wanted slice resized, nearest neighbours along ``axis``."""
    moved = np.moveaxis(labels, axis, 0)
    in_plane = tuple(n for i, n in enumerate(shape) if i != axis)
    result = np.empty((shape[axis], *in_plane), labels.dtype)
    sources = nearest(labels.shape[axis], shape[axis])

    def resize(source: int) -> None:
        result[sources == source] = _resized(moved[source], in_plane, order)

    in_parallel(resize, np.unique(sources).tolist())
    return np.ascontiguousarray(np.moveaxis(result, 0, axis))


def _resized(labels: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """All axes at a new size, by the label that scores most."""
    if labels.shape == shape:
        return labels
    closest = _zoomed(labels.astype(float), shape, 0).astype(labels.dtype)
    there = np.unique(labels)
    if order == 0 or len(there) == 1:
        return closest
    winner, best = np.full(shape, there[0], labels.dtype), np.full(shape, -1.0)
    for label in there:
        score = np.clip(_zoomed((labels == label).astype(float), shape, order), 0, 1)
        wins = (score > best) | ((score == best) & (closest == label))
        winner[wins] = label
        best = np.maximum(best, score)
    return winner


def _zoomed(values: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    from scipy.ndimage import zoom

    factors = [1 / (before / after) for before, after in zip(values.shape, shape, strict=True)]
    zoomed: np.ndarray = zoom(values, factors, order=order, mode="nearest", grid_mode=True)
    return zoomed
