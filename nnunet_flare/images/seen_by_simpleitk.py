"""What SimpleITK makes of a NIfTI header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnunet_flare.images.geometry import TO_OTHER_WORLD
from nnunet_flare.images.nifti_header import EXTENSION_BYTES, HEADER_BYTES, Header
from nnunet_flare.images.views import LAST_CODE, View, last_line, numbers
from nnunet_flare.names import readable

SCANNER = 1
"""The code of the scanner's own space: SimpleITK takes the sform where that is its space."""

MILLIMETRES = (0, 2)
"""Codes of the unit of space that mean mm; 0 is not told."""

FIRST_VOXEL = HEADER_BYTES + EXTENSION_BYTES
"""Where the voxels of a NIfTI-1 file without extensions start."""

SAME_GRID = 1e-5
"""Rounding of single precision, as a share of a step."""

SAME_TURN = 2e-3
"""Rounding of a direction that is told by a quaternion, near half a turn, where it comes of a root."""

SMALLEST_SLOPE = float(np.finfo(float).eps)
"""SimpleITK takes 1 for a slope that is nearer to 0, such as what was never set."""


def seen_by_simpleitk(path: Path, header: Header) -> View | str:
    """What SimpleITK makes of a NIfTI file, or why it cannot read it."""
    if header.version != "NIfTI-1":
        return f"it is {header.version}, and SimpleITK reads NIfTI-1"
    found = _plain_grid(header)
    grid = _by_simpleitk(path) if found is None else found
    if isinstance(grid, str):
        return grid
    slope, intercept = numbers(header, 112, "f4", 2)
    slope = slope if np.isfinite(slope) and abs(slope) >= SMALLEST_SLOPE else 1.0
    return View(grid.spacing_mm, grid.origin, grid.direction, slope, intercept if np.isfinite(intercept) else 0.0)


class _Placed(NamedTuple):
    """What SimpleITK takes from a header: spacing (z, y, x) in mm, origin and direction (x, y, z)."""

    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def _plain_grid(header: Header) -> _Placed | None:
    """What SimpleITK takes from a header in which it has nothing to choose and nothing to repair; None of any other.

    That is nearly every file, and SimpleITK takes 90 MB of memory, which a network needs at the same time.
    """
    is_plain = header.problem is None and header.voxel_type is not None and header.offset == FIRST_VOXEL
    zooms = numbers(header, 80, "f4", 3)
    if not is_plain or numbers(header, 40, "i2", 1) != (3,) or not all(np.isfinite(zooms)) or min(zooms) <= 0:
        return None
    qform, sform = numbers(header, 252, "i2", 2)
    if header.raw[123] & 7 not in MILLIMETRES or numbers(header, 68, "i2", 1) != (0,) or not 0 < sform <= LAST_CODE:
        return None
    rows = np.reshape(numbers(header, 280, "f4", 12), (3, 4))
    direction = _directions(rows[:, :3])
    lengths = np.linalg.norm(rows[:, :3], axis=0)
    if direction is None or not np.allclose(lengths, zooms, rtol=SAME_GRID, atol=0):
        return None
    if qform != 0:
        *quaternion, x, y, z = numbers(header, 256, "f4", 6)
        other = _directions(_turned(quaternion, numbers(header, 76, "f4", 1)[0], zooms))
        if other is None or not np.allclose(other, direction, rtol=0, atol=SAME_TURN):
            return None
        if not 0 < qform <= LAST_CODE or not np.allclose((x, y, z), rows[:, 3], rtol=SAME_GRID, atol=SAME_GRID):
            return None
        is_exact = np.isin(direction, (-1, 0, 1)).all() and np.abs(direction - other).max() == 0
        if sform != SCANNER and not (is_exact and (x, y, z) == tuple(rows[:, 3].tolist())):
            return None  # of two matrices that differ by rounding it chooses one
    origin = TO_OTHER_WORLD[:3, :3] @ rows[:, 3] + 0.0
    return _Placed((zooms[2], zooms[1], zooms[0]), tuple(origin.tolist()), tuple((direction.ravel() + 0.0).tolist()))


def _directions(steps: np.ndarray) -> np.ndarray | None:
    """Unit vectors (LPS) of steps along the axes (RAS, in columns); None where they are not at right angles."""
    steps = TO_OTHER_WORLD[:3, :3] @ steps
    with np.errstate(invalid="ignore", divide="ignore"):
        units = steps / np.sqrt(steps[0] * steps[0] + steps[1] * steps[1] + steps[2] * steps[2])
    return units if np.allclose(units.T @ units, np.eye(3), rtol=0, atol=SAME_GRID) else None


def _turned(quaternion: Sequence[float], handedness: float, zooms: Sequence[float]) -> np.ndarray:
    """The matrix of a qform: steps along the axes (RAS), in columns."""
    b, c, d = quaternion
    a = np.sqrt(max(0.0, 1 - (b * b + c * c + d * d)))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    return turn * np.array([zooms[0], zooms[1], zooms[2] * (-1 if handedness < 0 else 1)])


def _by_simpleitk(path: Path) -> _Placed | str:
    """What SimpleITK itself takes from a file, or why it cannot read it."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what it would say is said by doubt()
    try:
        with readable(path) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
    except RuntimeError as error:
        return last_line(error)
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    if reader.GetDimension() != 3:
        return f"it has {reader.GetDimension()} dimensions {reader.GetSize()}, expected 3"
    spacing, direction = np.array(reader.GetSpacing()), np.reshape(reader.GetDirection(), (3, 3)).copy()
    direction[:, spacing < 0] *= -1  # as SimpleITK does once it reads the voxels
    z, y, x = (float(step) for step in np.abs(spacing[::-1]))
    origin = tuple(float(n) + 0.0 for n in reader.GetOrigin())  # no negative zeros
    return _Placed((z, y, x), origin, tuple((direction.ravel() + 0.0).tolist()))
