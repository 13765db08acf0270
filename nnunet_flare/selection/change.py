"""How much a case's label map changed from one round to the next (blackbean, FLARE22 winner, seed-systems 6.6).

A label that the next model draws again is more likely to be right. The paper's uncertainty of a case is the mean of
|L1 != L2| / |L2 > 0| and |L2 != L3| / |L3 > 0| over the label maps of its three rounds; here it is the mean over all
consecutive rounds so far, and the rule ``round-change`` of :mod:`nnunet_flare.selection.rules` ranks by it.
"""

from __future__ import annotations

import numpy as np


def label_change(before: np.ndarray, after: np.ndarray) -> float:
    """Voxels whose label differs, divided by the foreground voxels of the later map; both (Z, Y, X) on one grid.

    May exceed 1. NaN where the later map has no foreground, so that such a case is never selected by it.

    Raises:
        ValueError: when the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"label maps differ in shape: {before.shape} and {after.shape}")
    foreground = np.count_nonzero(after)
    return float(np.count_nonzero(before != after) / foreground) if foreground else float("nan")
