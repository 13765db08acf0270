"""nnU-Net's readers of volumes: which one a dataset or model names, and what each makes of a NIfTI header.

Stock nnU-Net trains on what the named reader reads, so prediction and every check read as it does. SimpleITK and
nibabel take some headers differently (two matrices that disagree, a slope of 0, a unit other than mm); what they
disagree about is said by :func:`doubt`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_flare.geometry import TO_OTHER_WORLD, describe, is_same_grid, matrix_of
from nnunet_flare.names import readable
from nnunet_flare.nifti import GZIP_MAGIC, load_header
from nnunet_flare.nifti_header import EXTENSION_BYTES, HEADER_BYTES, Header

SITK, SITK_RAS, NIBABEL, NIBABEL_RAS = "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"

READERS = (SITK, NIBABEL, SITK_RAS, NIBABEL_RAS)
"""Readers of volumes; the reorienting ones bring every scan to RAS first."""

_quiet = logging.getLogger(f"{__name__}.nibabel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False

CANNOT = "cannot"

LAST_CODE = 4
"""The last code of a space that every version of nibabel knows."""

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

SAME_SPACING = 1e-3
"""Two libraries read one spacing when they differ by no larger share."""


@dataclass(frozen=True)
class View:
    """What a library makes of a header: spacing (z, y, x) in mm, origin and direction (LPS), slope and intercept.

    ``affine`` is nibabel's matrix (16 numbers, row-major, RAS), which may be sheared; None for SimpleITK. ``refusal``
    says why stock nnU-Net's reader refuses the file, although what it holds is clear.
    """

    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    slope: float = 1.0
    intercept: float = 0.0
    affine: tuple[float, ...] | None = None
    refusal: str | None = None

    @property
    def matrix(self) -> np.ndarray:
        """From voxel indices to LPS, see :mod:`nnunet_flare.geometry`."""
        if self.affine is not None:
            return TO_OTHER_WORLD @ np.reshape(self.affine, (4, 4))
        return matrix_of(self.spacing_mm, self.origin, self.direction)


def library(reader: str) -> str:
    """The library by which a reader reads NIfTI."""
    return "nibabel" if reader.startswith("Nibabel") else "SimpleITK"


def reader_of_plans(plans: Mapping[str, Any]) -> str:
    """The reader that a model's plans name; SimpleITK's where they name none that reads volumes."""
    reader = plans.get("image_reader_writer")
    return reader if reader in READERS else SITK


def reader_of_dataset(document: Mapping[str, Any], example: Path | None = None) -> str:
    """The reader that stock nnU-Net takes for a dataset: the one that dataset.json names, else by its file ending.

    Args:
        document: dataset.json.
        example: one of its images; a reader that cannot read it is passed over, as stock does.
    """
    named = document.get("overwrite_image_reader_writer")
    if named in READERS:
        return str(named)
    ending = str(document.get("file_ending", "")).lower()
    if ending == ".nii":
        return NIBABEL
    header = load_header(example) if ending == ".nii.gz" and example is not None else None
    if example is not None and header is not None and isinstance(seen_by_simpleitk(example, header), str):
        return NIBABEL
    return SITK


def seen_by(reader: str, path: Path, header: Header) -> View | str:
    """What a reader makes of a NIfTI file, or in words why it cannot read it."""
    if library(reader) == "nibabel":
        return seen_by_nibabel(path, header, reorient=reader == NIBABEL_RAS)
    return seen_by_simpleitk(path, header)


def seen_by_simpleitk(path: Path, header: Header) -> View | str:
    """What SimpleITK makes of a NIfTI file, or why it cannot read it."""
    if header.version != "NIfTI-1":
        return f"it is {header.version}, and SimpleITK reads NIfTI-1"
    found = _plain_grid(header)
    grid = _by_simpleitk(path) if found is None else found
    if isinstance(grid, str):
        return grid
    slope, intercept = _numbers(header, 112, "f4", 2)
    slope, intercept = (slope if np.isfinite(slope) else 0.0), (intercept if np.isfinite(intercept) else 0.0)
    return View(grid.spacing_mm, grid.origin, grid.direction, slope or 1.0, intercept)


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
    zooms = _numbers(header, 80, "f4", 3)
    if not is_plain or _numbers(header, 40, "i2", 1) != (3,) or not all(np.isfinite(zooms)) or min(zooms) <= 0:
        return None
    qform, sform = _numbers(header, 252, "i2", 2)
    if header.raw[123] & 7 not in MILLIMETRES or _numbers(header, 68, "i2", 1) != (0,) or not 0 < sform <= LAST_CODE:
        return None
    rows = np.reshape(_numbers(header, 280, "f4", 12), (3, 4))
    direction = _directions(rows[:, :3])
    lengths = np.linalg.norm(rows[:, :3], axis=0)
    if direction is None or not np.allclose(lengths, zooms, rtol=SAME_GRID, atol=0):
        return None
    if qform != 0:
        *quaternion, x, y, z = _numbers(header, 256, "f4", 6)
        other = _directions(_turned(quaternion, _numbers(header, 76, "f4", 1)[0], zooms))
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
    if header.version != "NIfTI-1" or header.problem is not None or _numbers(header, 40, "i2", 1) != (3,):
        return None
    zooms = _numbers(header, 80, "f4", 3)
    qform, sform = _numbers(header, 252, "i2", 2)
    if not all(np.isfinite(zooms)) or min(zooms) <= 0 or not (0 <= qform <= LAST_CODE and 0 < sform <= LAST_CODE):
        return None
    affine = np.vstack([np.reshape(_numbers(header, 280, "f4", 12), (3, 4)), [0.0, 0.0, 0.0, 1.0]])
    slope, intercept = _numbers(header, 112, "f4", 2)
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


def doubt(path: Path, header: Header, reader: str, own: View) -> str | None:
    """Why a file is not to be trained on, in words: the other library takes it differently, or stock refuses it."""
    other_reader = SITK if library(reader) == "nibabel" else NIBABEL
    here, there = library(reader), library(other_reader)
    other = seen_by(other_reader, path, header)
    found = [] if own.refusal is None else [f"nnU-Net's {reader} cannot read the file: {own.refusal}"]
    if isinstance(other, str):
        return "; ".join([*found, f"{here} reads the file and {there} {CANNOT} ({other})"])
    if not np.allclose(own.spacing_mm, other.spacing_mm, rtol=SAME_SPACING, atol=0):
        found.append(
            f"{here} reads the spacing (z, y, x) {_rounded(own.spacing_mm)} mm, {there} {_rounded(other.spacing_mm)} mm"
        )
    if not is_same_grid(own.matrix, other.matrix, header.shape):
        found.append(f"{here} reads the axes (x, y, z) as {_place(own)}, {there} as {_place(other)}")
    if (own.slope, own.intercept) != (other.slope, other.intercept):
        found.append(
            f"{here} reads values as {own.slope:g} * stored + {own.intercept:g}, {there} as {other.slope:g} * stored "
            f"+ {other.intercept:g}"
        )
    return "; ".join(found) or None


def doubtful(reader: str) -> str:
    """What is to be done about a file that the two libraries read differently."""
    return f"{reader} takes {library(reader)}'s reading; save the file again with one matrix, in mm, with a slope of 1"


def is_doubt_of_one(said: str | None) -> bool:
    """Whether a doubt is no more than that the other library cannot read the file."""
    return said is not None and f" {CANNOT} (" in said


def last_line(error: Exception) -> str:
    """What a library's error says, without where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Reason:")]  # errno of some earlier call
    return lines[-1] if lines else type(error).__name__


def _place(view: View) -> str:
    return f"{describe(view.direction)} from {_rounded(view.origin)}"


def _rounded(numbers: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(number), 3) for number in numbers)


def _numbers(header: Header, offset: int, kind: str, count: int) -> tuple[float, ...]:
    order = "<" if int.from_bytes(header.raw[:4], "little") == len(header.raw) else ">"
    return tuple(np.frombuffer(header.raw, order + kind, count, offset).astype(float).tolist())


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
