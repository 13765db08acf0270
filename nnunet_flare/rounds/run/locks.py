"""Lock files that survive kill -9 and work across hosts, and containers, that share a file system.

A lock is a file that names its owner. It is taken over, and that is said, when its owner is gone. An owner of our own
host, boot and PID namespace is looked up by its number. Of any other the heartbeat decides: the owner touches the file,
and one that is silent for long, and stays so while it is watched (:mod:`nnunet_flare.signs_of_life`), has lost its
owner. Locks of the operating system are held beside the file, and believed only when they say that the owner lives:
they are unreliable on the network file systems of clusters.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from nnunet_flare.errors import FlareError
from nnunet_flare.processes import is_judged_by_number, this_process
from nnunet_flare.signs_of_life import (
    STALE_SECONDS,
    WATCH_SECONDS,
    beats,
    hold,
    is_silent,
    remove_held,
    silence,
    why_gone,
)

log = logging.getLogger(__name__)

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
        self._ending = threading.Lock()
        self._beat: threading.Thread | None = None
        self._held: int | None = None

    def __enter__(self) -> LockFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        said = False
        while not self._try():
            owner = self._owner()
            if owner is None:
                continue
            reason = why_gone(owner)
            if reason is None and is_silent(owner, self.path):
                log.info("%s: watching the silent lock of %s for %.0f s", self.what, _name(owner), WATCH_SECONDS)
                reason = None if beats(self.path) else f"no sign of life for {STALE_SECONDS / 60:.0f} minutes or more"
            if reason is not None:
                log.warning("%s: taking over the lock of %s: %s", self.what, _name(owner), reason)
                self._remove(owner)
                continue
            if not self.wait:
                raise LockedError(
                    f"{self.what} is in use by {_name(owner)} ({self.path}). Wait for it or end it, then try again"
                    f"{self._when(owner)}"
                )
            if not said:
                log.info("%s: waiting for %s", self.what, _name(owner))
                said = True
            time.sleep(0.2 if is_judged_by_number(owner) else 2.0)  # looking for signs of life writes a file
        self._held = hold(self.path)
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ending:
            self._stop.set()
        if self._held is not None:
            os.close(self._held)
        owner = self._owner()
        if owner is not None and owner.get("token") == self._token:
            with suppress(OSError):
                self.path.unlink()

    def _when(self, owner: Mapping[str, Any]) -> str:
        """What a person can do about an owner that only its heartbeat tells of."""
        age = None if is_judged_by_number(owner) else silence(self.path)
        if age is None:
            return ""
        return (
            f". Its last sign of life is {abs(age):.0f} s old; after {STALE_SECONDS / 60:.0f} minutes without one the "
            "lock is taken over"
        )

    def _try(self) -> bool:
        """Create the file whole: written under another name, then linked, so that no reader sees it half done."""
        mine = {**this_process(), "token": self._token, "since": time.strftime("%Y-%m-%dT%H:%M:%S")}
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

    def _owner(self) -> dict[str, Any] | None:
        """The owner's entry; None when the lock was released just now."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _remove(self, owner: dict[str, Any]) -> None:
        """Remove exactly this owner's lock, so that of two that take over only one succeeds.

        Where the file system has no locks it is renamed first, and given back when it was somebody else's meanwhile.
        """
        if remove_held(self.path, owner.get("token")):
            return
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
            with self._ending:  # a lock that is being given back is soon another's, and no reason to end
                if self._stop.is_set():
                    return
                owner = self._owner()
                if owner and owner.get("token") != self._token:
                    log.error(
                        "%s: %s took this lock over; this process ends, so that two never write",
                        self.what,
                        _name(owner),
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                with suppress(OSError):
                    os.utime(self.path)
                if self._held is None:
                    self._held = hold(self.path)


def living_owner(path: Path) -> dict[str, Any] | None:
    """The entry (host, pid, since) of the process that holds a lock; None when nobody does or its owner is gone."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(owner, dict) or why_gone(owner) is not None or is_silent(owner, path):
        return None
    return owner


def _name(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "an unknown process (the lock file is damaged)"
    near = owner.get("host") == socket.gethostname() and not is_judged_by_number(owner)
    where = f"{owner.get('host')}{' (another container or start of it)' if near else ''}"
    return f"process {owner.get('pid')} on {where}, since {owner.get('since')}"
