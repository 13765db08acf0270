"""Several transforms, all applied, in an order that is drawn anew for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class ShuffledTransforms(BasicTransform):
    """Applies all its transforms to a sample in random order (S1's colour block)."""

    def __init__(self, transforms: Sequence[BasicTransform]) -> None:
        super().__init__()
        self.transforms = list(transforms)

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"order": torch.randperm(len(self.transforms)).tolist()}

    def apply(self, data_dict: dict, **params: Any) -> dict:
        for index in params["order"]:
            data_dict = self.transforms[index](**data_dict)
        return data_dict
