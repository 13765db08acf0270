"""Locks: one owner at a time, a dead owner's lock is taken over, a living one's never."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nnunet_flare import processes, signs_of_life
from nnunet_flare.processes import this_process
from nnunet_flare.rounds.run import locks
from nnunet_flare.rounds.run.locks import LockedError, LockFile, living_owner


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
    owner = {**this_process(), "born": None, "token": "other", "since": "before"}
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


@pytest.fixture
def hasty(monkeypatch):
    """Silent locks are watched for a moment only."""
    monkeypatch.setattr(signs_of_life, "WATCH_SECONDS", 0.4)


def test_another_hosts_lock_holds_until_its_heartbeat_is_old(tmp_path, caplog, hasty):
    path = tmp_path / "driver.lock"
    holder(path, host="node-7", pid=1)
    with pytest.raises(LockedError, match="node-7"), LockFile(path, "the run"):
        pass
    old = time.time() - signs_of_life.STALE_SECONDS - 60
    os.utime(path, (old, old))
    with caplog.at_level(logging.WARNING), LockFile(path, "the run"):
        pass
    assert "no sign of life" in caplog.text


def test_a_damaged_lock_file_is_not_taken_for_free_until_it_is_old(tmp_path, hasty):
    path = tmp_path / "driver.lock"
    path.write_text("{half")
    with pytest.raises(LockedError, match="damaged"), LockFile(path, "the run"):
        pass
    old = time.time() - signs_of_life.STALE_SECONDS - 60
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


# ------------------------------------------------------------------ containers: the same host name, other numbers

ELSEWHERE = {
    "another container": {"namespace": "pid:[1]"},
    "another boot": {"boot": "another"},
    "a namespace that is not known": {"namespace": processes.UNKNOWN},
    "a boot that is not known": {"boot": processes.UNKNOWN},
    "an earlier version of this package": {"namespace": None, "boot": None},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_an_owner_whose_number_says_nothing_here_is_judged_by_its_heartbeat(tmp_path, caplog, hasty, where):
    """Its number belongs to no process of ours, yet it may well live."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    path = tmp_path / "driver.lock"
    holder(path, pid=child.pid, **ELSEWHERE[where])
    with pytest.raises(LockedError, match="last sign of life"), LockFile(path, "the run"):
        pass
    assert living_owner(path) is not None
    old = time.time() - signs_of_life.STALE_SECONDS - 60
    os.utime(path, (old, old))
    assert living_owner(path) is None
    with caplog.at_level(logging.WARNING), LockFile(path, "the run"):
        assert json.loads(path.read_text())["token"] != "other"
    assert "no sign of life" in caplog.text


def test_where_our_own_namespace_is_not_known_nobody_is_judged_by_a_number(tmp_path, monkeypatch):
    path = tmp_path / "driver.lock"
    monkeypatch.setattr(processes, "numbers_are_ours", lambda: False)
    holder(path, pid=2**22 - 1)
    with pytest.raises(LockedError), LockFile(path, "the run"):
        pass


def test_a_silent_owner_that_shows_a_sign_of_life_while_it_is_watched_keeps_its_lock(tmp_path, monkeypatch):
    """A machine that slept, or a clock that jumped: the file's time is old, and the next heartbeat comes."""
    monkeypatch.setattr(signs_of_life, "WATCH_SECONDS", 3.0)
    path = tmp_path / "driver.lock"
    holder(path, namespace="pid:[1]")
    old = time.time() - 86_400
    os.utime(path, (old, old))
    later = threading.Timer(0.7, lambda: os.utime(path, (old + 30, old + 30)))
    later.start()
    with pytest.raises(LockedError), LockFile(path, "the run"):
        pass
    later.join()


def test_a_clock_that_differs_from_the_file_systems_takes_no_lock(tmp_path, monkeypatch):
    path = tmp_path / "driver.lock"
    holder(path, host="node-7")
    real = time.time
    for jump in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        with pytest.raises(LockedError), LockFile(path, "the run"):
            pass


