"""Organ-wise HU shift: some organs of a patch become brighter or darker, as contrast phases do.

Fosun's weak augmentation (S1): each organ with probability 1/2 is shifted by a whole number of HU from [-200, 199].
They shift before normalising. Arrays of nnU-Net are normalised already, so the shift is divided by the plan's standard
deviation and the result clipped to the plan's window: what shifting first would have given, except for voxels that the
window had cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunet_flare.trainers.transforms.window import Window

SHIFT_HU = (-200, 200)
"""S1 (code): lowest shift, and the first whole number above the highest."""
P_PER_LABEL = 0.5


def shift_labels(image: torch.Tensor, labels: torch.Tensor, shifts: torch.Tensor) -> None:
    """Add ``shifts[k]`` to the voxels of label ``k``, in place.

    Args:
        image: one channel, (Z, Y, X), float.
        labels: (Z, Y, X), integer; values outside ``0 ... len(shifts) - 1`` (padding, ignored voxels) are left alone.
        shifts: (number of labels + 1,), float, entry 0 being background.
    """
    known = labels.clamp(-1, len(shifts)) + 1
    table = torch.nn.functional.pad(shifts.to(image.dtype), (1, 1))
    # index_select on flat 64-bit indices takes a quarter of the time of table[known].
    image.add_(table.index_select(0, known.long().reshape(-1)).view(image.shape))


class OrganShiftTransform(BasicTransform):
    """Shifts organs of the CT channels of a sample; channels without a window are left alone.

    Args:
        labels: ids of the organs that may be shifted.
        windows: the window of each image channel.
        p_per_label: probability of each organ to be shifted.
    """

    def __init__(
        self, labels: Sequence[int], windows: Sequence[Window | None], p_per_label: float = P_PER_LABEL
    ) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.windows = tuple(windows)
        self.p_per_label = p_per_label

    def get_parameters(self, **data_dict: Any) -> dict:
        shifts_hu = torch.zeros(max(self.labels, default=0) + 1)
        drawn = torch.randint(*SHIFT_HU, (len(self.labels),)).float()
        drawn *= torch.rand(len(self.labels)) < self.p_per_label
        shifts_hu[list(self.labels)] = drawn
        return {"shifts_hu": shifts_hu}

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image, segmentation = data_dict.get("image"), data_dict.get("segmentation")
        if image is None or segmentation is None or not bool(params["shifts_hu"].any()):
            return data_dict
        for channel, window in zip(image, self.windows, strict=False):
            if window is not None:
                shift_labels(channel, segmentation[0], params["shifts_hu"] / window.hu)
                channel.clamp_(window.low, window.high)
        return data_dict
