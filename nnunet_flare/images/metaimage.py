"""What a MetaImage (.mha, .mhd) says of its voxels, and whether they are there."""

from __future__ import annotations

import math
from pathlib import Path

from nnunet_flare.errors import CaseError
from nnunet_flare.images.payload import Payload, Unpacked, beside, check_payload, header_start

LOCAL = "LOCAL"
LAST_FIELD = "ElementDataFile"
"""Ends the header; the voxels follow it where its value is ``LOCAL``."""

GRID_FIELDS = (
    "Offset", "Origin", "Position", "TransformMatrix", "Rotation", "Orientation", "ElementSpacing", "ElementSize",
)  # fmt: skip
"""Fields of numbers of which the reader takes what is none as 0."""

ORDER_FIELDS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
"""Fields that are true where a voxel's most significant byte comes first."""

BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4,
    "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
"""Bytes of a voxel by its type."""


def check_metaimage(path: Path, case: str) -> Unpacked | None:
    """Refuse a MetaImage whose voxels are damaged, incomplete, in several files, or outside the header's folder.

    Returns:
        Its voxels where they had to be unpacked for that.

    Raises:
        CaseError: with what was found.
    """
    fields, end = _fields(path, case)
    payload = _payload(path, case, fields, end)
    return None if payload is None else check_payload(payload, path, case)


def _fields(path: Path, case: str) -> tuple[dict[str, str], int]:
    """The header's fields, and the byte after it."""
    start = header_start(path, case)
    fields: dict[str, str] = {}
    end = 0
    for line in start.splitlines(keepends=True) if b"\n" in start else ():
        end += len(line)
        text = line.decode("utf-8", "surrogateescape").strip()
        separator = min((mark for mark in "=:" if mark in text), key=text.index, default=None)
        if separator is None:
            continue
        name, _, value = text.partition(separator)
        fields[name.strip()] = value.strip()
        if name.strip() == LAST_FIELD:
            return fields, end
    raise CaseError(
        case, f"{path}: cannot be read: no {LAST_FIELD}, with which a MetaImage header ends; damaged or another format"
    )


def _payload(path: Path, case: str, fields: dict[str, str], end: int) -> Payload | None:
    """Where the voxels are; None where the header's other fields are left to the reader, which refuses them."""
    name = fields[LAST_FIELD]
    is_local = name.upper() == LOCAL
    file = path if is_local else beside(path, name, case)
    try:
        sizes = [int(size) for size in fields["DimSize"].split()]
        skipped = int(fields.get("HeaderSize", 0))
        packed = _is_true(fields.get("CompressedData", "False"))
        stored = int(float(fields["CompressedDataSize"])) if "CompressedDataSize" in fields else None
        channels = int(fields.get("ElementNumberOfChannels", 1))
        grid = [float(number) for name in GRID_FIELDS for number in fields.get(name, "").split()]
    except (KeyError, ValueError, OverflowError) as error:
        raise CaseError(
            case, f"{path}: cannot be read: the header's numbers are missing or damaged ({error})"
        ) from error
    if not all(math.isfinite(number) for number in grid):
        raise CaseError(case, f"{path}: origin, direction or spacing in the header is NaN or infinite")
    bytes_each = BYTES.get(fields.get("ElementType", ""))
    if bytes_each is None or not sizes or min(sizes) < 1 or not _is_true(fields.get("BinaryData", "True")):
        return None
    if (skipped > 0 and (packed or (is_local and skipped < end))) or (skipped < 0 and packed):
        raise CaseError(
            case,
            f"{path}: HeaderSize is {skipped}, but the header has {end} bytes and the voxels are "
            f"{'compressed' if packed else 'not compressed'}; the position of the voxels is unclear; save it again",
        )
    if packed and is_local and not stored:
        raise CaseError(case, f"{path}: lacks CompressedDataSize, so the voxels cannot be read; save it again")
    voxels = math.prod(sizes) * channels * bytes_each
    start = skipped if skipped != 0 else (end if is_local else 0)
    msb = {_is_true(fields[name]) for name in ORDER_FIELDS if name in fields}
    order = None if len(msb) > 1 else (">" if True in msb else "<")
    return Payload(file, start, voxels, voxels // sizes[-1], "zlib" if packed else "raw", stored=stored, order=order)


def _is_true(value: str) -> bool:
    """Whether the reader takes a field for true: it looks at the first letter alone."""
    return value[:1] in ("T", "t", "1")
