"""The intensity window of a normalised CT channel, and clipping to it after an augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform


@dataclass(frozen=True)
class Window:
    """What nnU-Net's ``CTNormalization`` leaves of a channel: values from ``low`` to ``high``, 1.0 being ``hu`` HU."""

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
