"""How stock nnU-Net maps one grid onto another, axis by axis.

Every resampling of stock nnU-Net is separable: along each axis it is a spline, a linear interpolation or a nearest
neighbour between cell centres (``scale * (i + 0.5) - 0.5``). Which axes take part is decided by the spacings: where
one axis is much coarser than the others, that axis takes nearest neighbours ("separate z") and the two others are
resampled slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ANISOTROPY_THRESHOLD = 3.0
"""Ratio of largest to smallest spacing above which nnU-Net resamples the coarse axis separately (its default)."""


class Lerp(NamedTuple):
    """Linear interpolation along one axis: ``(1 - weight) * source[low] + weight * source[high]`` per output index."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def separate_axis(
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    *,
    force: bool | None = None,
    threshold: float = ANISOTROPY_THRESHOLD,
) -> int | None:
    """The axis that stock nnU-Net resamples by nearest neighbours, or None when it resamples all three together.

    ``force`` is the plans' ``force_separate_z``. Without it the current spacing decides, then the new one. Two or
    three equally coarse axes are never separated.
    """
    if force is False:
        return None
    if force or _ratio(current_spacing) > threshold:
        deciding = current_spacing
    elif _ratio(new_spacing) > threshold:
        deciding = new_spacing
    else:
        return None
    coarse = [axis for axis, spacing in enumerate(deciding) if max(deciding) / spacing == 1]
    return coarse[0] if len(coarse) == 1 else None


def new_shape(shape: Sequence[int], current_spacing: Sequence[float], new_spacing: Sequence[float]) -> tuple[int, ...]:
    """Shape after resampling: ``round(current / new * size)`` per axis, as stock nnU-Net rounds it."""
    return tuple(round(c / n * s) for c, n, s in zip(current_spacing, new_spacing, shape, strict=True))


def nearest(size: int, new_size: int) -> np.ndarray:
    """Source index of each output index for nearest neighbours; halves go to the higher index, as SciPy's do."""
    centres = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    return np.clip(np.floor(centres + 0.5).astype(np.int64), 0, size - 1)


def linear(size: int, new_size: int) -> Lerp:
    """Linear interpolation between cell centres, the edges repeated."""
    centres = np.clip(size / new_size * (np.arange(new_size) + 0.5) - 0.5, 0, size - 1)
    low = np.floor(centres).astype(np.int64)
    weight = centres - low
    return Lerp(low, np.where(weight > 0, np.minimum(low + 1, size - 1), low), weight)


@lru_cache(maxsize=16)
def spline_matrix(size: int, new_size: int, order: int) -> np.ndarray:
    """The matrix (new_size, size), float32, of stock's spline resampling along one axis.

    Stock calls scikit-image's ``resize``, which is SciPy's ``zoom`` with repeated edges: pre-filter and evaluation are
    linear in the samples, so that zooming the unit vectors gives the whole operator.
    """
    from scipy.ndimage import zoom

    if size == new_size:
        return np.eye(size, dtype=np.float32)
    unit = np.eye(size)
    columns = [
        zoom(unit[i], new_size / size, order=order, mode="nearest", grid_mode=True, prefilter=order > 1)
        for i in range(size)
    ]
    return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.float32)


def _ratio(spacing: Sequence[float]) -> float:
    return max(spacing) / min(spacing)
