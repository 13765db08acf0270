"""Arrays of scores: NumPy's on the CPU, PyTorch's tensors on a GPU.

Windows, augmentation and export slice, add and divide both alike; what the two libraries name differently is here, for
the CPU in :class:`Host`, for GPUs in :mod:`nnunet_flare.inference.torch_arrays`; which of them an array needs, in
:mod:`nnunet_flare.inference.places`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunet_flare.inference.workers import in_parallel, split

Array = Any
"""A NumPy array, or a tensor on a GPU; what a network gives may be :class:`BFloat16` scores."""


@dataclass(frozen=True, eq=False)
class BFloat16:
    """Scores in bfloat16, which NumPy does not have, on the CPU: the upper halves of single precision, uint16."""

    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""
        return self.bits.shape

    def __getitem__(self, part: Any) -> BFloat16:
        """A view of a part."""
        return BFloat16(self.bits[part])

    def single(self, out: np.ndarray | None = None) -> np.ndarray:
        """The same values in single precision, in ``out`` where it is given."""
        values = np.empty(self.shape, np.float32) if out is None else out
        upper = values.view(np.uint32)
        np.copyto(upper, self.bits)
        np.left_shift(upper, 16, out=upper)
        return values

    def is_finite(self) -> bool:
        """Whether no value is infinite or NaN, whose exponents are all ones."""
        return all(int((plane & 0x7FFF).max(initial=0)) < 0x7F80 for plane in self.bits)


class Place(Protocol):
    """Where arrays lie, and what is done with them there."""

    def zeros(self, shape: Sequence[int]) -> Array:
        """Single precision zeros."""
        ...

    def take(self, array: Any) -> Array:
        """An array from anywhere, here and in single precision; the same memory where that is so already."""
        ...

    def packed(self, array: Any) -> Array:
        """As :meth:`take`, and in one piece."""
        ...

    def copy(self, array: Array) -> Array:
        """A copy in single precision."""
        ...

    def pad(self, array: Array, widths: Sequence[tuple[int, int]]) -> Array:
        """The array with zeros before and after each axis."""
        ...

    def nowhere(self, shape: Sequence[int]) -> Array:
        """A mask that holds nothing."""
        ...

    def counts(self, masks: Iterable[Array]) -> list[int]:
        """How many voxels each mask holds; a GPU is waited for once."""
        ...

    def add_weighted(self, sums: Array, scores: Array, weights: Array) -> None:
        """Add scores (K, z, y, x), each times its weight (z, y, x), to sums, a part of an array of :meth:`zeros`."""
        ...

    def divide(self, sums: Array, total: Array) -> Array:
        """Sums (K, n, y, x) by the total weight (n, y, x), in place; zero where that is zero."""
        ...

    def flip(self, array: Array, axes: Sequence[int]) -> Array:
        """The array with axes reversed."""
        ...

    def join(self, arrays: Sequence[Array], axis: int) -> Array:
        """Arrays one after the other along an axis."""
        ...

    def softmax(self, scores: Array) -> Array:
        """Probabilities over the first axis."""
        ...

    def sigmoid(self, scores: Array) -> Array:
        """The logistic function."""
        ...

    def winner(self, scores: Array) -> Array:
        """The index, uint8, of the highest score over the first axis, the lowest one of several."""
        ...

    def labels(self, shape: Sequence[int]) -> Array:
        """A label map, uint8, of background."""
        ...

    def paint(self, labels: Array, where: Array, label: int) -> None:
        """Give a label to the voxels of a mask."""
        ...

    def total(self, scores: Array) -> Any:
        """The sum of all scores, or another number, which is finite when they are."""
        ...


TINY = float(np.finfo(np.float32).tiny)


class Host:
    """The CPU. Work goes plane by plane, so that what is made on the way stays in the processor's cache.

    Large sums are shared by threads, each of which has planes of its own: no sum depends on their number.
    """

    def zeros(self, shape: Sequence[int]) -> np.ndarray:
        return np.zeros(tuple(shape), np.float32)

    def take(self, array: Any) -> np.ndarray:
        return to_host(array)

    def packed(self, array: Any) -> np.ndarray:
        return np.ascontiguousarray(to_host(array))

    def copy(self, array: np.ndarray | BFloat16) -> np.ndarray:
        return array.single() if isinstance(array, BFloat16) else np.array(array, np.float32)

    def pad(self, array: np.ndarray, widths: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.pad(array, widths)

    def nowhere(self, shape: Sequence[int]) -> np.ndarray:
        return np.zeros(tuple(shape), bool)

    def counts(self, masks: Iterable[np.ndarray]) -> list[int]:
        return [int(np.count_nonzero(mask)) for mask in masks]

    def add_weighted(self, sums: np.ndarray, scores: Array, weights: np.ndarray) -> None:
        scores = scores if isinstance(scores, BFloat16) else to_host(scores)

        def add(part: slice) -> None:
            product = np.empty(scores.shape[2:], np.float32)
            for index in range(part.start, part.stop):
                for head, into in enumerate(sums[:, index]):
                    plane = scores[head, index]
                    plane = plane.single(product) if isinstance(plane, BFloat16) else plane
                    np.multiply(plane, weights[index], out=product)
                    into += product

        in_parallel(add, split(len(weights), sums.size))

    def divide(self, sums: np.ndarray, total: np.ndarray) -> np.ndarray:
        def divide(part: slice) -> None:
            for index in range(part.start, part.stop):
                sums[:, index] /= np.maximum(total[index], TINY)

        in_parallel(divide, split(len(total), sums.size))
        return sums

    def flip(self, array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        return np.flip(array, tuple(axes))

    def join(self, arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(arrays, axis=axis)

    def softmax(self, scores: np.ndarray | BFloat16) -> np.ndarray:
        scores = to_host(scores)
        powers = np.exp(scores - scores.max(0))
        powers /= powers.sum(0)
        return powers

    def sigmoid(self, scores: np.ndarray) -> np.ndarray:
        return sigmoid(scores)

    def winner(self, scores: np.ndarray) -> np.ndarray:
        return scores.argmax(0).astype(np.uint8)

    def labels(self, shape: Sequence[int]) -> np.ndarray:
        return np.zeros(tuple(shape), np.uint8)

    def paint(self, labels: np.ndarray, where: np.ndarray, label: int) -> None:
        labels[where] = label

    def total(self, scores: np.ndarray | BFloat16) -> float:
        if isinstance(scores, BFloat16):
            return 0.0 if scores.is_finite() else np.inf
        with np.errstate(invalid="ignore", over="ignore"):
            return float(scores.sum(dtype=np.float32))


HOST = Host()


def to_host(array: Any) -> np.ndarray:
    """An array from anywhere as a NumPy array in single precision; the same memory where it is one already."""
    if isinstance(array, BFloat16):
        return array.single()
    if not isinstance(array, np.ndarray):
        array = array.detach().float().cpu().numpy()
    return array.astype(np.float32, copy=False)


def fetched(array: Array) -> np.ndarray:
    """An array from anywhere as a NumPy array in its own type."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """The logistic function, in single precision."""
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-scores))
