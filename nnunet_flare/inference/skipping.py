"""Leaving out windows that hold no organ.

``skip-empty`` grows the visited region from the middle of every slab: a window is visited when foreground was found in
it or near it by the windows visited so far. Every slab has a seed, the first and the last one included, so that organs
after a gap are found. Windows that hold no body are never visited.

``huang`` is the rule of the FLARE22 winner (``seed-systems.md`` 6.10), kept for parity: a central window decides about
its slab, the slab after an empty one is skipped, and only a central band of two patches is ever seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nnunet_flare.inference.arrays import Array, Place, to_host
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.places import place_at, place_of
from nnunet_flare.inference.slabs import Slab, window_at
from nnunet_flare.inference.windows import (
    Consume,
    Forward,
    place_of_scan,
    window_starts,
    window_weights,
)

MARGIN = 1 / 8
"""Foreground this close to a window, as a share of the patch, makes ``skip-empty`` visit it."""

MIN_FOREGROUND_VOXELS = 20
"""Fewer foreground voxels near a window are taken for noise."""

BODY_SHARE = 0.001
"""A window with a smaller share of body voxels is air."""

BODY_HU = -500.0
"""Threshold between air and body (S1's background removal)."""

HUANG_STEP = 0.5
"""Step size along the first axis."""

HUANG_EMPTY_VOXELS = 1000
"""A central window with fewer foreground voxels is empty."""

HUANG_RIM_VOXELS = 10
"""More foreground voxels than this on a window's first or last row call for its neighbour."""

TUBES = (0, 5, 6, 10)
"""Background, aorta, inferior vena cava and oesophagus: a slab with nothing else needs no windows at the sides."""


At = tuple[int, ...]
"""Where a window starts (z, y, x)."""


class Huang:
    """Visits one slab after the other by the FLARE22 winner's rule."""

    def __init__(self, shape: Sequence[int], patch: Sequence[int]) -> None:
        self._patch = tuple(patch)
        self.z_starts = window_starts(shape[:1], patch[:1], HUANG_STEP)[0]
        self._rows = self._three(shape[1], patch[1])
        self._columns = self._three(shape[2], patch[2])
        self._after_empty = False

    def __call__(self, slab: Slab) -> None:
        """Visit a slab's windows."""
        if self._after_empty:
            self._after_empty = False
            return
        middle = (self._rows[1], self._columns[1])
        scores = slab.run(*middle)
        labels = to_host(scores.argmax(0))
        if int((labels > 0).sum()) < HUANG_EMPTY_VOXELS:
            self._after_empty = True
            return
        slab.add(*middle, scores)
        for position in dict.fromkeys(self._others(labels)):
            if position != middle:
                slab.add(*position, slab.run(*position))

    def _others(self, labels: np.ndarray) -> list[tuple[int, int]]:
        if set(np.unique(labels).tolist()) <= set(TUBES):
            front = int((labels[:, 0] > 0).sum()) > HUANG_RIM_VOXELS
            back = int((labels[:, -1] > 0).sum()) > HUANG_RIM_VOXELS
            rows = [row for row, wanted in ((self._rows[0], front), (self._rows[2], back)) if wanted]
            return [(row, self._columns[1]) for row in rows]
        return [(row, column) for row in self._rows for column in self._columns]

    @staticmethod
    def _three(size: int, width: int) -> tuple[int, int, int]:
        """Three starts: a centred band of two patches, less where the volume is smaller."""
        if size > 2 * width:
            half = round(size / 2)
            return half - width, half - width // 2, half
        if size > width:
            return 0, round((size - width) / 2), size - width
        return 0, 0, 0


def slide_growing(
    data: Array,
    forward: Forward,
    consume: Consume,
    *,
    heads: int,
    patch: Sequence[int],
    step_size: float,
    device: Any,
    foreground: Callable[[Array], Array],
    body_above: float | None,
    network: Any = CPU,
    gaussian: bool = True,
    progress: Callable[[int], None] | None = None,
) -> int:
    """As :func:`windows.slide`, but visiting only windows near foreground. Keeps the sums of the whole volume.

    Args:
        foreground: scores (heads, z, y, x) to a mask (z, y, x) of what is not background.
        body_above: values of the first channel above this are body; None where that cannot be told.
    """
    patch = tuple(int(p) for p in patch)
    kept = place_of_scan(data.shape[1:], patch)
    shape = tuple(max(n, p) for n, p in zip(data.shape[1:], patch, strict=True))
    place, there = place_at(device), place_at(network)
    weights = window_weights(patch, place, gaussian=gaussian)
    sums, total = place.zeros((heads, *shape)), place.zeros(shape)
    found = place.nowhere(shape)
    starts = window_starts(shape, patch, step_size)
    waiting: set[At] = {(z, y, x) for z in starts[0] for y in starts[1] for x in starts[2]}
    if body_above is not None:
        waiting = _with_body(data, sorted(waiting), patch, kept, body_above)
    centre = np.asarray([(n - p) / 2 for n, p in zip(shape[1:], patch[1:], strict=True)])
    ready: list[At] = []
    for z in starts[0]:
        in_slab = [at for at in waiting if at[0] == z]
        if in_slab:
            ready.append(min(in_slab, key=lambda at: (float(np.sum((np.asarray(at[1:]) - centre) ** 2)), at)))
    done = 0
    while ready:
        for at in ready:
            waiting.discard(at)
            box = tuple(slice(start, start + width) for start, width in zip(at, patch, strict=True))
            everywhere = (slice(None), *box)
            scores = place.take(forward(there.packed(window_at(data, at, patch, kept)[None])))
            place.add_weighted(sums[everywhere], scores, weights)
            total[box] += weights
            found[box] |= foreground(scores)
            done += 1
            if progress is not None:
                progress(1)
        ready = _near(place, found, sorted(waiting), patch)
    for first in range(kept[0].start, kept[0].stop, patch[0]):
        block = slice(first, min(first + patch[0], kept[0].stop))
        consume(place.divide(sums[:, block, kept[1], kept[2]], total[block, kept[1], kept[2]]))
    return done


def _with_body(
    data: Array, windows: Sequence[At], patch: tuple[int, ...], kept: Sequence[slice], above: float
) -> set[At]:
    counts = place_of(data).counts(window_at(data[:1], at, patch, kept)[0] > above for at in windows)
    return {at for at, count in zip(windows, counts, strict=True) if count / math.prod(patch) >= BODY_SHARE}


def _near(place: Place, found: Array, windows: Sequence[At], patch: tuple[int, ...]) -> list[At]:
    """The windows in which, or within the margin around which, foreground was found."""
    boxes = [
        tuple(
            slice(max(0, start - round(width * MARGIN)), start + width + round(width * MARGIN))
            for start, width in zip(at, patch, strict=True)
        )
        for at in windows
    ]
    counts = place.counts(found[box] for box in boxes)
    return [at for at, count in zip(windows, counts, strict=True) if count >= MIN_FOREGROUND_VOXELS]
