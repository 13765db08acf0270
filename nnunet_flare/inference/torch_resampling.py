"""Normalising and resampling a scan on a GPU, see :mod:`nnunet_flare.inference.resampling`.

The same splines as whole matrices, for which a GPU has no need of bands, in single precision and not TF32. Nothing
waits for the GPU, and of a scan only so many slices at a time are there in single precision before they are resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnunet_flare.inference.devices import Device, of_torch
from nnunet_flare.inference.grids import nearest, spline_matrix
from nnunet_flare.inference.held import EXACT
from nnunet_flare.inference.memory import CHUNK_BYTES, FLOAT_BYTES
from nnunet_flare.inference.normalisation import SMALLEST
from nnunet_flare.inference.resampling import axis_and_order
from nnunet_flare.inference.torch_arrays import upload

if TYPE_CHECKING:
    from nnunet_flare.inference.preprocessing import Channel

Normalise = Callable[[torch.Tensor], torch.Tensor]
"""Stored values to single precision, normalised, voxel by voxel."""


def resampled_there(
    channels: Sequence[Channel],
    shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    configuration: Mapping[str, Any],
    *,
    device: Device,
) -> torch.Tensor:
    """All channels (C, z, y, x) on the new grid, float32, on a device; equal to the CPU's but for rounding.

    Args:
        channels: in any real type; what is not normalised voxel by voxel is normalised on the CPU first.
        shape: the new shape.
        current_spacing: (z, y, x), mm.
        new_spacing: (z, y, x), mm.
        configuration: of the plans, whose resampling ``resampling.is_ours``.
        device: a GPU.
    """
    shape = tuple(int(n) for n in shape)
    data = torch.empty((len(channels), *shape), dtype=torch.float32, device=of_torch(device))
    with EXACT.hold():
        for into, channel in zip(data, channels, strict=True):
            image, normalise = _uploaded(channel, device)
            if tuple(image.shape) == shape:
                for part in _parts(len(image), image[0].numel()):
                    into[part] = normalise(image[part])
                continue
            axis, order = axis_and_order(configuration, current_spacing, new_spacing)
            if axis is None:
                _resample_3d(image, into, order, normalise)
            else:
                _resample_slices(image.movedim(axis, 0), into.movedim(axis, 0), order, normalise)
    return data


def _uploaded(channel: Channel, device: Device) -> tuple[torch.Tensor, Normalise]:
    """A channel on the device and what is left of its normalisation."""
    if channel.scheme == "NoNormalization":
        return _as_stored(channel, device), torch.Tensor.float
    if channel.scheme != "CTNormalization":
        return upload(channel.normalise(channel.array), device), torch.Tensor.float
    values = channel.intensities
    low, high = float(values["percentile_00_5"]), float(values["percentile_99_5"])
    mean, deviation = float(values["mean"]), max(float(values["std"]), SMALLEST)

    def of_ct(stored: torch.Tensor) -> torch.Tensor:
        return stored.to(torch.float32, copy=True).clamp_(low, high).sub_(mean).div_(deviation)

    return _as_stored(channel, device), of_ct


def _as_stored(channel: Channel, device: Device) -> torch.Tensor:
    return upload(channel.array, device) if channel.there is None else channel.there


def _resample_slices(image: torch.Tensor, result: torch.Tensor, order: int, normalise: Normalise) -> None:
    """Splines within each slice, nearest neighbours along the first axis; every slice is clipped to its own range."""
    sources = nearest(len(image), len(result))
    where = upload(sources, image.device)
    for part in _parts(len(image), max(image[0].numel(), result[0].numel())):
        first, last = np.searchsorted(sources, (part.start, part.stop)).tolist()
        if first == last:
            continue
        planes = normalise(image[part])
        lows, highs = planes.amin((1, 2), keepdim=True), planes.amax((1, 2), keepdim=True)
        planes = _in_plane(planes, tuple(result.shape[1:]), order).clamp_(lows, highs)
        result[first:last] = planes.index_select(0, where[first:last] - part.start)


def _resample_3d(image: torch.Tensor, result: torch.Tensor, order: int, normalise: Normalise) -> None:
    """Splines along all three axes; overshoot beyond the image's range is clipped. Slices become fewer first."""
    lows, highs = [], []

    def noted(values: torch.Tensor) -> torch.Tensor:
        values = normalise(values)
        lows.append(values.min())
        highs.append(values.max())
        return values

    depth, in_plane = len(result), tuple(result.shape[1:])
    if depth < len(image):
        fewer = image.new_empty((depth, *image.shape[1:]), dtype=torch.float32)
        _between_slices(image, fewer, order, noted)
        _within_slices(fewer, result, order, torch.Tensor.float)
    elif depth == len(image):
        _within_slices(image, result, order, noted)
    else:
        resized = image.new_empty((len(image), *in_plane), dtype=torch.float32)
        _within_slices(image, resized, order, noted)
        _between_slices(resized, result, order, torch.Tensor.float)
    result.clamp_(torch.stack(lows).min(), torch.stack(highs).max())


def _within_slices(image: torch.Tensor, result: torch.Tensor, order: int, normalise: Normalise) -> None:
    for part in _parts(len(image), max(image[0].numel(), result[0].numel())):
        result[part] = _in_plane(normalise(image[part]), tuple(result.shape[1:]), order)


def _between_slices(image: torch.Tensor, result: torch.Tensor, order: int, normalise: Normalise) -> None:
    matrix = _matrix(len(image), len(result), order, image.device)
    for rows in _parts(image.shape[1], max(len(image), len(result)) * image.shape[2]):
        values = normalise(image[:, rows])
        result[:, rows] = (matrix @ values.flatten(1)).reshape(len(result), *values.shape[1:])


def _in_plane(planes: torch.Tensor, shape: tuple[int, ...], order: int) -> torch.Tensor:
    """Slices (n, Y, X) at a new size."""
    if planes.shape[1] != shape[0]:
        planes = _matrix(planes.shape[1], shape[0], order, planes.device) @ planes
    if planes.shape[2] != shape[1]:
        planes = planes @ _matrix(planes.shape[2], shape[1], order, planes.device).T
    return planes


def _parts(count: int, voxels: int) -> list[slice]:
    """``count`` things of so many voxels in portions that are worked on at a time."""
    size = max(1, CHUNK_BYTES // (FLOAT_BYTES * max(1, voxels)))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@lru_cache(maxsize=12)
def _matrix(size: int, new_size: int, order: int, device: torch.device) -> torch.Tensor:
    return upload(spline_matrix(size, new_size, order), device)
