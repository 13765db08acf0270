"""From a coarse label map to the box that is worth a fine look, and boxes on the way between grids.

A box is one ``(first, one past last)`` per axis. Three rules say which voxels of the coarse map count:

``union``
    Every foreground voxel: nothing that the coarse pass saw is left out.
``fosun``
    Fosun Aitrox (S1): components of more than 100 mm3; with more than five labels the slice range runs from the second
    lowest start to the second highest end of a label, so that one outlier on either side does not stretch it.
``sztu``
    SZTU (S4): the largest component of every label, where it has more than 1000 mm3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_flare.images.orientation import Turn

Box = tuple[tuple[int, int], ...]


MARGIN_MM = 20.0
"""Added on every side of the box (both papers)."""

FOSUN_MIN_MM3 = 100.0
FOSUN_MAX_COMPONENTS = 30
FOSUN_TRIM_ABOVE = 5
"""With more labels than this the slice range is trimmed."""

SZTU_MIN_MM3 = 1000.0

MIN_VOXELS = 2
"""Shortest edge of a box, as of a scan."""


def find_box(
    labels: np.ndarray, spacing_mm: Sequence[float], *, rule: str = "union", slice_axis: int = 0
) -> Box | None:
    """The box of what a rule counts as organ, or None where there is nothing.

    Args:
        labels: coarse label map (z, y, x), uint8.
        spacing_mm: of that map, in its axis order.
        rule: one of :data:`ROI_RULES`.
        slice_axis: the axis from head to feet, which ``fosun`` trims.
    """
    if rule == "union":
        return _bounds(labels > 0)
    from nnunet_flare.postprocessing.components import find_components

    found = find_components(np.ascontiguousarray(labels))
    voxel_mm3 = float(np.prod(spacing_mm))
    chosen = np.zeros(found.count.size, bool)
    if rule == "fosun":
        large = [i for i in np.argsort(-found.count, kind="stable") if found.count[i] * voxel_mm3 > FOSUN_MIN_MM3]
        chosen[large[:FOSUN_MAX_COMPONENTS]] = True
    else:
        for label in np.unique(found.label[1:]):
            largest = max(np.flatnonzero(found.label == label), key=lambda i: found.count[i])
            chosen[largest] = found.count[largest] * voxel_mm3 > SZTU_MIN_MM3
    chosen[0] = False
    kept = np.zeros(labels.size, labels.dtype)
    voxels = found.voxels_of(chosen)
    kept[voxels] = labels.ravel()[voxels]
    kept = kept.reshape(labels.shape)
    box = _bounds(kept > 0)
    return box if box is None or rule != "fosun" else _trimmed(kept, box, slice_axis)


def _bounds(mask: np.ndarray) -> Box | None:
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        if not hit.size:
            return None
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _trimmed(kept: np.ndarray, box: Box, axis: int) -> Box:
    """The box with Fosun's slice range."""
    labels = np.unique(kept[kept > 0])
    if labels.size <= FOSUN_TRIM_ABOVE:
        return box
    ranges = [_bounds(kept == label) for label in labels]
    starts = sorted(one[axis][0] for one in ranges if one is not None)
    ends = sorted(one[axis][1] for one in ranges if one is not None)
    if starts[1] >= ends[-2]:  # organs that hardly overlap along the axis
        return box
    trimmed = list(box)
    trimmed[axis] = (starts[1], ends[-2])
    return tuple(trimmed)


def to_image_box(
    box: Box, shape: Sequence[int], properties: dict[str, Any], backward: Sequence[int], turn: Turn
) -> Box:
    """A box on the network's grid as the box of stored voxels (Z, Y, X) that covers it.

    Args:
        box: on the network's grid.
        shape: of that grid.
        properties: what preprocessing noted (stock's names): crop, and its shape before resampling.
        backward: the plans' ``transpose_backward``.
        turn: how the scan was turned for the model.
    """
    inner = properties["shape_after_cropping_and_before_resampling"]
    outer = properties["shape_before_cropping"]
    crop = properties["bbox_used_for_cropping"]
    scaled = []
    for (low, high), size, stored, (offset, _) in zip(box, shape, inner, crop, strict=True):
        first = int(np.floor(low * stored / size))
        last = int(np.ceil(high * stored / size))
        scaled.append((int(offset) + first, int(offset) + min(last, int(stored))))
    oriented = [(scaled[axis], int(outer[axis])) for axis in backward]
    unflipped = [
        (size - high, size - low) if flip else (low, high)
        for ((low, high), size), flip in zip(oriented, turn.flipped, strict=True)
    ]
    return tuple(unflipped[axis] for axis in np.argsort(turn.axes))


def widened(box: Box, shape: Sequence[int], spacing_mm: Sequence[float], margin_mm: float) -> Box:
    """The box with a margin on every side, at least two voxels wide, inside a scan of this shape."""
    wide = []
    for (low, high), size, spacing in zip(box, shape, spacing_mm, strict=True):
        margin = int(np.ceil(margin_mm / spacing))
        first, last = max(0, low - margin), min(size, high + margin)
        if last - first < MIN_VOXELS:
            first = max(0, min(first, size - MIN_VOXELS))
            last = first + MIN_VOXELS
        wide.append((first, last))
    return tuple(wide)
