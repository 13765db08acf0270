"""Fosun Aitrox's residual U-Net (S1, seed-systems 1.3), which SZTU (S4) takes narrower as its coarse network.

An encoder level is residual units on a max-pooled map, a decoder level residual units on the skip and the trilinearly
upsampled map side by side. Plans name the network by its dotted path, so that stock nnU-Net opens it where this package
is installed. There is one more output than the papers' 13, background, and no sigmoid: nnU-Net's softmax follows.

The papers have no deep supervision. Trainers that ask for it get the one full-resolution output and its averages over
the strides, so that the weights are the same either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nnunet_flare.networks import blocks
from nnunet_flare.networks.blocks import Layers, max_pool, residual_level, upsample


class ResidualUNet(nn.Module):
    """Logits (B, K, z, y, x) of images (B, C, z, y, x) whose edges the strides divide.

    Args:
        input_channels: image channels C.
        num_classes: outputs K, background included.
        n_stages: resolutions, the first included.
        features_per_stage: channels of each.
        strides: reduction from the stage above, per stage and axis; the first is 1.
        kernel_sizes: per stage and axis, odd.
        n_blocks_per_stage: residual units of each encoder level (the papers: 2).
        n_conv_per_stage_decoder: convolutions of each decoder level, lowest first, two a residual unit (the papers: 2).
        dropout_op: with ``dropout_op_kwargs``, after the first convolution of every residual unit.
        nonlin: with ``nonlin_kwargs``, the activation.
        deep_supervision: whether to return a list, highest resolution first.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        strides: Sequence[blocks.Size],
        kernel_sizes: Sequence[blocks.Size],
        n_blocks_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: Mapping[str, Any] | None = None,
        nonlin: type[nn.Module] | None = nn.ReLU,
        nonlin_kwargs: Mapping[str, Any] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        blocks.check_stages(
            n_stages,
            features_per_stage=features_per_stage,
            strides=strides,
            kernel_sizes=kernel_sizes,
            n_blocks_per_stage=n_blocks_per_stage,
            n_conv_per_stage_decoder=n_conv_per_stage_decoder,
        )
        layers = Layers(dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs)
        self.encoder = _Encoder(input_channels, features_per_stage, strides, kernel_sizes, n_blocks_per_stage, layers)
        self.decoder = _Decoder(
            num_classes, features_per_stage, strides, kernel_sizes, n_conv_per_stage_decoder, layers, deep_supervision
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        logits: torch.Tensor | list[torch.Tensor] = self.decoder(self.encoder(x))
        return logits

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Kaiming-normal weights; nnU-Net calls this for every module."""
        blocks.initialize(module)


class _Encoder(nn.Module):
    """The feature maps of all stages, highest resolution first."""

    def __init__(
        self,
        input_channels: int,
        features: Sequence[int],
        strides: Sequence[blocks.Size],
        kernel_sizes: Sequence[blocks.Size],
        units: Sequence[int],
        layers: Layers,
    ) -> None:
        super().__init__()
        before = [input_channels, *features[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if stage == 0 else max_pool(strides[stage]),
                residual_level(before[stage], wide, units[stage], layers, kernel_size=kernel_sizes[stage]),
            )
            for stage, wide in enumerate(features)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _Decoder(nn.Module):
    """From the lowest map back to full resolution, and the head (named as nnU-Net's, for ``-pretrained_weights``)."""

    def __init__(
        self,
        num_classes: int,
        features: Sequence[int],
        strides: Sequence[blocks.Size],
        kernel_sizes: Sequence[blocks.Size],
        convolutions: Sequence[int],
        layers: Layers,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        upwards = range(len(features) - 1, 0, -1)
        self.upsamplings = nn.ModuleList(upsample(strides[stage]) for stage in upwards)
        self.stages = nn.ModuleList(
            residual_level(
                features[stage] + features[stage - 1],
                features[stage - 1],
                count // 2,
                layers,
                kernel_size=kernel_sizes[stage - 1],
            )
            for stage, count in zip(upwards, convolutions, strict=True)
        )
        self.seg_layers = nn.ModuleList([nn.Conv3d(features[0], num_classes, 1)])
        self.poolings = nn.ModuleList(nn.AvgPool3d(blocks.axes(stride)) for stride in strides[1:-1])

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        x = maps[-1]
        for stage, upsampling, skip in zip(self.stages, self.upsamplings, maps[-2::-1], strict=True):
            x = stage(torch.cat([skip, upsampling(x)], dim=1))
        logits: torch.Tensor = self.seg_layers[0](x)
        return blocks.averaged(logits, self.poolings) if self.deep_supervision else logits
