"""Turning volumes between orientations by exact flips and axis swaps, as their headers say.

``direction`` is SimpleITK's row-major 3x3 matrix in LPS; its identity means that (x, y, z) run to the left, to the
back and upwards, so that array axis 0 of ``(Z, Y, X)`` ascends towards the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from nnunet_flare.images import Volume
from nnunet_flare.images.geometry import LPS, TO_OTHER_WORLD, describe
from nnunet_flare.images.readers import NIBABEL_RAS, SITK_RAS

__all__ = ["LPS", "Turn", "describe", "turn_between", "turn_for_reader", "turn_volume"]

TOWARDS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Letters of an orientation: the axis of SimpleITK's world and the sign."""


@dataclass(frozen=True)
class Turn:
    """New array axis ``a`` is old axis ``axes[a]``, reversed where ``flipped[a]``; all in (Z, Y, X) order."""

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @property
    def is_identity(self) -> bool:
        return self.axes == (0, 1, 2) and not any(self.flipped)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The turned view of a (Z, Y, X) array."""
        return array.transpose(self.axes)[self._steps]

    def undo(self, array: np.ndarray) -> np.ndarray:
        """The view that turns an array of :meth:`apply` back."""
        return array[self._steps].transpose(tuple(int(axis) for axis in np.argsort(self.axes)))

    def spacing_mm(self, spacing_mm: Sequence[float]) -> tuple[float, float, float]:
        """The (z, y, x) spacing of the turned array."""
        first, second, third = (float(spacing_mm[axis]) for axis in self.axes)
        return first, second, third

    @property
    def _steps(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)


def turn_between(direction: Sequence[float], wanted: Sequence[float] = LPS) -> Turn:
    """The flips and swaps that bring axes of ``direction`` closest to those of ``wanted`` (default LPS)."""
    alignment = np.reshape(wanted, (3, 3)).T @ np.reshape(direction, (3, 3))
    best = max(permutations(range(3)), key=lambda order: sum(abs(alignment[a, b]) for a, b in enumerate(order)))
    axes = tuple(2 - best[2 - axis] for axis in range(3))
    flipped = tuple(bool(alignment[2 - axis, best[2 - axis]] < 0) for axis in range(3))
    return Turn((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))


def turn_for_reader(reader: str, volume: Volume) -> Turn:
    """How a scan is turned for a model whose plans name this reader of nnU-Net.

    ``SimpleITKIO`` and ``NibabelIO`` keep the axes as stored; the readers that end in ``WithReorient`` bring every scan
    to RAS. Which axis is which is the choice of the reader's library, and oblique scans show that they differ.
    """
    if reader == NIBABEL_RAS:
        from nibabel.orientations import io_orientation

        world, sign = io_orientation(TO_OTHER_WORLD @ volume.matrix).T
        return _to_ras([(int(w), int(s)) for w, s in zip(world, sign, strict=True)])
    if reader == SITK_RAS:
        import SimpleITK as sitk

        code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(volume.direction)
        towards = [TOWARDS[letter] for letter in code]
        return _to_ras([(axis, sign if axis == 2 else -sign) for axis, sign in towards])
    return Turn((0, 1, 2), (False, False, False))


def _to_ras(file_axes: Sequence[tuple[int, int]]) -> Turn:
    """The turn to RAS of a file whose axes x, y, z lie along these world axes (R, A, S), with these signs."""
    axes, flipped = [0, 0, 0], [False, False, False]
    for axis, (world, sign) in enumerate(file_axes):  # file axis x, y, z = array axis 2, 1, 0; likewise the world's
        axes[2 - world] = 2 - axis
        flipped[2 - world] = sign < 0
    return Turn((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))


def turn_volume(volume: Volume, turn: Turn) -> Volume:
    """The turned volume: same voxels at the same places in space, other storage order."""
    old_index = np.zeros((4, 4))  # of the old (x, y, z) for the new one
    old_index[3, 3] = 1
    for axis in range(3):
        old = turn.axes[axis]
        old_index[2 - old, 2 - axis] = -1 if turn.flipped[axis] else 1
        old_index[2 - old, 3] = volume.array.shape[old] - 1 if turn.flipped[axis] else 0
    return volume.moved(np.ascontiguousarray(turn.apply(volume.array)), old_index, turn.spacing_mm(volume.spacing_mm))
