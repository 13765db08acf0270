"""The sliding window: where the windows lie, how they are weighted, and one pass over them.

Positions and Gaussian weights are stock nnU-Net's, its half-precision rounding of the weights included, so that sums
differ only by their own rounding. The windows go slab by slab along the first axis; slices that no later window
touches are handed on at once. The sums therefore cover one patch depth and not the volume, however long the scan, and
nothing of what a small scan is padded with. A scan that one slab covers is not handed on before its last window: there
the rows of windows take the place of slabs, where the consumer takes rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from nnunet_flare.inference.arrays import Array, Place
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.places import place_at
from nnunet_flare.inference.slabs import Slab

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of the window weights, as a share of the patch size (stock nnU-Net)."""

GAUSSIAN_PEAK = 10.0
"""Weight at the centre; it keeps half-precision weights away from zero (stock nnU-Net)."""

Forward = Callable[[Array], Array]
"""A window (1, C, z, y, x), float32, to its scores (K, z, y, x), which may be ``BFloat16``; the next call may use the
result's memory again.

Windows of a network on a GPU are tensors there, all others are NumPy's arrays.
"""


class Visit(Protocol):
    """Chooses which windows of a slab are run; brings its own first indices of the slabs."""

    z_starts: list[int]

    def __call__(self, slab: Slab) -> None:
        """Run and add windows."""


Consume = Callable[..., None]
"""Takes the next finished slices (K, n, y, x) along the first axis, or some rows of all slices (``by_rows``)."""


def window_starts(shape: Sequence[int], patch: Sequence[int], step_size: float) -> list[list[int]]:
    """First indices of the windows per axis: evenly spaced, at most ``step_size`` patches apart, the ends covered.

    A patch of one voxel along an axis (the slices of a 2-D network) visits every index.

    Raises:
        ValueError: when a step size is outside (0, 1] or the patch does not fit.
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"step size {step_size}, expected a number above 0 and at most 1")
    starts = []
    for size, width in zip(shape, patch, strict=True):
        if width > size:
            raise ValueError(f"patch {tuple(patch)} does not fit into {tuple(shape)}")
        if width == 1:
            starts.append(list(range(size)))
            continue
        count = math.ceil((size - width) / (width * step_size)) + 1
        spread = (size - width) / max(1, count - 1)
        starts.append([int(np.round(spread * i)) for i in range(count)])
    return starts


def count_windows(shape: Sequence[int], patch: Sequence[int], step_size: float) -> int:
    """How many windows stock's grid has on a scan, padded to the patch where it is smaller."""
    padded = [max(n, p) for n, p in zip(shape, patch, strict=True)]
    return math.prod(len(starts) for starts in window_starts(padded, patch, step_size))


