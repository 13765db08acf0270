"""Reading a DICOM series: one folder, one scan.

The slices are sorted by their position along the slice normal, never by name or number. What cannot be one evenly
spaced scan is refused: several series, several orientations, missing or doubled slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, from_sitk, read_volume

MAGIC = b"DICM"
MAGIC_OFFSET = 128
"""A DICOM file has these letters after its preamble."""

SPACING_TOLERANCE = 0.02
"""Distances of neighbouring slices may differ from their median by this share (rounded positions do)."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference of direction cosines within one series."""

SERIES, POSITION, ORIENTATION = "0020|000e", "0020|0032", "0020|0037"


@dataclass(frozen=True)
class Slice:
    """One file of a series: where it lies (mm), how it is oriented (two direction cosines), and its series."""

    path: Path
    series: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]

    @property
    def along_normal(self) -> float:
        """Position along the slice normal, mm."""
        normal = np.cross(self.orientation[:3], self.orientation[3:])
        return float(np.dot(normal, self.position))


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


def read_scan(path: Path, case: str) -> Volume:
    """A scan as it comes: one image file, or a folder that holds one DICOM series.

    Raises:
        CaseError: as :func:`read_series` and :func:`nnunet_flare.images.read_volume`.
    """
    return read_series(path, case) if path.is_dir() else read_volume(path, case)


def read_series(folder: Path, case: str) -> Volume:
    """The scan of a folder that holds one DICOM series.

    Raises:
        CaseError: for several series or orientations, missing or doubled slices, or unreadable files.
    """
    import SimpleITK as sitk

    files = ordered_files(folder, case)
    try:
        image = sitk.ReadImage([str(path) for path in files])
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
    series = sorted({one.series for one in slices})
    if len(series) > 1:
        counts = [sum(one.series == uid for one in slices) for uid in series]
        raise CaseError(
            case, f"{folder}: holds {len(series)} series of {counts} files; expected one, move each to its own folder"
        )
    return [one.path for one in _in_order(slices, folder, case)]


def _in_order(slices: list[Slice], folder: Path, case: str) -> list[Slice]:
    first = np.asarray(slices[0].orientation)
    if any(np.abs(np.asarray(one.orientation) - first).max() > ORIENTATION_TOLERANCE for one in slices):
        raise CaseError(case, f"{folder}: the slices have different orientations; expected one series of one scan")
    if len(slices) < 2:
        raise CaseError(case, f"{folder}: holds 1 slice; expected a 3-D scan")
    ordered = sorted(slices, key=lambda one: one.along_normal)
    gaps = np.diff([one.along_normal for one in ordered])
    usual = float(np.median(gaps))
    if usual <= 0:
        raise CaseError(case, f"{folder}: most slices lie at the same position; expected one scan")
    for index, gap in enumerate(gaps):
        if abs(gap - usual) > SPACING_TOLERANCE * usual:
            before, after = ordered[index].path.name, ordered[index + 1].path.name
            what = "two slices at one position" if gap < SPACING_TOLERANCE * usual else f"a gap of {gap:.2f} mm"
            raise CaseError(
                case,
                f"{folder}: {what} between {before} and {after}, the others lie {usual:.2f} mm apart; "
                "slices are missing or doubled",
            )
    return ordered


def _read_header(path: Path, case: str) -> Slice:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(case, f"{path}: is no readable DICOM image ({str(error).strip().splitlines()[-1]})") from error
    keys = set(reader.GetMetaDataKeys())
    missing = [name for name in (SERIES, POSITION, ORIENTATION) if name not in keys]
    if missing:
        raise CaseError(case, f"{path}: lacks {', '.join(missing)}, which tell series, position and orientation")
    position, orientation = (
        tuple(float(number) for number in reader.GetMetaData(name).split("\\")) for name in (POSITION, ORIENTATION)
    )
    return Slice(path, reader.GetMetaData(SERIES).strip("\0 "), position, orientation)
