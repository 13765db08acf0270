"""Writing a NIfTI file: the header is the one that SimpleITK or nibabel writes, the voxels follow it compressed fast.

The library is asked to write an image of a single voxel on the same grid; only the sizes of the axes are then set. So
the geometry is what stock nnU-Net's writer of that library makes, byte by byte, and the voxels are compressed ten times
as fast as by it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_flare.images.deflate import deflater
from nnunet_flare.images.nifti_header import EXTENSION_BYTES, HEADER_BYTES

LONGEST_AXIS = 32767
"""Voxels along an axis that NIfTI-1 can tell of."""

SIZES_AT = 42
"""Where a NIfTI-1 header has the sizes of the three axes, x first."""

BLOCK_BYTES = 1 << 23
"""Voxels are compressed in blocks of about this size."""


def nibabel_header(voxel_type: np.dtype, affine: Sequence[float]) -> bytes:
    """The start of the NIfTI-1 file that nibabel writes of one voxel with a matrix (16 numbers, row-major, RAS)."""
    import nibabel

    return _start(nibabel.Nifti1Image(np.zeros((1, 1, 1), voxel_type), np.reshape(affine, (4, 4))).to_bytes())


def simpleitk_header(image: object, folder: Path) -> bytes:
    """The start of the NIfTI-1 file that SimpleITK writes of an image of one voxel, in a folder for it.

    Raises:
        RuntimeError: SimpleITK's, where it cannot write it.
    """
    import SimpleITK as sitk

    file = folder / "header.nii"
    sitk.WriteImage(image, str(file))
    start = file.read_bytes()
    file.unlink()
    return _start(start)


def write_nifti(file: Path, start: bytes, array: np.ndarray) -> None:
    """Write a file, compressed where its name ends in ``.gz``.

    Args:
        file: its place.
        start: what :func:`simpleitk_header` or :func:`nibabel_header` gave for one voxel of the array's type.
        array: voxels (Z, Y, X).

    Raises:
        OSError: when it cannot be written, or has an axis too long for NIfTI-1.
    """
    if max(array.shape) > LONGEST_AXIS:
        raise OSError(f"{file}: an axis has {max(array.shape)} voxels, NIfTI-1 allows at most {LONGEST_AXIS}")
    header = bytearray(start)
    struct.pack_into("=3h", header, SIZES_AT, *array.shape[::-1])
    step = max(1, BLOCK_BYTES // max(1, array[0].nbytes))
    with open(file, "wb") as stream:
        stream_of = deflater() if file.name.endswith(".gz") else None
        for block in (bytes(header), *(array[first : first + step] for first in range(0, len(array), step))):
            plain = block if isinstance(block, bytes) else np.ascontiguousarray(block).data.cast("B")
            stream.write(plain if stream_of is None else stream_of.compress(plain))
        if stream_of is not None:
            stream.write(stream_of.flush())


def _start(file: bytes) -> bytes:
    """Header and extension flag of a file whose voxels follow at once."""
    return file[: HEADER_BYTES + EXTENSION_BYTES]
