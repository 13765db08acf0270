"""One task: not before its time, and never beside what a killed one left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.rounds.do_task import TASK_VARIABLE, do_task
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import find_task


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_a_task_before_its_time_and_an_unknown_one_are_refused(run, capsys):
    run.paths.done("select-r0").unlink()
    run.paths.done("build-r1").unlink()
    assert main(["task", "-o", str(run.root), "build-r1"]) == 2
    assert "needs select-r0 first" in capsys.readouterr().err
    assert main(["task", "-o", str(run.root), "build-r9"]) == 2
    assert "build-r1" in capsys.readouterr().err


def test_workers_that_a_task_forks_end_at_once_when_nnunet_asks_them_to(run):
    code = (
        "import os, signal\n"
        "from nnunet_flare.cli.pseudolabel import main\n"
        f"main(['task', '-o', {str(run.root)!r}, 'plan'])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(3 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 4)\n"
        "print('worker', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "worker 3" in done.stdout


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["status", "-o", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert main(["status", "-o", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_process_left_over_from_a_killed_task_is_ended_before_the_task_starts_again(run, caplog):
    task = find_task(run, "build-r1")
    environment = {**os.environ, TASK_VARIABLE: f"{run.root.resolve()}:build-r1"}
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             env={**environment, TASK_VARIABLE: f"{run.root.resolve()}:build-r0"})  # fmt: skip
    try:
        run.paths.done("build-r1").unlink()
        do_task(run, task)
        assert orphan.poll() is not None and other.poll() is None
        assert f"ending process {orphan.pid}" in caplog.text
        assert run.paths.done("build-r1").is_file()
        assert TASK_VARIABLE not in os.environ, "what we start from now on is no process of that task"
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()
