"""Lock files that survive kill -9 and work across hosts that share a file system.

A lock is a file that names its owner. It is taken over, and that is said, when its owner is gone: its process does not
exist any more on this host, or another host has not touched the file for :data:`STALE_SECONDS`. Advisory locks of the
operating system are not used, because they are unreliable on the network file systems of clusters.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from nnunet_flare.errors import FlareError

log = logging.getLogger(__name__)

STALE_SECONDS = 600.0
"""A lock of another host whose heartbeat is older has lost its owner."""

HEARTBEAT_SECONDS = 30.0


class LockedError(FlareError):
    """Another living process holds the lock; the message names its host and pid."""


class LockFile:
    """A lock as a context manager.

    Args:
        path: the lock file; its folder is made.
        what: what is locked, for messages.
        wait: wait for a living owner instead of raising :class:`LockedError`.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self.path, self.what, self.wait = path, what, wait
        self._token = uuid4().hex
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> LockFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        said = False
        while not self._try():
            owner = self._owner()
            if owner is None:
                continue
            reason = _why_gone(owner, self.path)
            if reason is not None:
                log.warning("%s: taking over the lock of %s: %s", self.what, _name(owner), reason)
                self._remove(owner)
                continue
            if not self.wait:
                raise LockedError(
                    f"{self.what} is in use by {_name(owner)} ({self.path}). Wait for it or end it, then try again"
                )
            if not said:
                log.info("%s: waiting for %s", self.what, _name(owner))
                said = True
            time.sleep(0.2)
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        owner = self._owner()
        if owner is not None and owner.get("token") == self._token:
            with suppress(OSError):
                self.path.unlink()

    def _try(self) -> bool:
        """Create the file whole: written under another name, then linked, so that no reader sees it half done."""
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": process_birth(os.getpid()),
            "token": self._token,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        temporary = self.path.with_name(f".tmp-{self._token}-{self.path.name}")
        temporary.write_text(json.dumps(mine), encoding="utf-8")
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(mine))
            return True
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _owner(self) -> dict[str, object] | None:
        """The owner's entry; None when the lock was released just now."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _remove(self, owner: dict[str, object]) -> None:
        """Remove exactly this owner's lock: renamed first, so that of two that take over only one succeeds."""
        grave = self.path.with_name(f".tmp-{uuid4().hex}-{self.path.name}")
        try:
            os.rename(self.path, grave)
        except FileNotFoundError:
            return
        with suppress(OSError, ValueError):
            moved = json.loads(grave.read_text(encoding="utf-8"))
            if moved.get("token") != owner.get("token"):  # somebody else took over between our read and rename
                with suppress(FileExistsError):
                    os.link(grave, self.path)
        with suppress(OSError):
            grave.unlink()

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)


def living_owner(path: Path) -> dict[str, object] | None:
    """The entry (host, pid, since) of the process that holds a lock; None when nobody does or its owner is gone."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and _why_gone(owner, path) is None else None


def process_birth(pid: int) -> str | None:
    """What tells a process of this host from an earlier or later one with its number; None when there is none.

    On Linux that is the boot and the clock ticks since then, which stay the same when the wall clock is set.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        try:
            ticks = (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
            )
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            return f"{process.create_time():.0f}"
    except psutil.Error:
        return None
    return f"{boot} {ticks}"


def _why_gone(owner: dict[str, object], path: Path) -> str | None:
    """Why the owner of a lock no longer lives, or None while it may."""
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
        birth = process_birth(int(str(owner["pid"])))
        born = owner.get("born")
        if birth is None:
            return "that process has ended"
        if born is not None and birth != born:
            return "that process number belongs to another process now"
        return None
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    return f"no sign of life for {age / 60:.0f} minutes" if age > STALE_SECONDS else None


def _name(owner: dict[str, object]) -> str:
    if not owner:
        return "an unknown process (the lock file is damaged)"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
