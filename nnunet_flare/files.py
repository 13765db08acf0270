"""Writing files so that a half-written one is never taken for done: write beside the target, then rename.

A temporary name says who made it: ``.tmp-p`` and 11 characters, 4 of the machine's start and process namespace, 5 of
the process, 2 that count. So the next command can tell what a killed one left from what a living one is writing, such
as the other parts of one prediction that write into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from nnunet_flare.disks import naming_disk_errors
from nnunet_flare.documents import csv_text, load_json
from nnunet_flare.errors import InputError

OURS = re.compile(
    r"\.tmp-(?:p(?P<machine>[0-9a-f]{4})(?P<process>[0-9a-z]{5})[0-9a-z]{2}-.*|[0-9a-f]{4,12}-.+|[0-9a-z_]{8})",
    re.DOTALL,
)
"""Temporary names of this package; the last two forms, which earlier versions gave, do not say who made them."""

ABANDONED_S = 3600.0
"""A temporary file is written within seconds to minutes; one that nobody has touched for longer is left over."""

CLOCKS_APART_S = 60.0
"""Files on another machine's disk carry that machine's time."""

_count = count()


def temporary_prefix() -> str:
    """The start of a new temporary name of this process."""
    return f".tmp-p{_machine()}{_base36(os.getpid(), 5)}{_base36(next(_count), 2)}-"


def _base36(number: int, digits: int) -> str:
    """The last digits of a number."""
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 36)
        text = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + text
    return text


@lru_cache(1)
def _machine() -> str:
    """Four digits of the machine, since when it runs, and of the container's processes: where a process id counts."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:4]


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove what killed commands left half-written in a folder; what a living process may be writing stays.

    Left over is what a process of this machine made that lives no more, what another machine or container made and
    did not touch for an hour, and what an earlier version made, which does not run beside this one.

    Args:
        folder: a missing one is left alone.
        below: in the folders below as well.
    """
    found = folder.rglob(".tmp-*") if below else folder.glob(".tmp-*")
    for path in list(found):
        match = OURS.fullmatch(path.name)
        if match is None or not _is_abandoned(path, match):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _is_abandoned(path: Path, match: re.Match[str]) -> bool:
    try:
        inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
        touched = max(one.lstat().st_mtime for one in (path, *inside))
    except OSError:  # gone meanwhile
        return False
    if match["machine"] is None:
        return True
    if match["machine"] == _machine() and not _lives(int(match["process"], 36), touched):
        return True
    return time.time() - touched > ABANDONED_S


def _lives(number: int, since: float) -> bool:
    """Whether the process that was there at a time still is; a number may have been given to a later process."""
    import psutil

    try:
        process = psutil.Process(number)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < since + CLOCKS_APART_S
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent``, removed at the end with all that is still in it."""
    folder = Path(mkdtemp(prefix=temporary_prefix(), dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


LOOP_FILES = ("{}_seg.b2nd", "{}_0000.nii.gz", "label_{}.nii.gz")
"""The longest names of files that the loop makes of a case; each is written under :func:`temporary_prefix` first."""


def name_problem(case: str, folder: Path, patterns: Sequence[str] = LOOP_FILES, *, renamed: bool = True) -> str | None:
    """Why a case's name is too long for the files that are written from it, in words; None where they all fit.

    Args:
        case: the id.
        folder: where they are written, or will be; its file system says how many bytes a name may have.
        patterns: names of the files, ``{}`` for the id.
        renamed: whether they are first written under :func:`temporary_prefix`.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        limit = os.pathconf(place, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        limit = 255
    own = len(os.fsencode(case))
    added = max(len(os.fsencode(pattern.replace("{}", ""))) for pattern in patterns)
    room = limit - added - (len(temporary_prefix()) if renamed else 0)
    if own <= room:
        return None
    return f"the name of case '{case[:30]}...' has {own} bytes, at most {room} are possible; shorten it"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that keeps its suffixes; renamed to ``path`` on success, removed on failure.

    Raises:
        OSError: what the disk says, whatever the writer made of it.
    """
    temporary = path.with_name(f"{temporary_prefix()}{path.name}")
    try:
        with naming_disk_errors(path):  # asked while the half-written file still takes its room
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename, its bytes on disk before the name is. What is no text is written as ``\\udcb8``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8", "backslashreplace")  # file names need not be text
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, document: Any) -> None:
    """Write JSON by rename. NaN is refused: it is no JSON."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, shape: Any = dict, *, remedy: str = "restore it from a copy") -> Any:
    """Read a JSON file that this package or nnU-Net wrote.

    Args:
        path: the file.
        shape: what its document must look like (see :mod:`nnunet_flare.shapes`).
        remedy: what to do when it is damaged.

    Raises:
        InputError: when it is missing, damaged or of another shape; the message ends with the remedy.
    """
    try:
        return load_json(path, shape)
    except InputError as error:
        raise InputError(f"{error}; the file is damaged: {remedy}" if path.is_file() else str(error)) from error


def holds(path: Path, shape: Any) -> bool:
    """Whether a file is there and is JSON of a shape."""
    try:
        load_json(path, shape)
    except InputError:
        return False
    return True


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write CSV by rename, guarded against formulas (see :func:`nnunet_flare.documents.csv_text`)."""
    write_text(path, csv_text(rows))


def link_or_copy(source: Path, target: Path) -> str:
    """Make ``target`` the same file as ``source``: hard link, else symbolic link, else copy. Returns which it was.

    An existing target is replaced by a fresh name, never written through, since it may itself be a link.
    """
    with suppress(FileNotFoundError):
        target.unlink()
    try:
        os.link(source, target)
        return "hard link"
    except OSError:
        pass
    try:
        os.symlink(source.resolve(), target)
        return "symbolic link"
    except OSError:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
        return "copy"


def remove_scratch(folder: Path) -> None:
    """Remove a folder through a rename, so that a killed removal leaves no half folder under the name."""
    if folder.exists():
        grave = folder.with_name(f"{temporary_prefix()}{folder.name}")
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def last_lines(path: Path, count: int = 8) -> str:
    """The last lines of a log, for an error message."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 8192))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(lines[-count:])
