"""Outputs and targets with deep supervision are lists, highest resolution first; without it they are tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def highest(parts: Any) -> torch.Tensor:
    """Of outputs or targets with deep supervision the first, full-resolution part."""
    full: torch.Tensor = parts[0] if isinstance(parts, (list, tuple)) else parts
    return full


def samples_of(parts: Any, samples: list[int] | slice) -> Any:
    """Some samples of a batch, or of each resolution of it. A list of numbers is no index that goes to the device."""
    return [_some(part, samples) for part in parts] if isinstance(parts, (list, tuple)) else _some(parts, samples)


def _some(part: torch.Tensor, samples: list[int] | slice) -> torch.Tensor:
    if isinstance(samples, slice):
        return part[samples]
    return torch.cat([part[index : index + 1] for index in samples])


def at_resolutions(labels: torch.Tensor, outputs: Any) -> Any:
    """Labels (B, 1 or regions, Z, Y, X) as the target of ``outputs``: one for each of several, nearest neighbour."""
    if not isinstance(outputs, (list, tuple)):
        return labels
    sizes = [output.shape[2:] for output in outputs]
    return [
        labels if size == labels.shape[2:] else functional.interpolate(labels.float(), size, mode="nearest-exact")
        for size in sizes
    ]
