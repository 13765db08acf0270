"""What a NRRD (.nrrd, .nhdr) says of its voxels, and whether they are there."""

from __future__ import annotations

import math
from pathlib import Path

from nnunet_flare.errors import CaseError
from nnunet_flare.images.payload import HEADER_LIMIT, Payload, Unpacked, beside, check_payload, header_start

MAGIC = b"NRRD000"

BYTES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t", "ushort", "unsigned short",
        "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
        "ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"),
}  # fmt: skip
"""Names of voxel types by the bytes of a voxel."""

BYTES_OF = {name: size for size, names in BYTES.items() for name in names}

PACKINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip"}
"""Encodings whose voxels are checked here. Of the readable others every number is parsed, so that the reader knows."""

ORDERS = {"little": "<", "big": ">"}
"""Values of the field ``endian``."""

UNREAD = ("bz2", "bzip2")


def check_nrrd(path: Path, case: str) -> Unpacked | None:
    """Refuse a NRRD whose voxels are damaged, incomplete, in several files, or outside the header's folder.

    Returns:
        Its voxels where they had to be unpacked for that.

    Raises:
        CaseError: with what was found.
    """
    fields, end = _fields(path, case)
    payload = _payload(path, case, fields, end)
    return None if payload is None else check_payload(payload, path, case)


def _fields(path: Path, case: str) -> tuple[dict[str, str], int]:
    """The header's fields, names in small letters, and the byte after it."""
    start = header_start(path, case)
    if not start.startswith(MAGIC):
        raise CaseError(case, f"{path}: cannot be read: does not begin with NRRD; damaged, or another format")
    fields: dict[str, str] = {}
    end = 0
    for line in start.split(b"\n"):
        end += len(line) + 1
        text = line.decode("utf-8", "surrogateescape").strip()
        if not text:
            return fields, min(end, len(start))
        name, mark, value = text.partition(":")
        if mark and not text.startswith("#") and not value.startswith("="):
            fields[name.strip().lower().replace(" ", "") if name.lower() in _SPACED else name.strip().lower()] = (
                value.strip()
            )
    raise CaseError(
        case, f"{path}: cannot be read: the empty line that ends a NRRD header is missing; damaged, copy it again"
    )


_SPACED = ("data file", "line skip", "byte skip")
"""Fields whose names are also written without the space."""


def _payload(path: Path, case: str, fields: dict[str, str], end: int) -> Payload | None:
    """Where the voxels are; None where the header's other fields are left to the reader, which refuses them."""
    file = path
    if "datafile" in fields:
        name = fields["datafile"]
        file, end = beside(path, name, case), 0
    encoding = fields.get("encoding", "").lower()
    if encoding in UNREAD:
        raise CaseError(case, f"{path}: encoding {encoding} cannot be read; save it with encoding gzip or raw")
    try:
        sizes = [int(size) for size in fields["sizes"].split()]
        lines, skip = int(fields.get("lineskip", 0)), int(fields.get("byteskip", 0))
    except (KeyError, ValueError) as error:
        raise CaseError(
            case, f"{path}: cannot be read: the header's numbers are missing or damaged ({error})"
        ) from error
    bytes_each, packing = BYTES_OF.get(fields.get("type", "").lower()), PACKINGS.get(encoding)
    if bytes_each is None or packing is None or not sizes or min(sizes) < 1:
        return None
    voxels = math.prod(sizes) * bytes_each
    start = _after_lines(file, end, lines)
    if packing == "gzip":
        order = "<" if bytes_each == 1 else ORDERS.get(fields.get("endian", "").lower())
        return Payload(file, start, voxels, voxels // sizes[-1], "gzip", skip=skip, order=order)
    return Payload(file, -1 if skip < 0 else start + skip, voxels, voxels // sizes[-1])


def _after_lines(file: Path, start: int, lines: int) -> int:
    """The byte after some lines of text."""
    with open(file, "rb") as stream:
        stream.seek(start)
        for _ in range(lines):
            stream.readline(HEADER_LIMIT)
        return stream.tell()
