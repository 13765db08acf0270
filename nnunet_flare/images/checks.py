"""What makes a scan unusable (:class:`CaseError`), and what is odd about one that can be predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images.hounsfield import SMALLEST_SPAN, not_hounsfield
from nnunet_flare.images.volume import Volume

CT_RANGE_HU = (-2048.0, 8192.0)
"""Values outside are no CT numbers (air is -1000, metal saturates near 3071 or, on extended scales, 8191)."""

SPACING_RANGE_MM = (0.2, 15.0)
"""Spacings outside are odd for an abdominal CT."""

LARGEST_EXTENT_MM = 2500.0
"""No body is longer; a scan that is has a wrong spacing in its header."""


def check_grid(volume: Volume, case: str, path: Path | str = "image") -> None:
    """Raise :class:`CaseError` for a grid that no model can predict."""
    if volume.array.ndim != 3:
        raise CaseError(case, f"{path}: has {volume.array.ndim} dimensions, expected 3 (z, y, x)")
    if not all(np.isfinite(s) and s > 0 for s in volume.spacing_mm):
        raise CaseError(case, f"{path}: spacing (z, y, x) {volume.spacing_mm} mm, expected three numbers above 0")
    if not np.isfinite([*volume.origin, *volume.direction]).all():
        raise CaseError(
            case,
            f"{path}: origin {volume.origin} and direction {volume.direction} hold NaN or infinity",
        )


def check_values(
    volume: Volume, case: str, path: Path | str = "image", *, flat: bool = False, part: bool = False
) -> None:
    """Raise :class:`CaseError` for NaN or infinite images, for a scan longer than any body, unless ``flat`` for one
    slice, and for constant images that are no ``part`` of a scan.
    """
    array = volume.array
    extent = tuple(round(n * mm) for n, mm in zip(array.shape, volume.spacing_mm, strict=True))
    if max(extent) > LARGEST_EXTENT_MM:
        spacing = tuple(round(mm, 3) for mm in volume.spacing_mm)
        raise CaseError(
            case,
            f"{path}: extends over (z, y, x) {extent} mm at a spacing of {spacing} mm, expected at most "
            f"{LARGEST_EXTENT_MM:g} mm; the spacing is wrong",
        )
    if min(array.shape) < (1 if flat else 2):
        raise CaseError(
            case, f"{path}: shape (z, y, x) {array.shape} has an axis of fewer than 2 voxels, expected a 3-D scan"
        )
    if array.dtype.kind not in "iuf":
        raise CaseError(case, f"{path}: voxels are of type {array.dtype}, expected real numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise CaseError(case, f"{path}: {bad} of {array.size} voxels are NaN or infinite; expected finite CT numbers")
    if not part and array.size and array.min() == array.max():
        raise CaseError(case, f"{path}: all voxels are {array.flat[0]}; the scan is empty")


def oddities(volume: Volume, *, is_ct: bool = True) -> list[str]:
    """What is odd about a readable scan, in words; such a scan is predicted with a warning.

    The values of other modalities have no scale that they could leave.
    """
    found = []
    low, high = float(volume.array.min()), float(volume.array.max())
    if not is_ct:
        pass
    elif low < CT_RANGE_HU[0] or high > CT_RANGE_HU[1]:
        found.append(f"values from {low:g} to {high:g}, outside CT's {CT_RANGE_HU[0]:g} to {CT_RANGE_HU[1]:g} HU")
    elif low >= 0 and SMALLEST_SPAN <= high <= 255:
        found.append(f"values from {low:g} to {high:g}, which look like an 8-bit picture, not like CT numbers")
    elif (problem := not_hounsfield(volume.array)) is not None:
        found.append(problem)
    if min(volume.spacing_mm) < SPACING_RANGE_MM[0] or max(volume.spacing_mm) > SPACING_RANGE_MM[1]:
        spacing = tuple(round(s, 3) for s in volume.spacing_mm)
        found.append(f"spacing (z, y, x) {spacing} mm, outside {SPACING_RANGE_MM[0]:g} to {SPACING_RANGE_MM[1]:g} mm")
    return found
