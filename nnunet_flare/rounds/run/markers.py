"""Markers of finished tasks. One that is empty or damaged says nothing: its task is done again."""

from __future__ import annotations

import logging
from pathlib import Path

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json

log = logging.getLogger(__name__)

MARKER = {"task": str, "seconds": float, "result?": dict}

_whole: set[tuple[str, int, int, int]] = set()
"""Markers that were read already: path, inode, size and time of change. A driver asks for each many times a second."""


def is_marked(path: Path) -> bool:
    """Whether a marker is there and whole."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    identity = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
    if identity not in _whole:
        try:
            read_json(path, MARKER, remedy="the task does not count as done")
        except InputError as error:
            log.warning("%s", error)
            return False
        _whole.add(identity)
    return True
