"""Reading a DICOM series: one folder, one scan.

The slices are sorted by their position along the slice normal, never by name or number. What cannot be one evenly
spaced, upright scan is refused: several series, orientations or pixel spacings, missing, doubled, shifted or short
slices, and files that may be slices and cannot be read. Every slice has its own rescale slope and intercept; the
scan's voxel type holds the values of all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.dicom.files import dicom_files, doubtful_files
from nnunet_flare.dicom.slices import IDENTITY, IMAGE_IO, Slice, read_header, voxel_types
from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, from_sitk, read_volume
from nnunet_flare.images.geometry import is_same_grid, matrix_of
from nnunet_flare.images.readers import SITK
from nnunet_flare.images.views import last_line
from nnunet_flare.names import all_readable

POSITION_TOLERANCE = 0.1
"""A slice may lie this share of the slice distance off its place on a straight line."""

ROUNDING_MM = 0.1
"""Positions are rounded to this at the coarsest; thin slices may lie that far off their place."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference of direction cosines within one series."""

SHIFT_TOLERANCE = 0.02
"""A slice may lie beside the line through the first along the normal by this share of their distance."""


def read_scan(path: Path, case: str, *, reader: str = SITK) -> Volume:
    """A scan as it comes: one image file (NIfTI as this reader of nnU-Net reads it), or a folder of one DICOM series.

    Raises:
        CaseError: as :func:`read_series` and :func:`nnunet_flare.images.read_volume`.
    """
    return read_series(path, case) if path.is_dir() else read_volume(path, case, reader=reader)


def read_series(folder: Path, case: str) -> Volume:
    """The scan of a folder that holds one DICOM series.

    Raises:
        CaseError: for several series or orientations, missing, doubled or shifted slices, or unreadable files.
    """
    import SimpleITK as sitk

    slices = _ordered_slices(folder, case)
    try:
        with all_readable([one.path for one in slices]) as names:
            image = sitk.ReadImage(names, _type_for_all(slices), IMAGE_IO)
    except RuntimeError as error:
        raise CaseError(case, f"{folder}: cannot be read ({last_line(error)})") from error
    volume = from_sitk(image, case, folder)
    _check_place(volume, slices, folder, case)
    return volume


def _check_place(volume: Volume, slices: list[Slice], folder: Path, case: str) -> None:
    """Refuse a series whose place the reader does not take from the slices, as of some kinds of picture."""
    first, last = slices[0], slices[-1]
    between_rows, between_columns = first.spacing_mm
    step = (last.along_normal - first.along_normal) / (len(slices) - 1)
    along = np.column_stack([first.orientation[:3], first.orientation[3:], first.normal])
    direction = (along / np.linalg.norm(along, axis=0)).ravel()
    told = matrix_of((step, between_rows, between_columns), first.position, direction)
    if not is_same_grid(told, volume.matrix, volume.array.shape):
        raise CaseError(
            case,
            f"{folder}: slices start at {first.position} with pixels of {first.spacing_mm} mm, {step:.2f} mm apart, "
            f"but the reader takes {volume.origin}, {volume.spacing_mm[1:]} mm and {volume.spacing_mm[0]:.2f} mm, as "
            "of another kind of picture (SOP class); convert the scan to NIfTI with another program",
        )


def ordered_files(folder: Path, case: str) -> list[Path]:
    """The files of a folder that holds one DICOM series, by position: file ``z`` is slice ``z`` of :func:`read_series`.

    Raises:
        CaseError: as :func:`read_series`, for what the headers tell.
    """
    return [one.path for one in _ordered_slices(folder, case)]


