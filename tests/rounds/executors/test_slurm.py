"""The Slurm executor against a fake Slurm: what is submitted, resubmitted, cancelled, and what a job does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import fake_slurm
from fake_tasks import finish, make_run, notes, plan_tasks

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.executors import slurm
from nnunet_flare.rounds.executors.slurm_options import parse_options, resources
from nnunet_flare.rounds.run.locks import LockedError, LockFile
from nnunet_flare.rounds.run.tasks import graph, stand_in

__all__ = ["fake_slurm"]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


# ------------------------------------------------------------------ what is submitted


def test_folds_and_shards_are_arrays_and_every_job_waits_for_what_it_needs(run, fake_slurm):
    slurm.submit(run, {})
    jobs = fake_slurm.jobs
    where = {task: number for number in jobs for task in fake_slurm.tasks(number)}
    assert list(where) == list(graph(run))
    assert jobs[where["train-r0-f0"]]["options"]["array"] == "0-1"
    assert jobs[where["label-r0-p1"]]["options"]["array"] == "0-1"
    assert "array" not in jobs[where["select-r0"]]["options"]
    for task in graph(run).values():
        options = jobs[where[task.name]]["options"]
        waits = set(options.get("dependency", "afterok:").removeprefix("afterok:").split(":")) - {""}
        assert waits == {where[need] for need in task.needs}
        assert ("kill-on-invalid-dep" in options) == bool(waits)
        assert options["signal"] == "B:USR1@120"


def test_only_tasks_that_hold_a_gpu_ask_for_one(run, fake_slurm):
    slurm.submit(run, parse_options(["partition=long,gres=gpu:a100:1,cpus=8", "extra=--account=lab --qos=high"]))
    for number, job in fake_slurm.jobs.items():
        is_gpu = fake_slurm.tasks(number)[0].startswith(("train", "label", "evaluate"))
        assert job["options"].get("gres") == ("gpu:a100:1" if is_gpu else None)
        assert (job["options"]["partition"], job["options"]["cpus-per-task"]) == ("long", "8")
        assert (job["options"]["account"], job["options"]["qos"]) == ("lab", "high")


def test_a_yaml_file_gives_each_stage_its_own(tmp_path, run, fake_slurm):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "all: {partition: cpu}\nselect: {time: 4:00:00}\n"
        "train: {partition: gpu, time: 2-00:00:00, mem: 64G, gres: gpu:2}\n"
    )
    slurm.submit(run, parse_options([str(path), "cpus=2"]))
    options = {fake_slurm.tasks(n)[0]: job["options"] for n, job in fake_slurm.jobs.items()}
    train, select = options["train-r0-f0"], options["select-r0"]
    assert [train[k] for k in ("partition", "time", "mem", "gres", "cpus-per-task")] == [
        "gpu", "2-00:00:00", "64G", "gpu:2", "2",
    ]  # fmt: skip
    assert select["partition"] == "cpu" and "time" not in options["plan"]
    assert select["time"] == "4:00:00", "YAML alone would read 14400"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["partition"], "is not key=value"),
        (["nodes=3"], "nodes"),
        (["cpus=0"], "cpus"),
        (["time=tomorrow"], "time"),
        (["extra=--dependency=afterok:1"], "set by the executor"),
        (["extra=-A lab"], "long options"),
        (["missing.yaml"], "missing.yaml: no such file"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_submitted(words, message):
    with pytest.raises(InputError, match=message):
        parse_options(words)


def test_a_yaml_file_with_an_unknown_stage_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {time: '10'}\n")
    with pytest.raises(InputError, match="stages are all, plan"):
        parse_options([str(tmp_path / "c.yaml")])


def test_a_training_on_two_gpus_asks_for_two(tmp_path):
    run = make_run(tmp_path, **{"training.num_gpus": "2"})
    task = graph(run)["train-r0-f0"]
    assert "--gres=gpu:2" in resources({}, task).arguments(task.gpus)


# ------------------------------------------------------------------ again


def test_what_is_queued_or_done_is_not_submitted_again(run, fake_slurm):
    first = slurm.submit(run, {})
    assert slurm.submit(run, {}) == []
    finish(run, "plan")
    fake_slurm.set(plan=None)
    assert slurm.submit(run, {}) == [] and len(fake_slurm.jobs) == len(first)


def test_retry_submits_the_failed_fold_and_its_dependents_and_keeps_the_fold_that_still_trains(run, fake_slurm, capsys):
    slurm.submit(run, {"all": {"partition": "lab"}})
    finish(run, "plan", "unlabelled", "build-r0")
    after = [name for name in graph(run) if name.startswith(("label", "select", "report-r0", "build-r1", "train-r1"))]
    gone = ["plan", "unlabelled", "build-r0", "train-r0-f0", *after, "report-r1"]
    fake_slurm.set(**{name.replace("-", "_"): None for name in gone}, train_r0_f1="RUNNING")
    write_json(run.paths.failed("train-r0-f0"), {"task": "train-r0-f0", "exit_code": 7, "last_lines": "no space"})
    known = set(fake_slurm.jobs)
    still = next(e for n in known for e, s in fake_slurm.jobs[n]["elements"].items() if s == "RUNNING")
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    assert main(["retry", "-o", str(run.root)]) == 0
    new = {number: fake_slurm.tasks(number) for number in fake_slurm.jobs if number not in known}
    assert [task for tasks in new.values() for task in tasks] == [
        name for name in graph(run) if name not in ("plan", "unlabelled", "build-r0", "train-r0-f1")
    ]
    options = {tasks[0]: fake_slurm.jobs[number]["options"] for number, tasks in new.items()}
    retrained = next(number for number, tasks in new.items() if tasks == ["train-r0-f0"])
    assert set(options["label-r0-p0"]["dependency"].removeprefix("afterok:").split(":")) == {retrained, still}
    assert options["train-r0-f0"]["partition"] == "lab", "the options of the first submission hold"
    assert not run.paths.failed("train-r0-f0").is_file()
    assert "jobs submitted" in capsys.readouterr().out


def test_a_waiting_job_that_does_not_know_the_new_one_is_replaced(run, fake_slurm):
    slurm.submit(run, {})
    fake_slurm.set(plan=None)  # lost, while its dependents still wait for it
    slurm.submit(run, {})
    waiting = [e for job in fake_slurm.jobs.values() for e, status in job["elements"].items() if status]
    assert len(waiting) == len(graph(run))
    assert len(fake_slurm.called("scancel")[0]) == len(graph(run)) - 1


def test_a_submission_killed_before_it_noted_the_job_finds_it_in_the_queue(run, fake_slurm):
    slurm.submit(run, {})
    document = read_json(slurm.state_file(run))
    document["submissions"][-1]["job"] = None
    write_json(slurm.state_file(run), document)
    assert slurm.submit(run, {}) == []


def test_a_submission_killed_half_way_is_completed(run, fake_slurm, monkeypatch):
    real, calls = slurm._sbatch, []

    def dies(*words):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(words)
        return real(*words)

    monkeypatch.setattr(slurm, "_sbatch", dies)
    with pytest.raises(KeyboardInterrupt):
        slurm.submit(run, {})
    monkeypatch.setattr(slurm, "_sbatch", real)
    slurm.submit(run, {})
    submitted = [task for number in fake_slurm.jobs for task in fake_slurm.tasks(number)]
    assert sorted(submitted) == sorted(graph(run))


def test_no_two_submit_at_once_and_no_local_driver_works_beside_the_queue(run, fake_slurm):
    with LockFile(run.paths.driver_lock, "test"), pytest.raises(LockedError):
        slurm.submit(run, {})
    slurm.submit(run, {})
    with pytest.raises(InputError, match="are in Slurm's queue"):
        slurm.leave(run)
    assert slurm.cancel(run) == len(graph(run))
    slurm.leave(run)
    assert not slurm.state_file(run).is_file()


# ------------------------------------------------------------------ Slurm says no


def test_a_refused_job_is_told_in_slurms_words(run, fake_slurm):
    fake_slurm.break_down("sbatch")
    with pytest.raises(TaskError, match=r"refused the job of plan: sbatch: sbatch: error: out of order.*0 jobs"):
        slurm.submit(run, {})


def test_nothing_is_submitted_when_the_queue_cannot_be_read(run, fake_slurm):
    slurm.submit(run, {})
    fake_slurm.break_down("squeue")
    before = len(fake_slurm.called("sbatch"))
    with pytest.raises(TaskError, match="squeue"):
        slurm.submit(run, {})
    assert len(fake_slurm.called("sbatch")) == before
    assert "Slurm cannot be asked here" in slurm.queue_rows(run)[0]


def test_without_slurm_the_missing_command_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="sbatch was not found"):
        slurm.submit(run, {})


def test_status_names_a_job_that_ended_without_a_result(run, fake_slurm, capsys):
    slurm.submit(run, {})
    fake_slurm.set(plan=None)
    assert main(["status", "-o", str(run.root)]) == 0
    printed = capsys.readouterr().out
    assert "ENDED plan without a result: job 100 OUT_OF_MEMORY, exit code 0:125" in printed
    assert f"flare-pseudolabel retry -o {run.root}" in printed
    fake_slurm.break_down("scontrol", "sacct")
    assert main(["status", "-o", str(run.root)]) == 0
    assert "job 100 is no longer known to Slurm" in capsys.readouterr().out


def test_cancel_takes_every_job_out(run, fake_slurm, capsys):
    slurm.submit(run, {})
    assert main(["cancel", "-o", str(run.root)]) == 0
    assert f"{len(graph(run))} tasks were removed" in capsys.readouterr().out
    assert not any(status for job in fake_slurm.jobs.values() for status in job["elements"].values())


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["a b'c\"$(touch pwned)", ";touch pwned\nü %j\\n"])
def test_hostile_folder_names_are_never_run(tmp_path, fake_slurm, name):
    run = make_run(tmp_path, root=tmp_path / name / "run")
    finish(run, "plan", "unlabelled")
    slurm.submit(run, {})
    script = next(iter(run.root.glob("slurm/build-r0-*.sh")))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert run.paths.done("build-r0").is_file()
    assert not list(tmp_path.rglob("pwned"))
    assert f"--chdir={run.root}" in fake_slurm.called("sbatch")[0]


# ------------------------------------------------------------------ early stop


def test_jobs_of_rounds_that_are_not_needed_any_more_end_well(tmp_path, fake_slurm):
    run = make_run(tmp_path, rounds="3", **{"stop.patience": "1"})
    planned = list(graph(run))
    write_json(run.paths.stop, {"last_labelled_round": 1, "mean_agreement": [0.5, 0.4]})
    run = run.current()
    assert stand_in(run, "train-r1-f1").name == "train-r1-f1"
    assert stand_in(run, "train-r2-f0").name == "train-r2-fall", "the first fold does the final training"
    assert stand_in(run, "train-r2-f1") is None and stand_in(run, "train-r3-fall") is None
    assert {t.name for n in planned if (t := stand_in(run, n))} == set(graph(run))
    with pytest.raises(InputError, match="has no task 'train-r7-f0'"):
        stand_in(run, "train-r7-f0")
    assert subprocess.run(job_command(run, "train-r2-f1"), check=False, timeout=60).returncode == 0


def test_a_queued_fold_that_became_the_final_training_is_not_submitted_again(tmp_path, fake_slurm):
    run = make_run(tmp_path, rounds="2")
    slurm.submit(run, {})
    write_json(run.paths.stop, {"last_labelled_round": 0, "mean_agreement": [0.5, 0.4]})
    run = run.current()
    assert "train-r1-fall" in slurm.queue(run)
    assert slurm.submit(run, {}) == []


# ------------------------------------------------------------------ what a job does


def job_command(run, task: str) -> list[str]:
    return [sys.executable, "-m", "nnunet_flare.rounds.job", str(run.root), task]


def start_job(run, task: str, tmp_path: Path, **environment: str) -> subprocess.Popen:
    full = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), **environment}
    return subprocess.Popen(job_command(run, task), env=full, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "did not happen in time"
        time.sleep(0.05)


def test_near_the_walltime_the_trainer_is_ended_and_the_job_put_back_and_goes_on(run, fake_slurm, tmp_path):
    finish(run, "plan", "build-r0")
    plan_tasks(run, {"train-r0-f0": {"epochs": 12}})
    checkpoint = run.root / "train-r0-f0.checkpoint"
    job = start_job(run, "train-r0-f0", tmp_path, SLURM_JOB_ID="123")
    wait_until(lambda: checkpoint.is_file() and int(checkpoint.read_text()) >= 3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=40) == 0
    assert fake_slurm.called("scontrol") == [["requeue", "123"]]
    reached = int(checkpoint.read_text())
    time.sleep(0.4)
    assert int(checkpoint.read_text()) == reached < 12, "the trainer lives on"
    assert not run.paths.done("train-r0-f0").is_file() and not run.paths.failed("train-r0-f0").is_file()
    assert not run.paths.task_lock("train-r0-f0").is_file(), "another node would wait for the lock"
    again = start_job(run, "train-r0-f0", tmp_path, SLURM_JOB_ID="123")
    assert again.wait(timeout=40) == 0 and run.paths.done("train-r0-f0").is_file()


def test_when_the_job_cannot_be_put_back_status_says_so(run, fake_slurm, tmp_path):
    finish(run, "plan", "build-r0")
    plan_tasks(run, {"train-r0-f0": {"epochs": 100}})
    fake_slurm.break_down("scontrol")
    job = start_job(run, "train-r0-f0", tmp_path, SLURM_JOB_ID="123")
    wait_until(lambda: notes(run))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=40) != 0
    assert "could not be put back into the queue" in read_json(run.paths.failed("train-r0-f0"))["last_lines"]


def test_scancel_ends_the_task_without_calling_it_failed(run, tmp_path):
    finish(run, "plan", "build-r0")
    plan_tasks(run, {"train-r0-f0": {"epochs": 100}})
    job = start_job(run, "train-r0-f0", tmp_path)
    wait_until(lambda: notes(run))
    job.terminate()
    assert job.wait(timeout=40) == 143
    assert not run.paths.failed("train-r0-f0").is_file() and not run.paths.task_lock("train-r0-f0").is_file()


def test_a_task_that_fails_leaves_its_last_lines_for_status(run, tmp_path):
    plan_tasks(run, {"plan": {"fail": True}})
    job = start_job(run, "plan", tmp_path)
    assert job.wait(timeout=40) == 1
    failed = read_json(run.paths.failed("plan"))
    assert failed["exit_code"] == 1 and "the scanner is on fire" in failed["last_lines"]


def test_a_job_of_a_folder_that_is_no_run_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nnunet_flare.rounds.job", str(tmp_path), "plan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "is not a run folder" in done.stderr
