"""One file of a DICOM series: what its header says, and whether the reader takes its values as they are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images.views import last_line
from nnunet_flare.names import readable

IMAGE_IO = "GDCMImageIO"

SERIES, POSITION, ORIENTATION, SPACING = "0020|000e", "0020|0032", "0020|0037", "0028|0030"
ROWS, COLUMNS, SAMPLES, BITS = "0028|0010", "0028|0011", "0028|0002", "0028|0100"
STORED, HIGH = "0028|0101", "0028|0102"
FRAMES, PHOTOMETRIC, INTERCEPT, SLOPE = "0028|0008", "0028|0004", "0028|1052", "0028|1053"

VOXEL_TYPES = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float32", "Float64")
"""SimpleITK's names of real voxel types; NumPy's are the same in small letters."""

GREY = "MONOCHROME2"
"""The values of any other kind of picture are changed by the reader: inverted, or made of colours."""

IDENTITY = (1.0, 0.0)
"""Slope and intercept that leave the stored values as they are."""

TABLE = re.compile(rb"\x28\x00\x00\x30(SQ\x00\x00)?.{4}\xfe\xff\x00\xe0", re.DOTALL)
"""The start of a Modality LUT Sequence, which stands in the place of slope and intercept: tag, length, first item."""

VOXELS = b"\xe0\x7f\x10\x00"
"""The tag of the voxels, the last of a file."""

TRANSFER_SYNTAX = b"\x02\x00\x10\x00UI"
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Transfer syntaxes whose voxels lie in the file as they are, so that its size tells whether they are all there."""


@dataclass(frozen=True)
class Slice:
    """One file of a series: where it lies (mm), how it is oriented (two direction cosines), spacing, and its series.

    ``voxels`` is the type that its rescaled values need; ``rescale`` slope and intercept, None where it has none.
    """

    path: Path
    series: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    voxels: np.dtype
    rescale: tuple[float, float] | None

    @property
    def normal(self) -> np.ndarray:
        """Unit vector along the slices' axis."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def along_normal(self) -> float:
        """Position along the slice normal, mm."""
        return float(np.dot(self.normal, self.position))


def read_header(path: Path, case: str) -> Slice:
    """What the header of one slice says.

    Raises:
        CaseError: when it is unreadable, incomplete, or no single picture of grey values.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO(IMAGE_IO)
    try:
        with readable(path) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(case, f"{path}: is not a readable DICOM image ({last_line(error)})") from error
    keys = set(reader.GetMetaDataKeys())
    _check_picture(reader, keys, path, case)
    needed = (SERIES, POSITION, ORIENTATION, SPACING)
    missing = [name for name in needed if name not in keys]
    if missing:
        raise CaseError(
            case, f"{path}: lacks {', '.join(missing)}, which give series, position, orientation and pixel spacing"
        )
    try:
        position, orientation, spacing = (
            tuple(float(number) for number in reader.GetMetaData(name).split("\\")) for name in needed[1:]
        )
    except ValueError as error:
        raise CaseError(case, f"{path}: position, orientation or pixel spacing is not a number ({error})") from error
    counts = len(position), len(orientation), len(spacing)
    if counts != (3, 6, 2) or min(spacing) <= 0 or not np.isfinite([*position, *orientation, *spacing]).all():
        raise CaseError(
            case,
            f"{path}: position {position}, orientation {orientation}, pixel spacing {spacing}; expected 3 numbers, 6 "
            "numbers, and 2 above 0",
        )
    voxels = np.prod([int(reader.GetMetaData(name)) for name in (ROWS, COLUMNS, SAMPLES, BITS) if name in keys]) // 8
    if _is_uncompressed(path) and path.stat().st_size < voxels:
        raise CaseError(case, f"{path}: has {path.stat().st_size} bytes, its voxels alone need {voxels}; copy it again")
    return Slice(
        path,
        reader.GetMetaData(SERIES).strip("\0 "),
        position,
        orientation,
        spacing,
        voxel_types()[reader.GetPixelID()],
        _rescale(reader, keys, path, case),
    )


def _check_picture(reader: Any, keys: set[str], path: Path, case: str) -> None:
    """Refuse what is no single slice of grey values, which the reader would change or join in silence."""
    frames = reader.GetMetaData(FRAMES).strip("\0 ") if FRAMES in keys else ""
    if frames not in ("", "1"):
        raise CaseError(case, f"{path}: holds {frames} frames, expected one slice per file; convert the scan to NIfTI")
    photometric = reader.GetMetaData(PHOTOMETRIC).strip("\0 ") if PHOTOMETRIC in keys else GREY
    if photometric != GREY or reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in voxel_types():
        raise CaseError(
            case,
            f"{path}: is a {photometric} picture of {reader.GetNumberOfComponents()} values per voxel; expected {GREY} "
            "and 1; values of other kinds would be changed in reading",
        )
    stored, high = (reader.GetMetaData(name).strip("\0 ") if name in keys else "" for name in (STORED, HIGH))
    if stored.isdigit() and high.isdigit() and int(high) != int(stored) - 1:
        raise CaseError(
            case,
            f"{path}: its values have {stored} bits with the highest at {high}, and the reader takes the lowest "
            f"{stored}; convert the scan to NIfTI with a program that shifts them",
        )


def _rescale(reader: Any, keys: set[str], path: Path, case: str) -> tuple[float, float] | None:
    """Slope and intercept of a slice, or None where it has no intercept."""
    slope, intercept = (reader.GetMetaData(name).strip("\0 ") if name in keys else "" for name in (SLOPE, INTERCEPT))
    if not intercept:
        if _has_table(path):
            raise CaseError(
                case,
                f"{path}: turns stored values into output values by a table (Modality LUT Sequence), which the reader "
                "leaves out; convert the scan to NIfTI with a program that applies it",
            )
        return None
    try:
        found = float(slope or 1), float(intercept)
    except ValueError:
        found = math.nan, math.nan
    if not np.isfinite(found).all() or found[0] == 0:
        raise CaseError(
            case,
            f"{path}: rescale slope {slope!r} and intercept {intercept!r}; expected two numbers, the slope not 0",
        )
    return found


def _has_table(path: Path) -> bool:
    """Whether the file holds a Modality LUT Sequence, before its voxels or, where none are found, anywhere."""
    header, _, _ = path.read_bytes().partition(VOXELS)
    return TABLE.search(header) is not None


def _is_uncompressed(path: Path) -> bool:
    """Whether the file says, in its first bytes, that its voxels are stored as they are."""
    with open(path, "rb") as stream:
        _, found, rest = stream.read(4096).partition(TRANSFER_SYNTAX)
    length = int.from_bytes(rest[:2], "little")
    return bool(found) and rest[2 : 2 + length].strip(b"\0 ").decode("ascii", "replace") in UNCOMPRESSED


def voxel_types() -> dict[int, np.dtype]:
    """NumPy's voxel types by SimpleITK's numbers."""
    import SimpleITK as sitk

    return {getattr(sitk, f"sitk{name}"): np.dtype(name.lower()) for name in VOXEL_TYPES}
