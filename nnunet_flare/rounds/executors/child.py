"""Starting and ending child processes: each in a session of its own that ends with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

from nnunet_flare.children import safe_environment
from nnunet_flare.processes import numbers_are_ours
from nnunet_flare.signals import handling

END_SECONDS = 10.0
"""How long a group may take to end when it is asked, before it is killed."""

LAUNCHER = Path(__file__).with_name("launcher.py")


def start_child(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command that leads a session of its own, reads nothing and is ended when we die.

    Args:
        command: the command.
        environment: its environment; None: ours.
        output: where its output goes; None: where ours goes.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command],
        env=safe_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def run_child(command: list[str], *, environment: dict[str, str] | None = None, output: IO[bytes] | None = None) -> int:
    """Run a command whose process group ends when we are asked to end; arguments as for :func:`start_child`.

    Returns its exit code.
    """
    child = start_child(command, environment=environment, output=output)

    def forward(number: int, frame: FrameType | None) -> None:
        end_group(child.pid)
        raise SystemExit(128 + number)

    try:
        with handling(forward, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return child.wait()
    finally:
        end_group(child.pid)  # data loader processes that outlive a trainer that crashed


def end_group(group: int) -> None:
    """End every process of a group: asked first, killed after :data:`END_SECONDS`."""
    if not _group_lives(group):
        return
    for number, patience in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return
        waited = 0.0
        while waited < patience and _group_lives(group):
            time.sleep(0.05)
            waited += 0.05
        if not _group_lives(group):
            return


def _group_lives(group: int) -> bool:
    import psutil

    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if not numbers_are_ours():  # /proc is of another PID namespace: its numbers mean other processes
        return True
    for process in psutil.process_iter(["pid", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            with suppress(OSError):
                if os.getpgid(process.info["pid"]) == group:
                    return True
    return False
