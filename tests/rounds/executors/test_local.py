"""The driver of this machine: GPUs, and tasks that fail."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time

import pytest

from nnunet_flare.errors import FlareError
from nnunet_flare.rounds.executors import local, telling
from nnunet_flare.rounds.run.tasks import Task


class _Fake:
    """A run of four GPU tasks whose commands note when they held which GPU."""

    def __init__(self, folder, log, fail=()):
        self.root, self.log, self.fail = folder, log, fail
        from nnunet_flare.rounds.run.paths import RunPaths

        self.paths = RunPaths(folder)
        (folder / "tasks").mkdir(parents=True)

    def current(self):
        return self

    def environment(self):
        return dict(os.environ)

    def graph(self):
        return {f"work-{i}": Task(f"work-{i}", "label", (), 0, part=i, gpus=1) for i in range(4)}

    def command(self, name):
        marker = json.dumps({"task": name, "seconds": 0.25})
        done = f"open({str(self.paths.done(name))!r}, 'w').write({marker!r})"
        end = "sys.exit(7)" if name in self.fail else done
        return [sys.executable, "-c", (
            "import os, sys, time\n"
            "a = time.time(); time.sleep(0.25); b = time.time()\n"
            f"open({str(self.log)!r}, 'a').write(f\"{{os.environ['CUDA_VISIBLE_DEVICES']}} {{a}} {{b}}\\n\")\n"
            f"{end}\n"
        )]  # fmt: skip


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "graph", lambda run: run.graph())
    monkeypatch.setattr(telling, "graph", lambda run: run.graph())
    monkeypatch.setattr(local, "forget_damaged", lambda run: None)
    monkeypatch.setattr(Task, "command", lambda task, run: run.command(task.name))
    monkeypatch.setattr(local, "gpu_lock", lambda gpu: tmp_path / "machine" / f"gpu-{gpu}.lock")
    return tmp_path


def test_two_drivers_never_put_two_tasks_on_one_gpu(fakes):
    log = fakes / "log.txt"
    runs = [_Fake(fakes / name, log) for name in ("one", "two")]
    threads = [threading.Thread(target=local.run_local, args=(run, ["0", "1"])) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    held = [line.split() for line in log.read_text().splitlines()]
    assert len(held) == 8 and {gpu for gpu, _, _ in held} == {"0", "1"}
    for gpu in ("0", "1"):
        times = sorted((float(a), float(b)) for g, a, b in held if g == gpu)
        assert all(b <= a for (_, b), (a, _) in itertools.pairwise(times))


def test_a_failed_task_is_reported_with_its_exit_code_and_the_others_go_on(fakes):
    run = _Fake(fakes / "one", fakes / "log.txt", fail=("work-2",))
    with pytest.raises(FlareError, match="work-2 failed with exit code 7"):
        local.run_local(run, ["0"])
    assert all(run.paths.done(f"work-{i}").is_file() for i in (0, 1, 3))
    assert json.loads(run.paths.failed("work-2").read_text())["exit_code"] == 7
    run.fail = ()
    started = time.time()
    local.run_local(run, ["0"])  # only the failed one runs again
    assert run.paths.done("work-2").is_file() and not run.paths.failed("work-2").is_file()
    assert len([line for line in (fakes / "log.txt").read_text().splitlines() if float(line.split()[1]) > started]) == 1