@lru_cache(maxsize=4)
def gaussian_weights(patch: tuple[int, ...]) -> np.ndarray:
    """Window weights (z, y, x), float32, with the values that stock nnU-Net has in half precision."""
    bells = [_bell(width) for width in patch]  # by the distance from the middle
    weights = np.multiply.outer(np.multiply.outer(bells[0], bells[1]), bells[2])
    half = (weights / (weights[0, 0, 0] / GAUSSIAN_PEAK)).astype(np.float32).astype(np.float16)
    half[half == 0] = half[half > 0].min()
    weights = half.astype(np.float32)
    for axis, width in enumerate(patch):
        weights = weights.take(np.abs(np.arange(width) - width // 2), axis)
    return weights


def _bell(width: int) -> np.ndarray:
    """What SciPy's Gaussian filter, cut off at four standard deviations, makes of a single one in the middle.

    By the distance from the middle, up to that of the first voxel.
    """
    sigma = width * GAUSSIAN_SIGMA
    reach = int(4 * sigma + 0.5)
    bell = np.exp(-0.5 / (sigma * sigma) * np.arange(-reach, reach + 1) ** 2)
    bell /= bell.sum()
    profile = np.zeros(max(width // 2, reach) + 1)
    profile[: reach + 1] = bell[reach:]
    return profile[: width // 2 + 1]


def padding(shape: Sequence[int], patch: Sequence[int]) -> list[tuple[int, int]]:
    """Voxels before and after each axis that make a small volume as large as the patch, the odd one at the end."""
    missing = [max(0, width - size) for size, width in zip(shape, patch, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]


def slide(
    data: Array,
    forward: Forward,
    consume: Consume,
    *,
    heads: int,
    patch: Sequence[int],
    step_size: float,
    device: Any,
    network: Any = CPU,
    gaussian: bool = True,
    progress: Callable[[int], None] | None = None,
    visit: Visit | None = None,
    by_rows: bool = False,
    batch: int = 1,
) -> int:
    """Predict a volume window by window and hand on its averaged scores, slice by slice.

    Args:
        data: the preprocessed scan (C, Z, Y, X), float32, on any device.
        forward: the network; its scores may lie on any device and are added up on ``device``.
        consume: gets all Z slices of scores (heads, n, Y, X), float32, in order.
        heads: number of classes or regions.
        patch: window size (z, y, x).
        step_size: distance of neighbouring windows as a share of the patch.
        device: where the sums lie.
        network: where ``forward`` wants its windows.
        gaussian: weigh a window's centre more than its rim.
        progress: told the number of windows done since the last call.
        visit: chooses the windows slab by slab; all of stock's grid without it. Voxels that no window covers get
            scores of zero, which is background.
        by_rows: on the CPU, where fewer sums are kept so, ``consume`` gets all slices at once and of them the next rows
            (heads, Z, n, X), as a second argument the slice of rows, which begins with the last one it had before.
        batch: slices that a 2-D network gets at a time, as the depth of a window.

    Returns:
        The number of windows.
    """
    slices = tuple(int(p) for p in patch)
    patch, depth = (batch * slices[0], *slices[1:]), int(data.shape[1])
    kept = place_of_scan(data.shape[1:], patch)
    shape = tuple(max(n, p) for n, p in zip(data.shape[1:], patch, strict=True))
    choose = visit or EveryWindow(shape, slices, step_size, batch=batch)
    place, there = place_at(device), place_at(network)
    inner = inner_part(data.shape[1:], kept, patch)
    weights = window_weights(slices, place, gaussian=gaussian)
    weights = (weights if batch == 1 else place.join([weights] * batch, 0))[inner]
    common = (data, kept, forward, there, place, weights, patch, inner, progress)
    rows = int(weights.shape[1]) + 1
    by_rows = by_rows and visit is None and device.type == "cpu" and goes_by_rows(data.shape[1:], patch)
    slab = Slab(heads, rows if by_rows else int(data.shape[2]), *common)
    slab.counts = 1 if batch == 1 else min(batch, depth)
    if by_rows:
        return _slide_rows(slab, consume, shape, step_size)
    for z, following in zip(choose.z_starts, [*choose.z_starts[1:], shape[0]], strict=True):
        slab.z = z
        choose(slab)
        finished = min(following - z, slab.depth)
        consume(slab.averaged(slice(0, finished), axis=0))
        if following < shape[0]:
            slab.drop(finished, axis=0)
            slab.counts = 1 if batch == 1 else following - z
    return slab.windows


def goes_by_rows(shape: Sequence[int], patch: Sequence[int]) -> bool:
    """Whether one slab covers a scan (z, y, x) and several rows of windows do, so that sums of rows are the smaller."""
    return shape[0] <= patch[0] and shape[1] > patch[1]


def _slide_rows(slab: Slab, consume: Consume, shape: Sequence[int], step_size: float) -> int:
    """Every window of a scan of one slab. The sums' first row is the last one that was handed on before."""
    rows, columns = window_starts(shape[1:], slab.patch[1:], step_size)
    held = 0
    for y, following in zip(rows, [*rows[1:], shape[1]], strict=True):
        slab.first_row = y - held
        for x in columns:
            slab.add(y, x, slab.run(y, x))
        last = following - slab.first_row
        slab.averaged(slice(held, last), axis=1)
        consume(slab.sums[:, :, :last], slice(slab.first_row, following))
        if following < shape[1]:
            slab.drop(last - 1, axis=1)
        held = 1
    return slab.windows


def inner_part(shape: Sequence[int], kept: Sequence[slice], patch: Sequence[int]) -> tuple[slice, ...]:
    """The part of a window whose scores are added up: the scan, without what it was padded with.

    An axis that was padded has one window; of the others all of the window counts.
    """
    return tuple(
        part if size < width else slice(0, width) for size, part, width in zip(shape, kept, patch, strict=True)
    )


def window_weights(patch: tuple[int, ...], place: Place, *, gaussian: bool) -> Array:
    """Weights of a window's voxels (z, y, x), at the place of the sums."""
    return place.take(gaussian_weights(patch) if gaussian else np.ones(patch, np.float32))


class EveryWindow:
    """Visits all of stock's windows."""

    def __init__(self, shape: Sequence[int], patch: Sequence[int], step_size: float, *, batch: int = 1) -> None:
        """In a ``batch`` of slices the last one begins earlier, so that all have the same size."""
        self.z_starts, self._rows, self._columns = window_starts(shape, patch, step_size)
        if batch > 1:
            self.z_starts = [*range(0, shape[0] - batch, batch), shape[0] - batch]

    def __call__(self, slab: Slab) -> None:
        """Run and add every window of a slab."""
        for y in self._rows:
            for x in self._columns:
                slab.add(y, x, slab.run(y, x))


def place_of_scan(shape: Sequence[int], patch: Sequence[int]) -> tuple[slice, ...]:
    """Where a scan lies in the one that is padded to at least one patch."""
    before = padding(shape, patch)
    return tuple(slice(low, low + size) for (low, _), size in zip(before, shape, strict=True))
