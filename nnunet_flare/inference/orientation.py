"""Bringing a scan into the orientation in which the model's training data were read, and labels back.

``SimpleITKIO`` and ``NibabelIO`` keep the axes as stored; the readers that end in ``WithReorient`` bring every scan to
RAS by exchanging and flipping axes. Both ways are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_flare.images import Volume


@dataclass(frozen=True)
class Orientation:
    """Axis ``i`` of the oriented array is axis ``order[i]`` of the stored one, reversed where ``flip[i]``."""

    order: tuple[int, int, int] = (0, 1, 2)
    flip: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """A view of a stored array (Z, Y, X) in the reader's orientation."""
        return array.transpose(self.order)[self._flips]

    def spacing(self, spacing_mm: tuple[float, ...]) -> tuple[float, float, float]:
        """The stored spacing in the oriented array's axis order."""
        return spacing_mm[self.order[0]], spacing_mm[self.order[1]], spacing_mm[self.order[2]]

    def revert(self, array: np.ndarray) -> np.ndarray:
        """A view of an oriented array as it is stored."""
        return array[self._flips].transpose(np.argsort(self.order))

    @property
    def _flips(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flip)


def orientation_for(reader: str, volume: Volume) -> Orientation:
    """How a scan is oriented for a model whose plans name this reader."""
    if not reader.endswith("WithReorient"):
        return Orientation()
    from nibabel.orientations import io_orientation

    # Columns of the direction matrix belong to the axes x, y, z; SimpleITK's world is LPS, nibabel's is RAS.
    direction = np.asarray(volume.direction, float).reshape(3, 3) * np.array([[-1.0], [-1.0], [1.0]])
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(volume.spacing_mm[::-1])
    world, sign = io_orientation(affine).T
    order, flip = [0, 0, 0], [False, False, False]
    for axis in range(3):  # file axis x, y, z = array axis 2, 1, 0; likewise the world axes R, A, S
        order[2 - int(world[axis])] = 2 - axis
        flip[2 - int(world[axis])] = bool(sign[axis] < 0)
    return Orientation((order[0], order[1], order[2]), (flip[0], flip[1], flip[2]))
