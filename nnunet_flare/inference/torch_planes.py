"""Slices of scores to slices of labels on a GPU, see :mod:`nnunet_flare.inference.planes`.

A batch of slices at a time, all of its classes, so that nothing has to be asked of the GPU on the way. The label map
stays there until it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.labels import REGION_THRESHOLD
from nnunet_flare.inference.memory import CHUNK_BYTES, FLOAT_BYTES
from nnunet_flare.inference.planes import Axis, HostPlanes
from nnunet_flare.inference.torch_arrays import upload

Values = Callable[[int], torch.Tensor]
"""A class to its scores in a batch of slices (n, y, x)."""


class DevicePlanes:
    """What :class:`HostPlanes` makes of slices, on a GPU."""

    def __init__(self, host: HostPlanes, device: torch.device) -> None:
        self._host, self._device = host, device
        self._picks = [
            None if axis.indices is None else upload(axis.indices, device) for axis in (host.rows, host.columns)
        ]

    @property
    def batch(self) -> int:
        """How many slices are worked on at a time."""
        return max(1, CHUNK_BYTES // (FLOAT_BYTES * self._host.rows.size * self._host.columns.size))

    def labels(self, values: Values, heads: int) -> torch.Tensor:
        """The labels (n, Y, X), uint8, of what ``values`` gives of each class."""
        if self._host.regions is not None:
            return self._regions(values)
        best = self._resized(values(0)).clone()
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=self._device)
        for k in range(1, heads):
            resized = self._resized(values(k))
            labels.masked_fill_(resized > best, k)
            torch.maximum(best, resized, out=best)
        return labels

    def scores(self, plane: torch.Tensor) -> np.ndarray:
        """All scores (K, Y, X), single precision on the CPU, of scores (K, y, x)."""
        return to_host(self._resized(plane))

    def _regions(self, values: Values) -> torch.Tensor:
        labels: torch.Tensor | None = None
        for k, label in enumerate(self._host.regions or ()):
            resized = self._resized(values(k))
            if labels is None:
                labels = torch.zeros(resized.shape, dtype=torch.uint8, device=self._device)
            probability = torch.sigmoid(resized) if self._host.sigmoid else resized
            labels.masked_fill_(probability > REGION_THRESHOLD, int(label))
        assert labels is not None
        return labels

    def _resized(self, planes: torch.Tensor) -> torch.Tensor:
        axes = zip(planes.shape[1:], (self._host.rows, self._host.columns), strict=True)
        size = tuple(n if axis.indices is not None else axis.size for n, axis in axes)
        if tuple(planes.shape[1:]) != size:
            planes = F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]
        for number, pick in enumerate(self._picks, start=1):
            planes = planes if pick is None else planes.index_select(number, pick)
        return planes


class DeviceLabels:
    """A label map that is filled on a GPU, batch by batch along the network's first axis."""

    def __init__(self, planes: DevicePlanes, depth: Axis, shape: Sequence[int], device: torch.device) -> None:
        """``depth``: how the first axis comes to its new size; ``shape`` (Z, Y, X): of the label map."""
        self._planes, self._depth = planes, depth
        self._labels = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
        self._previous: torch.Tensor | None = None
        if depth.mix is not None:
            self._low, self._high = (upload(indices, device) for indices in depth.mix[:2])
            self._share = upload(depth.mix.weight.astype(np.float32)[:, None, None], device)
        elif depth.indices is not None:
            self._sources = upload(depth.indices, device)

    def consume(self, scores: torch.Tensor, seen: int) -> None:
        """Take the next slices (K, n, y, x), of which ``seen`` were taken before."""
        if self._depth.mix is not None:
            self._mixed(scores, seen)
            self._previous = scores[:, -1:].clone()  # the caller may use its memory again
            return
        for first, last in _batches(0, scores.shape[1], self._planes.batch):
            labels = self._planes.labels(scores[:, first:last].__getitem__, len(scores))
            if self._depth.indices is None:
                self._labels[seen + first : seen + last] = labels
                continue
            own = slice(*np.searchsorted(self._depth.indices, (seen + first, seen + last)).tolist())
            if own.stop > own.start:
                self._labels[own] = labels.index_select(0, self._sources[own] - (seen + first))

    def fetch(self) -> np.ndarray:
        """The label map on the CPU."""
        return self._labels.cpu().numpy()

    def _mixed(self, scores: torch.Tensor, seen: int) -> None:
        """Slices between two of the network's grid, of which the second one is new."""
        assert self._depth.mix is not None
        before = seen if self._previous is None else seen - 1  # the number of the first slice at hand
        start, stop = np.searchsorted(self._depth.mix.high, (seen, seen + scores.shape[1])).tolist()
        for first, last in _batches(start, stop, self._planes.batch):
            low, high = self._low[first:last] - before, self._high[first:last] - before
            share = self._share[first:last]

            def values(
                k: int, low: torch.Tensor = low, high: torch.Tensor = high, s: torch.Tensor = share
            ) -> torch.Tensor:
                planes = scores[k] if self._previous is None else torch.cat([self._previous[k], scores[k]])
                return planes.index_select(0, low).mul_(1 - s).add_(planes.index_select(0, high).mul_(s))

            self._labels[first:last] = self._planes.labels(values, len(scores))


def _batches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
