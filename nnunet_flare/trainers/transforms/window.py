"""The intensity window of a normalised CT channel, and clipping to it after an augmentation.

Arrays of nnU-Net are normalised, while the papers give their augmentations in HU: the window says how the two relate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


@dataclass(frozen=True)
class Window:
    """What the normalisation leaves of a CT channel: values from ``low`` to ``high``, 1.0 being ``hu`` HU."""

    low: float
    high: float
    hu: float


def channel_windows(
    normalization_schemes: Sequence[str], intensity_properties: Mapping[str, Mapping[str, Any]]
) -> tuple[Window | None, ...]:
    """The window of each channel; None for a channel that is not normalised as CT, whose values have no unit.

    Args:
        normalization_schemes: of the configuration, one name a channel.
        intensity_properties: the plans' ``foreground_intensity_properties_per_channel``.
    """
    windows: list[Window | None] = []
    for channel, scheme in enumerate(normalization_schemes):
        found = intensity_properties.get(str(channel), {})
        if scheme != "CTNormalization" or not found:
            windows.append(None)
            continue
        mean, std = float(found["mean"]), max(float(found["std"]), 1e-8)
        low, high = (float(found[key]) for key in ("percentile_00_5", "percentile_99_5"))
        windows.append(Window((low - mean) / std, (high - mean) / std, std))
    return tuple(windows)


def common_windows(windows: Iterable[Sequence[Sequence[float] | None]]) -> tuple[Window | None, ...]:
    """One window per channel for cases that each have their own mean and standard deviation.

    Args:
        windows: of each case, per channel (low, high, HU of 1.0), or None; see ``planners.fixed_size``.

    Returns:
        Per channel the lowest and highest value of all cases, so that clipping takes nothing away, and their median HU;
        None for a channel that some case has no window of.
    """
    common: list[Window | None] = []
    for channel in zip(*windows, strict=True):
        known = [window for window in channel if window is not None]
        if len(known) < len(channel):
            common.append(None)
            continue
        low, high, hu = zip(*known, strict=True)
        common.append(Window(float(min(low)), float(max(high)), float(np.median(hu))))
    return tuple(common)


class ClipToWindowTransform(ImageOnlyTransform):
    """Clips CT channels to the window of the plan again, in place, as the preprocessing left them."""

    def __init__(self, windows: Sequence[Window | None]) -> None:
        super().__init__()
        self.windows = tuple(windows)

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel, window in zip(img, self.windows, strict=False):
            if window is not None:
                channel.clamp_(window.low, window.high)
        return img
