"""3-D convolutions of a batch of one, on a CPU in single precision: computed as a batch of two halves of the volume.

PyTorch leaves such a batch to its own unrolled matrix products (``slow_conv3d``) unless it is large; of a large one
oneDNN's gradients take longer than of two halves. The values are the same but for rounding; modules keep their names
and weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

AXES = (2, 3, 4)


class HalvedConv3d(nn.Conv3d):
    """``torch.nn.Conv3d`` that computes a batch of one, (1, C, z, y, x), in two halves where it can."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        axis = self._axis(input)
        if axis is None:
            return super()._conv_forward(input, weight, bias)
        dim = axis - AXES[0]
        step, reach = self.stride[dim], self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
        padding = [int(edge) for edge in self.padding]
        edges = [0, 0] * (len(AXES) - dim)
        edges[-2:] = [padding[dim]] * 2
        padded = functional.pad(input, edges)
        half = self._steps(input, axis) // 2
        length = (half - 1) * step + reach
        halves = torch.cat([padded.narrow(axis, 0, length), padded.narrow(axis, half * step, length)])
        padding[dim] = 0
        first, second = functional.conv3d(
            halves, weight, bias, self.stride, tuple(padding), self.dilation, self.groups
        ).split(1)
        return torch.cat([first, second], axis)

    def _steps(self, input: torch.Tensor, axis: int) -> int:
        """Length of the result along an axis."""
        dim = axis - AXES[0]
        reach = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
        return (input.shape[axis] + 2 * int(self.padding[dim]) - reach) // self.stride[dim] + 1

    def _axis(self, input: torch.Tensor) -> int | None:
        """The first axis along which the result can be halved; None where PyTorch computes the whole."""
        if (
            input.dim() != 5
            or input.shape[0] != 1
            or input.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or set(self.kernel_size) == {1}
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
        ):
            return None
        return next((axis for axis in AXES if (steps := self._steps(input, axis)) >= 2 and steps % 2 == 0), None)


def halve_convolutions(network: nn.Module, device: torch.device) -> None:
    """Let the plain 3-D convolutions of a network that is trained on a CPU compute a batch of one in halves."""
    if device.type != "cpu":
        return
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = HalvedConv3d
