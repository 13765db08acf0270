"""Resampling an image as stock nnU-Net does, as matrix products.

Stock resamples with cubic splines, slice by slice where one axis is coarse (nearest neighbours between the slices) and
clips each resized array to its input's range. A spline along one axis is a matrix (``grids.spline_matrix``), so that a
slice is two matrix products, and with nearest neighbours only the slices that are wanted are resized at all.
Differs from stock by rounding (single instead of double precision): below 0.001 HU on CT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.inference.grids import ANISOTROPY_THRESHOLD, nearest, separate_axis, spline_matrix

STOCK = "resample_data_or_seg_to_shape"
"""The stock function that is reproduced; any other of the plans is called as it is."""

NO_RESAMPLING = "no_resampling_hack"
"""The stock function that gives back what it is given, whatever the spacings."""

KNOWN_ARGUMENTS = frozenset({"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"})

Normalise = Callable[[np.ndarray], np.ndarray]
"""A voxel-wise operation on a float32 array, applied before resampling."""


def resample_image(
    image: np.ndarray,
    shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    configuration_manager: Any,
    normalise: Normalise | None = None,
) -> np.ndarray:
    """One channel (Z, Y, X) on a new grid of ``shape``, float32, as the plans' ``resampling_fn_data`` makes it.

    Args:
        image: the channel in any real type; it is not changed.
        shape: the new shape.
        current_spacing: the image's spacing (z, y, x), mm.
        new_spacing: the new spacing (z, y, x), mm.
        configuration_manager: stock nnU-Net's, with the function's name and arguments.
        normalise: applied to the values first; slices that are not wanted are spared it.

    Raises:
        InputError: when the plans name a resampling function that does not exist.
    """
    settings = configuration_manager.configuration
    kwargs = settings["resampling_fn_data_kwargs"]
    shape = tuple(int(n) for n in shape)
    plain = (lambda array: array.astype(np.float32)) if normalise is None else normalise
    if tuple(image.shape) == shape:
        return plain(image)
    if not _reproducible(settings["resampling_fn_data"], kwargs):
        return _with_stock(plain(image), shape, current_spacing, new_spacing, configuration_manager)
    order = int(kwargs.get("order", 3))
    axis = separate_axis(
        current_spacing,
        new_spacing,
        force=kwargs.get("force_separate_z", False),
        threshold=kwargs.get("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD),
    )
    if axis is None:
        return _resample_3d(plain(image), shape, order)
    return _resample_slices(image, shape, axis, order, plain)


def _resample_slices(
    image: np.ndarray, shape: tuple[int, ...], axis: int, order: int, normalise: Normalise
) -> np.ndarray:
    """Splines within each slice, nearest neighbours along ``axis``."""
    moved = np.moveaxis(image, axis, 0)
    in_plane = tuple(n for i, n in enumerate(shape) if i != axis)
    rows = spline_matrix(moved.shape[1], in_plane[0], order)
    columns = np.ascontiguousarray(spline_matrix(moved.shape[2], in_plane[1], order).T)
    result = np.empty((shape[axis], *in_plane), np.float32)
    before = -1
    for target, source in enumerate(nearest(image.shape[axis], shape[axis])):
        if source == before:
            result[target] = result[target - 1]
            continue
        plane = normalise(np.ascontiguousarray(moved[source])[None])[0]
        resized = rows @ plane @ columns if plane.shape != in_plane else plane
        np.clip(resized, plane.min(), plane.max(), out=result[target])
        before = source
    return np.ascontiguousarray(np.moveaxis(result, 0, axis))


def _resample_3d(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """Splines along all three axes; overshoot beyond the image's range is clipped, as stock does."""
    low, high = image.min(), image.max()
    rows = spline_matrix(image.shape[1], shape[1], order)
    columns = np.ascontiguousarray(spline_matrix(image.shape[2], shape[2], order).T)
    in_plane = np.empty((image.shape[0], *shape[1:]), np.float32)
    for index, plane in enumerate(image):
        np.matmul(rows @ plane, columns, out=in_plane[index])
    if image.shape[0] != shape[0]:
        slices = spline_matrix(image.shape[0], shape[0], order)
        in_plane = (slices @ in_plane.reshape(image.shape[0], -1)).reshape(shape)
    return np.clip(in_plane, low, high, out=in_plane)


def is_ours(configuration: Mapping[str, Any]) -> bool:
    """Whether images of a configuration are resampled here, and not by the function of nnU-Net that it names."""
    return _reproducible(configuration["resampling_fn_data"], configuration["resampling_fn_data_kwargs"])


def _reproducible(name: str, kwargs: dict[str, Any]) -> bool:
    return (
        name == STOCK
        and KNOWN_ARGUMENTS.issuperset(kwargs)
        and not kwargs.get("is_seg", False)
        and kwargs.get("order_z", 0) == 0
        and 0 < kwargs.get("order", 3) <= 5
    )


def _with_stock(
    image: np.ndarray,
    shape: tuple[int, ...],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    configuration_manager: Any,
) -> np.ndarray:
    try:
        resample = configuration_manager.resampling_fn_data
    except RuntimeError as error:
        raise InputError(f"the plans resample images with an unknown function ({error})") from error
    return np.asarray(resample(image[None], shape, current_spacing, new_spacing)[0], np.float32)