def _ordered_slices(folder: Path, case: str) -> list[Slice]:
    files = dicom_files(folder)
    doubtful = doubtful_files(folder, files)
    if doubtful:
        more = f" and {len(doubtful) - 5} more" if len(doubtful) > 5 else ""
        raise CaseError(
            case,
            f"{folder}: {', '.join(doubtful[:5])}{more}; may be slices, so the scan may be incomplete. Copy them "
            "again, unpack them, or move files that are not slices out of the folder",
        )
    slices = [read_header(path, case) for path in files]
    if not slices:
        raise CaseError(case, f"{folder}: no DICOM file")
    series = sorted({one.series for one in slices})
    if len(series) > 1:
        counts = [sum(one.series == uid for one in slices) for uid in series]
        raise CaseError(
            case, f"{folder}: holds {len(series)} series of {counts} files; expected one; move each to its own folder"
        )
    bare = [one.path.name for one in slices if one.rescale is None]
    if bare and any(one.rescale not in (None, IDENTITY) for one in slices):
        raise CaseError(
            case,
            f"{folder}: {len(bare)} of {len(slices)} slices lack the rescale intercept that the others have "
            f"({', '.join(bare[:5])}), so their values have another scale. Export the series again",
        )
    return _in_order(slices, folder, case)


def _type_for_all(slices: list[Slice]) -> int:
    """SimpleITK's number of the smallest voxel type that holds the values of every slice.

    The reader alone would take the first slice's, and wrap or cut the values of the others.
    """
    common = np.result_type(*(one.voxels for one in slices))
    return next(number for number, dtype in voxel_types().items() if dtype == common)


def _in_order(slices: list[Slice], folder: Path, case: str) -> list[Slice]:
    first, first_normal = np.asarray(slices[0].orientation), slices[0].normal
    if any(np.abs(np.asarray(one.orientation) - first).max() > ORIENTATION_TOLERANCE for one in slices):
        raise CaseError(case, f"{folder}: the slices have different orientations; expected one series of one scan")
    spacings = sorted({one.spacing_mm for one in slices})
    if np.ptp(spacings, axis=0).max() > ORIENTATION_TOLERANCE:
        raise CaseError(case, f"{folder}: the slices have the pixel spacings {spacings} mm; expected the same for all")
    if len(slices) < 2:
        raise CaseError(case, f"{folder}: holds 1 slice; expected a 3-D scan")
    ordered = sorted(slices, key=lambda one: one.along_normal)
    places = np.array([one.along_normal for one in ordered])
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    if usual <= 0:
        raise CaseError(case, f"{folder}: most slices lie at the same position; expected one scan")
    if not _is_even(places):
        for index in np.flatnonzero(np.abs(gaps - usual) == np.abs(gaps - usual).max())[:1]:
            gap, before, after = gaps[index], ordered[index].path.name, ordered[index + 1].path.name
            what = "two slices at one position" if gap < 0.1 * usual else f"a gap of {gap:.2f} mm"
            raise CaseError(
                case,
                f"{folder}: {what} between {before} and {after}, the others lie {usual:.2f} mm apart; "
                "slices are missing or duplicated",
            )
    offset = np.subtract(ordered[-1].position, ordered[0].position)
    shift = float(np.linalg.norm(offset - np.dot(offset, first_normal) * first_normal))
    if shift > SHIFT_TOLERANCE * np.linalg.norm(offset):
        raise CaseError(
            case,
            f"{folder}: from first to last the slices shift by {shift:.1f} mm sideways (tilted gantry); a "
            "sheared scan cannot be used, resample it first",
        )
    positions = np.array([one.position for one in ordered])
    off = positions - np.linspace(positions[0], positions[-1], len(ordered))
    beside = np.linalg.norm(off - np.outer(off @ first_normal, first_normal), axis=1)
    if beside.max() > max(ordered[0].spacing_mm):
        raise CaseError(
            case,
            f"{folder}: {ordered[int(beside.argmax())].path.name} lies {beside.max():.1f} mm beside the line from the "
            "first slice to the last; its pixels lie elsewhere than those of the others. Export the series again",
        )
    return ordered


def _is_even(places: np.ndarray) -> bool:
    """Whether positions along the normal are those of evenly spaced slices, but for rounding.

    They are compared with a straight line from the first to the last, so that rounding does not add up, and a missing
    or doubled slice does: it moves others by up to a whole distance.
    """
    line = np.linspace(places[0], places[-1], len(places))
    step = (places[-1] - places[0]) / (len(places) - 1)
    off = np.abs(places - line).max()
    return bool(off <= max(POSITION_TOLERANCE * step, min(ROUNDING_MM, 0.25 * step)))
