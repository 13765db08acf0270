"""Normalised surface Dice (NSD) of many structures at once, with the values of DeepMind's surface-distance.

Surface elements sit on the corners of the voxels. The 2x2x2 voxels around a corner give an 8-bit code, the code the
area of the surface that passes there (Nikolov et al., "Clinically applicable segmentation of head and neck anatomy",
2021). Three ideas keep this fast:

* corners whose eight labels are equal carry no surface of any structure; one pass over the label map finds the others
  for all structures together, so the cost grows with the surface, not with the volume or the box of stray voxels;
* only "within the tolerance or not" is asked, so no distance map is made: around a corner, the tolerance ball is cut
  into rows along x, and a row is answered by one binary search in the sorted positions of the other surface;
* the nearest rows are asked first, and most corners are answered by the first of them.

The distance of two corners is computed in the order of operations of ``scipy.ndimage.distance_transform_edt`` (x, y,
z of the file, float64), so that distances that tie with the tolerance fall on the same side.

Arrays are ``(Z, Y, X)``, spacings ``(z, y, x)`` in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

SLAB_CORNERS = 1 << 21
"""Corners compared at a time while searching; keeps the intermediate arrays in cache."""

# One surface element per minority corner group; components are the areas (in eighths of a voxel face) of its triangles'
# normals along (axis of the group, the two others) as marching cubes lays them through the middles of the edges.
_SINGLE = ((1, 1, 1),)
_EDGE = ((0, 2, 2), (0, 2, 2))
_BEND = ((4, 0, 0), (2, 2, 2), (1, 1, 1))
_FACE = ((4, 0, 0), (4, 0, 0))
_CLAW = ((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))


@dataclass(frozen=True, eq=False)
class Corners:
    """The corners of a label map where labels meet.

    ``position`` (n,) is the flat index in the ``shape`` = (Z+1, Y+1, X+1) grid of corners, ascending; ``labels`` (8, n)
    are the labels around each, in the order (z, y, x) of the lower, then the upper voxel; outside the map is 0.
    """

    position: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Surface:
    """One structure's surface: ascending flat corner ``position`` (n,) in ``shape``, and its ``code`` (n,) uint8."""

    position: np.ndarray
    code: np.ndarray
    shape: tuple[int, int, int]


