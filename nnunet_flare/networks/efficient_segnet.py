"""SZTU's fine generator (S4, seed-systems 4.3), their EfficientSegNet: strided residual encoder, context, thin decoder.

An encoder level is two residual units, the first of them strided. At the bottom a block looks around at several scales
and along whole planes. A decoder level reduces the channels, upsamples, *adds* the skip and runs one anisotropic block:
a 3 x 3 x 1 and a 1 x 1 x 3 convolution, in (z, y, x), so that the one-dimensional one runs along x as in the code.
With the paper's widths this has 9.4 million weights (the paper: "9 MB").

Head and deep supervision are as in :mod:`nnunet_flare.networks.residual_unet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nnunet_flare.networks import blocks
from nnunet_flare.networks.blocks import Layers, axes, conv_norm, conv_unit, residual_level, upsample

CONTEXT_SCALES = (1, 2, 4)
"""The context block's 3 x 3 x 3 convolutions see maps reduced by these factors."""
CONTEXT_REDUCTION = 4
MIN_EDGE = 2
"""No map is pooled below this: the normalisation of a single voxel is undefined."""


class EfficientSegNet(nn.Module):
    """Logits (B, K, z, y, x) of images (B, C, z, y, x) whose edges the strides divide.

    Args:
        input_channels: image channels C.
        num_classes: outputs K, background included.
        n_stages: resolutions, the first included.
        features_per_stage: channels of each, the last a multiple of 4.
        strides: reduction from the stage above, per stage and axis; the first is 1.
        kernel_sizes: per stage and axis, odd.
        n_blocks_per_stage: residual units of each encoder level (the paper: 2).
        n_conv_per_stage_decoder: convolutions of each decoder level, two an anisotropic block (the paper: 2).
        dropout_op: with ``dropout_op_kwargs``, after the convolutions (the paper: 0.2).
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
        nonlin: type[nn.Module] | None = nn.LeakyReLU,
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
        before = [input_channels, *features_per_stage[:-1]]
        levels = zip(before, features_per_stage, n_blocks_per_stage, kernel_sizes, strides, strict=True)
        self.encoder = _Encoder(
            residual_level(thin, wide, units, layers, kernel_size=kernel, stride=stride)
            for thin, wide, units, kernel, stride in levels
        )
        self.context = Context(features_per_stage[-1], layers)
        self.decoder = _Decoder(
            num_classes, features_per_stage, strides, kernel_sizes, n_conv_per_stage_decoder, layers, deep_supervision
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        maps = self.encoder(x)
        logits: torch.Tensor | list[torch.Tensor] = self.decoder([*maps[:-1], self.context(maps[-1])])
        return logits

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Kaiming-normal weights; nnU-Net calls this for every module."""
        blocks.initialize(module)


class _Encoder(nn.Module):
    """The feature maps of all stages, highest resolution first."""

    def __init__(self, stages: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


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


class _Decoder(nn.Module):
    """From the context back to full resolution, and the head (named as nnU-Net's, for ``-pretrained_weights``)."""

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
        self.upsamplings = nn.ModuleList(
            nn.Sequential(
                conv_unit(features[stage], features[stage - 1], layers, kernel_size=1), upsample(strides[stage])
            )
            for stage in upwards
        )
        self.stages = nn.ModuleList(
            anisotropic_level(features[stage - 1], count, layers, kernel_size=kernel_sizes[stage - 1])
            for stage, count in zip(upwards, convolutions, strict=True)
        )
        self.seg_layers = nn.ModuleList([nn.Conv3d(features[0], num_classes, 1)])
        self.poolings = nn.ModuleList(nn.AvgPool3d(axes(stride)) for stride in strides[1:-1])

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        x = maps[-1]
        for stage, upsampling, skip in zip(self.stages, self.upsamplings, maps[-2::-1], strict=True):
            x = stage(upsampling(x) + skip)
        logits: torch.Tensor = self.seg_layers[0](x)
        return blocks.averaged(logits, self.poolings) if self.deep_supervision else logits


def anisotropic_level(channels: int, convolutions: int, layers: Layers, *, kernel_size: blocks.Size) -> nn.Sequential:
    """Anisotropic blocks, each a convolution within the (z, y) planes and one along x."""
    z, y, x = axes(kernel_size)
    pair = [(z, y, 1), (1, 1, x)]
    return nn.Sequential(
        *(conv_unit(channels, channels, layers, kernel_size=pair[index % 2]) for index in range(convolutions))
    )
