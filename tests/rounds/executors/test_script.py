"""``--executor print``: the scripts do what the executors do, whatever the folders are called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import fake_slurm
from fake_tasks import finish, make_run, notes, plan_tasks, run_of

from nnunet_flare.files import write_json
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.rounds.executors.script import write_script, write_submission
from nnunet_flare.rounds.executors.slurm_options import parse_options
from nnunet_flare.rounds.run.tasks import graph

__all__ = ["fake_slurm"]

HOSTILE = ["a b'c\"$(touch pwned)", ";touch pwned\ntouch pwned\n`touch pwned`ü %j\\n", "-rf"]


def shell(script: Path, folder: Path, *, program: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the stand-ins for tasks, and our command on PATH as a user has it."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    ours = commands / "flare-pseudolabel"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m nnunet_flare.cli.pseudolabel "$@"\n')
    ours.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    environment["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [program, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def is_clean(script: Path) -> None:
    """No shell and no linter finds anything wrong with it."""
    program = script.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#!")
    assert subprocess.run([program, "-n", str(script)], check=False).returncode == 0
    linter = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if linter is not None:
        done = subprocess.run([linter, "--severity=warning", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("names", [[], HOSTILE], ids=["plain", "hostile"])
def test_the_loops_do_every_task_in_order_and_can_be_run_again_after_a_failure(tmp_path, names):
    run = make_run(tmp_path, root=tmp_path.joinpath(*names, "run"))
    finish(run, "plan", "unlabelled", "build-r0", "train-r0-f0", "label-r0-p0")
    plan_tasks(run, {"label-r0-p1": {"fail": True}})
    script = write_script(run)
    is_clean(script)
    first = shell(script, tmp_path, program="sh")
    assert first.returncode == 1 and "as the test asked" in first.stderr
    assert [line["task"] for line in notes(run)] == ["train-r0-f1", "label-r0-p1"], "it goes on after a failure"
    plan_tasks(run, {})
    assert shell(script, tmp_path, program="sh").returncode == 0
    assert all(run.paths.done(task).is_file() for task in graph(run))
    assert not list(tmp_path.rglob("pwned"))


def test_after_an_early_stop_the_loops_end_well(tmp_path):
    run = make_run(tmp_path, rounds="2", **{"stop.patience": "1"})
    script = write_script(run)
    write_json(run.paths.stop, {"last_labelled_round": 0, "mean_agreement": [0.5]})
    run = run.current()
    finish(run, *(name for name in graph(run) if name != "train-r1-fall"))
    done = shell(script, tmp_path, program="sh")
    assert done.returncode == 0, done.stderr
    assert [line["task"] for line in notes(run)] == ["train-r1-fall"]
    assert "select-r1: not needed, the run ended early" in done.stdout


@pytest.mark.parametrize("name", ["run", *HOSTILE])
def test_the_sbatch_lines_submit_jobs_that_do_their_tasks(tmp_path, fake_slurm, name):
    run = make_run(tmp_path, root=tmp_path / name / "run")
    words = ["partition=long,gres=gpu:a100:1,time=4:00:00", "extra=--comment='$(touch pwned) ;touch pwned'"]
    script = write_submission(run, parse_options(words))
    is_clean(script)
    done = shell(script, tmp_path, program="bash")
    assert done.returncode == 0, done.stderr
    check_jobs(run, fake_slurm)
    for number, job in fake_slurm.jobs.items():
        is_gpu = graph(run)[fake_slurm.tasks(number)[0]].gpus > 0
        assert (job["options"]["partition"], job["options"]["time"]) == ("long", "4:00:00")
        assert job["options"].get("gres") == ("gpu:a100:1" if is_gpu else None)
        assert job["options"]["comment"] == "$(touch pwned) ;touch pwned"
        assert job["options"]["chdir"] == str(run.root) and job["options"]["signal"] == "B:USR1@120"
    finish(run, "plan")
    batch = run.root / "slurm" / "build-r0.sh"
    is_clean(batch)
    assert shell(batch, tmp_path, program="bash").returncode == 0
    assert run.paths.done("build-r0").is_file()
    assert not list(tmp_path.rglob("pwned"))


def check_jobs(run, fake) -> None:
    """Every task is in one job, and every job waits for all that its tasks need, and for nothing else."""
    where = {task: number for number in fake.jobs for task in fake.tasks(number)}
    assert sorted(where) == sorted(graph(run))
    for number, job in fake.jobs.items():
        options, tasks = job["options"], fake.tasks(number)
        waits = options.get("dependency", "").removeprefix("afterok:")
        needed = {where[need] for task in tasks for need in graph(run)[task].needs}
        assert set(filter(None, waits.split(":"))) == needed
        assert needed <= {str(n) for n in range(100, int(number))}, "a job waits for one that is not submitted"
        assert options.get("array") == (f"0-{len(tasks) - 1}" if len(tasks) > 1 else None)
        assert ("kill-on-invalid-dep" in options) == bool(needed)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_graph_of_every_recipe_is_submitted_and_printed_whole(tmp_path, fake_slurm, name):
    from nnunet_flare.rounds.executors import slurm

    loaded = load_recipe(name)
    has_own_final = loaded.base_changes(final=True) != loaded.base_changes(final=False)
    plans = {
        "coarse_plans_name": None if loaded.roi is None else "nnUNetPlansCoarse",
        "final_plans_name": "nnUNetPlansFinal" if has_own_final else None,
    }
    evaluation = {"eval_images": str(tmp_path), "eval_labels": str(tmp_path)}
    run = run_of(tmp_path, loaded, shards=3, **plans, **evaluation)
    assert ("plan-coarse" in graph(run)) == (loaded.roi is not None)
    assert ("plan-final" in graph(run)) == has_own_final
    script = write_submission(run, {})
    is_clean(script)
    is_clean(write_script(run))
    assert shell(script, tmp_path, program="bash").returncode == 0
    check_jobs(run, fake_slurm)
    fake_slurm.write({"calls": [], "jobs": {}, "broken": []})
    slurm.submit(run, {})
    check_jobs(run, fake_slurm)


def test_a_submission_that_slurm_refuses_stops_there(tmp_path, fake_slurm):
    run = make_run(tmp_path)
    fake_slurm.break_down("sbatch")
    done = shell(write_submission(run, {}), tmp_path, program="bash")
    assert done.returncode == 1 and "out of order" in done.stderr
    assert len(fake_slurm.called("sbatch")) == 1
