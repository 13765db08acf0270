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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that keeps its suffixes; renamed to ``path`` on success, removed on failure."""
    temporary = path.with_name(f"{temporary_prefix()}{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename, its bytes on disk before the name is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, document: Any) -> None:
    """Write JSON by rename. NaN is refused: it is no JSON."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


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
