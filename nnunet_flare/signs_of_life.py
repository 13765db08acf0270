"""Whether the owner of a lock file still lives, by everything that can be known of it.

A process of our own host, boot and PID namespace is looked up by its number. Any other one is judged by its heartbeat:
the times of the lock file, compared with each other and with those of a new file beside it, never with our clock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunet_flare.processes import is_judged_by_number, why_ended

STALE_SECONDS = 600.0
"""A lock of another host or container whose heartbeat is older has lost its owner, if it stays silent."""

WATCH_SECONDS = 75.0
"""How long a silent lock is watched before it is taken over: a machine that slept sends its heartbeat meanwhile."""


def why_gone(owner: Mapping[str, Any]) -> str | None:
    """Why the owner of a lock is known to be gone; None while it may live."""
    return why_ended(owner) if is_judged_by_number(owner) else None


def is_silent(owner: Mapping[str, Any], path: Path) -> bool:
    """Whether an owner that cannot be looked up has not been heard of for :data:`STALE_SECONDS`."""
    if is_judged_by_number(owner) or is_held(path):
        return False
    age = silence(path)
    return age is not None and abs(age) > STALE_SECONDS


def silence(path: Path) -> float | None:
    """Seconds since the last heartbeat by the clock of the file system, which needs not be ours; None: no such lock."""
    probe = path.with_name(f".tmp-{uuid4().hex}-{path.name}")
    try:
        then = path.stat().st_mtime
        try:
            probe.touch()
            now = probe.stat().st_mtime
        except OSError:  # a folder that we may read only
            now = time.time()
        return now - then
    except FileNotFoundError:
        return None
    finally:
        with suppress(OSError):
            probe.unlink()


def beats(path: Path) -> bool:
    """Whether a lock shows a sign of life, or is given back, while it is watched."""
    try:
        first = path.stat()
        waited = 0.0
        while waited < WATCH_SECONDS:
            time.sleep(min(0.5, WATCH_SECONDS))
            waited += min(0.5, WATCH_SECONDS)
            now = path.stat()
            if (now.st_mtime_ns, now.st_ino) != (first.st_mtime_ns, first.st_ino) or is_held(path):
                return True
    except FileNotFoundError:
        return True
    return False


def hold(path: Path) -> int | None:
    """Hold a lock of the operating system on a lock file; None where the file system has none.

    It is given back by the kernel when its owner ends, and stands also while the owner cannot send a heartbeat: paused,
    or in one long call of a library. Not all network file systems show it to other hosts; so it only ever says that
    an owner lives, never that one is gone.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDWR)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_held(path: Path, token: object) -> bool:
    """Remove a lock file with this token while the operating system's lock on it is ours: then nobody else removes it.

    Returns:
        False where that cannot be: the file system has no such locks, or a child of the dead owner has it.
    """
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except (ImportError, OSError):
        return False
    try:
        if _token(descriptor) != token:  # it is another's by now
            return True
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
    except BlockingIOError:  # somebody looks at it or removes it: that takes no time
        time.sleep(0.05)
        with suppress(OSError):
            return not os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _token(descriptor: int) -> object:
    """Of a lock file's entry; None where it is damaged."""
    try:
        entry = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return None
    return entry.get("token") if isinstance(entry, dict) else None


def is_held(path: Path) -> bool:
    """Whether a living process holds :func:`hold`'s lock."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
