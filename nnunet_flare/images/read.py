"""Reading volumes and label maps, geometry carried exactly.

NIfTI files are read as one of nnU-Net's readers reads them (:mod:`nnunet_flare.images.readers`), every other format by
SimpleITK.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images.checks import check_grid
from nnunet_flare.images.file_names import NIFTI_SUFFIXES, SUFFIXES, stem_of, suffix_of
from nnunet_flare.images.formats import check_format
from nnunet_flare.images.nifti import Nifti, load_nifti
from nnunet_flare.images.payload import Unpacked
from nnunet_flare.images.readers import NIBABEL, SITK, doubt, doubtful, is_doubt_of_one, library, seen_by
from nnunet_flare.images.views import last_line
from nnunet_flare.images.volume import Volume
from nnunet_flare.names import readable

IMAGE_IO = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO"}
"""SimpleITK's reader by ending; that of every other file it finds itself."""


def read_volume(path: Path, case: str | None = None, *, reader: str = SITK) -> Volume:
    """Read one 3-D scalar image in its stored type, as one of nnU-Net's readers reads it.

    Args:
        path: the file.
        case: its name, for messages.
        reader: of NIfTI, one of :data:`nnunet_flare.images.readers.READERS`; turning to RAS is left to
            :func:`nnunet_flare.images.orientation.turn_for_reader`.

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

    reader = _simpleitk_reader(path)
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
    reader = _simpleitk_reader(path)
    try:
        with readable(path) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
            # before any voxel is read: SimpleITK crashes on some vectors of integers with a slope
            _check_scalar(reader.GetSize(), reader.GetNumberOfComponents(), case, path)
            image = reader.Execute()
    except RuntimeError as error:
        known = ", ".join(SUFFIXES)
        raise CaseError(
            case, f"{path}: cannot be read ({last_line(error)}): damaged, truncated, or not one of {known}"
        ) from error
    return from_sitk(image, case, path)


def _simpleitk_reader(path: Path) -> Any:
    """SimpleITK's reader of the file's format, which it knows by small letters only."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO(IMAGE_IO.get(suffix_of(path) or "", ""))
    return reader


def from_sitk(image: Any, case: str, path: Path | str = "image") -> Volume:
    """A :class:`Volume` of a SimpleITK image, checked as :func:`read_volume` does."""
    import SimpleITK as sitk

    _check_scalar(image.GetSize(), image.GetNumberOfComponentsPerPixel(), case, path)
    volume = Volume(
        sitk.GetArrayFromImage(image),
        tuple(float(s) for s in image.GetSpacing()[::-1]),  # type: ignore[arg-type]
        tuple(image.GetOrigin()),
        tuple(image.GetDirection()),
    )
    check_grid(volume, case, path)
    return volume


def _check_scalar(size: Sequence[int], components: int, case: str, path: Path | str) -> None:
    if len(size) != 3:
        raise CaseError(case, f"{path}: has {len(size)} dimensions {tuple(size)}, expected 3")
    if components != 1:
        raise CaseError(case, f"{path}: has {components} values per voxel, expected 1")


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