def test_an_owner_that_cannot_send_a_heartbeat_keeps_its_lock_while_it_lives(tmp_path, hasty):
    """Paused, or in one long call of a library: the kernel still says that it holds the file."""
    path = tmp_path / "driver.lock"
    code = (
        "import os, signal, sys, pathlib\n"
        "from nnunet_flare.rounds.run import locks\n"
        "with locks.LockFile(pathlib.Path(sys.argv[1]), 'the run'):\n"
        "    print('in', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        holder(path, **{**json.loads(path.read_text()), "namespace": "pid:[1]"})  # as another container sees it
        os.utime(path, (1, 1))
        with pytest.raises(LockedError), LockFile(path, "the run"):
            pass
        child.kill()
        child.wait()
        os.utime(path, (1, 1))
        with LockFile(path, "the run"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_long_call_without_the_interpreters_lock_does_not_stop_the_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "driver.lock"
    with LockFile(path, "the run"):
        os.utime(path, (1, 1))
        subprocess.run(["sleep", "1"], check=True)
        assert path.stat().st_mtime > 1


def test_an_owner_that_lost_its_lock_ends_and_says_why(tmp_path):
    path = tmp_path / "driver.lock"
    code = (
        "import sys, time, pathlib, logging\n"
        "logging.basicConfig()\n"
        "from nnunet_flare.rounds.run import locks\n"
        "locks.HEARTBEAT_SECONDS = 0.05\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with locks.LockFile(path, 'the run'):\n"
        "    path.write_text(path.read_text().replace(path.read_text()[path.read_text().index('token'):][9:41], 'x'))\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == -15 and "took this lock over" in done.stderr


def test_a_lock_that_is_given_back_while_its_heartbeat_reads_it_ends_nobody(tmp_path):
    """The next owner of the file is no reason to end: the lock was given back, not lost."""
    code = (
        "import sys, threading, time, pathlib\n"
        "from nnunet_flare.rounds.run import locks\n"
        "locks.HEARTBEAT_SECONDS = 0.05\n"
        "path, reading = pathlib.Path(sys.argv[1]), threading.Event()\n"
        "class Slow(locks.LockFile):\n"
        "    def _owner(self):\n"
        "        if threading.current_thread() is not threading.main_thread():\n"
        "            reading.set()\n"
        "            time.sleep(0.5)\n"
        "        return super()._owner()\n"
        "with Slow(path, 'the run'):\n"
        "    reading.wait()\n"
        "with locks.LockFile(path, 'the run'):\n"
        "    time.sleep(1.5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path := tmp_path / "a.lock")], check=False)
    assert done.returncode == 0 and not path.exists()


def test_a_lock_that_another_took_over_first_never_leaves_its_place(tmp_path, monkeypatch):
    """In the meantime a third one would find none, and two would hold it at once."""
    path = tmp_path / "a.lock"
    holder(path, born="an earlier boot 4711")
    dead, moved = json.loads(path.read_text()), []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *places: (moved.append(places), rename(*places)))
    late = LockFile(path, "the run")
    with LockFile(path, "the run"):
        mine = path.read_text()
        late._remove(dead)
        assert path.read_text() == mine and not moved
    assert not path.exists()
    late._remove(dead)  # nothing is there to remove


def test_a_lock_whose_dead_owner_left_a_child_is_taken_over(tmp_path):
    path = tmp_path / "a.lock"
    holder(path, born="an earlier boot 4711")
    childs = signs_of_life.hold(path)
    with LockFile(path, "the run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    os.close(childs)


def in_new_namespace(*words, mount=True):
    """A command in a PID namespace of its own, as a container has; skipped where that is not allowed."""
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "--pid", "--fork", "--kill-child", *(["--mount-proc"] if mount else [])]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no PID namespace of its own can be made here (needs unshare and root)")
    return [*command, *words]


HOLD = (
    "import sys, time, pathlib\n"
    "from nnunet_flare.rounds.run.locks import LockFile\n"
    "with LockFile(pathlib.Path(sys.argv[1]), 'the run'):\n"
    "    print('in', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.mark.parametrize("mount", [True, False], ids=["own /proc", "the host's /proc"])
@pytest.mark.parametrize("inside", ["owner", "other"])
def test_a_driver_in_another_pid_namespace_keeps_its_lock(tmp_path, inside, mount):
    """Both ways: the owner in a container and we outside, and the owner outside and the other in a container."""
    path = tmp_path / "driver.lock"
    owner, other = [sys.executable, "-c", HOLD, str(path)], [sys.executable, "-c", HOLD, str(path)]
    if inside == "owner":
        owner = in_new_namespace(*owner, mount=mount)
    else:
        other = in_new_namespace(*other, mount=mount)
    child = subprocess.Popen(owner, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        done = subprocess.run(other, capture_output=True, text=True, check=False, timeout=50)
        assert done.returncode == 1 and "LockedError" in done.stderr and "last sign of life" in done.stderr
        assert child.poll() is None
    finally:
        for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
            process.kill()
        child.wait()
