"""Ellipsoids and tubes as implicit functions of a patient's coordinates, and the smooth map from scan to patient.

Coordinates are millimetres in nnU-Net's axis order (z, y, x): z towards the head, y towards the back, x towards the
patient's left (LPS). A shape's *level* is below 1 inside and grows outwards in units of its radius.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.interpolate import BSpline, CubicSpline

Point = tuple[float, float, float]


class Shape(Protocol):
    """What the renderer needs of a shape: its box, its level at given points, and a copy that differs a little."""

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (z, y, x) in mm."""
        ...

    def level(self, points: np.ndarray) -> np.ndarray:
        """Level (Z, Y, X) at ``points`` (3, Z, Y, X)."""
        ...

    def varied(self, offset: Point, radius: float) -> Shape:
        """The shape moved by ``offset`` mm with its radii times ``radius``."""
        ...


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, turned about the y axis (in the coronal plane) and then about z (in the axial plane)."""

    centre: Point
    radii: Point
    tilt_deg: float = 0.0
    turn_deg: float = 0.0

    def _axes(self) -> np.ndarray:
        tilt, turn = np.deg2rad(self.tilt_deg), np.deg2rad(self.turn_deg)
        coronal = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
        axial = np.array([[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]])
        return axial @ coronal

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        reach = np.sqrt(((self._axes() * np.asarray(self.radii)) ** 2).sum(1))
        return np.asarray(self.centre) - reach, np.asarray(self.centre) + reach

    def level(self, points: np.ndarray) -> np.ndarray:
        total = np.zeros(points.shape[1:], np.float32)
        offsets = [points[axis] - np.float32(self.centre[axis]) for axis in range(3)]
        for axis, radius in zip(self._axes().T, self.radii, strict=True):
            along = sum(np.float32(axis[i]) * offsets[i] for i in range(3)) * np.float32(1 / radius)
            total += along**2
        return np.sqrt(total)

    def varied(self, offset: Point, radius: float) -> Ellipsoid:
        z, y, x = (r * radius for r in self.radii)
        return replace(self, centre=_moved(self.centre, offset), radii=(z, y, x))


@dataclass(frozen=True)
class Tube:
    """A tube along a smooth curve through ``points``, with a radius at each of them; a repeated point counts once."""

    points: Sequence[Point]
    radii: Sequence[float]
    steps: int = 3

    def _polyline(self) -> tuple[np.ndarray, np.ndarray]:
        knots = np.asarray(self.points, float)
        radii = np.asarray(self.radii, float)
        moves = np.append(True, np.any(np.diff(knots, axis=0) != 0, axis=1))
        knots, radii = knots[moves], radii[moves]
        if len(knots) <= 2:
            return knots[[0, -1]], radii[[0, -1]]
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
        fine = np.interp(np.linspace(0, len(knots) - 1, (len(knots) - 1) * self.steps + 1), range(len(knots)), length)
        return CubicSpline(length, knots)(fine), np.interp(fine, length, radii)

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        line, radii = self._polyline()
        return (line - radii[:, None]).min(0), (line + radii[:, None]).max(0)

    def level(self, points: np.ndarray) -> np.ndarray:
        line, radii = (a.astype(np.float32) for a in self._polyline())
        best = np.full(points.shape[1:], np.inf, np.float32)
        for start, end, radius, next_radius in zip(line[:-1], line[1:], radii[:-1], radii[1:], strict=True):
            step = end - start
            offset = [points[axis] - start[axis] for axis in range(3)]
            along = sum(offset[axis] * step[axis] for axis in range(3)) * (1 / max(np.dot(step, step), 1e-12))
            np.clip(along, 0, 1, out=along)
            squared = sum((offset[axis] - along * step[axis]) ** 2 for axis in range(3))
            np.minimum(best, np.sqrt(squared) / (radius + along * (next_radius - radius)), out=best)
        return best

    def varied(self, offset: Point, radius: float) -> Tube:
        points = [_moved(point, offset) for point in self.points]
        return replace(self, points=points, radii=[r * radius for r in self.radii])


@dataclass(frozen=True)
class JoinedShapes:
    """Several shapes as one."""

    parts: Sequence[Shape]

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = zip(*(part.box() for part in self.parts), strict=True)
        return np.min(lower, axis=0), np.max(upper, axis=0)

    def level(self, points: np.ndarray) -> np.ndarray:
        best = self.parts[0].level(points)
        for part in self.parts[1:]:
            np.minimum(best, part.level(points), out=best)
        return best

    def varied(self, offset: Point, radius: float) -> JoinedShapes:
        return JoinedShapes([part.varied(offset, radius) for part in self.parts])


def _moved(point: Point, offset: Point) -> Point:
    return (point[0] + offset[0], point[1] + offset[1], point[2] + offset[2])


class SmoothField:
    """A smooth random function of scan coordinates: a tensor product of cubic B-splines, peak value ``amplitude``.

    It depends on the coefficients alone and not on the grid, so the same patient comes out on every grid.
    """

    def __init__(self, rng: np.random.Generator, extent_mm: Point, knot_mm: float, amplitude: float) -> None:
        self._extent = np.asarray(extent_mm, float) / 2
        self._cells = np.maximum(1, np.ceil(2 * self._extent / knot_mm)).astype(int)
        coefficients = rng.uniform(-1, 1, tuple(self._cells + 3)).astype(np.float32)
        lattice = [np.linspace(-e, e, 2 * c + 1) for e, c in zip(self._extent, self._cells, strict=True)]
        peak = np.abs(self._evaluate(coefficients, *lattice)).max()
        self._coefficients = coefficients * np.float32(amplitude / peak)

    def _basis(self, axis: int, values: np.ndarray) -> np.ndarray:
        cells, extent = self._cells[axis], self._extent[axis]
        position = np.clip((values + extent) / (2 * extent) * cells, 0, cells * (1 - 1e-9))
        return BSpline.design_matrix(position, np.arange(-3, cells + 4, dtype=float), 3).toarray().astype(np.float32)

    def _evaluate(self, coefficients: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        result = np.tensordot(self._basis(2, x), coefficients, (1, 2))
        result = np.tensordot(self._basis(1, y), result, (1, 2))
        return np.tensordot(self._basis(0, z), result, (1, 2))

    def __call__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Values (Z, Y, X) float32 at the grid spanned by the 1-D coordinates in mm; held constant outside."""
        return self._evaluate(self._coefficients, z, y, x)
