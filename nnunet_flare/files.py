"""Writing files so that a half-written one is never taken for done: write beside the target, then rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that keeps its suffixes; renamed to ``path`` on success, removed on failure."""
    temporary = path.with_name(f".tmp-{uuid4().hex[:12]}-{path.name}")
    try:
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
