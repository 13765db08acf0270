"""Which files of a folder are DICOM, and which may be slices that are damaged, packed, or not all there.

A slice that is missing in the middle leaves a gap. At the ends of a series nothing tells, so that every file that may
be a slice is read or named.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from nnunet_flare.images.deflate import DAMAGED, inflater

MAGIC = b"DICM"
MAGIC_OFFSET = 128
"""A DICOM file has these letters after its preamble."""

START_BYTES = 4096

FIRST_GROUPS = (0x0002, 0x0008)
"""A data set without preamble begins with an element of one of these groups."""

LONGEST_FIRST_ELEMENT = 256

VALUE_TYPES = (b"UL", b"CS", b"UI", b"LO", b"DA", b"TM", b"SH", b"DT", b"ST", b"OB", b"SQ", b"UT")
"""What a first element may hold, in explicit coding."""

GZIP_MAGIC = b"\x1f\x8b"

INDEX_NAME = "DICOMDIR"

SIDE_FILES = (
    ".txt", ".md", ".json", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".ini", ".log", ".html", ".htm", ".pdf", ".doc",
    ".docx", ".xls", ".xlsx", ".png", ".jpg", ".jpeg", ".gif", ".db", ".md5", ".sha1", ".sha256",
)  # fmt: skip
"""Endings of what is put beside slices and never is one."""

UNFINISHED = (".gz", ".bz2", ".xz", ".zst", ".part", ".partial", ".tmp", ".crdownload", ".filepart", "~")
"""Endings that programs add to the name of a file that is packed or not yet there."""


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do, with or without the preamble."""
    return _begins_as_dicom(_start(path))


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder (the index file DICOMDIR is none), sorted by name."""
    return [path for path in _files(folder) if is_dicom(path)]


def series_folders(folder: Path) -> list[Path]:
    """The folder itself, or those folders in it, that hold DICOM files, packed ones too."""
    if _holds_dicom(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_dicom(path)]


def doubtful_files(folder: Path, slices: Iterable[Path]) -> list[str]:
    """What may be a slice but cannot be read as one: each file's name, and what it is."""
    slices = set(slices)
    endings = {_ending(path.name) for path in slices}
    found = []
    for path in _files(folder):
        what = None if path in slices else _doubt(path, endings)
        if what is not None:
            found.append(f"{path.name} {what}")
    return found


def _files(folder: Path) -> list[Path]:
    """Whatever is no folder and not hidden, links to nothing too."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.is_dir() and path.name[0] != "." and path.name.upper() != INDEX_NAME
    ]


def _holds_dicom(folder: Path) -> bool:
    """Whether any file is DICOM; looks no further than the first that is."""
    starts = (_start(path) for path in _files(folder))
    return any(_begins_as_dicom(start) or _begins_as_dicom(_unpacked(start)) for start in starts)


def _doubt(path: Path, endings: set[str]) -> str | None:
    """Why a file that is no readable slice may be one all the same, or None."""
    if path.is_file() and path.stat().st_size == 0:
        return "is empty (0 bytes)"
    start = _start(path)
    if _begins_as_dicom(_unpacked(start)):
        return "is a gzip-compressed slice"
    if not _named_as_slice(path.name, endings):
        return None
    if not path.is_file():
        return "is a link to nothing" if path.is_symlink() else "is not a regular file"
    return "cannot be opened" if not start else "does not begin like a DICOM file"


def _named_as_slice(name: str, endings: set[str]) -> bool:
    """Whether a file is named as slices with some endings are, whatever a program that copied it put behind."""
    name = name.lower()
    for added in UNFINISHED:
        name = name.removesuffix(added)
    if Path(name).suffix in SIDE_FILES:
        return False
    return _ending(name) in endings or any(f".{part}" in endings for part in name.split(".")[1:])


def _ending(name: str) -> str:
    """A file name's ending in small letters; names that end with a number (UIDs) have none."""
    suffix = Path(name).suffix.lower()
    return "" if suffix[1:].isdigit() else suffix


def _start(path: Path) -> bytes:
    """The first bytes of a plain file; none of what cannot be opened."""
    try:
        if not path.is_file():  # a pipe would wait for its writer
            return b""
        with open(path, "rb") as stream:
            return stream.read(START_BYTES)
    except OSError:
        return b""


def _unpacked(start: bytes) -> bytes:
    """The first bytes of a gzip file's content, or none."""
    if not start.startswith(GZIP_MAGIC):
        return b""
    try:
        return inflater().decompress(start, START_BYTES)
    except DAMAGED:
        return b""


def _begins_as_dicom(start: bytes) -> bool:
    if start[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] == MAGIC:
        return True
    if len(start) < MAGIC_OFFSET:  # no slice is so short
        return False
    group, _, length = struct.unpack_from("<HHI", start)
    return group in FIRST_GROUPS and (start[4:6] in VALUE_TYPES or length <= LONGEST_FIRST_ELEMENT)
