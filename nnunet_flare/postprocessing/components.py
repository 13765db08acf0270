"""Connected components of all organs in one pass, and sparse voxel sets split into boxes.

Everything works on the labelled voxels alone: they are a few per cent of a CT, and stray voxels far away cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

CELL_VOXELS = 16
"""Edge of the cells by which a set of voxels is split into far-apart clusters."""


@dataclass(frozen=True, eq=False)
class Components:
    """26-connected components of equal labels.

    ``voxels`` (n,) are the flat indices of the labelled voxels, ascending, and ``component`` (n,) their component, from
    1 in the order of first appearance; ``label`` and ``count`` (k + 1,) are each component's label and voxel count,
    entry 0 unused.
    """

    voxels: np.ndarray
    component: np.ndarray
    label: np.ndarray
    count: np.ndarray

    def voxels_of(self, chosen: np.ndarray) -> np.ndarray:
        """Flat indices of the voxels of the components where ``chosen`` (k + 1,) is true."""
        return self.voxels[chosen[self.component]]


def find_components(labels: np.ndarray) -> Components:
    """The components of all labels of a uint8 map (Z, Y, X); neighbours join only where their labels are equal."""
    numbered = cc3d.connected_components(labels, connectivity=26)
    voxels = np.flatnonzero(labels != 0)  # several times faster than on the integers themselves
    component = numbered.ravel()[voxels]
    count = np.bincount(component, minlength=1)
    label = np.zeros(count.size, dtype=labels.dtype)
    label[component] = labels.ravel()[voxels]
    return Components(voxels, component, label, count)


def slice_counts(labels: np.ndarray) -> np.ndarray:
    """Voxels of every label in every slice, (Z, highest label + 1) int64; column 0, the background, is left at 0."""
    size = int(labels.max(initial=0)) + 1
    counts = np.zeros((labels.shape[0], size), dtype=np.int64)
    for place, plane in enumerate(labels):
        values = plane.ravel()
        counts[place] = np.bincount(values[np.flatnonzero(values != 0)], minlength=size)
    return counts


def clusters(labels: np.ndarray, label: int, *, apart: int) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes that together hold all voxels of one label, each a cluster more than ``apart`` voxels from the others.

    Other clusters' voxels may lie inside a box, but never within ``apart`` voxels of its own.
    """
    shape = labels.shape
    places = np.stack(np.unravel_index(np.flatnonzero(labels == label), shape))
    if not places.size:
        return
    cells = places // max(CELL_VOXELS, apart)
    occupied = np.zeros(cells.max(axis=1) + 1, dtype=np.uint8)
    occupied[tuple(cells)] = 1
    group = cc3d.connected_components(occupied, connectivity=26)[tuple(cells)]
    for number in range(1, int(group.max()) + 1):
        members = places[:, group == number]
        first, last = members.min(axis=1), members.max(axis=1) + 1
        z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        yield z, y, x


def foreground_rectangle(labels: np.ndarray, *, margin: int) -> tuple[slice, slice]:
    """The in-plane (y, x) box of all labelled voxels with a margin, clipped to the image; empty for an empty map."""
    plane = labels.max(axis=0, initial=0) > 0
    box = []
    for axis in (1, 0):
        places = np.flatnonzero(plane.any(axis=axis))
        box.append(_with_margin(places, plane.shape[1 - axis], margin))
    return box[0], box[1]


def _with_margin(places: np.ndarray, size: int, margin: int) -> slice:
    if not places.size:
        return slice(0, 0)
    return slice(max(0, int(places[0]) - margin), min(size, int(places[-1]) + 1 + margin))


def chosen_labels(components: Components, organs: Sequence[int]) -> np.ndarray:
    """Which components (k + 1,) belong to one of ``organs``."""
    wanted = np.zeros(256, dtype=bool)
    wanted[list(organs)] = True
    chosen = wanted[components.label]
    chosen[0] = False
    return chosen
