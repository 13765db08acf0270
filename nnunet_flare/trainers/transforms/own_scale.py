"""The scale of a scan of another modality for a sample that was made to look like one.

What makes another contrast keeps no scale: inverted organs of a CT would lie near its air. Preprocessing standardises
scans of other modalities by themselves, so a CT that shall pass for one is standardised alike.
"""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

from nnunet_flare.inference.normalisation import of_signal


class OwnScaleTransform(ImageOnlyTransform):
    """Every channel of a sample as :func:`~nnunet_flare.inference.normalisation.of_signal` has it, in place."""

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel in img:
            channel.copy_(torch.from_numpy(of_signal(channel.numpy().copy())))
        return img
