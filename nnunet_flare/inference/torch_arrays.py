"""Arrays on a GPU: PyTorch's tensors, see :mod:`nnunet_flare.inference.arrays`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nnunet_flare.inference.arrays import TINY, BFloat16
from nnunet_flare.inference.devices import of_torch

UPLOADED = frozenset("?bBhilqefd")
"""Codes of NumPy's types that travel as they are; others, which GPUs hardly know, as single precision."""


class OnDevice:
    """A GPU, or any other device of PyTorch."""

    def __init__(self, device: Any) -> None:
        self._device = of_torch(device)

    def zeros(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float32, device=self._device)

    def take(self, array: Any) -> torch.Tensor:
        array = array.single() if isinstance(array, BFloat16) else array
        tensor = upload(array, self._device) if isinstance(array, np.ndarray) else array.to(self._device)
        return tensor.float()

    def packed(self, array: Any) -> torch.Tensor:
        return self.take(array).contiguous()

    def copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.float().clone()

    def pad(self, array: torch.Tensor, widths: Sequence[tuple[int, int]]) -> torch.Tensor:
        return F.pad(array, [width for pair in reversed(widths) for width in pair])

    def nowhere(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.bool, device=self._device)

    def counts(self, masks: Iterable[torch.Tensor]) -> list[int]:
        found = [mask.sum() for mask in masks]
        return torch.stack(found).tolist() if found else []

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

    def sigmoid(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float().sigmoid()

    def winner(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.argmax(0).to(torch.uint8)

    def labels(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=torch.uint8, device=self._device)

    def paint(self, labels: torch.Tensor, where: torch.Tensor, label: int) -> None:
        labels.masked_fill_(where, label)

    def total(self, scores: torch.Tensor) -> torch.Tensor:
        """A tensor, so that nothing waits for the GPU until it is looked at."""
        return scores.sum(dtype=torch.float32)


def upload(array: np.ndarray, device: Any) -> torch.Tensor:
    """A copy of an array of any strides on a device, in its own type.

    CUDA gets it through pinned memory, so that the program goes on meanwhile; PyTorch keeps that memory until the copy
    is there. Where the system gives no pinned memory the program waits.
    """
    device = of_torch(device)
    kind = array.dtype.newbyteorder("=") if array.dtype.char in UPLOADED else np.dtype(np.float32)
    if device.type == "cuda":
        try:
            staged = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype, pin_memory=True)
        except RuntimeError:
            pass
        else:
            np.copyto(staged.numpy(), array, casting="unsafe")
            return staged.to(device, non_blocking=True)
    return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device)
