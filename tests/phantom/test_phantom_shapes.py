"""The shapes' levels against closed forms, and their boxes against every point inside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.phantom.shapes import Ellipsoid, JoinedShapes, Shape, SmoothField, Tube

COORDINATE = st.floats(-60, 60)
RADIUS = st.floats(4, 30)
POINT = st.tuples(COORDINATE, COORDINATE, COORDINATE)
ANGLE = st.floats(-80, 80)
ELLIPSOIDS = st.builds(Ellipsoid, POINT, st.tuples(RADIUS, RADIUS, RADIUS), ANGLE, ANGLE)


@st.composite
def tubes(draw: st.DrawFn) -> Tube:
    points = draw(st.lists(POINT, min_size=2, max_size=5, unique_by=lambda p: tuple(round(c / 8) for c in p)))
    return Tube(points, draw(st.lists(RADIUS, min_size=len(points), max_size=len(points))))


SHAPES = st.one_of(ELLIPSOIDS, tubes(), st.lists(ELLIPSOIDS, min_size=1, max_size=3).map(JoinedShapes))


def grid(step: float, reach: float = 100) -> np.ndarray:
    axis = np.arange(-reach, reach + step, step, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))


@given(shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_box_holds_its_shape(shape: Shape) -> None:
    points = grid(10)
    inside = shape.level(points) < 1
    lower, upper = shape.box()
    for axis in range(3):
        found = points[axis][inside]
        assert (found >= lower[axis] - 1e-3).all()
        assert (found <= upper[axis] + 1e-3).all()


@given(shape=SHAPES, offset=POINT)
@settings(max_examples=20, deadline=None)
def test_moving_a_shape_moves_its_levels(shape: Shape, offset: tuple[float, float, float]) -> None:
    points = grid(25)
    moved = shape.varied(offset, 1.0)
    shifted = points + np.asarray(offset, np.float32)[:, None, None, None]
    assert moved.level(shifted) == pytest.approx(shape.level(points), rel=2e-2, abs=2e-2)


def test_level_of_an_upright_ellipsoid() -> None:
    points = grid(20)
    z, y, x = points
    expected = np.sqrt(((z - 5) / 10) ** 2 + ((y + 3) / 20) ** 2 + ((x - 1) / 30) ** 2)
    assert Ellipsoid((5, -3, 1), (10, 20, 30)).level(points) == pytest.approx(expected, rel=1e-5)


def test_tilt_leans_the_top_to_the_right_and_turn_the_back() -> None:
    """Positive angles lean towards the patient's right (negative x), as the names of the arguments promise."""
    tilted, turned = Ellipsoid((0, 0, 0), (30, 5, 5), tilt_deg=30), Ellipsoid((0, 0, 0), (5, 30, 5), turn_deg=30)
    up = np.array([20 * np.cos(np.pi / 6), 0, -20 * np.sin(np.pi / 6)], np.float32).reshape(3, 1, 1, 1)
    back = np.array([0, 20 * np.cos(np.pi / 6), -20 * np.sin(np.pi / 6)], np.float32).reshape(3, 1, 1, 1)
    assert tilted.level(up).item() == pytest.approx(20 / 30, rel=1e-4)
    assert turned.level(back).item() == pytest.approx(20 / 30, rel=1e-4)


def test_a_straight_tube_is_a_capsule_with_a_linear_radius() -> None:
    tube = Tube([(0, 0, 0), (40, 0, 0)], [10, 20])
    at = np.array([[20, 0, 7.5], [-5, 0, 0], [50, 0, 0], [40, 20, 0]], np.float32).T.reshape(3, 4, 1, 1)
    assert tube.level(at).ravel() == pytest.approx([0.5, 0.5, 0.5, 1.0], rel=1e-4)


def test_a_curved_tube_passes_through_its_points() -> None:
    points = [(0, 0, 0), (20, 10, 0), (30, -10, 15)]
    tube = Tube(points, [5, 6, 7])
    at = np.asarray(points, np.float32).T.reshape(3, 3, 1, 1)
    assert tube.level(at).max() < 1e-3


def test_a_point_that_is_repeated_counts_once() -> None:
    points = [(0.0, 0.0, 0.0), (0.0, 5.0, 3.0), (0.0, 10.0, 0.0)]
    once, twice = Tube(points, [2, 2, 2]), Tube([points[0], points[1], points[1], points[2]], [2, 2, 2, 2])
    grid = np.stack(np.meshgrid(np.zeros(1), np.linspace(-3, 13, 9), np.linspace(-3, 6, 7), indexing="ij"))
    np.testing.assert_allclose(twice.level(grid), once.level(grid))
    dot = Tube([points[0]] * 3, [2, 2, 2])
    assert np.isfinite(dot.level(grid)).all()


def test_a_smooth_field_peaks_at_its_amplitude_and_does_not_depend_on_the_grid() -> None:
    field = SmoothField(np.random.default_rng(1), (200, 200, 200), 50, 9.0)
    fine = np.linspace(-100, 100, 41)
    values = field(fine, fine, fine)
    assert np.abs(values).max() == pytest.approx(9, rel=0.12)
    assert field(fine[::4], fine[::4], fine[::4]) == pytest.approx(values[::4, ::4, ::4], abs=1e-4)
    assert np.abs(np.diff(values, axis=0)).max() < 9 * 5 / 50 * 2.5, "smooth on the scale of its knots"
