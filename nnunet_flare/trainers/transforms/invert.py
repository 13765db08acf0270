"""Inversion of tissue contrast: what is bright becomes dark, the background stays dark.

Domain randomisation across modalities (Billot et al., SynthSeg, Medical Image Analysis 2023; Zhou et al., CVPR 2022)
teaches that contrasts have no fixed sign. nnU-Net's own inversion (around zero, and undone after gamma) and that of
batchgeneratorsv2 (around the mean) turn air into the brightest tissue, which no scanner shows.
"""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

from nnunet_flare.trainers.transforms.background import background_edge


class InvertTissueTransform(ImageOnlyTransform):
    """Reflects what is no background at the middle of its range, in place; every channel by itself."""

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel in img:
            _, edge, high = background_edge(channel)
            torch.where(channel > edge, edge + high - channel, channel, out=channel)
        return img
