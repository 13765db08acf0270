"""Post-processing operations: pure functions from a label map and its spacing to a new label map.

Label maps are uint8 ``(Z, Y, X)`` in LPS, that is with axis 0 ascending towards the head (a pipeline turns other
orientations before and after); spacings are ``(z, y, x)`` in mm, volumes in mm3. Components are 26-connected. The
input is never changed. Sources: Radboud's FLARE22 system (small organs, closing, axial field, component share,
gallbladder), Fosun Aitrox's (single-label components), nnU-Net (largest component).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import cc3d
import numpy as np
from scipy import ndimage

from nnunet_flare.labels import Group, ids_of
from nnunet_flare.postprocessing.components import chosen_labels, clusters, find_components, slice_counts

Spacing = tuple[float, float, float]


def remove_small_organs(labels: np.ndarray, spacing_mm: Spacing, *, minimum_mm3: Mapping[Group, float]) -> np.ndarray:
    """Erase every organ, or region, whose whole volume is below its minimum; organs without one stay."""
    counts = slice_counts(labels).sum(axis=0)
    voxel_mm3 = float(np.prod(spacing_mm))
    result = labels.copy()
    for organ, least in minimum_mm3.items():
        ids = [label for label in ids_of(organ) if label < counts.size]
        if 0 < counts[ids].sum() * voxel_mm3 < least:
            result[np.isin(labels, ids)] = 0
    return result


def close_organs(
    labels: np.ndarray, spacing_mm: Spacing, *, organs: Sequence[int], size_voxels: tuple[int, int, int]
) -> np.ndarray:
    """Morphological closing of each organ in turn with a full box of ``size_voxels`` (z, y, x), all odd.

    Closed gaps take whatever lies there. The image is treated as surrounded by background, so an organ at the border
    is closed as one inside; voxels are only ever added to the organ.
    """
    del spacing_mm  # the papers give the box in voxels
    result = labels.copy()
    reach = [size // 2 for size in size_voxels]
    for organ in organs:
        for box in list(clusters(result, organ, apart=max(size_voxels))):
            region = result[box]
            padded = np.pad((region == organ).view(np.uint8), [(2 * r, 2 * r) for r in reach])
            grown = ndimage.maximum_filter(padded, size=size_voxels, mode="constant", cval=0)
            closed = ndimage.minimum_filter(grown, size=size_voxels, mode="constant", cval=0)
            inner = tuple(slice(2 * r, 2 * r + size) for r, size in zip(reach, region.shape, strict=True))
            region[closed[inner] != 0] = organ
    return result


def keep_axial_field(
    labels: np.ndarray, spacing_mm: Spacing, *, references: Sequence[int], gap_mm: float | None, below_mm: float
) -> np.ndarray:
    """Erase the slices above and below the reach of reference organs, as a whole.

    Going down from the highest slice with a reference organ (which is kept), the field ends at the first slice without
    one, unless the slice ``gap_mm`` further down still has one; ``below_mm`` under that end are kept. ``gap_mm`` None
    reaches down to the lowest slice with a reference organ. Without any reference organ nothing is erased.
    """
    counts = slice_counts(labels)
    present: np.ndarray = counts[:, [organ for organ in references if organ < counts.shape[1]]].sum(axis=1) > 0
    if not present.any():
        return labels.copy()
    top = int(np.flatnonzero(present)[-1])
    bottom = max(0, _field_end(present, top, spacing_mm[0], gap_mm) - int(below_mm / spacing_mm[0]))
    result = np.zeros_like(labels)
    result[bottom : top + 1] = labels[bottom : top + 1]
    return result


def _field_end(present: np.ndarray, top: int, slice_mm: float, gap_mm: float | None) -> int:
    if gap_mm is None:
        return int(np.flatnonzero(present)[0])
    gap = int(gap_mm / slice_mm)
    for place in range(top - 1, -1, -1):
        if not present[place] and not present[max(0, place - gap)]:
            return place
    return 0


def remove_small_components(
    labels: np.ndarray, spacing_mm: Spacing, *, organs: Sequence[Group], share: float, minimum_mm3: float = 0.0
) -> np.ndarray:
    """Erase components below ``share`` of their organ's, or region's, volume, or below ``minimum_mm3``."""
    erase = partial(remove_small_components, spacing_mm=spacing_mm, organs=[1], share=share, minimum_mm3=minimum_mm3)
    labels, organs = _regions_first(labels, organs, erase)
    found = find_components(labels)
    organ_count = np.bincount(found.label[1:], weights=found.count[1:], minlength=256)
    small = found.count < share * organ_count[found.label]
    small |= found.count * float(np.prod(spacing_mm)) < minimum_mm3
    return _without(labels, found.voxels_of(small & chosen_labels(found, organs)))


def _regions_first(
    labels: np.ndarray, organs: Sequence[Group], erase: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """A label map from whose regions was erased what ``erase`` takes from each (as label 1), and the other organs.

    The labels of a region (a tuple of ids) count as one; what goes becomes background, as stock nnU-Net does it.
    """
    for region in organs:
        if isinstance(region, tuple):
            whole = np.isin(labels, region)
            labels = np.where(whole & (erase(whole.view(np.uint8)) == 0), 0, labels).astype(labels.dtype)
    return labels, [organ for organ in organs if not isinstance(organ, tuple)]


def keep_largest(
    labels: np.ndarray, spacing_mm: Spacing, *, organs: Sequence[Group], minimum_mm3: float = 0.0
) -> np.ndarray:
    """Keep the largest component of each organ or region, and that only above ``minimum_mm3``; of equal ones, the first
    stays.
    """
    erase = partial(keep_largest, spacing_mm=spacing_mm, organs=[1], minimum_mm3=minimum_mm3)
    labels, organs = _regions_first(labels, organs, erase)
    found = find_components(labels)
    largest = np.zeros(found.count.size, dtype=bool)
    for organ in organs:
        own = np.flatnonzero(found.label == organ)
        if own.size:
            largest[own[np.argmax(found.count[own])]] = True
    largest &= found.count * float(np.prod(spacing_mm)) > minimum_mm3
    return _without(labels, found.voxels_of(chosen_labels(found, organs) & ~largest))


def keep_largest_pooled(
    labels: np.ndarray, spacing_mm: Spacing, *, organs: Sequence[int], minimum_mm3: float, at_most: int
) -> np.ndarray:
    """Single-label components (Fosun Aitrox): the components of all organs compete in one list.

    They are sorted by size; the first ``at_most`` are looked at, and kept until the first that is not above
    ``minimum_mm3``. An organ may keep several components or none.
    """
    found = find_components(labels)
    pooled = np.flatnonzero(chosen_labels(found, organs))
    ranked = pooled[np.argsort(-found.count[pooled], kind="stable")][:at_most]
    kept = np.zeros(found.count.size, dtype=bool)
    kept[ranked[found.count[ranked] * float(np.prod(spacing_mm)) > minimum_mm3]] = True
    return _without(labels, found.voxels_of(chosen_labels(found, organs) & ~kept))


def absorb_enclosed(
    labels: np.ndarray, spacing_mm: Spacing, *, organ: int, into: int, only_if_several: bool
) -> np.ndarray:
    """Turn components of ``organ`` into ``into`` where they lie inside it: Radboud's gallbladder inside the liver.

    A component lies inside when on some axial slice all of its outer contour (the 4-neighbours in the image) is
    ``into``. ``only_if_several`` leaves an organ of a single component alone.
    """
    del spacing_mm  # a matter of neighbours, not of size
    result = labels.copy()
    found = find_components((labels == organ).view(np.uint8))
    if found.count.size - 1 < (2 if only_if_several else 1):
        return result
    slices, rows, columns = labels.shape
    z, y, x = np.unravel_index(found.voxels, labels.shape)
    outline = found.component.astype(np.int64) * slices + z
    seen, outside = np.zeros((2, found.count.size * slices), dtype=bool)
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        inside_image = (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
        neighbour = labels[z[inside_image], (y + dy)[inside_image], (x + dx)[inside_image]]
        on_contour = neighbour != organ  # neighbours of the same label are of the same component
        seen[outline[inside_image][on_contour]] = True
        outside[outline[inside_image][on_contour & (neighbour != into)]] = True
    enclosed = (seen & ~outside).reshape(-1, slices).any(axis=1)
    result.ravel()[found.voxels_of(enclosed)] = into
    return result


def fill_holes(
    labels: np.ndarray, spacing_mm: Spacing, *, organs: Sequence[int], maximum_mm3: float | None = None
) -> np.ndarray:
    """Fill background that an organ encloses (no way out by faces), hole by hole up to ``maximum_mm3``.

    Other labels inside a hole stay; a cavity open to the image border is no hole.
    """
    voxel_mm3 = float(np.prod(spacing_mm))
    result = labels.copy()
    for organ in organs:
        for box in list(clusters(labels, organ, apart=1)):
            region = result[box]
            around = np.pad((labels[box] != organ).view(np.uint8), 1, constant_values=1)
            regions = cc3d.connected_components(around, connectivity=6)
            counts = np.bincount(regions.ravel())
            hole = np.arange(counts.size) > 0
            hole[regions[0, 0, 0]] = False
            if maximum_mm3 is not None:
                hole &= counts * voxel_mm3 <= maximum_mm3
            if hole.any():
                region[hole[regions[1:-1, 1:-1, 1:-1]] & (region == 0)] = organ
    return result


def _without(labels: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    result = labels.copy()
    result.ravel()[voxels] = 0
    return result
