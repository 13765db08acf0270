"""What nibabel makes of a NIfTI header."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnunet_flare.images.geometry import TO_OTHER_WORLD
from nnunet_flare.images.nifti import GZIP_MAGIC
from nnunet_flare.images.nifti_header import Header
from nnunet_flare.images.views import LAST_CODE, View, last_line, numbers

_quiet = logging.getLogger(f"{__name__}.nibabel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


def seen_by_nibabel(path: Path, header: Header, *, reorient: bool = False) -> View | str:
    """What nibabel makes of a NIfTI file, or why it cannot read it. ``reorient``: the spacing after turning to RAS."""
    refusal = None
    if path.name.lower().endswith(".gz") and not _starts_with(path, GZIP_MAGIC):
        refusal = "its name ends in .gz, but it is not compressed"
    grid = None if reorient else _as_it_stands(header)
    if grid is None:
        found = _by_nibabel(header, reorient=reorient)
        if isinstance(found, str):
            return found
        grid, why = found
        refusal = why or refusal
    affine, zooms = grid.affine, grid.zooms
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        return f"its matrix from voxels to space is {affine[:3].round(4).tolist()}, which has no inverse"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    direction = TO_OTHER_WORLD[:3, :3] @ (affine[:3, :3] / lengths)
    return View(
        (zooms[2], zooms[1], zooms[0]),
        tuple((TO_OTHER_WORLD[:3, :3] @ affine[:3, 3] + 0.0).tolist()),
        tuple((direction.ravel() + 0.0).tolist()),
        1.0 if grid.slope is None else float(grid.slope),
        0.0 if grid.intercept is None else float(grid.intercept),
        tuple(affine.ravel().tolist()),
        refusal,
    )


class _Grid(NamedTuple):
    """What nibabel takes from a header: matrix (4, 4), steps (x, y, z) in mm, slope and intercept or None."""

    affine: np.ndarray
    zooms: list[float]
    slope: float | None
    intercept: float | None


def _as_it_stands(header: Header) -> _Grid | None:
    """What nibabel takes from a header in which it has nothing to choose and nothing to repair; None of any other.

    That is nearly every file, and importing nibabel takes longer than reading a label map.
    """
    if header.version != "NIfTI-1" or header.problem is not None or numbers(header, 40, "i2", 1) != (3,):
        return None
    zooms = numbers(header, 80, "f4", 3)
    qform, sform = numbers(header, 252, "i2", 2)
    if not all(np.isfinite(zooms)) or min(zooms) <= 0 or not (0 <= qform <= LAST_CODE and 0 < sform <= LAST_CODE):
        return None
    affine = np.vstack([np.reshape(numbers(header, 280, "f4", 12), (3, 4)), [0.0, 0.0, 0.0, 1.0]])
    slope, intercept = numbers(header, 112, "f4", 2)
    is_scaled = slope != 0 and np.isfinite(slope)
    return _Grid(affine, list(zooms), slope if is_scaled else None, intercept if is_scaled else None)


def _by_nibabel(header: Header, *, reorient: bool) -> tuple[_Grid, str | None] | str:
    """What nibabel itself takes from a header, and why stock's reader refuses it; or why nibabel cannot read it."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.imageglobals import error_level
    from nibabel.orientations import io_orientation
    from nibabel.spatialimages import HeaderDataError

    refusal = None
    kind = nibabel.Nifti1Image if header.version == "NIfTI-1" else nibabel.Nifti2Image
    try:
        fields = kind.header_class.from_fileobj(BytesIO(header.raw), check=False)
        fields.check_fix(logger=_quiet, error_level=error_level)  # repairs what nibabel repairs, without its remarks
        shape = tuple(int(n) for n in fields.get_data_shape())
        if len(shape) != 3:
            refusal = f"it has {len(shape)} dimensions {shape}, expected 3"
            if len(header.shape) != 3:
                return refusal
            shape = header.shape[::-1]
            fields.set_data_shape(shape)
        affine = np.asarray(fields.get_best_affine(), float)
        image = kind(np.broadcast_to(np.zeros((), np.uint8), shape), affine, fields)
        slope, intercept = fields.get_slope_inter()
        zooms = [float(n) for n in image.header.get_zooms()]
        if reorient and np.isfinite(affine).all() and abs(np.linalg.det(affine)) >= 1e-12:
            orientation = io_orientation(affine)
            turned = [float(n) for n in image.as_reoriented(orientation).header.get_zooms()]
            zooms = [turned[int(axis)] for axis in orientation[:, 0]]
    except (HeaderDataError, ImageFileError, ValueError) as error:
        return last_line(error)
    return _Grid(affine, zooms, slope, intercept), refusal


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
