"""A NIfTI file's header and voxels, read through once and checked on the way.

ITK fills the missing rest of a truncated or damaged file with zeros, sets NaN and infinite voxels to zero, and replaces
zero spacings. A scan changed in such ways must not be segmented as if nothing had happened. On a full disk ITK writes
what fits and reports success.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from os import SEEK_END
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images.deflate import DAMAGED, GZIP, inflater
from nnunet_flare.images.nifti_header import LONGEST_HEADER_BYTES, Header, check_header, parse_header

CHUNK_BYTES = 1 << 20

GZIP_MAGIC = b"\x1f\x8b"

GZIP_LENGTH = struct.Struct("<I")
"""The end of a gzip file: its uncompressed length, modulo 2^32."""

GZIP_MODULUS = 2**32

GZIP_RATIO = 1100
"""No gzip file is longer by more once it is unpacked."""

SCALE_CHUNK = 1 << 24
"""Voxels that are scaled at a time, so that double precision needs little memory."""


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


def load_nifti(path: Path, case: str) -> Nifti:
    """Read a NIfTI file whole.

    Compressed or not is told by the bytes and not by the name. What follows a whole gzip file is not looked at.

    Raises:
        CaseError: when the file is no NIfTI, truncated or damaged, or has impossible spacings, NaN or infinite voxels.
    """
    chunks = _chunks(path, case)
    first = _start(chunks)
    if parse_header(first) is None:
        for _ in chunks:  # a damaged or truncated stream is said to be that
            pass
    header = check_header(first, path, case)
    if not all(math.isfinite(s) and s != 0 for s in header.spacing_mm):
        raise CaseError(
            case, f"{path}: spacing (x, y, z) {header.spacing_mm} mm in the header, expected three numbers above 0"
        )
    is_plausible = header.is_volume and header.file_bytes <= path.stat().st_size * GZIP_RATIO
    buffer = np.empty(header.file_bytes if is_plausible else 0, np.uint8)
    total, surplus = 0, 0
    for chunk in chain((first,), chunks):
        surplus += surplus_bytes(chunk, header.file_bytes - total)
        fits = min(len(chunk), max(0, buffer.size - total))
        if fits:
            buffer[total : total + fits] = np.frombuffer(chunk, np.uint8, fits)
        total += len(chunk)
    if total < header.file_bytes:
        raise CaseError(case, f"{path}: is truncated: {total} of {header.file_bytes} bytes; copy it again")
    if surplus >= header.slice_bytes:
        raise CaseError(
            case,
            f"{path}: holds {total} bytes, the header says {header.file_bytes}; file or header is damaged, copy it "
            "again",
        )
    if not is_plausible:
        return Nifti(header, None)
    stored = _voxels(buffer, header)
    bad = stored.size - int(np.count_nonzero(np.isfinite(stored))) if stored.dtype.kind == "f" else 0
    if bad:
        raise CaseError(case, f"{path}: {bad} of {stored.size} voxels are NaN or infinite; expected finite CT numbers")
    return Nifti(header, stored)


def load_header(path: Path) -> Header | None:
    """The header alone; None for a file that is no NIfTI file or cannot be read."""
    try:
        return parse_header(_start(_chunks(path, path.name)))
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
            start = inflater().decompress(start, LONGEST_HEADER_BYTES)
            size = GZIP_LENGTH.unpack(end)[0] if len(end) == GZIP_LENGTH.size else 0
    header = parse_header(start)
    return header is not None and header.file_bytes % GZIP_MODULUS == size % GZIP_MODULUS


def _start(chunks: Iterator[bytes]) -> bytes:
    """The first chunks, as many as any header needs: the members of a gzip file may be short."""
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= LONGEST_HEADER_BYTES:
            break
    return start


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
                yield from inflate(chain((first,), rest), path, case)
            else:
                yield first
                yield from rest
    except OSError as error:
        raise CaseError(case, f"{path}: cannot be read ({error.strerror or error})") from error


def inflate(
    chunks: Iterator[bytes], path: Path, case: str, *, wbits: int = GZIP, several: bool = True
) -> Iterator[bytes]:
    """Decompressed bytes of a gzip stream (``wbits`` as zlib has it) of one or several members, up to what is none.

    Raises:
        CaseError: when the stream is damaged or truncated.
    """
    stream = inflater(wbits)
    try:
        for chunk in chunks:
            while chunk:
                yield stream.decompress(chunk)
                chunk = stream.unused_data if several else b""
                if chunk and not GZIP_MAGIC.startswith(chunk[:2]):
                    return
                if chunk:
                    stream = inflater(wbits)
    except DAMAGED as error:
        raise CaseError(case, f"{path}: is damaged ({error}); copy it again") from error
    if not stream.eof:
        raise CaseError(case, f"{path}: is truncated after {path.stat().st_size} bytes; copy it again")


def surplus_bytes(chunk: bytes, wanted: int) -> int:
    """How many bytes of a chunk come after those that are wanted; zeros are padding."""
    rest = chunk[max(0, wanted) :]
    return len(rest) if any(rest) else 0
