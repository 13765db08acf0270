"""Which processes have ended."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from nnunet_flare.processes import still_running

NEGLECTFUL = (
    "import subprocess, sys, time\n"
    "children = [subprocess.Popen([sys.executable, '-c', code]) for code in ('pass', 'import time; time.sleep(60)')]\n"
    "print(*(child.pid for child in children), flush=True)\n"
    "time.sleep(60)\n"
)
"""Two children, of which nobody fetches the exit code: as the first process of a container neglects orphans."""


@pytest.fixture
def children():
    parent = subprocess.Popen([sys.executable, "-c", NEGLECTFUL], stdout=subprocess.PIPE, text=True)
    ended, lives = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    yield ended, lives
    lives.kill()
    parent.kill()
    parent.wait()
    parent.stdout.close()


def test_a_process_whose_exit_code_nobody_fetches_has_ended(children):
    began = time.monotonic()
    assert still_running(children[:1], patience_s=30) == []
    assert time.monotonic() - began < 20
    assert children[0].status() == psutil.STATUS_ZOMBIE


def test_one_that_lives_is_told_after_the_patience(children):
    assert still_running(children, patience_s=0.5) == [children[1]]
    children[1].kill()
    assert still_running(children, patience_s=30) == []
