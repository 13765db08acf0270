"""What ITK repairs silently when it reads NIfTI, and leaves out when it writes it, found in the bytes themselves.

ITK fills the missing rest of a truncated or damaged file with zeros, sets NaN and infinite voxels to zero, and replaces
zero and negative spacings. A scan changed in such ways must not be segmented as if nothing had happened, so the file is
read through once before (0.1 s per 40 MB). On a full disk ITK writes what fits and reports success.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError

HEADER_BYTES = 348
"""Size of a NIfTI-1 header, which is also its first number."""

FLOAT_TYPES = {16: "f4", 64: "f8"}
"""NIfTI's codes of floating-point voxels and their NumPy types."""

CHUNK_BYTES = 1 << 20

GZIP_LENGTH = struct.Struct("<I")
"""The end of a gzip file: its uncompressed length, modulo 2^32."""

GZIP_MODULUS = 2**32


@dataclass(frozen=True)
class Header:
    """The fields that matter here: axis sizes, spacing (x, y, z) in mm, where the voxels start, bits, float type."""

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    offset: int
    bits: int
    float_type: str | None

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, uncompressed."""
        return self.offset + math.prod(self.size) * self.bits // 8


def check_nifti(path: Path, case: str) -> None:
    """Refuse a NIfTI file that ITK would read only by changing it.

    Files that are no NIfTI-1 are left to the reader, which says so itself.

    Raises:
        CaseError: when the file is truncated or damaged, or has impossible spacings, NaN or infinite voxels.
    """
    chunks = _chunks(path, case)
    first = next(chunks, b"")
    header = parse_header(first)
    if header is None:
        for _ in chunks:  # still the whole file, so that a damaged one is found
            pass
        return
    if not all(math.isfinite(s) and s > 0 for s in header.spacing_mm):
        raise CaseError(
            case, f"{path}: spacing (x, y, z) {header.spacing_mm} mm in the header, expected three numbers above 0"
        )
    total, bad, rest = len(first), 0, first[header.offset :]
    for chunk in chunks:
        total += len(chunk)
        if header.float_type is not None:
            bad, rest = _count_bad(rest, header.float_type, bad)
            rest += chunk
    if header.float_type is not None:
        bad, _ = _count_bad(rest, header.float_type, bad)
    if total < header.file_bytes:
        raise CaseError(case, f"{path}: is truncated, {total} of {header.file_bytes} bytes; copy it again")
    if bad:
        voxels = math.prod(header.size)
        raise CaseError(case, f"{path}: {bad} of {voxels} voxels are NaN or infinite; expected finite CT numbers")


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
            start = zlib.decompressobj(wbits=31).decompress(start, HEADER_BYTES)
            size = GZIP_LENGTH.unpack(end)[0] if len(end) == GZIP_LENGTH.size else 0
    header = parse_header(start)
    return header is not None and header.file_bytes % GZIP_MODULUS == size % GZIP_MODULUS


def parse_header(start: bytes) -> Header | None:
    """The header at the start of an uncompressed NIfTI-1 file, in either byte order; None when it is none."""
    for order in "<>":
        if len(start) >= HEADER_BYTES and struct.unpack_from(f"{order}i", start)[0] == HEADER_BYTES:
            dim = struct.unpack_from(f"{order}8h", start, 40)
            kind, bits = struct.unpack_from(f"{order}2h", start, 70)
            pixdim = struct.unpack_from(f"{order}8f", start, 76)
            offset = int(struct.unpack_from(f"{order}f", start, 108)[0])
            axes = min(7, max(1, dim[0]))
            return Header(
                tuple(dim[1 : 1 + axes]),
                tuple(pixdim[1 : 1 + min(3, axes)]),
                offset,
                bits,
                f"{order}{FLOAT_TYPES[kind]}" if kind in FLOAT_TYPES else None,
            )
    return None


def _chunks(path: Path, case: str) -> Iterator[bytes]:
    """The uncompressed bytes of a file."""
    try:
        with open(path, "rb") as file:
            if path.name.lower().endswith(".gz"):
                yield from _inflate(iter(lambda: file.read(CHUNK_BYTES), b""), path, case)
            else:
                yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    except OSError as error:
        raise CaseError(case, f"{path}: cannot be read ({error.strerror or error})") from error


def _inflate(chunks: Iterator[bytes], path: Path, case: str) -> Iterator[bytes]:
    """Decompressed bytes of a gzip file, which may have several members."""
    stream = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            while chunk:
                yield stream.decompress(chunk)
                chunk = stream.unused_data
                if chunk:
                    stream = zlib.decompressobj(wbits=31)
    except zlib.error as error:
        raise CaseError(case, f"{path}: is damaged ({error}); copy it again") from error
    if not stream.eof:
        raise CaseError(case, f"{path}: is truncated after {path.stat().st_size} bytes; copy it again")


def _count_bad(data: bytes, dtype: str, bad: int) -> tuple[int, bytes]:
    """NaN and infinite values so far, and the bytes that do not make up a whole value yet."""
    whole = len(data) - len(data) % np.dtype(dtype).itemsize
    values = np.frombuffer(data[:whole], dtype)
    return bad + int(values.size - np.isfinite(values).sum()), data[whole:]
