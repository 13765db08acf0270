"""Writing a NIfTI file: the header is the one that SimpleITK or nibabel writes, the voxels follow it compressed fast.

The library is asked to write an image of a single voxel on the same grid; only the sizes of the axes are then set. So
the geometry is what stock nnU-Net's writer of that library makes, and the voxels are compressed ten times as fast as by
it. Of a grid along the scanner's axes nothing has to be asked: SimpleITK's import takes longer than the whole file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_flare.images.deflate import deflater
from nnunet_flare.images.geometry import TO_OTHER_WORLD
from nnunet_flare.images.nifti_header import (
    BITS,
    DESCRIPTION_AT,
    DESCRIPTION_BYTES,
    EXTENSION_BYTES,
    HEADER_BYTES,
    VOXEL_TYPES,
    parse_header,
)

LONGEST_AXIS = 32767
"""Voxels along an axis that NIfTI-1 can tell of."""

SIZES_AT = 42
"""Where a NIfTI-1 header has the sizes of the three axes, x first."""

SCANNER = 1
"""The code of the scanner's own space."""

MM_AND_SECONDS = 10
"""The code of the units of space and time."""

BLOCK_BYTES = 1 << 23
"""Voxels are compressed in blocks of about this size."""


def nibabel_header(voxel_type: np.dtype, affine: Sequence[float]) -> bytes:
    """The start of the NIfTI-1 file that nibabel writes of one voxel with a matrix (16 numbers, row-major, RAS)."""
    import nibabel

    return _start(nibabel.Nifti1Image(np.zeros((1, 1, 1), voxel_type), np.reshape(affine, (4, 4))).to_bytes())


def axis_aligned_header(
    voxel_type: np.dtype, spacing_mm: Sequence[float], origin: Sequence[float], direction: Sequence[float]
) -> bytes | None:
    """The start of the NIfTI-1 file that SimpleITK writes of one voxel, where the grid runs along the scanner's axes.

    Spacing (z, y, x), origin and direction (x, y, z) as :class:`nnunet_flare.images.Volume` has them. Equal to
    SimpleITK's but for the sign of zeros. None of another grid, of voxels and of numbers that NIfTI does not have.
    """
    kind = next((code for code, name in VOXEL_TYPES.items() if np.dtype(name) == voxel_type), None)
    turn = TO_OTHER_WORLD[:3, :3] @ np.reshape(direction, (3, 3))
    is_aligned = np.isin(turn, (-1, 0, 1)).all() and (abs(turn).sum(0) == 1).all() and (abs(turn).sum(1) == 1).all()
    spacing = np.array(spacing_mm[::-1], float)
    place = TO_OTHER_WORLD[:3, :3] @ np.asarray(origin, float)
    if kind is None or not is_aligned or not max(*spacing, *abs(place)) <= np.finfo(np.float32).max:
        return None
    handedness = round(float(np.linalg.det(turn)))
    header = bytearray(HEADER_BYTES + EXTENSION_BYTES)
    struct.pack_into("=i", header, 0, HEADER_BYTES)
    header[38:39] = b"r"
    struct.pack_into("=8h", header, 40, 3, *[1] * 7)
    struct.pack_into("=2h", header, 70, kind, BITS[kind])
    struct.pack_into("=8f", header, 76, handedness, *spacing, *[0] * 4)
    struct.pack_into("=2f", header, 108, HEADER_BYTES + EXTENSION_BYTES, 1)
    header[123] = MM_AND_SECONDS
    struct.pack_into("=2h", header, 252, SCANNER, SCANNER)
    struct.pack_into("=6f", header, 256, *_quaternion(turn * [1, 1, handedness]), *place)
    struct.pack_into("=12f", header, 280, *np.column_stack([turn * spacing, place]).ravel())
    header[344:348] = b"n+1\0"
    return bytes(header)


def _quaternion(turn: np.ndarray) -> tuple[float, float, float]:
    """The last three numbers of the unit quaternion of a rotation (3, 3) onto axes, whose first one is not negative."""
    a2, *squares = (1 + np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) @ turn.diagonal()).tolist()
    if a2 > 0:
        found = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / (
            2 * np.sqrt(a2)
        )
    else:  # half a turn
        largest = int(np.argmax(squares))
        four_times = 2 * np.sqrt(squares[largest])
        found = (turn + turn.T)[largest] / four_times
        found[largest] = four_times / 4
    b, c, d = found.tolist()
    return b, c, d


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


def described(start: bytes, text: str) -> bytes:
    """The start of a NIfTI-1 file with a free text of up to 79 ASCII characters in its header."""
    field = text.encode("ascii").ljust(DESCRIPTION_BYTES, b"\0")
    if len(field) > DESCRIPTION_BYTES or field[-1]:
        raise ValueError(f"{text!r} has {len(text)} characters, a header has room for {DESCRIPTION_BYTES - 1}")
    return start[:DESCRIPTION_AT] + field + start[DESCRIPTION_AT + DESCRIPTION_BYTES :]


def write_nifti(file: Path, start: bytes, array: np.ndarray) -> None:
    """Write a file, compressed where its name ends in ``.gz``.

    Args:
        file: its place.
        start: what one of the functions above gave for one voxel of the array's type.
        array: voxels (Z, Y, X).

    Raises:
        OSError: when it cannot be written, or has a number or an axis that NIfTI-1 has no room for.
    """
    found = parse_header(start)
    if found is None or found.problem is not None:
        raise OSError(f"{file}: cannot be written as NIfTI: {'no header' if found is None else found.problem}")
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
