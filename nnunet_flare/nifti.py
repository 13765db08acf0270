"""A NIfTI file's header and voxels, read through once and checked on the way.

ITK fills the missing rest of a truncated or damaged file with zeros, sets NaN and infinite voxels to zero, and replaces
zero spacings. A scan changed in such ways must not be segmented as if nothing had happened. On a full disk ITK writes
what fits and reports success.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from os import SEEK_END
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError

HEADER_BYTES = {348: "NIfTI-1", 540: "NIfTI-2"}
"""Sizes of the headers, which are also their first numbers."""

LONGEST_HEADER = max(HEADER_BYTES)

FLOAT_TYPES = {16: "f4", 64: "f8"}
"""NIfTI's codes of floating-point voxels and their NumPy types."""

VOXEL_TYPES = {
    **FLOAT_TYPES, 2: "u1", 4: "i2", 8: "i4", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""NIfTI's codes of real numbers and their NumPy types."""

CHUNK_BYTES = 1 << 20

GZIP_MAGIC = b"\x1f\x8b"

GZIP_LENGTH = struct.Struct("<I")
"""The end of a gzip file: its uncompressed length, modulo 2^32."""

GZIP_MODULUS = 2**32

GZIP_RATIO = 1100
"""No gzip file is longer by more once it is unpacked."""

SCALE_CHUNK = 1 << 24
"""Voxels that are scaled at a time, so that double precision needs little memory."""


@dataclass(frozen=True)
class Header:
    """The fields that matter here.

    ``size`` and ``spacing_mm`` are in the order (x, y, z, ...), ``offset`` is where the voxels start, ``voxel_type``
    NumPy's name of their type (None: no real numbers). ``raw`` is the header itself.
    """

    version: str
    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    offset: int
    bits: int
    voxel_type: str | None
    raw: bytes = b""

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, uncompressed."""
        return self.offset + self.voxels * self.bits // 8

    @property
    def voxels(self) -> int:
        """Their number."""
        return math.prod(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis sizes as NumPy takes them, without last axes of one voxel beyond the third: (Z, Y, X)."""
        size = list(self.size)
        while len(size) > 3 and size[-1] == 1:
            size.pop()
        return tuple(size[::-1])

    @property
    def is_volume(self) -> bool:
        """Whether the voxels are one 3-D array of real numbers that lies behind the header."""
        return (
            self.voxel_type is not None
            and self.bits == 8 * np.dtype(self.voxel_type).itemsize
            and self.offset >= len(self.raw)
            and len(self.shape) == 3
            and min(self.size) > 0
        )


@dataclass(frozen=True, eq=False)
class Nifti:
    """A whole NIfTI file: its header, and its voxels as they are stored (Z, Y, X), or None where it is no volume."""

    header: Header
    stored: np.ndarray | None

    def scaled(self, slope: float, intercept: float) -> np.ndarray:
        """The voxels' values: as stored, or ``slope * stored + intercept``, computed in double, kept in float32."""
        assert self.stored is not None
        if slope == 1 and intercept == 0:
            return self.stored
        values = np.empty(self.stored.shape, np.float32)
        step = max(1, SCALE_CHUNK // max(1, self.stored[0].size))
        for first in range(0, len(values), step):
            part = slice(first, first + step)
            values[part] = self.stored[part] * np.float64(slope) + np.float64(intercept)
        return values


def load_nifti(path: Path, case: str) -> Nifti | None:
    """Read a NIfTI file whole; None for a file of another kind, which is left to the reader.

    Compressed or not is told by the bytes and not by the name. What follows a whole gzip file is not looked at.

    Raises:
        CaseError: when the file is truncated or damaged, or has impossible spacings, NaN or infinite voxels.
    """
    chunks = _chunks(path, case)
    first = next(chunks, b"")
    header = parse_header(first)
    if header is None:
        for _ in chunks:  # still the whole file, so that a damaged one is found
            pass
        return None
    if not all(math.isfinite(s) and s != 0 for s in header.spacing_mm):
        raise CaseError(
            case, f"{path}: spacing (x, y, z) {header.spacing_mm} mm in the header, expected three numbers above 0"
        )
    on_disk = path.stat().st_size
    if not header.is_volume or header.file_bytes > on_disk * GZIP_RATIO:
        total = len(first) + sum(len(chunk) for chunk in chunks)
        stored = None
    else:
        buffer = np.empty(header.file_bytes, np.uint8)
        total = _fill(buffer, chain((first,), chunks))
        stored = None if total < header.file_bytes else _voxels(buffer, header)
    if total < header.file_bytes:
        raise CaseError(case, f"{path}: is truncated, {total} of {header.file_bytes} bytes; copy it again")
    if stored is not None and stored.dtype.kind == "f":
        bad = stored.size - int(np.count_nonzero(np.isfinite(stored)))
        if bad:
            raise CaseError(
                case, f"{path}: {bad} of {stored.size} voxels are NaN or infinite; expected finite CT numbers"
            )
    return Nifti(header, stored)


def load_header(path: Path) -> Header | None:
    """The header alone; None for a file that is no NIfTI file or cannot be read."""
    try:
        return parse_header(next(_chunks(path, path.name), b""))
    except CaseError:
        return None


def is_whole(path: Path) -> bool:
    """Whether a NIfTI file that was just written, in one piece, has all its bytes.

    Of a gzip file the length is taken that stands at its end, so that it need not be read through.
    """
    with open(path, "rb") as file:
        start = file.read(CHUNK_BYTES)
        size = file.seek(0, SEEK_END)
        if path.name.lower().endswith(".gz"):
            file.seek(max(0, size - GZIP_LENGTH.size))
            end = file.read()
            start = zlib.decompressobj(wbits=31).decompress(start, LONGEST_HEADER)
            size = GZIP_LENGTH.unpack(end)[0] if len(end) == GZIP_LENGTH.size else 0
    header = parse_header(start)
    return header is not None and header.file_bytes % GZIP_MODULUS == size % GZIP_MODULUS


def parse_header(start: bytes) -> Header | None:
    """The header at the start of an uncompressed NIfTI file, in either byte order; None when it is none."""
    for order in "<>":
        length = struct.unpack_from(f"{order}i", start)[0] if len(start) >= 4 else 0
        if len(start) < length or length not in HEADER_BYTES:
            continue
        if HEADER_BYTES[length] == "NIfTI-1":
            dim = struct.unpack_from(f"{order}8h", start, 40)
            kind, bits = struct.unpack_from(f"{order}2h", start, 70)
            pixdim = struct.unpack_from(f"{order}8f", start, 76)
            offset = int(struct.unpack_from(f"{order}f", start, 108)[0])
        else:
            kind, bits = struct.unpack_from(f"{order}2h", start, 12)
            dim = struct.unpack_from(f"{order}8q", start, 16)
            pixdim = struct.unpack_from(f"{order}8d", start, 104)
            offset = struct.unpack_from(f"{order}q", start, 168)[0]
        axes = min(7, max(1, dim[0]))
        return Header(
            HEADER_BYTES[length],
            tuple(dim[1 : 1 + axes]),
            tuple(pixdim[1 : 1 + min(3, axes)]),
            offset,
            bits,
            f"{order}{VOXEL_TYPES[kind]}" if kind in VOXEL_TYPES else None,
            bytes(start[:length]),
        )
    return None


def _fill(buffer: np.ndarray, chunks: Iterator[bytes]) -> int:
    """Put the file's bytes into the buffer; returns how many there were, those that did not fit included."""
    total = 0
    for chunk in chunks:
        fits = min(len(chunk), max(0, buffer.size - total))
        if fits:
            buffer[total : total + fits] = np.frombuffer(chunk, np.uint8, fits)
        total += len(chunk)
    return total


def _voxels(buffer: np.ndarray, header: Header) -> np.ndarray:
    stored = np.frombuffer(buffer, header.voxel_type, header.voxels, header.offset).reshape(header.shape)
    if not stored.flags.aligned or not stored.dtype.isnative:
        stored = stored.astype(stored.dtype.newbyteorder("="))
    return stored


def _chunks(path: Path, case: str) -> Iterator[bytes]:
    """The uncompressed bytes of a file."""
    try:
        with open(path, "rb") as file:
            first = file.read(CHUNK_BYTES)
            rest = iter(lambda: file.read(CHUNK_BYTES), b"")
            if path.name.lower().endswith(".gz") and (first.startswith(GZIP_MAGIC) or parse_header(first) is None):
                yield from _inflate(first, rest, path, case)
            else:
                yield first
                yield from rest
    except OSError as error:
        raise CaseError(case, f"{path}: cannot be read ({error.strerror or error})") from error


def _inflate(first: bytes, rest: Iterator[bytes], path: Path, case: str) -> Iterator[bytes]:
    """Decompressed bytes of a gzip file, which may have several members, up to what is none."""
    stream = zlib.decompressobj(wbits=31)
    try:
        for chunk in chain((first,), rest):
            while chunk:
                yield stream.decompress(chunk)
                chunk = stream.unused_data
                if chunk and not GZIP_MAGIC.startswith(chunk[:2]):
                    return
                if chunk:
                    stream = zlib.decompressobj(wbits=31)
    except zlib.error as error:
        raise CaseError(case, f"{path}: is damaged ({error}); copy it again") from error
    if not stream.eof:
        raise CaseError(case, f"{path}: is truncated after {path.stat().st_size} bytes; copy it again")
