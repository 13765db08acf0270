"""What of a normalised scan is background: its darkest voxels, where no modality has tissue.

Transforms that turn one modality into another leave them dark: air is dark in CT, MR and PET alike.
"""

from __future__ import annotations

import torch

DARKEST_SHARE = 0.15
"""Of the way from the lowest value to the mean of what is brighter than the mean. The noise of MR and PET stays below;
fat, the darkest tissue of a CT, lies above."""


def background_edge(channel: torch.Tensor) -> tuple[float, float, float]:
    """Lowest value, highest value of background, and highest value of a channel of any shape."""
    low, high = (float(value) for value in torch.aminmax(channel))
    bright = channel[channel > channel.mean()]
    tissue = float(bright.mean()) if bright.numel() else high
    return low, low + DARKEST_SHARE * (tissue - low), high
