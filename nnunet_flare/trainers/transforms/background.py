"""What of a normalised scan is background: its darkest voxels, where no modality has tissue.

Transforms that turn one modality into another leave them dark: air is dark in CT, MR and PET alike.
"""

from __future__ import annotations

import torch

DARKEST_SHARE = 0.02
"""Of the range of values, counted from the lowest."""


def background_edge(channel: torch.Tensor) -> tuple[float, float, float]:
    """Lowest value, highest value of background, and highest value of a channel of any shape."""
    low, high = (float(value) for value in torch.aminmax(channel))
    return low, low + DARKEST_SHARE * (high - low), high
