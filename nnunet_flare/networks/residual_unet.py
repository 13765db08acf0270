"""Fosun Aitrox's residual U-Net (S1, seed-systems 1.3), which SZTU (S4) takes narrower as its coarse network.

An encoder level is residual units on a max-pooled map, a decoder level residual units on the skip and the trilinearly
upsampled map side by side.
"""

from __future__ import annotations

import torch
from torch import nn

from nnunet_flare.networks.blocks import Layers, Size, max_pool, residual_level, upsample
from nnunet_flare.networks.staged import StagedNetwork


class ResidualUNet(StagedNetwork):
    """As :class:`StagedNetwork`; dropout after the first convolution of every residual unit."""

    @staticmethod
    def encoder_stage(before: int, here: int, units: int, kernel_size: Size, stride: Size, layers: Layers) -> nn.Module:
        return nn.Sequential(max_pool(stride), residual_level(before, here, units, layers, kernel_size=kernel_size))

    @staticmethod
    def upsampling(below: int, here: int, stride: Size, layers: Layers) -> nn.Module:
        return upsample(stride)

    @staticmethod
    def join(skip: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        return torch.cat([skip, upsampled], dim=1)

    @staticmethod
    def decoder_stage(below: int, here: int, convolutions: int, kernel_size: Size, layers: Layers) -> nn.Module:
        return residual_level(below + here, here, convolutions // 2, layers, kernel_size=kernel_size)
