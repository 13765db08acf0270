"""Whether an output that is there already can be kept: whole, readable and on the grid of its scan.

A full disk, a broken copy or a crash of the machine leave files of no bytes or half their bytes under the right name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.dicom.files import is_dicom
from nnunet_flare.dicom.series import read_scan
from nnunet_flare.errors import CaseError
from nnunet_flare.images import NIFTI_SUFFIXES, Volume, read_volume, suffix_of
from nnunet_flare.images.deflate import DAMAGED, inflater
from nnunet_flare.images.geometry import is_same_grid
from nnunet_flare.images.nifti import load_nifti
from nnunet_flare.images.nifti_header import HEADER_BYTES, Header, parse_header
from nnunet_flare.images.readers import SITK, seen_by

GRID_TOLERANCE_MM = 1e-3
LABEL_BITS = 8


def is_kept(path: Path, scan: Path | None = None, *, reader: str = SITK) -> bool:
    """Whether an image or label map was written whole, and lies on the grid of ``scan``.

    Every byte of it is read (0.1 s for a label map), and of a scan in NIfTI the header, of others every byte too.

    Args:
        path: the output; a missing one is not kept.
        scan: what it was made of, a file or a folder of DICOM files, where it must lie on that grid.
        reader: of nnU-Net, as which NIfTI files are compared.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return False
    try:
        if scan is None and suffix_of(path) in NIFTI_SUFFIXES:
            load_nifti(path, path.name)
            return header_of(path) is not None
        found = read_volume(path, reader=reader)
        return scan is None or _is_on_grid_of(found, scan, reader)
    except CaseError:
        return False


def is_kept_dicom(path: Path) -> bool:
    """Whether a DICOM segmentation has all its voxels."""
    if not is_dicom(path):
        return False
    import pydicom

    try:
        document = pydicom.dcmread(path)
        bits = int(document.Rows) * int(document.Columns) * int(document.NumberOfFrames)
        return 8 * len(document.PixelData) >= bits
    except Exception:  # a damaged file can raise anything
        return False


def is_label_map_of(path: Path, scan: Path) -> bool:
    """Whether a NIfTI file is a label map (8 bits a voxel) on the grid of a scan that is no such file itself."""
    found, expected = header_of(path), header_of(scan)
    if found is None or expected is None:
        return False
    return found.bits == LABEL_BITS and expected.bits != LABEL_BITS and _same_grid(found, expected)


def header_of(path: Path) -> Header | None:
    """The header of a NIfTI file; None for what is none, or cannot be read."""
    if suffix_of(path) not in NIFTI_SUFFIXES or not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16)
        if start[:2] == b"\x1f\x8b":
            start = inflater().decompress(start, HEADER_BYTES)
    except OSError:
        return None
    except DAMAGED:
        return None
    return parse_header(start)


def _is_on_grid_of(found: Volume, scan: Path, reader: str) -> bool:
    header = header_of(scan)
    if header is None:
        volume = read_scan(scan, scan.name, reader=reader)
        shape, matrix = volume.array.shape, volume.matrix
    else:
        view = seen_by(reader, scan, header)
        if isinstance(view, str):
            return False
        shape, matrix = header.shape, view.matrix
    steps, expected = (np.linalg.norm(one[:3, :3], axis=0) for one in (found.matrix, matrix))
    return (
        found.array.shape == shape
        and np.allclose(steps, expected, rtol=0, atol=GRID_TOLERANCE_MM)
        and is_same_grid(found.matrix, matrix, shape)
    )


def _same_grid(one: Header, other: Header) -> bool:
    return _sizes(one) == _sizes(other) and all(
        abs(abs(a) - abs(b)) < GRID_TOLERANCE_MM for a, b in zip(one.spacing_mm[:3], other.spacing_mm[:3], strict=False)
    )


def _sizes(header: Header) -> tuple[int, ...]:
    """Without trailing axes of one voxel."""
    return (*header.size[:3], *(n for n in header.size[3:] if n != 1))
