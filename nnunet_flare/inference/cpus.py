"""How many CPUs this process may use: those it is bound to, and no more than its container's quota.

``docker run --cpus`` and clusters set a quota of time per period on a control group, in version 2 in ``cpu.max``, in
version 1 in two files of the controller ``cpu``. Every group above counts too. Which group a process is in stands in
``/proc/self/cgroup``; inside a container that path may be the host's, and then the group is mounted at the root.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""The groups of this process: lines of number, controllers and path."""

CONTROLLER = "cpu"

VERSION_2_MOUNTS = ("", "unified")
"""Where version 2 is mounted: alone, or beside version 1."""


def limit_torch_threads() -> None:
    """Let PyTorch compute with no more threads than :func:`thread_count`: more of them wait for each other."""
    import torch

    torch.set_num_threads(thread_count())


def thread_count() -> int:
    """Threads to compute with: the usable CPUs, or fewer as ``OMP_NUM_THREADS`` or PyTorch say."""
    most = usable_cpus()
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        most = min(most, int(said))
    torch = sys.modules.get("torch")
    return most if torch is None or not hasattr(torch, "get_num_threads") else min(most, torch.get_num_threads())


def usable_cpus(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """CPUs that this process may use: those it may run on (its cpuset), and no more than any quota, at least one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _folders(groups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min([count, *(round(quota) for quota in quotas)]))


def _folders(groups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups of CPU time and of all groups above them."""
    paths = {"": PurePosixPath("/"), CONTROLLER: PurePosixPath("/")}
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    version_1 = {CONTROLLER}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0" and not controllers:
            paths[""] = PurePosixPath(place)
        elif CONTROLLER in controllers.split(","):
            paths[CONTROLLER] = PurePosixPath(place)
            version_1.add(controllers)  # mounted under the names of all its controllers, as cpu,cpuacct
    mounts = [(mount, paths[""]) for mount in VERSION_2_MOUNTS]
    mounts += [(mount, paths[CONTROLLER]) for mount in sorted(version_1)]
    for mount, path in mounts:
        if ".." in path.parts:  # above what is mounted here
            path = PurePosixPath("/")
        for group in (path, *path.parents):
            yield groups / mount / str(group).lstrip("/")


def _quota(folder: Path) -> float | None:
    """CPUs that a group may use, or None where it has no quota or is none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such group; "max"
        return None
