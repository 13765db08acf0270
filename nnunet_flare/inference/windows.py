"""The sliding window: where the windows lie, how they are weighted, and one pass over them.

Positions and Gaussian weights are stock nnU-Net's, its half-precision rounding of the weights included, so that sums
differ only by their own rounding. The windows go slab by slab along the first axis; slices that no later window
touches are handed on at once. The sums therefore cover one patch depth and not the volume, however long the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of the window weights, as a share of the patch size (stock nnU-Net)."""

GAUSSIAN_PEAK = 10.0
"""Weight at the centre; it keeps half-precision weights away from zero (stock nnU-Net)."""

Forward = Callable[[torch.Tensor], torch.Tensor]
"""A window (1, C, z, y, x) to its scores (K, z, y, x); the next call may use the result's memory again."""


class Visit(Protocol):
    """Chooses which windows of a slab are run; brings its own first indices of the slabs."""

    z_starts: list[int]

    def __call__(self, slab: Slab) -> None:
        """Run and add windows."""


Consume = Callable[[torch.Tensor], None]
"""Takes the next finished slices (K, n, y, x) along the first axis."""


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
def gaussian_weights(patch: tuple[int, ...]) -> torch.Tensor:
    """Window weights (z, y, x), float32, with the values that stock nnU-Net has in half precision."""
    from scipy.ndimage import gaussian_filter1d

    profiles = []
    for width in patch:
        unit = np.zeros(width)
        unit[width // 2] = 1
        profiles.append(gaussian_filter1d(unit, width * GAUSSIAN_SIGMA, mode="constant"))
    weights = np.multiply.outer(np.multiply.outer(profiles[0], profiles[1]), profiles[2])
    half = torch.from_numpy(weights / (weights.max() / GAUSSIAN_PEAK)).half()
    half[half == 0] = half[half > 0].min()
    return half.float()


def padding(shape: Sequence[int], patch: Sequence[int]) -> list[tuple[int, int]]:
    """Voxels before and after each axis that make a small volume as large as the patch, the odd one at the end."""
    missing = [max(0, width - size) for size, width in zip(shape, patch, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]


def slide(
    data: torch.Tensor,
    forward: Forward,
    consume: Consume,
    *,
    heads: int,
    patch: Sequence[int],
    step_size: float,
    device: torch.device,
    gaussian: bool = True,
    progress: Callable[[int], None] | None = None,
    visit: Visit | None = None,
) -> int:
    """Predict a volume window by window and hand on its averaged scores, slice by slice.

    Args:
        data: the preprocessed scan (C, Z, Y, X), float32, on the CPU.
        forward: the network; its scores may lie on any device and are added up on ``device``.
        consume: gets all Z slices of scores (heads, n, Y, X), float32, in order.
        heads: number of classes or regions.
        patch: window size (z, y, x).
        step_size: distance of neighbouring windows as a share of the patch.
        device: where the sums lie.
        gaussian: weigh a window's centre more than its rim.
        progress: told the number of windows done since the last call.
        visit: chooses the windows slab by slab; all of stock's grid without it. Voxels that no window covers get
            scores of zero, which is background.

    Returns:
        The number of windows.
    """
    patch = tuple(int(p) for p in patch)
    padded, kept = padded_volume(data, patch)
    shape = tuple(padded.shape[1:])
    choose = visit or EveryWindow(shape, patch, step_size)
    weights = (gaussian_weights(patch) if gaussian else torch.ones(patch)).to(device)
    sums = torch.zeros((heads, patch[0], *shape[1:]), dtype=torch.float32, device=device)
    total = torch.zeros((patch[0], *shape[1:]), dtype=torch.float32, device=device)
    done = 0
    for z, following in zip(choose.z_starts, [*choose.z_starts[1:], shape[0]], strict=True):
        slab = Slab(padded[:, z : z + patch[0]], forward, sums, total, weights, patch, progress)
        choose(slab)
        done += slab.windows
        first, last = max(kept[0].start, z), min(kept[0].stop, following)
        if last > first:
            weight = total[first - z : last - z, kept[1], kept[2]].clamp(min=torch.finfo(torch.float32).tiny)
            consume(sums[:, first - z : last - z, kept[1], kept[2]].div_(weight))
        _shift(sums, following - z, axis=1)
        _shift(total, following - z, axis=0)
    return done


class Slab:
    """The windows that start at one index of the first axis: run the network at a place, and add its scores."""

    def __init__(
        self,
        data: torch.Tensor,
        forward: Forward,
        sums: torch.Tensor,
        total: torch.Tensor,
        weights: torch.Tensor,
        patch: tuple[int, ...],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._data, self._forward, self._patch, self._progress = data, forward, patch, progress
        self._sums, self._total, self._weights = sums, total, weights
        self.windows = 0

    def run(self, y: int, x: int) -> torch.Tensor:
        """Scores (K, z, y, x) of the window that starts here."""
        window = self._data[:, :, y : y + self._patch[1], x : x + self._patch[2]]
        scores = self._forward(window[None].contiguous()).to(self._sums.device).float()
        self.windows += 1
        if self._progress is not None:
            self._progress(1)
        return scores

    def add(self, y: int, x: int, scores: torch.Tensor) -> None:
        """Add a window's scores to the sums."""
        rows, columns = slice(y, y + self._patch[1]), slice(x, x + self._patch[2])
        self._sums[:, :, rows, columns].addcmul_(scores, self._weights)
        self._total[:, rows, columns] += self._weights


class EveryWindow:
    """Visits all of stock's windows."""

    def __init__(self, shape: Sequence[int], patch: Sequence[int], step_size: float) -> None:
        self.z_starts, self._rows, self._columns = window_starts(shape, patch, step_size)

    def __call__(self, slab: Slab) -> None:
        """Run and add every window of a slab."""
        for y in self._rows:
            for x in self._columns:
                slab.add(y, x, slab.run(y, x))


def padded_volume(data: torch.Tensor, patch: Sequence[int]) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The scan (C, Z, Y, X), zero-padded to at least one patch, and where it lies in there."""
    before = padding(data.shape[1:], patch)
    kept = tuple(slice(low, low + size) for (low, _), size in zip(before, data.shape[1:], strict=True))
    return _pad(data, before), kept


def _pad(data: torch.Tensor, widths: Sequence[tuple[int, int]]) -> torch.Tensor:
    if not any(sum(width) for width in widths):
        return data
    flat = [value for width in reversed(widths) for value in width]
    return torch.nn.functional.pad(data, flat)


def _shift(sums: torch.Tensor, count: int, *, axis: int) -> None:
    """Drop the first ``count`` entries of an axis and append zeros, in place."""
    size = sums.shape[axis]
    keep = size - count
    if keep > 0:
        sums.narrow(axis, 0, keep).copy_(sums.narrow(axis, count, keep).clone())
    sums.narrow(axis, max(0, keep), size - max(0, keep)).zero_()
