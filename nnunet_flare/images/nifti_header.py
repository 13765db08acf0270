"""The header of a NIfTI file, read from its bytes, and what in it cannot be true.

The libraries that read NIfTI differ in what they make of a damaged header, and say nothing: a first voxel before the
end of the header shifts all voxels, an unknown magic is read as Analyze (another orientation), axes below 1 become 1.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.errors import CaseError

HEADER_BYTES = 348
"""Size of a NIfTI-1 header, which is also its first number."""

LONGEST_HEADER_BYTES = 540
"""Size of a NIfTI-2 header, which is also its first number."""

VOXEL_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""NIfTI's codes of real numbers and their NumPy types."""

BITS = {
    2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32, 1024: 64, 1280: 64, 1536: 128,
    1792: 128, 2048: 256, 2304: 32,
}  # fmt: skip
"""NIfTI's codes of voxel types and the bits of a voxel."""

EXTENSION_BYTES = 4
"""Between a header and the first voxel, in a single file."""

DESCRIPTION_AT, DESCRIPTION_BYTES = 148, 80
"""Where a NIfTI-1 header has its free text, which ends with a zero."""

MAX_AXES = 7


@dataclass(frozen=True)
class _Layout:
    """Where the fields of one version lie: offset and ``struct`` format."""

    size: int
    magic: tuple[int, str]
    single: bytes
    kind: tuple[int, str]
    axes: tuple[int, str]
    spacing: tuple[int, str]
    offset: tuple[int, str]
    scale: tuple[int, str]
    codes: tuple[int, str]
    quaternion: tuple[int, str]
    rows: tuple[int, str]


_LAYOUTS = (
    _Layout(
        HEADER_BYTES, (344, "4s"), b"n+1\0", (70, "2h"), (40, "8h"), (76, "8f"), (108, "f"), (112, "2f"), (252, "2h"),
        (256, "6f"), (280, "12f"),
    ),
    _Layout(
        LONGEST_HEADER_BYTES, (4, "8s"), b"n+2\0\r\n\x1a\n", (12, "2h"), (16, "8q"), (104, "8d"), (168, "q"),
        (176, "2d"), (344, "2i"), (352, "6d"), (400, "12d"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """The fields that matter here.

    Sizes of the axes (x first), spacing (x, y, z) in mm, where the voxels start (bytes), their type as it is written
    and the order of bytes (``<`` or ``>``). ``problem`` says what cannot be true, or is None; ``raw`` is the header.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    offset: int
    kind: int
    order: str
    problem: str | None
    raw: bytes

    @property
    def bits(self) -> int:
        """Bits of a voxel, which its type alone decides."""
        return BITS.get(self.kind, 0)

    @property
    def version(self) -> str:
        """``NIfTI-1`` or ``NIfTI-2``."""
        return "NIfTI-1" if len(self.raw) == HEADER_BYTES else "NIfTI-2"

    @property
    def description(self) -> str:
        """The free text of NIfTI-1."""
        text = self.raw[DESCRIPTION_AT : DESCRIPTION_AT + DESCRIPTION_BYTES] if self.version == "NIfTI-1" else b""
        return text.split(b"\0")[0].decode("ascii", "replace")

    @property
    def voxel_type(self) -> str | None:
        """NumPy's name of the voxels' type; None where they are no real numbers."""
        return f"{self.order}{VOXEL_TYPES[self.kind]}" if self.kind in VOXEL_TYPES else None

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
        """Whether the voxels are one 3-D array of real numbers."""
        return self.problem is None and self.voxel_type is not None and len(self.shape) == 3

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, uncompressed."""
        return self.offset + self.voxels * self.bits // 8

    @property
    def slice_bytes(self) -> int:
        """Size of one plane of the last axis."""
        return math.prod(self.size[:-1]) * self.bits // 8


def parse_header(start: bytes) -> Header | None:
    """The header at the start of an uncompressed NIfTI-1 or -2 file, in either byte order; None when it is none."""
    for layout in _LAYOUTS:
        for order in "<>":
            if len(start) >= layout.size and struct.unpack_from(f"{order}i", start)[0] == layout.size:
                return _header(start, layout, order)
    return None


def check_header(start: bytes, path: Path, case: str) -> Header:
    """The header at the start of an uncompressed file.

    Raises:
        CaseError: where it is none, or says what cannot be true.
    """
    header = parse_header(start)
    if header is None:
        number = struct.unpack_from("<i", start)[0] if len(start) >= HEADER_BYTES else None
        found = f"only {len(start)} bytes" if number is None else f"its first number is {number}"
        raise CaseError(
            case,
            f"{path}: cannot be read: does not begin like NIfTI ({found}, expected {HEADER_BYTES} or "
            f"{LONGEST_HEADER_BYTES}); damaged, truncated, or another format with this name",
        )
    if header.problem is not None:
        raise CaseError(case, f"{path}: the header is damaged: {header.problem}; copy or convert the scan again")
    return header


def _header(start: bytes, layout: _Layout, order: str) -> Header:
    def read(field: tuple[int, str]) -> tuple:
        return struct.unpack_from(order + field[1], start, field[0])

    axes, (kind, bits), (offset,) = read(layout.axes), read(layout.kind), read(layout.offset)
    count = min(MAX_AXES, max(1, axes[0]))
    first_voxel = layout.size + EXTENSION_BYTES
    problem: str | None = None
    if not 1 <= axes[0] <= MAX_AXES:
        problem = f"{axes[0]} axes, expected 1 to {MAX_AXES}"
    elif min(axes[1 : 1 + count]) < 1:
        problem = f"axes of {axes[1 : 1 + count]} voxels, expected 1 or more each"
    elif read(layout.magic) != (layout.single,):
        problem = f"magic {read(layout.magic)[0]!r}, expected {layout.single!r} in a single file"
    elif kind not in BITS:
        problem = f"voxel type {kind}, which NIfTI does not have"
    elif bits != BITS[kind]:
        problem = f"{bits} bits per voxel, expected {BITS[kind]} for its voxel type {kind}"
    elif not math.isfinite(offset) or offset != int(offset) or offset < first_voxel:
        problem = f"voxels start at byte {offset:g}, expected a whole number, {first_voxel} or more"
    else:
        problem = _grid_problem(*(read(f) for f in (layout.scale, layout.codes, layout.quaternion, layout.rows)))
    whole = int(offset) if math.isfinite(offset) else 0
    spacing = read(layout.spacing)[1 : 1 + min(3, count)]
    return Header(tuple(axes[1 : 1 + count]), tuple(spacing), whole, kind, order, problem, bytes(start[: layout.size]))


def _grid_problem(scale: tuple, codes: tuple, quaternion: tuple, rows: tuple) -> str | None:
    """What is wrong with the fields of the grid and of the values' scale; those that are not used may hold anything."""
    qform, sform = codes
    slope, intercept = scale
    if sform > 0 and not all(math.isfinite(number) for number in rows):
        return "NaN or infinity in the sform, expected 12 finite numbers"
    if qform > 0 and not all(math.isfinite(number) for number in quaternion):
        return "NaN or infinity in the qform, expected 6 finite numbers"
    if math.isfinite(slope) and slope != 0 and not math.isfinite(intercept):
        return f"values are scaled by {slope:g} plus {intercept:g}, expected a finite number"
    return None
