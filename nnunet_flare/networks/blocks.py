"""What the papers' 3-D networks are built of: convolution units, residual units, poolings and upsampling.

Normalisation is instance normalisation without learnt scale and shift, convolutions have no bias. Tensors are
(B, C, z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Size = int | Sequence[int]
"""One number for all three axes, or one per axis (z, y, x)."""


@dataclass(frozen=True)
class Layers:
    """Dropout and activation of all units of a network, in nnU-Net's words; None leaves the layer out."""

    dropout_op: type[nn.Module] | None = None
    dropout_op_kwargs: Mapping[str, Any] | None = None
    nonlin: type[nn.Module] | None = nn.ReLU
    nonlin_kwargs: Mapping[str, Any] | None = None

    def dropout(self) -> list[nn.Module]:
        """A dropout layer, or nothing."""
        return [] if self.dropout_op is None else [self.dropout_op(**(self.dropout_op_kwargs or {}))]

    def activation(self) -> list[nn.Module]:
        """An activation layer, or nothing."""
        return [] if self.nonlin is None else [self.nonlin(**(self.nonlin_kwargs or {}))]


def conv_norm(in_channels: int, out_channels: int, *, kernel_size: Size = 3, stride: Size = 1) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, and the normalisation of its result."""
    return [
        nn.Conv3d(in_channels, out_channels, axes(kernel_size), axes(stride), padding=half(kernel_size), bias=False),
        nn.InstanceNorm3d(out_channels),
    ]


def conv_unit(
    in_channels: int, out_channels: int, layers: Layers, *, kernel_size: Size = 3, stride: Size = 1
) -> nn.Sequential:
    """Convolution, normalisation, dropout, activation."""
    convolution = conv_norm(in_channels, out_channels, kernel_size=kernel_size, stride=stride)
    return nn.Sequential(*convolution, *layers.dropout(), *layers.activation())


class ResidualUnit(nn.Module):
    """Two convolutions and a shortcut, added before the activation; no dropout after the second convolution.

    The shortcut is the identity, or a normalised 1 x 1 x 1 convolution where channels or size change.
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: Layers, *, kernel_size: Size = 3, stride: Size = 1
    ) -> None:
        super().__init__()
        self.first = conv_unit(in_channels, out_channels, layers, kernel_size=kernel_size, stride=stride)
        self.second = nn.Sequential(*conv_norm(out_channels, out_channels, kernel_size=kernel_size))
        is_same = in_channels == out_channels and math.prod(axes(stride)) == 1
        self.shortcut: nn.Module = (
            nn.Identity()
            if is_same
            else nn.Sequential(*conv_norm(in_channels, out_channels, kernel_size=1, stride=stride))
        )
        self.activation = nn.Sequential(*layers.activation())

    def forward(self, x: Any) -> Any:
        return self.activation(self.second(self.first(x)) + self.shortcut(x))


def residual_level(
    in_channels: int, out_channels: int, units: int, layers: Layers, *, kernel_size: Size = 3, stride: Size = 1
) -> nn.Sequential:
    """Residual units one after the other; the first changes channels and, with a stride, the size."""
    first = ResidualUnit(in_channels, out_channels, layers, kernel_size=kernel_size, stride=stride)
    rest = (ResidualUnit(out_channels, out_channels, layers, kernel_size=kernel_size) for _ in range(units - 1))
    return nn.Sequential(first, *rest)


def check_stages(n_stages: int, **given: Sequence[Any]) -> None:
    """Whether a network's arguments have one entry per stage, the decoder's (an even number each) one less.

    Raises:
        ValueError: with the argument, what it is and what is expected.
    """
    for name, entries in given.items():
        is_decoder = name == "n_conv_per_stage_decoder"
        expected = n_stages - 1 if is_decoder else n_stages
        if len(entries) != expected:
            raise ValueError(f"{name}: found {len(entries)} entries {list(entries)}, expected {expected}")
        if is_decoder and any(number % 2 for number in entries):
            raise ValueError(f"{name}: found {list(entries)}, expected even numbers")


def averaged(logits: torch.Tensor, poolings: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Outputs for deep supervision from one head: the logits, and their averages by one pooling after the other."""
    outputs = [logits]
    for pooling in poolings:
        outputs.append(pooling(outputs[-1]))
    return outputs


def max_pool(stride: Size) -> nn.Module:
    """Maximum over three voxels along the axes with a stride, over one along the others; without any, nothing."""
    steps = axes(stride)
    if math.prod(steps) == 1:
        return nn.Identity()
    kernel = axes([3 if step > 1 else 1 for step in steps])
    return nn.MaxPool3d(kernel, steps, padding=half(kernel))


def upsample(stride: Size) -> nn.Module:
    """Trilinear upsampling by a stride, corner voxels on corner voxels."""
    factors = tuple(float(step) for step in axes(stride))
    return nn.Upsample(scale_factor=factors, mode="trilinear", align_corners=True)


def initialize(module: nn.Module) -> None:
    """Kaiming-normal weights (He et al. 2015) of a convolution or linear layer, biases zero; others are left alone."""
    if isinstance(module, (nn.Conv3d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def axes(size: Size) -> tuple[int, int, int]:
    """A size per axis (z, y, x)."""
    z, y, x = (size, size, size) if isinstance(size, int) else size
    return int(z), int(y), int(x)


def half(kernel_size: Size) -> tuple[int, int, int]:
    """The padding with which an odd kernel keeps the size."""
    z, y, x = axes(kernel_size)
    return z // 2, y // 2, x // 2
