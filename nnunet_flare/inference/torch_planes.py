"""One slice of scores to one slice of labels on a GPU, see :mod:`nnunet_flare.inference.planes`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.labels import REGION_THRESHOLD
from nnunet_flare.inference.planes import Axis, HostPlanes


class DevicePlanes:
    """On a GPU, with PyTorch; the labels come to the CPU."""

    def __init__(self, host: HostPlanes) -> None:
        self._host = host

    def labels(self, plane: torch.Tensor) -> np.ndarray:
        if self._host.regions is not None:
            return self._regions(plane)
        best = self._resized(plane[0]).clone()
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        above = (plane[1:] > plane[:1]).flatten(1).any(1).tolist()
        for k in (k for k, wins in enumerate(above, start=1) if wins):
            resized = self._resized(plane[k])
            labels.masked_fill_(resized > best, k)
            torch.maximum(best, resized, out=best)
        return labels.cpu().numpy()

    def between(self, one: torch.Tensor, other: torch.Tensor, shares: np.ndarray) -> Iterator[np.ndarray]:
        for share in shares.tolist():
            yield self.labels(one * (1 - share) + other * share)

    def scores(self, plane: torch.Tensor) -> np.ndarray:
        return np.stack([to_host(self._resized(scores)) for scores in plane])

    def _regions(self, plane: torch.Tensor) -> np.ndarray:
        labels = torch.zeros((self._host.rows.size, self._host.columns.size), dtype=torch.uint8, device=plane.device)
        for label, region in zip(self._host.regions or (), plane, strict=True):
            resized = self._resized(region)
            probability = torch.sigmoid(resized) if self._host.sigmoid else resized
            labels.masked_fill_(probability > REGION_THRESHOLD, int(label))
        return labels.cpu().numpy()

    def _resized(self, plane: torch.Tensor) -> torch.Tensor:
        rows, columns = self._host.rows, self._host.columns
        axes = zip(plane.shape, (rows, columns), strict=True)
        size = tuple(n if axis.indices is not None else axis.size for n, axis in axes)
        if tuple(plane.shape) != size:
            plane = F.interpolate(plane[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        return _picked(_picked(plane, rows, 0), columns, 1)


def _picked(plane: torch.Tensor, axis: Axis, number: int) -> torch.Tensor:
    if axis.indices is None:
        return plane
    return plane.index_select(number, torch.from_numpy(axis.indices).to(plane.device))