def find_corners(labels: np.ndarray) -> Corners:
    """All corners of a uint8 label map (Z, Y, X) whose eight surrounding labels are not all equal."""
    padded = np.pad(labels, 1)
    shape = tuple(size - 1 for size in padded.shape)
    rows = max(1, SLAB_CORNERS // (shape[1] * shape[2]))
    found = []
    for start in range(0, shape[0], rows):
        slab = padded[start : min(start + rows, shape[0]) + 1]
        high, low = _over_neighbours(slab, np.maximum), _over_neighbours(slab, np.minimum)
        found.append(np.flatnonzero(high != low) + start * shape[1] * shape[2])
    position = np.concatenate(found)
    z, y, x = np.unravel_index(position, shape)
    base = (z * padded.shape[1] + y) * padded.shape[2] + x
    flat = padded.ravel()
    steps = [(dz * padded.shape[1] + dy) * padded.shape[2] + dx for dz, dy, dx in product((0, 1), repeat=3)]
    around = np.stack([flat[base + step] for step in steps])
    return Corners(position, around, (shape[0], shape[1], shape[2]))


def _over_neighbours(slab: np.ndarray, combine: np.ufunc) -> np.ndarray:
    along_z = combine(slab[1:], slab[:-1])
    along_y = combine(along_z[:, 1:], along_z[:, :-1])
    return combine(along_y[:, :, 1:], along_y[:, :, :-1])


def surface_of(
    corners: Corners, members: Sequence[int], *, labels: np.ndarray | None = None, slices: slice | None = None
) -> Surface:
    """The surface of the union of the labels ``members``, optionally of a range of slices only.

    With ``slices`` the structure is cut as if the volume ended there, which bares surface on both cuts; ``labels``, the
    label map of ``corners``, is needed then.
    """
    inside = np.isin(corners.labels, members) if len(members) > 1 else corners.labels == members[0]
    position = corners.position
    if slices is not None:
        if labels is None:
            raise ValueError("cutting a surface needs the label map")
        position, inside = _cut(position, inside, corners.shape, labels, members, slices)
    code = np.packbits(inside, axis=0)[0]
    on_surface = (code != 0) & (code != 255)
    return Surface(position[on_surface], code[on_surface], corners.shape)


def _cut(
    position: np.ndarray,
    inside: np.ndarray,
    shape: tuple[int, int, int],
    labels: np.ndarray,
    members: Sequence[int],
    slices: slice,
) -> tuple[np.ndarray, np.ndarray]:
    plane = shape[1] * shape[2]
    kept = slice(*np.searchsorted(position, (slices.start * plane, (slices.stop + 1) * plane)))
    position, inside = position[kept], inside[:, kept].copy()
    first, last = np.searchsorted(position, ((slices.start + 1) * plane, slices.stop * plane))
    inside[:4, :first] = False
    inside[4:, last:] = False
    extra_position, extra_inside = [], []
    for cut, own, beyond, upper in (
        (slices.start, slices.start, slices.start - 1, True),
        (slices.stop, slices.stop - 1, slices.stop, False),
    ):
        if not 0 <= beyond < labels.shape[0]:
            continue
        # Corners inside the structure on both sides of the cut: no labels meet there, the cut alone makes the surface.
        both = np.isin(labels[own], members) & np.isin(labels[beyond], members)
        uniform = _uniform_corners(labels[own], labels[beyond], both)
        extra_position.append(uniform + cut * plane)
        pattern = np.zeros((8, uniform.size), dtype=bool)
        pattern[4:] = upper
        pattern[:4] = not upper
        extra_inside.append(pattern)
    position = np.concatenate([position, *extra_position])
    inside = np.concatenate([inside, *extra_inside], axis=1)
    order = np.argsort(position, kind="stable")
    return position[order], inside[:, order]


def _uniform_corners(own: np.ndarray, beyond: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Flat in-plane positions of corners whose eight labels (four in each slice) are one and the same member label."""
    same = np.where(both & (own == beyond), own, 0)
    padded = np.pad(same, 1)[None]
    high = _over_neighbours(np.concatenate([padded, padded]), np.maximum)
    low = _over_neighbours(np.concatenate([padded, padded]), np.minimum)
    return np.flatnonzero((high == low) & (high > 0))


def surface_dice(
    reference: Surface, prediction: Surface, *, spacing_mm: tuple[float, float, float], tolerance_mm: float
) -> float:
    """Share (0 to 1) of both surfaces' area within ``tolerance_mm`` of the other surface; NaN without any surface."""
    areas = corner_areas_mm2(spacing_mm)
    total = overlap = 0.0
    for one, other in ((reference, prediction), (prediction, reference)):
        area = areas[one.code]
        total += float(area.sum())
        overlap += float(area[within(one, other, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)].sum())
    return overlap / total if total > 0 else float("nan")


def within(one: Surface, other: Surface, *, spacing_mm: tuple[float, float, float], tolerance_mm: float) -> np.ndarray:
    """Which corners (n,) of ``one`` have a corner of ``other`` at most ``tolerance_mm`` away."""
    hit = np.zeros(one.position.size, dtype=bool)
    if not one.position.size or not other.position.size:
        return hit
    rows = ball_rows(spacing_mm, tolerance_mm)
    reach = tuple(max(abs(row[axis]) for row in rows) for axis in range(3))
    # Positions in a grid with margins, so that no row of the ball runs over into a neighbouring line of the volume.
    queries, targets = (_widen(surface.position, one.shape, reach) for surface in (one, other))
    lines, columns = one.shape[1] + 2 * reach[1], one.shape[2] + 2 * reach[2]
    targets = np.append(targets, np.iinfo(np.int64).max)
    open_places = np.arange(queries.size)
    for dz, dy, radius in rows:
        start = queries[open_places] + ((dz * lines + dy) * columns - radius)
        found = targets[np.searchsorted(targets, start)] <= start + 2 * radius
        hit[open_places[found]] = True
        open_places = open_places[~found]
        if not open_places.size:
            break
    return hit


def _widen(position: np.ndarray, shape: tuple[int, int, int], reach: tuple[int, ...]) -> np.ndarray:
    z, y, x = np.unravel_index(position, shape)
    lines, columns = shape[1] + 2 * reach[1], shape[2] + 2 * reach[2]
    return ((z + reach[0]) * lines + y + reach[1]) * columns + x + reach[2]


@lru_cache(maxsize=256)
def ball_rows(spacing_mm: tuple[float, float, float], tolerance_mm: float) -> tuple[tuple[int, int, int], ...]:
    """The ball of radius ``tolerance_mm`` as rows along x, nearest first: (dz, dy, radius in x), in voxels."""
    deep, wide, long = (int(tolerance_mm / spacing) + 1 for spacing in spacing_mm)
    along_x = (np.arange(long + 1) * spacing_mm[2]) ** 2
    rows = []
    for dz, dy in product(range(-deep, deep + 1), range(-wide, wide + 1)):
        squared = along_x + (dy * spacing_mm[1]) ** 2 + (dz * spacing_mm[0]) ** 2
        radius = int(np.count_nonzero(np.sqrt(squared) <= tolerance_mm)) - 1
        if radius >= 0:
            rows.append((squared[0], dz, dy, radius))
    return tuple(row[1:] for row in sorted(rows))


@lru_cache(maxsize=256)
def corner_areas_mm2(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Area of the surface at a corner for each of the 256 codes (256,), for a spacing (z, y, x) in mm."""
    faces = np.array([spacing_mm[1] * spacing_mm[2], spacing_mm[0] * spacing_mm[2], spacing_mm[0] * spacing_mm[1]])
    areas = np.array([sum(np.linalg.norm(np.array(n) / 8 * faces) for n in _normals(code)) for code in range(256)])
    areas.setflags(write=False)
    return areas


def _normals(code: int) -> list[tuple[int, int, int]]:
    """Triangle normals (z, y, x), in eighths and without sign, of the surface that separates a code's corners."""
    points = list(product((0, 1), repeat=3))
    ones = {point for bit, point in enumerate(points) if code >> (7 - bit) & 1}
    few = ones if len(ones) <= 4 else set(points) - ones
    normals = []
    while few:
        group = _grow(few)
        few = few - group
        normals += _group_normals(group)
    return normals


def _grow(points: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    group = {min(points)}
    while more := {p for p in points - group if any(_step(p, q) is not None for q in group)}:
        group |= more
    return group


def _step(p: tuple[int, ...], q: tuple[int, ...]) -> int | None:
    """The axis along which two corners of the cube are neighbours, or None."""
    axes = [axis for axis in range(3) if p[axis] != q[axis]]
    return axes[0] if len(axes) == 1 else None


def _group_normals(group: set[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    flat = [axis for axis in range(3) if len({point[axis] for point in group}) == 1]
    if len(group) == 1:
        return _along(0, _SINGLE)
    if len(group) == 2:
        return _along(next(axis for axis in range(3) if axis not in flat), _EDGE)
    if len(group) == 3:
        return _along(flat[0], _BEND)
    if flat:
        return _along(flat[0], _FACE)
    degrees = {p: [axis for q in group if (axis := _step(p, q)) is not None] for p in group}
    if max(len(axes) for axes in degrees.values()) == 3:
        return _along(0, _CLAW)
    # A path of four corners that bends twice: its two end pieces, a corner of three and one cap between them.
    ends = [axes[0] for axes in degrees.values() if len(axes) == 1]
    return [(3, 3, 3), (1, 1, 1), *_along(ends[0], _EDGE[:1]), *_along(ends[1], _EDGE[:1])]


def _along(axis: int, normals: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Normals given as (own axis, others) turned to axis order (z, y, x); the two others are always equal."""
    return [(own, other, other) if axis == 0 else _placed(axis, own, other) for own, other, _ in normals]


def _placed(axis: int, own: int, other: int) -> tuple[int, int, int]:
    return (other, own, other) if axis == 1 else (other, other, own)
