"""Which process a number means: its host, boot and PID namespace belong to it.

Containers that share a host name number their processes each for itself, so that ``pid 7`` of one is another process,
or none, in the next. A process is judged or ended by its number only where host, boot and namespace are known to be
ours; where one of them cannot be told it is :data:`UNKNOWN`, which is never the same as anything.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

UNKNOWN = "unknown"


def this_process() -> dict[str, Any]:
    """What names this process among all: ``host``, ``pid``, ``boot``, ``namespace`` and ``born``."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": boot(),
        "namespace": namespace(),
        "born": process_birth(os.getpid()),
    }


def boot() -> str:
    """This start of this machine's kernel."""
    if sys.platform != "linux":
        return sys.platform  # no PID namespaces: the host says enough
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or UNKNOWN
    except (OSError, UnicodeError):
        return UNKNOWN


def namespace() -> str:
    """The PID namespace in which our process numbers hold."""
    return namespace_of(os.getpid()) if numbers_are_ours() else UNKNOWN


def namespace_of(pid: int) -> str:
    """The PID namespace of a process that ``/proc`` shows."""
    if sys.platform != "linux":
        return sys.platform
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # it has ended, or is not ours to look at
        return UNKNOWN


def numbers_are_ours() -> bool:
    """Whether ``/proc`` numbers processes as we do; one that was mounted in another PID namespace does not."""
    if sys.platform != "linux":
        return True
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def is_judged_by_number(other: Mapping[str, Any]) -> bool:
    """Whether a process that was noted as :func:`this_process` notes it can be looked up, or ended, by its number."""
    if not isinstance(other.get("pid"), int) or other.get("host") != socket.gethostname():
        return False
    places = (boot(), namespace())
    return UNKNOWN not in places and (other.get("boot"), other.get("namespace")) == places


def why_ended(other: Mapping[str, Any]) -> str | None:
    """Why a process that is judged by its number no longer lives; None while it does."""
    birth, born = process_birth(int(other["pid"])), other.get("born")
    if birth is None:
        return "that process has ended"
    if born is not None and birth != born:
        return "that process number belongs to another process now"
    return None


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
            start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            return f"{process.create_time():.0f}"
    except psutil.Error:
        return None
    return f"{start} {ticks}"


def still_running(processes: Iterable[psutil.Process], *, patience_s: float) -> list[psutil.Process]:
    """Which of these processes have not ended, after up to ``patience_s`` of waiting for that.

    A zombie has ended. ``psutil.wait_procs`` waits for its parent to fetch its exit code, which the first process of a
    container without ``--init`` never does for orphans.
    """
    ends = time.monotonic() + patience_s
    left = list(processes)
    while True:
        left = [process for process in left if not _has_ended(process)]
        if not left or time.monotonic() >= ends:
            return left
        time.sleep(0.02)


def _has_ended(process: psutil.Process) -> bool:
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
