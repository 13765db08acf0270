"""What a prediction will need, estimated before it starts, and where its sums go.

The sums over windows cover one patch depth (``windows.slide``), or the whole volume for ``skip-empty``. On a GPU they
lie there when they leave room for the network, else on the CPU; on the CPU a limit that cannot be kept is said before
the work and not by the kernel's killer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT_BYTES = 4

WINDOW_COPIES = 4
"""Scores of one window alive at once: the network's output, its float copy, their sum over folds and flips."""

GPU_SHARE = 0.5
"""Share of the GPU's memory that sums may take; the network's activations need the rest."""

GIGABYTE = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes of one prediction beyond what the process holds already."""

    sums: int
    window: int
    labels: int

    @property
    def total(self) -> int:
        """All together."""
        return self.sums + self.window + self.labels


def need(
    grid: Sequence[int], image: Sequence[int], patch: Sequence[int], *, heads: int, maps: int, whole_volume: bool
) -> Need:
    """Estimate a prediction.

    Args:
        grid: shape on the network's grid.
        image: shape of the image.
        patch: window size.
        heads: score channels, of all members that are kept apart.
        maps: label maps that are made.
        whole_volume: whether sums cover the whole grid and not one patch depth.
    """
    grid = [max(n, p) for n, p in zip(grid, patch, strict=True)]
    depth = grid[0] if whole_volume else patch[0]
    sums = (heads + 1) * depth * grid[1] * grid[2] * FLOAT_BYTES
    window = WINDOW_COPIES * heads * math.prod(patch) * FLOAT_BYTES
    return Need(sums, window, 2 * maps * math.prod(image))


def process_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def sums_fit_on_gpu(sums: int, budget: int) -> bool:
    """Whether the sums leave the network its share of a GPU's memory budget."""
    return sums <= GPU_SHARE * budget
