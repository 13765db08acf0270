"""The voxels of a file whose header says where they lie: all there, undamaged, and beside the header.

ITK checks little of it: it takes what a damaged zlib stream gives, fills the rest with whatever the memory held, and
follows a header to any file of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, Literal

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.images.deflate import GZIP, ZLIB_OR_GZIP
from nnunet_flare.images.nifti import CHUNK_BYTES, GZIP_RATIO, inflate, surplus_bytes


@dataclass(frozen=True)
class Payload:
    """Where a header says that voxels lie.

    ``start`` is the first byte in ``file``, or -1 for the last bytes of it; ``voxels`` the bytes of all voxels and
    ``slice_bytes`` those of one slice, uncompressed; ``skip`` uncompressed bytes before them (-1: as many as there
    are); ``stored`` the compressed bytes where the header tells. ``packing`` is ``raw``, ``zlib`` (one stream) or
    ``gzip`` (which may have several members). ``order`` of a voxel's bytes is ``<`` or ``>``, or None where the header
    does not tell it.
    """

    file: Path
    start: int
    voxels: int
    slice_bytes: int
    packing: Literal["raw", "zlib", "gzip"] = "raw"
    skip: int = 0
    stored: int | None = None
    order: str | None = None


@dataclass(frozen=True, eq=False)
class Unpacked:
    """All voxels of a compressed file as bytes (uint8), each in the order ``<`` or ``>``: none need inflate again."""

    content: np.ndarray
    order: str

    def voxels(self, kind: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Voxels (Z, Y, X) of a type of NumPy (``i2``), native; None where that is not what there is."""
        stored = np.dtype(self.order + kind)
        if self.content.size != int(np.prod(shape)) * stored.itemsize:
            return None
        return self.content.view(stored).reshape(shape).astype(stored.newbyteorder("="), copy=False)


HEADER_LIMIT = 1 << 20
"""Bytes in which a header's text must end; key/value pairs of a NRRD may be long."""


def header_start(path: Path, case: str) -> bytes:
    """The first bytes of a file, which hold its header's text.

    Raises:
        CaseError: when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(HEADER_LIMIT)
    except OSError as error:
        raise CaseError(case, f"{path}: cannot be read ({error.strerror or error})") from error


def beside(header: Path, name: str, case: str) -> Path:
    """The file of voxels that a header names, which must lie in the header's folder.

    Links are followed: a header that is a link may have its voxels beside the link or beside its target.

    Raises:
        CaseError: when it is elsewhere, missing, or no plain file, and when there are several.
    """
    if name.upper().split()[:1] == ["LIST"] or "%" in name:
        raise CaseError(
            case, f"{header}: names several data files ({name}); expected one. Convert the scan to a single file"
        )
    if Path(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise CaseError(case, f"{header}: names {name} as its data file; expected a file in its folder")
    if name in ("", "-"):
        raise CaseError(case, f"{header}: names {name!r} as its data file; expected a file in its folder")
    file = header.parent / name
    folders = {os.path.realpath(header.parent), os.path.dirname(os.path.realpath(header))}
    real = os.path.realpath(file)
    if not any(os.path.commonpath([folder, real]) == folder for folder in folders):
        raise CaseError(
            case, f"{header}: its data file {name} is {real}, outside the header's folder; put both into one folder"
        )
    if not os.path.isfile(real):
        what = "is not a regular file" if os.path.exists(real) else "does not exist"
        raise CaseError(case, f"{header}: cannot be read: its data file {name} {what}; put both into one folder")
    return file


def check_payload(payload: Payload, header: Path, case: str) -> Unpacked | None:
    """Read the voxels through once, and refuse what a reader would fill up or take as it is.

    Returns:
        The voxels of a compressed file, where they and nothing else are what is compressed and their order is known.

    Raises:
        CaseError: when they are truncated or damaged, or there is at least a slice more of them than the header says.
    """
    size = payload.file.stat().st_size
    is_plausible = payload.voxels <= size * GZIP_RATIO and payload.start + (payload.stored or 0) <= size
    wanted = is_plausible and payload.packing != "raw" and payload.skip == 0 and payload.order is not None
    content = np.empty(payload.voxels if wanted else 0, np.uint8)
    try:
        with open(payload.file, "rb") as file:
            if payload.packing == "raw":
                found, surplus = _raw(file, payload)
            else:
                found, surplus = _packed(file, payload, header, case, content)
    except OSError as error:
        raise CaseError(case, f"{payload.file}: cannot be read ({error.strerror or error})") from error
    where = header if payload.file == header else f"{header}: its data file {payload.file.name}"
    if found < payload.voxels:
        raise CaseError(case, f"{where}: is truncated: {found} of {payload.voxels} bytes of voxels; copy it again")
    if surplus >= payload.slice_bytes:
        raise CaseError(
            case,
            f"{where}: holds {found} bytes of voxels, the header says {payload.voxels}; file or header is damaged, "
            "copy it again",
        )
    return Unpacked(content, payload.order) if wanted and payload.order is not None else None


def _raw(file: BinaryIO, payload: Payload) -> tuple[int, int]:
    """Bytes of voxels, and how many of them are too many; zeros at the end are padding."""
    size = file.seek(0, os.SEEK_END)
    if payload.start < 0:
        return size, 0
    found = max(0, size - payload.start)
    if found - payload.voxels < payload.slice_bytes:
        return found, 0
    file.seek(payload.start + payload.voxels)
    return found, sum(surplus_bytes(chunk, 0) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))


def _packed(file: BinaryIO, payload: Payload, header: Path, case: str, content: np.ndarray) -> tuple[int, int]:
    """The same of compressed voxels, ``content`` filled as far as it goes; the checksum is compared on the way."""
    file.seek(payload.start)
    total, several = 0, payload.packing == "gzip"
    chunks = inflate(
        _read(file, payload.stored), header, case, wbits=GZIP if several else ZLIB_OR_GZIP, several=several
    )
    for chunk in chunks:
        fits = min(len(chunk), max(0, content.size - total))
        if fits:
            content[total : total + fits] = np.frombuffer(chunk, np.uint8, fits)
        total += len(chunk)
        if total > 2 * payload.voxels + max(0, payload.skip) + CHUNK_BYTES:  # no need to go on, whatever it is
            break
    if payload.skip < 0:
        return total, 0
    found = max(0, total - payload.skip)
    return found, payload.slice_bytes if found > payload.voxels else 0


def _read(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    """Chunks of a file, up to a number of bytes."""
    left = limit
    while left is None or left > 0:
        chunk = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not chunk:
            return
        yield chunk
        left = None if left is None else left - len(chunk)
