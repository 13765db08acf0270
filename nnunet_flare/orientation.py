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

LPS: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""The direction in which array axis 0 runs to the head, 1 to the back and 2 to the patient's left."""


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
    to RAS. The axes are nibabel's choice (by the polar decomposition of the affine), as the nibabel reader makes it.
    """
    if not reader.endswith("WithReorient"):
        return Turn((0, 1, 2), (False, False, False))
    from nibabel.orientations import io_orientation

    # Columns of the direction matrix belong to the axes x, y, z; SimpleITK's world is LPS, nibabel's is RAS.
    direction = np.asarray(volume.direction, float).reshape(3, 3) * np.array([[-1.0], [-1.0], [1.0]])
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(volume.spacing_mm[::-1])
    world, sign = io_orientation(affine).T
    axes, flipped = [0, 0, 0], [False, False, False]
    for axis in range(3):  # file axis x, y, z = array axis 2, 1, 0; likewise the world axes R, A, S
        axes[2 - int(world[axis])] = 2 - axis
        flipped[2 - int(world[axis])] = bool(sign[axis] < 0)
    return Turn((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))


def turn_volume(volume: Volume, turn: Turn) -> Volume:
    """The turned volume: same voxels at the same places in space, other storage order."""
    matrix = np.reshape(volume.direction, (3, 3))
    columns, origin = [], np.array(volume.origin, dtype=float)
    for axis in (2, 1, 0):
        old = turn.axes[axis]
        column = matrix[:, 2 - old]
        if turn.flipped[axis]:
            origin = origin + column * volume.spacing_mm[old] * (volume.array.shape[old] - 1)
            column = -column
        columns.append(column)
    direction = np.stack(columns, axis=1).ravel()
    return Volume(
        np.ascontiguousarray(turn.apply(volume.array)),
        turn.spacing_mm(volume.spacing_mm),
        tuple(origin.tolist()),
        tuple(direction.tolist()),
    )


def describe(direction: Sequence[float]) -> str:
    """Where (x, y, z) of a direction run, as three letters such as ``LPS`` or ``RAS``."""
    matrix = np.reshape(direction, (3, 3))
    names = (("L", "R"), ("P", "A"), ("S", "I"))
    letters = []
    for column in matrix.T:
        axis = int(np.argmax(np.abs(column)))
        letters.append(names[axis][0 if column[axis] > 0 else 1])
    return "".join(letters)
