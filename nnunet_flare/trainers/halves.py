"""3-D convolutions of a batch of one, on a CPU in single precision: computed as a batch of two halves of the volume.

PyTorch leaves such a batch to its own unrolled matrix products (``slow_conv3d``) unless it is large; of a large one
oneDNN's gradients take longer than of two halves. The values are the same but for rounding; modules keep their names
and weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

DIMENSIONS = 3


class HalvedConv3d(nn.Conv3d):
    """``torch.nn.Conv3d`` that computes a batch of one, (1, C, z, y, x), in two halves where it can."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dim = self._halved(input)
        if dim is None:
            return super()._conv_forward(input, weight, bias)
        axis, stride, padding = 2 + dim, self.stride[dim], [int(edge) for edge in self.padding]
        edges = [0] * (2 * (DIMENSIONS - dim))  # of the last axis first
        edges[-2:] = [padding[dim]] * 2
        padding[dim] = 0
        padded = functional.pad(input, edges)
        half = self._steps(input, dim) // 2
        length = (half - 1) * stride + self._reach(dim)
        halves = torch.cat([padded.narrow(axis, 0, length), padded.narrow(axis, half * stride, length)])
        found = functional.conv3d(halves, weight, bias, self.stride, tuple(padding), self.dilation, self.groups)
        return torch.cat(found.split(1), axis)

    def _halved(self, input: torch.Tensor) -> int | None:
        """The first dimension along which the result can be halved; None where PyTorch computes the whole."""
        if (
            input.dim() != 2 + DIMENSIONS
            or input.shape[0] != 1
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or set(self.kernel_size) == {1}
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
        ):
            return None
        steps = [self._steps(input, dim) for dim in range(DIMENSIONS)]
        return next((dim for dim, count in enumerate(steps) if count >= 2 and count % 2 == 0), None)

    def _steps(self, input: torch.Tensor, dim: int) -> int:
        """Length of the result along a dimension."""
        return (input.shape[2 + dim] + 2 * int(self.padding[dim]) - self._reach(dim)) // self.stride[dim] + 1

    def _reach(self, dim: int) -> int:
        """Voxels that the kernel spans along a dimension."""
        return self.dilation[dim] * (self.kernel_size[dim] - 1) + 1


def halve_convolutions(network: nn.Module, device: torch.device) -> None:
    """Let the plain 3-D convolutions of a network that is trained on a CPU compute a batch of one in halves."""
    if device.type != "cpu":
        return
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = HalvedConv3d
