"""What the papers' two U-Nets have in common: encoder stages, a decoder that takes their maps in again, one head.

Plans name a network by its dotted path, so that stock nnU-Net opens it where this package is installed. There is one
more output than the papers' 13, background, and no sigmoid: nnU-Net's softmax follows.

The papers have no deep supervision. Trainers that ask for it get the one full-resolution output and its averages over
the strides, so that the weights are the same either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nnunet_flare.networks import blocks
from nnunet_flare.networks.blocks import Layers, Size


class StagedNetwork(nn.Module, ABC):
    """Logits (B, K, z, y, x) of images (B, C, z, y, x) whose edges the strides divide. What the stages are, is left.

    Args:
        input_channels: image channels C.
        num_classes: outputs K, background included.
        n_stages: resolutions, the first included.
        features_per_stage: channels of each.
        strides: reduction from the stage above, per stage and axis; the first is 1.
        kernel_sizes: per stage and axis, odd.
        n_blocks_per_stage: residual units of each encoder level (the papers: 2).
        n_conv_per_stage_decoder: convolutions of each decoder level, lowest first, an even number (the papers: 2).
        dropout_op: with ``dropout_op_kwargs``, after convolutions (the papers: 0.2).
        nonlin: with ``nonlin_kwargs``, the activation.
        deep_supervision: whether to return a list, highest resolution first.

    Raises:
        ValueError: when an argument has not one entry per stage.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Size],
        kernel_sizes: Sequence[Size],
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
        before = [input_channels, *features_per_stage[:-1]]
        levels = zip(before, features_per_stage, n_blocks_per_stage, kernel_sizes, strides, strict=True)
        self.encoder = _Encoder(self.encoder_stage(*level, layers) for level in levels)
        self.context = self.bottom(features_per_stage[-1], layers)
        wide, thin = features_per_stage[:0:-1], features_per_stage[-2::-1]
        rising = zip(wide, thin, strides[:0:-1], strict=True)
        joined = zip(wide, thin, n_conv_per_stage_decoder, kernel_sizes[-2::-1], strict=True)
        self.decoder = _Decoder(
            [self.upsampling(*level, layers) for level in rising],
            [self.decoder_stage(*level, layers) for level in joined],
            nn.Conv3d(features_per_stage[0], num_classes, 1),
            [nn.AvgPool3d(blocks.axes(stride)) for stride in strides[1:-1]],
            self.join,
            deep_supervision,
        )

    @staticmethod
    @abstractmethod
    def encoder_stage(before: int, here: int, units: int, kernel_size: Size, stride: Size, layers: Layers) -> nn.Module:
        """From the stage above (``before`` channels) to this one."""

    @staticmethod
    def bottom(channels: int, layers: Layers) -> nn.Module:
        """What the lowest map goes through before the decoder."""
        return nn.Identity()

    @staticmethod
    @abstractmethod
    def upsampling(below: int, here: int, stride: Size, layers: Layers) -> nn.Module:
        """From the stage below to this one's resolution."""

    @staticmethod
    @abstractmethod
    def join(skip: torch.Tensor, upsampled: torch.Tensor) -> torch.Tensor:
        """The encoder's map and the upsampled one as one map."""

    @staticmethod
    @abstractmethod
    def decoder_stage(below: int, here: int, convolutions: int, kernel_size: Size, layers: Layers) -> nn.Module:
        """From the joined map to one of ``here`` channels."""

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

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

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
        upsamplings: Iterable[nn.Module],
        stages: Iterable[nn.Module],
        head: nn.Module,
        poolings: Iterable[nn.Module],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.upsamplings, self.stages = nn.ModuleList(upsamplings), nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList([head])
        self.poolings = nn.ModuleList(poolings)
        self._join = join

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        x = maps[-1]
        for stage, upsampling, skip in zip(self.stages, self.upsamplings, maps[-2::-1], strict=True):
            x = stage(self._join(skip, upsampling(x)))
        logits: torch.Tensor = self.seg_layers[0](x)
        return blocks.averaged(logits, self.poolings) if self.deep_supervision else logits
