"""Resampling an image as stock nnU-Net does, as matrix products.

Stock resamples with cubic splines, slice by slice where one axis is coarse (nearest neighbours between the slices) and
clips each resized array to its input's range. A spline along one axis is a matrix (``grids.spline_matrix``), so that a
slice is two matrix products, and with nearest neighbours only the slices that are wanted are resized at all. The
matrices are nearly empty away from their diagonals, and only what is not is multiplied (``grids.spline_bands``).
Differs from stock by rounding (single instead of double precision): below 0.001 HU on CT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_flare.errors import InputError
from nnunet_flare.inference.grids import ANISOTROPY_THRESHOLD, nearest, separate_axis, spline_bands
from nnunet_flare.inference.workers import in_parallel

STOCK = "resample_data_or_seg_to_shape"
"""The stock function that is reproduced; any other of the plans is called as it is."""

NO_RESAMPLING = "no_resampling_hack"
"""The stock function that gives back what it is given, whatever the spacings."""

KNOWN_ARGUMENTS = frozenset({"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"})

STRIP_ROWS = 16
"""Rows of all slices that are resampled between slices at a time."""

Normalise = Callable[[np.ndarray], np.ndarray]
"""A voxel-wise operation that gives a new float32 array, applied before resampling; used by several threads at once."""


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
    axis, order = axis_and_order(settings, current_spacing, new_spacing)
    if axis is None:
        return _resample_3d(image, shape, order, plain)
    return _resample_slices(image, shape, axis, order, plain)


def axis_and_order(
    configuration: Mapping[str, Any], current_spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int | None, int]:
    """The axis that takes nearest neighbours, or None, and the order of the splines along the others."""
    arguments = configuration["resampling_fn_data_kwargs"]
    return coarse_axis(arguments, current_spacing, new_spacing), int(arguments.get("order", 3))


def coarse_axis(
    arguments: Mapping[str, Any], current_spacing: Sequence[float], new_spacing: Sequence[float]
) -> int | None:
    """The axis that takes nearest neighbours by the arguments of stock's function, or None."""
    return separate_axis(
        current_spacing,
        new_spacing,
        force=arguments.get("force_separate_z", False),
        threshold=arguments.get("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD),
    )


def _resample_slices(
    image: np.ndarray, shape: tuple[int, ...], axis: int, order: int, normalise: Normalise
) -> np.ndarray:
    """Splines within each slice, nearest neighbours along ``axis``; every slice is clipped to its own range."""
    moved = np.moveaxis(image, axis, 0)
    in_plane = tuple(n for i, n in enumerate(shape) if i != axis)
    result = np.empty((shape[axis], *in_plane), np.float32)
    sources = nearest(image.shape[axis], shape[axis])

    def resize(source: int) -> None:
        plane = normalise(np.ascontiguousarray(moved[source])[None])[0]
        resized = _in_plane(plane, in_plane, order)
        result[sources == source] = np.clip(resized, plane.min(), plane.max())

    in_parallel(resize, np.unique(sources).tolist())
    return np.ascontiguousarray(np.moveaxis(result, 0, axis))


def _resample_3d(image: np.ndarray, shape: tuple[int, ...], order: int, normalise: Normalise) -> np.ndarray:
    """Splines along all three axes; overshoot beyond the image's range is clipped, as stock does.

    Where slices become fewer they do so first, which leaves the least to compute.
    """
    ranges: list[tuple[float, float]] = []

    def noted(values: np.ndarray) -> np.ndarray:
        values = normalise(np.ascontiguousarray(values))
        ranges.append((values.min(), values.max()))
        return values

    if shape[0] < image.shape[0]:
        fewer = _between_slices(image, shape[0], order, noted)
        result = _within_slices(fewer, shape[1:], order, lambda values: values)
    else:
        resized = _within_slices(image, shape[1:], order, noted)
        result = resized if shape[0] == image.shape[0] else _between_slices(resized, shape[0], order, lambda v: v)
    lows, highs = zip(*ranges, strict=True)
    return np.clip(result, min(lows), max(highs), out=result)


def _within_slices(image: np.ndarray, shape: tuple[int, ...], order: int, normalise: Normalise) -> np.ndarray:
    """Every slice (Y, X) at a new size."""
    result = np.empty((len(image), *shape), np.float32)

    def resize(index: int) -> None:
        result[index] = _in_plane(normalise(image[index : index + 1])[0], shape, order)

    in_parallel(resize, range(len(image)))
    return result


def _between_slices(image: np.ndarray, slices: int, order: int, normalise: Normalise) -> np.ndarray:
    """Another number of slices; done in strips of some rows, so that no second whole image is needed."""
    result = np.empty((slices, *image.shape[1:]), np.float32)

    def resize(first: int) -> None:
        rows = slice(first, first + STRIP_ROWS)
        values = normalise(image[:, rows])
        flat = np.ascontiguousarray(values).reshape(len(image), -1)
        for band in spline_bands(len(image), slices, order):
            result[band.out, rows] = (band.matrix @ flat[band.into]).reshape(-1, *values.shape[1:])

    in_parallel(resize, range(0, image.shape[1], STRIP_ROWS))
    return result


def _in_plane(plane: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """A slice (Y, X) at a new size."""
    if plane.shape[0] != shape[0]:
        rows = np.empty((shape[0], plane.shape[1]), np.float32)
        for band in spline_bands(plane.shape[0], shape[0], order):
            np.matmul(band.matrix, plane[band.into], out=rows[band.out])
        plane = rows
    if plane.shape[1] != shape[1]:
        columns = np.empty(shape, np.float32)
        for band in spline_bands(plane.shape[1], shape[1], order):
            columns[:, band.out] = plane[:, band.into] @ band.matrix.T
        plane = columns
    return plane


def is_ours(configuration: Mapping[str, Any]) -> bool:
    """Whether images of a configuration are resampled here, or not at all, and not by a function that it names."""
    name = configuration["resampling_fn_data"]
    return name == NO_RESAMPLING or _reproducible(name, configuration["resampling_fn_data_kwargs"])


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
