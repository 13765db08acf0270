"""Arrays of scores on a GPU: PyTorch's tensors, see :mod:`nnunet_flare.inference.arrays`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nnunet_flare.inference.arrays import TINY, BFloat16, to_host
from nnunet_flare.inference.devices import of_torch


class OnDevice:
    """A GPU, or any other device of PyTorch."""

    def __init__(self, device: Any) -> None:
        self._device = of_torch(device)

    def zeros(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float32, device=self._device)

    def take(self, array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(to_host(array)) if isinstance(array, (np.ndarray, BFloat16)) else array
        return tensor.to(self._device).float()

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.float().clone()

    def add_weighted(self, sums: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor) -> None:
        sums.addcmul_(self.take(scores), weights)

    def divide(self, sums: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return sums.div_(total.clamp(min=TINY))

    def flip(self, array: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return torch.flip(array, tuple(axes))

    def join(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(list(arrays), dim=axis)

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().softmax(0)

    def total(self, scores: torch.Tensor) -> torch.Tensor:
        """A tensor, so that nothing waits for the GPU until it is looked at."""
        return scores.sum(dtype=torch.float32)
