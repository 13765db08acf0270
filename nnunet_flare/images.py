"""Reading, checking and writing images and label maps, geometry carried exactly.

Arrays are ``(Z, Y, X)`` as stored in the file (no reorientation), spacings ``(z, y, x)`` in mm; origin and direction
stay in SimpleITK's ``(x, y, z)`` order and are only ever copied. NIfTI files are read as one of nnU-Net's readers reads
them (:mod:`nnunet_flare.readers`), every other format by SimpleITK. What makes a case unusable raises
:class:`CaseError`; what is odd but predictable is returned by :func:`oddities`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.disks import naming_disk_errors
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.formats import check_format
from nnunet_flare.geometry import TO_OTHER_WORLD, is_same_grid, matrix_of
from nnunet_flare.hounsfield import SMALLEST_SPAN, not_hounsfield
from nnunet_flare.names import is_plain, plain_folder, readable
from nnunet_flare.nifti import Nifti, is_whole, load_nifti
from nnunet_flare.nifti_write import nibabel_header, simpleitk_header, write_nifti
from nnunet_flare.payload import Unpacked
from nnunet_flare.readers import NIBABEL, SITK, doubt, doubtful, is_doubt_of_one, last_line, library, seen_by

SUFFIXES: tuple[str, ...] = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
"""File name endings of single-file images, longest first."""

NIFTI_SUFFIXES = (".nii.gz", ".nii")

CT_RANGE_HU = (-2048.0, 8192.0)
"""Values outside are no CT numbers (air is -1000, metal saturates near 3071 or, on extended scales, 8191)."""

SPACING_RANGE_MM = (0.2, 15.0)
"""Spacings outside are odd for an abdominal CT."""

LARGEST_EXTENT_MM = 2500.0
"""No body is longer; a scan that is has a wrong spacing in its header."""

GEOMETRY_TOLERANCE_MM = 1e-3
"""Where no spacing, origin or direction entry differs by more, two grids are equal but for rounding."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map and its grid: ``array`` (Z, Y, X), ``spacing_mm`` (z, y, x), origin, direction (x, y, z).

    ``affine`` is nibabel's matrix (16 numbers, row-major, RAS) of what a nibabel reader read, with which results on
    this grid are written; ``doubt`` says what another library would have read in the file.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    affine: tuple[float, ...] | None = None
    doubt: str | None = None

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing_mm))

    @property
    def matrix(self) -> np.ndarray:
        """From voxel indices (x, y, z) to places in mm (LPS), see :mod:`nnunet_flare.geometry`."""
        if self.affine is not None:
            return TO_OTHER_WORLD @ np.reshape(self.affine, (4, 4))
        return matrix_of(self.spacing_mm, self.origin, self.direction)

    def with_array(self, array: np.ndarray) -> Volume:
        """The same grid with other values; the shape must be equal."""
        if array.shape != self.array.shape:
            raise ValueError(f"array of shape {array.shape} does not fit a grid of shape {self.array.shape}")
        return replace(self, array=array)

    def moved(self, array: np.ndarray, old_index: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
        """The same space with another grid: ``old_index`` (4, 4) takes new voxel indices (x, y, z, 1) to old ones.

        It holds flips, swaps and shifts alone, so that ``spacing_mm`` is the old one with its axes swapped.
        """
        direction = np.reshape(self.direction, (3, 3))
        steps = direction * np.asarray(self.spacing_mm[::-1], float)
        origin = np.asarray(self.origin, float) + steps @ old_index[:3, 3]
        affine = None if self.affine is None else np.reshape(self.affine, (4, 4)) @ old_index
        if affine is not None:
            origin = (TO_OTHER_WORLD @ affine)[:3, 3]
        return Volume(
            array,
            spacing_mm,
            tuple(origin.tolist()),
            tuple((direction @ old_index[:3, :3]).ravel().tolist()),
            None if affine is None else tuple(affine.ravel().tolist()),
            self.doubt,
        )


def suffix_of(path: Path) -> str | None:
    """The image suffix of a file name (``.nii.gz``, ...), or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def stem_of(path: Path) -> str:
    """File name without its image suffix."""
    suffix = suffix_of(path)
    return path.name if suffix is None else path.name[: -len(suffix)]


def read_volume(path: Path, case: str | None = None, *, reader: str = SITK) -> Volume:
    """Read one 3-D scalar image in its stored type, as one of nnU-Net's readers reads it.

    Args:
        path: the file.
        case: its name, for messages.
        reader: of NIfTI, one of :data:`nnunet_flare.readers.READERS`; turning to RAS is left to
            :func:`nnunet_flare.orientation.turn_for_reader`.

    Raises:
        CaseError: when it is missing, unreadable by that reader, not 3-D, of several components, or has an impossible
            spacing.
    """
    case = case or stem_of(path)
    if not path.is_file():
        raise CaseError(case, f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
    if path.stat().st_size == 0:
        raise CaseError(case, f"{path}: the file is empty (0 bytes); copy it again")
    if suffix_of(path) in NIFTI_SUFFIXES:
        nifti = load_nifti(path, case)
        if nifti.stored is not None:
            return _read_as(reader, nifti, path, case)
    unpacked = check_format(path, case)
    found = None if unpacked is None else _placed_by_simpleitk(unpacked, path, case)
    return _read_by_simpleitk(path, case) if found is None else found


def _read_as(reader: str, nifti: Nifti, path: Path, case: str) -> Volume:
    view = seen_by(reader, path, nifti.header)
    if isinstance(view, str):
        raise CaseError(case, f"{path}: cannot be read by {library(reader)}, as {reader} reads it ({view})")
    found = doubt(path, nifti.header, reader, view)
    array = nifti.scaled(view.slope, view.intercept)
    volume = Volume(array, view.spacing_mm, view.origin, view.direction, view.affine, found)
    check_grid(volume, case, path)
    return volume


def _placed_by_simpleitk(unpacked: Unpacked, path: Path, case: str) -> Volume | None:
    """Voxels that were unpacked already, on the grid that SimpleITK reads; None where it would read something else.

    A header in which it has something to repair or to refuse is left to it.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    try:
        with readable(path) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
    except RuntimeError:
        return None
    kinds = {
        sitk.sitkInt8: "i1", sitk.sitkUInt8: "u1", sitk.sitkInt16: "i2", sitk.sitkUInt16: "u2", sitk.sitkInt32: "i4",
        sitk.sitkUInt32: "u4", sitk.sitkInt64: "i8", sitk.sitkUInt64: "u8", sitk.sitkFloat32: "f4",
        sitk.sitkFloat64: "f8",
    }  # fmt: skip
    kind, spacing = kinds.get(reader.GetPixelID()), reader.GetSpacing()
    if reader.GetDimension() != 3 or kind is None or not all(step > 0 for step in spacing):
        return None
    if abs(np.linalg.det(np.reshape(reader.GetDirection(), (3, 3)))) < 1e-12:
        return None
    array = unpacked.voxels(kind, tuple(reader.GetSize()[::-1]))
    if array is None:
        return None
    z, y, x = (float(step) for step in spacing[::-1])
    volume = Volume(array, (z, y, x), tuple(reader.GetOrigin()), tuple(reader.GetDirection()))
    check_grid(volume, case, path)
    return volume


def _read_by_simpleitk(path: Path, case: str) -> Volume:
    import SimpleITK as sitk

    try:
        with readable(path) as name:
            image = sitk.ReadImage(name)
    except RuntimeError as error:
        known = ", ".join(SUFFIXES)
        raise CaseError(
            case, f"{path}: cannot be read ({last_line(error)}): damaged, truncated, or not one of {known}"
        ) from error
    return from_sitk(image, case, path)


def from_sitk(image: Any, case: str, path: Path | str = "image") -> Volume:
    """A :class:`Volume` of a SimpleITK image, checked as :func:`read_volume` does."""
    import SimpleITK as sitk

    if image.GetDimension() != 3:
        raise CaseError(case, f"{path}: has {image.GetDimension()} dimensions {image.GetSize()}, expected 3")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise CaseError(case, f"{path}: has {image.GetNumberOfComponentsPerPixel()} values per voxel, expected 1")
    volume = Volume(
        sitk.GetArrayFromImage(image),
        tuple(float(s) for s in image.GetSpacing()[::-1]),  # type: ignore[arg-type]
        tuple(image.GetOrigin()),
        tuple(image.GetDirection()),
    )
    check_grid(volume, case, path)
    return volume


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


def check_values(volume: Volume, case: str, path: Path | str = "image", *, flat: bool = False) -> None:
    """Raise :class:`CaseError` for NaN, infinite or constant images, for a scan longer than any body, and unless
    ``flat`` for one slice.
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
    if array.size and array.min() == array.max():
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


def read_labels(
    path: Path,
    case: str | None = None,
    *,
    allowed: Sequence[int] | None = None,
    reader: str = SITK,
    doubted: bool = False,
) -> Volume:
    """Read a label map as integers (uint8 where the ids fit); floats are taken when they are whole numbers.

    ``doubted``: also one that SimpleITK and nibabel read differently.

    Raises:
        CaseError: as :func:`read_volume`, and for fractional or negative ids or ids outside ``allowed``.
    """
    case = case or stem_of(path)
    volume = read_volume(path, case, reader=reader)
    if volume.doubt and not doubted:
        raise CaseError(case, f"{path}: {volume.doubt}; {doubtful(reader)}")
    array = volume.array
    if array.dtype.kind not in "iuf":
        raise CaseError(case, f"{path}: voxels are of type {array.dtype}, expected whole label ids")
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.isfinite(array).all() or not np.array_equal(whole, array):
            raise CaseError(case, f"{path}: holds fractions or NaN; expected whole label ids")
        array = whole
    if array.size and array.min() < 0:
        raise CaseError(case, f"{path}: holds the negative id {array.min():g}; expected ids from 0 up")
    if array.max(initial=0) > 65535:
        raise CaseError(case, f"{path}: holds the id {array.max():g}; expected small label ids")
    array = array.astype(np.uint8 if array.max(initial=0) <= 255 else np.uint16, copy=False)
    if allowed is not None:
        unknown = sorted(set(np.flatnonzero(np.bincount(array.ravel())).tolist()) - set(allowed))
        if unknown:
            raise CaseError(case, f"{path}: holds the ids {unknown}, which are not in the label set {sorted(allowed)}")
    return volume.with_array(array)


def read_labels_alone(path: Path, case: str, *, allowed: Sequence[int] | None = None) -> Volume:
    """A label map that belongs to no model or dataset: read by SimpleITK or, where it cannot, by nibabel.

    Raises:
        CaseError: as :func:`read_labels`, also where the two read it differently.
    """
    try:
        return read_labels(path, case, allowed=allowed)
    except CaseError as error:
        try:
            volume = read_labels(path, case, allowed=allowed, reader=NIBABEL, doubted=True)
        except CaseError:
            raise error from None
        if volume.affine is None or not is_doubt_of_one(volume.doubt):
            raise
        return volume


def geometry_difference(one: Volume, other: Volume) -> str | None:
    """What differs between two grids, in words, or None when they are the same within a share of a voxel."""
    if one.array.shape != other.array.shape:
        return f"shape (z, y, x) {one.array.shape} and {other.array.shape}"
    if is_same_grid(one.matrix, other.matrix, one.array.shape):
        return None
    return rounding_difference(one, other) or f"matrix {_listed(one.matrix[:3])} and {_listed(other.matrix[:3])}"


def rounding_difference(one: Volume, other: Volume) -> str | None:
    """What differs by more than 0.001 between two grids that may be the same, in words, or None."""
    for name in ("spacing_mm", "origin", "direction"):
        a, b = getattr(one, name), getattr(other, name)
        if not np.allclose(a, b, rtol=0, atol=GEOMETRY_TOLERANCE_MM):
            return f"{name.replace('_mm', '')} {_listed(a)} and {_listed(b)}"
    return None


def _listed(numbers: Any) -> tuple[Any, ...]:
    return tuple(np.round(np.asarray(numbers, float), 4).tolist())


def to_sitk(volume: Volume) -> Any:
    """The SimpleITK image of a volume."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(tuple(volume.spacing_mm[::-1]))
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction)
    return image


