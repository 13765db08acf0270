"""SZTU's fine generator (S4, seed-systems 4.3), their EfficientSegNet: strided residual encoder, context, thin decoder.

An encoder level is two residual units, the first of them strided. At the bottom a block looks around at several scales
and along whole planes. A decoder level reduces the channels, upsamples, *adds* the skip and runs one anisotropic block:
a 3 x 3 x 1 and a 1 x 1 x 3 convolution, in (z, y, x), so that the one-dimensional one runs along x as in the code.
With the paper's widths this has 9.4 million weights (the paper: "9 MB").
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nnunet_flare.networks.blocks import Layers, Size, axes, conv_norm, conv_unit, residual_level, upsample
from nnunet_flare.networks.staged import StagedNetwork

CONTEXT_SCALES = (1, 2, 4)
"""The context block's 3 x 3 x 3 convolutions see maps reduced by these factors."""
CONTEXT_REDUCTION = 4
MIN_EDGE = 2
"""No map is pooled below this: the normalisation of a single voxel is undefined."""


class EfficientSegNet(StagedNetwork):
    """As :class:`StagedNetwork`; the last stage has a multiple of 4 channels. Dropout after the convolutions."""

    @staticmethod
    def encoder_stage(before: int, here: int, units: int, kernel_size: Size, stride: Size, layers: Layers) -> nn.Module:
        return residual_level(before, here, units, layers, kernel_size=kernel_size, stride=stride)

    @staticmethod
    def bottom(channels: int, layers: Layers) -> nn.Module:
        return Context(channels, layers)

    @staticmethod
    def upsampling(below: int, here: int, stride: Size, layers: Layers) -> nn.Module:
        return nn.Sequential(conv_unit(below, here, layers, kernel_size=1), upsample(stride))

    @staticmethod
    def join(skip: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        return upsampled + skip

    @staticmethod
    def decoder_stage(below: int, here: int, convolutions: int, kernel_size: Size, layers: Layers) -> nn.Module:
        """Anisotropic blocks, each a convolution within the (z, y) planes and one along x."""
        z, y, x = axes(kernel_size)
        pair = [(z, y, 1), (1, 1, x)]
        return nn.Sequential(
            *(conv_unit(here, here, layers, kernel_size=pair[index % 2]) for index in range(convolutions))
        )


class Context(nn.Module):
    """The bottleneck's anisotropic average-pool context block, (B, C, z, y, x) in and out.

    On a quarter of the channels: 3 x 3 x 3 convolutions at full, half and quarter scale, summed; beside them the means
    of all planes across each axis, convolved along that axis, summed. Both together go through a 3 x 3 x 3 and a
    1 x 1 x 1 convolution and are added to the input.
    """

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        few = channels // CONTEXT_REDUCTION
        self.reduce = conv_unit(channels, few, layers, kernel_size=1)
        self.scales = nn.ModuleList(nn.Sequential(*conv_norm(few, few)) for _ in CONTEXT_SCALES)
        along = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
        self.planes = nn.ModuleList(nn.Sequential(*conv_norm(few, few, kernel_size=kernel)) for kernel in along)
        self.activation = nn.Sequential(*layers.activation())
        self.merge = nn.Sequential(
            conv_unit(2 * few, 2 * few, layers), nn.Sequential(*conv_norm(2 * few, channels, kernel_size=1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reduced = self.reduce(x)
        size = [int(edge) for edge in x.shape[2:]]
        around, across = torch.zeros_like(reduced), torch.zeros_like(reduced)
        for factor, convolution in zip(CONTEXT_SCALES, self.scales, strict=True):
            pooled = axes([max(min(edge, MIN_EDGE), edge // factor) for edge in size])
            around = around + _resized(convolution(functional.adaptive_avg_pool3d(reduced, pooled)), size)
        for axis, convolution in enumerate(self.planes):
            others = [2 + other for other in range(3) if other != axis]
            across = across + convolution(reduced.mean(others, keepdim=True))
        both = torch.cat([self.activation(around), self.activation(across)], dim=1)
        merged: torch.Tensor = self.activation(x + self.merge(both))
        return merged


def _resized(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    return functional.interpolate(x, size, mode="trilinear", align_corners=True)
