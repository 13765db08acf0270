"""Drawing scans and label maps: soft-tissue window, organs in the same colour-blind-safe colours everywhere.

NumPy alone; what is drawn is made a picture file by who asked for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nnunet_flare.images import Volume
from nnunet_flare.images.orientation import turn_between

WINDOW_HU = (-160.0, 240.0)
"""The usual soft-tissue window."""

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7",
    "#882255", "#44AA99", "#AA4499", "#DDCC77", "#999933", "#EE7733", "#FFFFFF",
)  # fmt: skip
"""Colour of organ 1, 2, ...: Okabe and Ito's palette, then Tol's muted one."""

PLANE_EDGE = 192
"""Along a longer axis, only every n-th voxel decides about the plane that is shown."""


def colour(organ: int) -> str:
    """The colour of an organ id, as ``#RRGGBB``."""
    return COLOURS[(organ - 1) % len(COLOURS)]


def rgb(hexadecimal: str) -> tuple[float, float, float]:
    """``#RRGGBB`` as three numbers in 0 .. 1."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def overlay(
    plane: np.ndarray, labels: np.ndarray, opacity: float = 0.5, *, window: tuple[float, float] = WINDOW_HU
) -> np.ndarray:
    """An RGB picture in 0 .. 1 of a plane (H, W), black to white in ``window`` (HU), with its labels on top."""
    low, high = window
    grey = np.clip((plane.astype(float) - low) / (high - low), 0, 1)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    for organ in np.unique(labels[labels > 0]):
        where = labels == organ
        picture[where] = (1 - opacity) * picture[where] + opacity * np.array(rgb(colour(int(organ))))
    return picture


def upright(volume: Volume) -> Volume:
    """The volume with its axes ordered and flipped so that index 0 is superior, anterior and the patient's right
    (radiological view), at origin 0. Oblique directions are shown by their main axes.
    """
    turn = turn_between(volume.direction)
    z, y, x = turn.spacing_mm(volume.spacing_mm)
    return Volume(turn.apply(volume.array)[::-1], (z, y, x))


def fullest_plane(labels: np.ndarray, axis: int) -> int:
    """Index of the plane across ``axis`` with the most different organs, of those the one with most organ voxels.

    Of large maps, every n-th voxel within the planes is looked at.
    """
    steps = [1 if a == axis else -(-n // PLANE_EDGE) for a, n in enumerate(labels.shape)]
    moved = np.moveaxis(labels[tuple(slice(None, None, step) for step in steps)], axis, 0)
    counts = [np.bincount(plane.ravel()) for plane in moved]
    kinds = [int((count > 0).sum()) for count in counts]
    voxels = [int(count[1:].sum()) for count in counts]
    return int(np.lexsort((voxels, kinds))[-1])


def organs_in(labels: np.ndarray) -> list[int]:
    """The ids in a label map, ascending, without the background; a copy of a plane is all the memory it takes."""
    found = np.zeros(256, bool)
    for plane in labels:
        found |= np.bincount(plane.ravel(), minlength=256).astype(bool)
    return [int(organ) for organ in np.flatnonzero(found) if organ]


class Panel:
    """Samples a plane on a square of ``pixels`` that shows ``width_mm`` around ``centre`` (row, column in mm)."""

    def __init__(self, spacing: ArrayLike, centre: ArrayLike, width_mm: float, pixels: int) -> None:
        mm, middle = np.asarray(spacing, float), np.asarray(centre, float)
        steps = (np.arange(pixels) + 0.5) / pixels * width_mm - width_mm / 2
        self.rows, self.columns = ((middle[a] + steps) / mm[a] - 0.5 for a in (0, 1))

    def scan(self, plane: np.ndarray, outside: float = -1024.0) -> np.ndarray:
        """(pixels, pixels) linear samples; air outside."""
        from scipy.ndimage import map_coordinates

        grid = np.meshgrid(self.rows, self.columns, indexing="ij")
        return np.asarray(map_coordinates(plane, grid, order=1, mode="constant", cval=outside))

    def labels(self, plane: np.ndarray) -> np.ndarray:
        """(pixels, pixels) nearest samples; 0 outside."""
        rows, columns = np.rint(self.rows).astype(int), np.rint(self.columns).astype(int)
        inside = ((rows >= 0) & (rows < plane.shape[0]))[:, None] & ((columns >= 0) & (columns < plane.shape[1]))
        sampled = plane[rows.clip(0, plane.shape[0] - 1)[:, None], columns.clip(0, plane.shape[1] - 1)]
        return np.where(inside, sampled, 0)
