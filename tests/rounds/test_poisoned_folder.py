"""A run that is started in a folder of files named as modules runs none of them, by any executor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tasks import make_run

from nnunet_flare.files import write_json, write_text
from nnunet_flare.rounds.executors.script import write_script
from nnunet_flare.rounds.executors.slurm import batch_script
from nnunet_flare.rounds.run.tasks import graph


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path, device="cpu", shards=1)
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    return run


@pytest.mark.parametrize("executor", ["local", "print", "slurm"])
def test_no_file_of_the_current_folder_runs_in_a_task(run, tmp_path, executor):
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    for name in ("tqdm", "numpy", "psutil", "json", "runpy", "logging", "nnunet_flare", "nnunetv2", "pickle"):
        (poisoned / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'a').write({name!r})\n")
    programs, shell = Path(sys.executable).parent, tmp_path / "programs"
    shell.mkdir()
    ours = shell / "flare-pseudolabel"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m nnunet_flare.cli.pseudolabel "$@"\n')
    ours.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{shell}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    environment.pop("PYTHONSAFEPATH", None)
    names = list(graph(run)) if executor == "local" else ["plan", "unlabelled"]
    commands = {"local": [[str(programs / "flare-pseudolabel"), "retry", "-o", str(run.root)]]}
    if executor == "print":
        head = write_script(run).read_text().partition("\n# build")[0]  # the first tasks are enough
        write_text(tmp_path / "run.sh", head)
        commands["print"] = [["sh", str(tmp_path / "run.sh")]]
    if executor == "slurm":
        write_text(tmp_path / "job.sh", batch_script(run, names))
        commands["slurm"] = [["env", f"SLURM_ARRAY_TASK_ID={index}", "bash", str(tmp_path / "job.sh")]
                             for index in range(len(names))]  # fmt: skip
    for command in commands[executor]:
        done = subprocess.run(command, cwd=poisoned, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert all(run.paths.done(name).is_file() for name in names)
    assert not (tmp_path / "marker").exists(), (tmp_path / "marker").read_text()
