"""Random shift (SZTU, S4): a sample's image and labels are moved along every axis by a part of the patch.

SZTU shift by up to 15 % per axis, with cubic interpolation of image and, by mistake, labels; here the image is
interpolated linearly and labels take the nearest voxel. What lies outside is 0 in the image and -1 in the labels, as in
nnU-Net's own padding; where the loader gives more than the patch, the neighbourhood moves in instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch.nn import functional

P_SHIFT = 0.5
SHIFT = 0.15
"""S4: probability, and largest shift as a share of the patch's edge."""
OUTSIDE_IMAGE, OUTSIDE_LABELS = 0.0, -1.0


def shifted_crop(
    volume: torch.Tensor, size: Sequence[int], shift: Sequence[float], *, outside: float, linear: bool
) -> torch.Tensor:
    """The central part of a volume, or what lies ``shift`` voxels beside it.

    Args:
        volume: (C, z, y, x).
        size: of the result, per axis.
        shift: by how much the cut-out moves, per axis; the content moves the other way.
        outside: value of what the volume does not have.
        linear: interpolate between voxels; otherwise take the nearest one.
    """
    for axis, (edge, offset) in enumerate(zip(size, shift, strict=True), start=1):
        # Stock's central crop starts at the rounded-down half of the difference.
        start = (volume.shape[axis] - edge) // 2 + offset
        first = math.floor(start) if linear else round(start)
        part = start - first if linear else 0.0
        near = _cut(volume, axis, first, edge, outside)
        volume = torch.lerp(near, _cut(volume, axis, first + 1, edge, outside), part) if part else near
    return volume


def _cut(volume: torch.Tensor, axis: int, first: int, edge: int, outside: float) -> torch.Tensor:
    """``edge`` planes from plane ``first`` on, which may be negative."""
    total = volume.shape[axis]
    low, high = min(max(first, 0), total), min(max(first + edge, 0), total)
    before = min(max(-first, 0), edge)
    kept = volume.narrow(axis, low, high - low)
    padding = [0, 0] * (volume.ndim - 1 - axis) + [before, edge - before - (high - low)]
    return functional.pad(kept, padding, value=outside)


class ShiftTransform(BasicTransform):
    """Shifts a sample with probability ``p`` and crops it to ``patch_size``; without a shift the centre remains."""

    def __init__(self, patch_size: Sequence[int], *, p: float = P_SHIFT, share: float = SHIFT) -> None:
        super().__init__()
        self.patch_size = tuple(int(edge) for edge in patch_size)
        self.p = p
        self.share = share

    def get_parameters(self, **data_dict: Any) -> dict:
        reach = self.share if torch.rand(1).item() < self.p else 0.0
        draws = (2 * torch.rand(len(self.patch_size)) - 1) * reach
        return {"shift": [draw * edge for draw, edge in zip(draws.tolist(), self.patch_size, strict=True)]}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return shifted_crop(img, self.patch_size, params["shift"], outside=OUTSIDE_IMAGE, linear=True)

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        return shifted_crop(segmentation, self.patch_size, params["shift"], outside=OUTSIDE_LABELS, linear=False)
