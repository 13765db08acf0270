"""Reading a DICOM series: one folder, one scan.

The slices are sorted by their position along the slice normal, never by name or number. What cannot be one evenly
spaced, upright scan is refused: several series, orientations or pixel spacings, missing, doubled, shifted or short
slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, from_sitk, read_volume
from nnunet_flare.names import all_readable, readable
from nnunet_flare.readers import SITK

MAGIC = b"DICM"
MAGIC_OFFSET = 128
"""A DICOM file has these letters after its preamble."""

POSITION_TOLERANCE = 0.1
"""A slice may lie this share of the slice distance off its place on a straight line."""

ROUNDING_MM = 0.1
"""Positions are rounded to this at the coarsest; thin slices may lie that far off their place."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference of direction cosines within one series."""

SHIFT_TOLERANCE = 0.02
"""A slice may lie beside the line through the first along the normal by this share of their distance."""

SERIES, POSITION, ORIENTATION, SPACING = "0020|000e", "0020|0032", "0020|0037", "0028|0030"
ROWS, COLUMNS, SAMPLES, BITS = "0028|0010", "0028|0011", "0028|0002", "0028|0100"

TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI"
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Transfer syntaxes whose voxels lie in the file as they are, so that its size tells whether they are all there."""


@dataclass(frozen=True)
class Slice:
    """One file of a series: where it lies (mm), how it is oriented (two direction cosines), spacing, and its series."""

    path: Path
    series: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]

    @property
    def normal(self) -> np.ndarray:
        """Unit vector along the slices' axis."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def along_normal(self) -> float:
        """Position along the slice normal, mm."""
        return float(np.dot(self.normal, self.position))


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with open(path, "rb") as stream:
            return stream.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC
    except OSError:
        return False


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder (the index file DICOMDIR is none), sorted by name."""
    return [path for path in _plain_files(folder) if is_dicom(path)]


def series_folders(folder: Path) -> list[Path]:
    """The folder itself, or those folders in it, that hold DICOM files."""
    if _holds_dicom(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_dicom(path)]


def _plain_files(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "." and path.name != "DICOMDIR"
    ]


def _holds_dicom(folder: Path) -> bool:
    """Whether any file is DICOM; looks no further than the first that is."""
    return any(is_dicom(path) for path in _plain_files(folder))


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

    files = ordered_files(folder, case)
    try:
        with all_readable(files) as names:
            image = sitk.ReadImage(names)
    except RuntimeError as error:
        raise CaseError(case, f"{folder}: cannot be read ({str(error).strip().splitlines()[-1]})") from error
    return from_sitk(image, case, folder)


def ordered_files(folder: Path, case: str) -> list[Path]:
    """The files of a folder that holds one DICOM series, by position: file ``z`` is slice ``z`` of :func:`read_series`.

    Raises:
        CaseError: as :func:`read_series`, for what the headers tell.
    """
    slices = [_read_header(path, case) for path in dicom_files(folder)]
    if not slices:
        raise CaseError(case, f"{folder}: no DICOM file")
    empty = [path.name for path in _plain_files(folder) if path.stat().st_size == 0]
    if empty:
        raise CaseError(case, f"{folder}: {', '.join(empty[:5])} is empty (0 bytes) and may be a slice; copy it again")
    series = sorted({one.series for one in slices})
    if len(series) > 1:
        counts = [sum(one.series == uid for one in slices) for uid in series]
        raise CaseError(
            case, f"{folder}: holds {len(series)} series of {counts} files; expected one, move each to its own folder"
        )
    return [one.path for one in _in_order(slices, folder, case)]


def _in_order(slices: list[Slice], folder: Path, case: str) -> list[Slice]:
    first, first_normal = np.asarray(slices[0].orientation), slices[0].normal
    if any(np.abs(np.asarray(one.orientation) - first).max() > ORIENTATION_TOLERANCE for one in slices):
        raise CaseError(case, f"{folder}: the slices have different orientations; expected one series of one scan")
    spacings = sorted({one.spacing_mm for one in slices})
    if np.ptp(spacings, axis=0).max() > ORIENTATION_TOLERANCE:
        raise CaseError(case, f"{folder}: the slices have the pixel spacings {spacings} mm; expected one for all")
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
                "slices are missing or doubled",
            )
    offset = np.subtract(ordered[-1].position, ordered[0].position)
    shift = float(np.linalg.norm(offset - np.dot(offset, first_normal) * first_normal))
    if shift > SHIFT_TOLERANCE * np.linalg.norm(offset):
        raise CaseError(
            case,
            f"{folder}: from first to last the slices shift by {shift:.1f} mm sideways (tilted gantry); a "
            "sheared scan cannot be used, resample it first",
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


def _read_header(path: Path, case: str) -> Slice:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        with readable(path) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(case, f"{path}: is no readable DICOM image ({str(error).strip().splitlines()[-1]})") from error
    keys = set(reader.GetMetaDataKeys())
    needed = (SERIES, POSITION, ORIENTATION, SPACING)
    missing = [name for name in needed if name not in keys]
    if missing:
        raise CaseError(
            case, f"{path}: lacks {', '.join(missing)}, which tell series, position, orientation and pixel spacing"
        )
    try:
        position, orientation, spacing = (
            tuple(float(number) for number in reader.GetMetaData(name).split("\\")) for name in needed[1:]
        )
    except ValueError as error:
        raise CaseError(case, f"{path}: position, orientation or pixel spacing is no number ({error})") from error
    if len(position) != 3 or len(orientation) != 6 or len(spacing) != 2 or min(spacing) <= 0:
        raise CaseError(
            case,
            f"{path}: position {position}, orientation {orientation}, pixel spacing {spacing}; expected 3 numbers, 6 "
            "numbers, and 2 above 0",
        )
    voxels = np.prod([int(reader.GetMetaData(name)) for name in (ROWS, COLUMNS, SAMPLES, BITS) if name in keys]) // 8
    if _is_uncompressed(path) and path.stat().st_size < voxels:
        raise CaseError(case, f"{path}: has {path.stat().st_size} bytes, its voxels alone need {voxels}; copy it again")
    return Slice(path, reader.GetMetaData(SERIES).strip("\0 "), position, orientation, spacing)


def _is_uncompressed(path: Path) -> bool:
    """Whether the file says, in its first bytes, that its voxels are stored as they are."""
    with open(path, "rb") as stream:
        _, found, rest = stream.read(4096).partition(TRANSFER_SYNTAX)
    length = int.from_bytes(rest[:2], "little")
    return bool(found) and rest[2 : 2 + length].strip(b"\0 ").decode("ascii", "replace") in UNCOMPRESSED
