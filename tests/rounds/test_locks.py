"""Locks: one owner at a time, a dead owner's lock is taken over, a living one's never."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nnunet_flare.rounds.run import locks
from nnunet_flare.rounds.run.locks import LockedError, LockFile


def test_a_second_owner_is_refused_with_the_first_ones_host_and_pid(tmp_path):
    path = tmp_path / "driver.lock"
    with LockFile(path, "the run"):
        with pytest.raises(LockedError) as caught, LockFile(path, "the run"):
            pass
        assert str(os.getpid()) in str(caught.value) and socket.gethostname() in str(caught.value)
    assert not path.exists()
    with LockFile(path, "the run"):
        assert path.exists()


def holder(path, **changes):
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "born": None, "token": "other", "since": "before"}
    path.write_text(json.dumps({**owner, **changes}))


def test_the_lock_of_a_process_that_was_killed_is_taken_over_and_that_is_said(tmp_path, caplog):
    path = tmp_path / "driver.lock"
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    holder(path, pid=child.pid)
    with caplog.at_level(logging.WARNING), LockFile(path, "the run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "taking over" in caplog.text and "ended" in caplog.text


def test_a_reused_process_number_does_not_keep_a_lock(tmp_path, caplog):
    path = tmp_path / "driver.lock"
    holder(path, born="an earlier boot 4711")
    with caplog.at_level(logging.WARNING), LockFile(path, "the run"):
        pass
    assert "another process now" in caplog.text


def test_a_wall_clock_that_jumps_does_not_take_a_living_owners_lock(tmp_path, monkeypatch):
    """The start of a process in wall-clock time moves with the clock (the kernel adds it to the time of the boot)."""
    path = tmp_path / "driver.lock"
    with LockFile(path, "the run"):
        jump = 3 * 86_400
        real_time, real_birth = time.time, psutil.Process.create_time
        monkeypatch.setattr(time, "time", lambda: real_time() + jump)
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: real_birth(process) + jump)
        with pytest.raises(LockedError), LockFile(path, "the run"):
            pass


def test_another_hosts_lock_holds_until_its_heartbeat_is_old(tmp_path, caplog):
    path = tmp_path / "driver.lock"
    holder(path, host="node-7", pid=1)
    with pytest.raises(LockedError, match="node-7"), LockFile(path, "the run"):
        pass
    old = time.time() - locks.STALE_SECONDS - 60
    os.utime(path, (old, old))
    with caplog.at_level(logging.WARNING), LockFile(path, "the run"):
        pass
    assert "no sign of life" in caplog.text


def test_a_damaged_lock_file_is_not_taken_for_free_until_it_is_old(tmp_path):
    path = tmp_path / "driver.lock"
    path.write_text("{half")
    with pytest.raises(LockedError, match="damaged"), LockFile(path, "the run"):
        pass
    old = time.time() - locks.STALE_SECONDS - 60
    os.utime(path, (old, old))
    with LockFile(path, "the run"):
        pass


def test_the_heartbeat_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    path = tmp_path / "driver.lock"
    with LockFile(path, "the run"):
        os.utime(path, (1, 1))
        for _ in range(200):
            if path.stat().st_mtime > 1:
                break
            time.sleep(0.02)
        assert path.stat().st_mtime > 1


def test_of_many_that_wait_one_at_a_time_enters(tmp_path):
    path, inside, most, entered = tmp_path / "plans.lock", [], [], []

    def work(number):
        with LockFile(path, "the plans", wait=True):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)
            entered.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(entered) == list(range(5)) and max(most) == 1
