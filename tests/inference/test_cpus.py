"""Threads keep to what the container may use, whichever version of control groups its host has."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nnunet_flare.inference.cpus import thread_count, usable_cpus


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


def machine(folder: Path, membership: str, files: dict[str, str]) -> int:
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cpus(folder / "groups", folder / "membership")


def version_1(place: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": f"{period}\n"}


V2 = "0::/\n"
V1 = "9:name=systemd:/\n3:cpuset:/\n2:cpuacct:/\n1:cpu:/\n0::/\n"


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("1000 100000", 1), ("max 100000", 64)],
)
def test_version_2(tmp_path: Path, quota: str, cpus: int) -> None:
    assert machine(tmp_path, V2, {"cpu.max": quota}) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [(200_000, 2), (50_000, 1), (-1, 64), (0, 64), (6_400_000_000, 64)])
def test_version_1(tmp_path: Path, quota: int, cpus: int) -> None:
    assert machine(tmp_path, V1, version_1("cpu", quota)) == cpus


def test_version_1_whose_controllers_are_mounted_together(tmp_path: Path) -> None:
    membership = "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert machine(tmp_path, membership, version_1("cpu,cpuacct/docker/abc", 300_000)) == 3


def test_version_1_in_a_container_that_sees_its_own_group_at_the_root_but_the_hosts_path(tmp_path: Path) -> None:
    assert machine(tmp_path, "1:cpu:/docker/0123\n0::/docker/0123\n", version_1("cpu", 200_000)) == 2


def test_a_group_below_the_mount_and_the_groups_above_it_count(tmp_path: Path) -> None:
    nested = {"slurm/job_7/step_0/cpu.max": "800000 100000", "slurm/job_7/cpu.max": "400000 100000"}
    assert machine(tmp_path, "0::/slurm/job_7/step_0\n", nested) == 4


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    files = {"unified/a/cpu.max": "700000 100000", **version_1("cpu/b", 500_000)}
    assert machine(tmp_path, "1:cpu:/b\n0::/a\n", files) == 5


def test_a_path_that_leads_above_the_mount_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert machine(tmp_path, "0::/../\n", {"cpu.max": "300000 100000"}) == 3


@pytest.mark.parametrize("quota", ["", "what", "100000", "100000 0", "1 2 3"])
def test_what_cannot_be_read_is_no_quota(tmp_path: Path, quota: str) -> None:
    assert machine(tmp_path, V2, {"cpu.max": quota}) == 64


def test_without_control_groups_the_process_has_what_it_is_bound_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus(tmp_path / "none", tmp_path / "no file") == 2
    assert machine(tmp_path, V2, {"cpu.max": "400000 100000"}) == 2


@pytest.mark.parametrize(("said", "most"), [("1", 1), ("0", 64), ("two", 64), ("", 64)])
def test_fewer_threads_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch, said: str, most: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("nnunet_flare.inference.cpus.usable_cpus", lambda: 64)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert thread_count() == most
