"""Two views of one sample: as it is, and with other intensities in the same place."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class TwoViews(BasicTransform):
    """Puts a second view behind the first: an image (C, z, y, x) becomes (2C, z, y, x).

    Args:
        transform: makes the second view; it must move nothing, because both views have one geometry.
    """

    def __init__(self, transform: BasicTransform) -> None:
        super().__init__()
        self.transform = transform

    def __call__(self, **sample: Any) -> dict:
        image = sample["image"]
        return {**sample, "image": torch.cat([image, self.transform(image=image.clone())["image"]])}
