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
from itertools import chain
from os import SEEK_END
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.nifti_header import LONGEST_HEADER_BYTES, check_header, parse_header

CHUNK_BYTES = 1 << 20

GZIP_LENGTH = struct.Struct("<I")
"""The end of a gzip file: its uncompressed length, modulo 2^32."""

GZIP_MODULUS = 2**32


def check_nifti(path: Path, case: str) -> None:
    """Refuse a NIfTI file that ITK would read only by changing it.

    Raises:
        CaseError: when the file is no NIfTI, truncated or damaged, or has impossible spacings, NaN or infinite voxels.
    """
    chunks = _chunks(path, case)
    first = next(chunks, b"")
    if parse_header(first) is None:
        for _ in chunks:  # a damaged or truncated stream is said to be that
            pass
    header = check_header(first, path, case)
    if not all(math.isfinite(s) and s > 0 for s in header.spacing_mm):
        raise CaseError(
            case, f"{path}: spacing (x, y, z) {header.spacing_mm} mm in the header, expected three numbers above 0"
        )
    total, bad, rest, surplus = 0, 0, b"", 0
    for chunk in chain([first], chunks):
        surplus += surplus_bytes(chunk, header.file_bytes - total)
        total += len(chunk)
        if header.float_type is not None:
            bad, rest = _count_bad(rest, header.float_type, bad)
            rest += chunk
    if header.float_type is not None:
        bad, _ = _count_bad(rest, header.float_type, bad)
    if total < header.file_bytes:
        raise CaseError(case, f"{path}: is truncated, {total} of {header.file_bytes} bytes; copy it again")
    if surplus >= header.slice_bytes:
        raise CaseError(
            case,
            f"{path}: holds {total} bytes, the header tells of {header.file_bytes}; one of both is damaged",
        )
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
            start = zlib.decompressobj(wbits=31).decompress(start, LONGEST_HEADER_BYTES)
            size = GZIP_LENGTH.unpack(end)[0] if len(end) == GZIP_LENGTH.size else 0
    header = parse_header(start)
    return header is not None and header.file_bytes % GZIP_MODULUS == size % GZIP_MODULUS


def _chunks(path: Path, case: str) -> Iterator[bytes]:
    """The uncompressed bytes of a file."""
    try:
        with open(path, "rb") as file:
            if path.name.lower().endswith(".gz"):
                yield from inflate(iter(lambda: file.read(CHUNK_BYTES), b""), path, case)
            else:
                yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    except OSError as error:
        raise CaseError(case, f"{path}: cannot be read ({error.strerror or error})") from error


def inflate(
    chunks: Iterator[bytes], path: Path, case: str, *, wbits: int = 31, several: bool = True
) -> Iterator[bytes]:
    """Decompressed bytes of a gzip stream (``wbits`` as zlib has it), which may have several members.

    Raises:
        CaseError: when the stream is damaged or truncated.
    """
    stream = zlib.decompressobj(wbits=wbits)
    try:
        for chunk in chunks:
            while chunk:
                yield stream.decompress(chunk)
                chunk = stream.unused_data if several else b""
                if chunk:
                    stream = zlib.decompressobj(wbits=wbits)
    except zlib.error as error:
        raise CaseError(case, f"{path}: is damaged ({error}); copy it again") from error
    if not stream.eof:
        raise CaseError(case, f"{path}: is truncated after {path.stat().st_size} bytes; copy it again")


def surplus_bytes(chunk: bytes, wanted: int) -> int:
    """How many bytes of a chunk come after those that are wanted; zeros are padding."""
    rest = chunk[max(0, wanted) :]
    return len(rest) if any(rest) else 0


def _count_bad(data: bytes, dtype: str, bad: int) -> tuple[int, bytes]:
    """NaN and infinite values so far, and the bytes that do not make up a whole value yet."""
    whole = len(data) - len(data) % np.dtype(dtype).itemsize
    values = np.frombuffer(data[:whole], dtype)
    return bad + int(values.size - np.isfinite(values).sum()), data[whole:]
