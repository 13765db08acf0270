"""Ending a driver of this machine and its tasks; what is done is kept and ``retry`` goes on."""

from __future__ import annotations

import socket

import psutil

from nnunet_flare.errors import TaskError
from nnunet_flare.processes import is_judged_by_number, still_running
from nnunet_flare.rounds.run.locks import living_owner
from nnunet_flare.rounds.run.manifest import Run

END_SECONDS = 60.0
"""How long a driver may take to end its tasks."""


def cancel_driver(run: Run) -> str:
    """End a run's driver on this machine; returns what was done.

    Raises:
        TaskError: when the driver works on another machine, or does not end.
    """
    owner = living_owner(run.paths.driver_lock)
    if owner is None:
        return f"nothing to cancel: no driver is working on the run in {run.root}"
    host, number = str(owner.get("host")), owner.get("pid")
    if not is_judged_by_number(owner) or not isinstance(number, int):
        where = "in the container or session that started it" if host == socket.gethostname() else "there"
        raise TaskError(f"the driver of the run in {run.root} is process {number} on {host}: cancel it {where}")
    try:
        driver = psutil.Process(number)
        tasks = driver.children(recursive=True)
        driver.terminate()
    except psutil.NoSuchProcess:
        return "the driver ended by itself"
    alive = still_running([driver, *tasks], patience_s=END_SECONDS)
    if alive:
        raise TaskError(f"process {', '.join(str(p.pid) for p in alive)} did not end within {END_SECONDS:.0f} s")
    run.paths.driver_lock.unlink(missing_ok=True)
    return f"the driver (process {number}) and its tasks were ended"
