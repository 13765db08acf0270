"""How stock nnU-Net maps one grid onto another, axis by axis.

Every resampling of stock nnU-Net is separable: along each axis it is a spline, a linear interpolation or a nearest
neighbour between cell centres (``scale * (i + 0.5) - 0.5``). Which axes take part is decided by the spacings: where
one axis is much coarser than the others, that axis takes nearest neighbours ("separate z") and the two others are
resampled slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

ANISOTROPY_THRESHOLD = 3.0
"""Ratio of largest to smallest spacing above which nnU-Net resamples the coarse axis separately (its default)."""


BAND_ROWS = 32

UNSEEN = 1e-9
"""Weights below have no part in single precision."""

POLE = 3**0.5 - 2
"""Of the filter that gives a cubic spline's coefficients."""

REPEATED = 40
"""An edge's further repetitions have no part in double precision."""


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


class Band(NamedTuple):
    """Some rows of a matrix, without the columns that are zero in all of them: ``result[out] = matrix @ source[into]``.

    ``matrix`` is float32.
    """

    out: slice
    into: slice
    matrix: np.ndarray


@lru_cache(maxsize=64)
def spline_bands(size: int, new_size: int, order: int) -> tuple[Band, ...]:
    """:func:`spline_matrix` in bands of :data:`BAND_ROWS` rows.

    A sample counts for a few neighbours only: of a cubic spline's weights, those 16 samples away are below a
    thousand-millionth, and single precision does not see them.
    """
    matrix = spline_matrix(size, new_size, order)
    bands = []
    for first in range(0, new_size, BAND_ROWS):
        rows = matrix[first : first + BAND_ROWS]
        used = np.flatnonzero((np.abs(rows) > UNSEEN).any(0))
        into = slice(int(used[0]), int(used[-1]) + 1)
        bands.append(Band(slice(first, first + len(rows)), into, np.ascontiguousarray(rows[:, into])))
    return tuple(bands)


def spline_matrix(size: int, new_size: int, order: int) -> np.ndarray:
    """The matrix (new_size, size), float32, of stock's spline resampling along one axis.

    Stock calls scikit-image's ``resize``, which is SciPy's ``zoom`` with repeated edges. Pre-filter and evaluation are
    linear in the samples. Cubic and linear splines are written down here; of other orders, zooming the unit vectors
    gives the operator.
    """
    if size == new_size:
        return np.eye(size, dtype=np.float32)
    centres = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    if order == 1:
        clipped = np.clip(centres, 0, size - 1)
        matrix = np.maximum(0, 1 - np.abs(clipped[:, None] - np.arange(size)))
    elif order == 3:
        matrix = _cubic(size, centres)
    else:
        from scipy.ndimage import zoom

        options: dict[str, Any] = {"mode": "nearest", "grid_mode": True, "prefilter": order > 1}
        columns = [zoom(unit, new_size / size, order=order, **options) for unit in np.eye(size)]
        matrix = np.stack(columns, axis=1)
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _cubic(size: int, centres: np.ndarray) -> np.ndarray:
    """A cubic spline through ``size`` samples, whose edges repeat for ever, at places between them.

    The coefficients are the samples filtered by ``POLE ** |distance|`` (Unser, Aldroubi and Eden 1993, part II, eq.
    2.8); the samples that repeat an edge are added to it.
    """
    distances = np.abs(np.arange(-2, size + 2)[:, None] - np.arange(-REPEATED, size + REPEATED))
    weights = -6 * POLE / (1 - POLE**2) * np.where(distances % 2, -1.0, 1.0) * abs(POLE) ** distances
    coefficients = weights[:, REPEATED : REPEATED + size]
    coefficients[:, 0] += weights[:, :REPEATED].sum(1)
    coefficients[:, -1] += weights[:, REPEATED + size :].sum(1)
    before = np.floor(centres).astype(np.int64)
    t = (centres - before)[:, None]
    basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    return np.sum([part / 6 * coefficients[before + 1 + k] for k, part in enumerate(basis)], axis=0)


def _ratio(spacing: Sequence[float]) -> float:
    return max(spacing) / min(spacing)