def write_volume(path: Path, volume: Volume) -> None:
    """Write an image by rename, compressed where the format allows it; as nibabel's readers write what they read.

    Raises:
        OSError: when it cannot be written whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, because the header of .mhd names its second file: both must have their final names.
    with plain_folder(beside=path.parent) as folder, naming_disk_errors(path):
        name = _name_for_libraries(path)
        if suffix_of(path) in NIFTI_SUFFIXES:
            write_nifti(folder / name, _nifti_start(volume, folder, path), volume.array)
            if not is_whole(folder / name):
                raise OSError(f"{path}: could not be written completely")
        else:
            _write_by_simpleitk(folder / name, volume, path)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == name):
            os.replace(file, path if file.name == name else path.with_name(file.name))


def _name_for_libraries(path: Path) -> str:
    """A plain name with a suffix in lower case; .mhd keeps its own where it can, as its voxels' file is named alike."""
    if path.name.endswith(".mhd") and is_plain(path.name):
        return path.name
    return f"image-{sha256(os.fsencode(path.name)).hexdigest()[:12]}{suffix_of(path) or path.suffix}"


def _write_by_simpleitk(file: Path, volume: Volume, path: Path) -> None:
    import SimpleITK as sitk

    try:
        sitk.WriteImage(to_sitk(volume), str(file), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({last_line(error)})") from error


def _nifti_start(volume: Volume, folder: Path, path: Path) -> bytes:
    """A NIfTI file's bytes before the voxels, as the library writes them by which the volume's grid was read."""
    if volume.affine is not None:
        return nibabel_header(volume.array.dtype, volume.affine)
    try:
        voxel = np.zeros((1, 1, 1), volume.array.dtype)
        return simpleitk_header(to_sitk(replace(volume, array=voxel)), folder)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({last_line(error)})") from error


def write_labels(path: Path, labels: np.ndarray, like: Volume) -> None:
    """Write a label map (Z, Y, X) as uint8 on the grid of ``like``, by rename."""
    if labels.max(initial=0) > 255:
        raise ValueError(f"label id {labels.max()} does not fit uint8")
    write_volume(path, like.with_array(labels.astype(np.uint8, copy=False)))


def find_cases(folder: Path, file_ending: str, channels: int = 1) -> dict[str, list[Path]]:
    """The cases of an nnU-Net image folder (``<case>_0000<file_ending>`` and so on), sorted by id.

    Missing channels are left for the reader to report, case by case.

    Raises:
        InputError: when the folder is missing or holds no such file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected images named <case>_0000{file_ending}")
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending), re.DOTALL)  # a line break is a character too
    names = {m.group(1) for p in folder.iterdir() if (m := pattern.fullmatch(p.name)) and not p.name.startswith(".")}
    if not names:
        seen = sorted(p.name for p in folder.iterdir())[:3]
        raise InputError(f"{folder}: no image named <case>_0000{file_ending}; found {seen or 'nothing'}")
    return {n: [folder / f"{n}_{channel:04d}{file_ending}" for channel in range(channels)] for n in sorted(names)}
