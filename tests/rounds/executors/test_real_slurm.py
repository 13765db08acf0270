"""The Slurm executor on a real Slurm: two nodes with two fake GPUs each, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from fake_tasks import make_run, notes, plan_tasks
from slurm_lab import SlurmLab, missing_binaries

from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.executors import slurm
from nnunet_flare.rounds.executors.script import write_submission
from nnunet_flare.rounds.executors.slurm_options import parse_options
from nnunet_flare.rounds.run.tasks import graph, is_done
from nnunet_flare.rounds.status import status

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing_binaries()),
        reason=f"no {', '.join(missing_binaries())}: apt-get install slurmctld slurmd slurm-client munge",
    ),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(lab, monkeypatch, tmp_path):
    """The cluster, empty, with its commands on PATH; jobs find the stand-ins for tasks."""
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    yield lab
    for job in lab.call("squeue", "-h", "-o", "%A").split():
        lab.call("scancel", job)
    lab.wait(lambda: not lab.call("squeue", "-h").strip())


def all_done(run) -> bool:
    return all(is_done(run, task) for task in graph(run).values())


def job_of(run, task: str) -> str:
    return slurm.queue(run)[task].job


def test_a_whole_run_goes_through_and_no_gpu_is_held_twice(cluster, tmp_path):
    run = make_run(tmp_path, shards=6, **{"members.count": "5"})
    plan_tasks(run, {task: {"seconds": 0.5} for task in graph(run) if task.startswith(("train", "label"))})
    jobs = slurm.submit(run, {})
    assert len(jobs) == 10
    cluster.wait(lambda: all_done(run), 120)
    order = [line["task"] for line in notes(run)]
    assert sorted(order) == sorted(graph(run)), "each task ran once"
    for task in graph(run).values():
        assert all(order.index(need) < order.index(task.name) for need in task.needs)
    ends = {line["task"]: line["time"] for line in notes(run, "end")}
    held: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in notes(run):
        if graph(run)[line["task"]].gpus:
            held.setdefault((line["SLURMD_NODENAME"], line["CUDA_VISIBLE_DEVICES"]), []).append(
                (line["time"], ends[line["task"]])
            )
        else:
            assert line["CUDA_VISIBLE_DEVICES"] in (None, "", "NoDevFiles")
    assert {gpu for _, gpu in held} == {"0", "1"}
    for times in held.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(times)))


def test_the_printed_sbatch_lines_do_a_whole_run(cluster, tmp_path):
    run = make_run(tmp_path)
    done = subprocess.run(
        ["bash", str(write_submission(run, {}))], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(": job ") == 10
    cluster.wait(lambda: all_done(run), 120)
    order = [line["task"] for line in notes(run)]
    assert sorted(order) == sorted(graph(run)), "each task ran once"
    for task in graph(run).values():
        assert all(order.index(need) < order.index(task.name) for need in task.needs)


def test_a_failed_fold_cancels_what_needs_it_and_retry_runs_only_what_is_missing(cluster, tmp_path):
    run = make_run(tmp_path)
    plan_tasks(run, {"train-r0-f1": {"fail": True}})
    slurm.submit(run, {})
    cluster.wait(lambda: run.paths.failed("train-r0-f1").is_file() and not slurm.queue(run))
    assert is_done(run, graph(run)["train-r0-f0"]) and not is_done(run, graph(run)["label-r0-p0"])
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    text = status(run)
    assert "FAILED train-r0-f1 (exit code 1)" in text and f"flare-pseudolabel retry -o {run.root}" in text
    plan_tasks(run, {})
    slurm.submit(run, {})
    cluster.wait(lambda: all_done(run))
    started = [line["task"] for line in notes(run)]
    assert started.count("train-r0-f0") == 1 and started.count("train-r0-f1") == 2 and started.count("plan") == 1


def test_at_the_walltime_signal_the_job_requeues_itself_and_the_training_goes_on(cluster, tmp_path):
    run = make_run(tmp_path, **{"members.count": "2"})
    plan_tasks(run, {"train-r0-f0": {"epochs": 40}})
    slurm.submit(run, {})
    checkpoint = run.root / "train-r0-f0.checkpoint"
    cluster.wait(lambda: checkpoint.is_file() and int(checkpoint.read_text()) >= 5)
    job = job_of(run, "train-r0-f0")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(lambda: len([line for line in notes(run) if line["task"] == "train-r0-f0"]) == 2)
    reached = int(checkpoint.read_text())
    cluster.wait(lambda: all_done(run), 90)
    first, second = (line for line in notes(run) if line["task"] == "train-r0-f0")
    assert (first["SLURM_JOB_ID"], second["SLURM_RESTART_COUNT"]) == (second["SLURM_JOB_ID"], "1")
    assert 5 <= reached < 40, "the second try goes on from the first one's checkpoint"


def test_a_preempted_training_is_requeued_by_slurm_and_goes_on(cluster, tmp_path):
    run = make_run(tmp_path)
    plan_tasks(run, {f"train-r0-f{fold}": {"epochs": 40} for fold in range(2)})
    slurm.submit(run, parse_options(["partition=lab"]))
    checkpoints = [run.root / f"train-r0-f{fold}.checkpoint" for fold in range(2)]
    cluster.wait(lambda: all(path.is_file() and int(path.read_text()) >= 3 for path in checkpoints))
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--gres=gpu:2", "--output=/dev/null"]
    urgent = cluster.call(*command, "--wrap=sleep 1").strip()
    cluster.wait(lambda: cluster.states().get(urgent) == "COMPLETED")
    cluster.wait(lambda: all_done(run), 90)
    tries = [line for line in notes(run) if line["task"].startswith("train-r0")]
    assert len(tries) == 4 and {line["SLURM_RESTART_COUNT"] for line in tries[2:]} == {"1"}


def test_cancel_empties_the_queue_and_leaves_no_process(cluster, tmp_path):
    run = make_run(tmp_path)
    plan_tasks(run, {f"train-r0-f{fold}": {"epochs": 600} for fold in range(2)})
    slurm.submit(run, {})
    checkpoints = [run.root / f"train-r0-f{fold}.checkpoint" for fold in range(2)]
    cluster.wait(lambda: all(path.is_file() for path in checkpoints))
    slurm.cancel(run)
    cluster.wait(lambda: not cluster.call("squeue", "-h").strip())
    reached = [path.read_text() for path in checkpoints]
    time.sleep(0.5)
    assert [path.read_text() for path in checkpoints] == reached, "a trainer lives on"
    assert not list(run.root.glob("tasks/train-r0-*.json"))
    plan_tasks(run, {})
    slurm.submit(run, {})
    cluster.wait(lambda: all_done(run))


def test_a_killed_submission_is_completed_and_no_task_runs_twice(cluster, tmp_path):
    run = make_run(tmp_path)
    code = (
        "import pathlib; from nnunet_flare.rounds.executors import slurm; "
        "from nnunet_flare.rounds.run import manifest; "
        f"slurm.submit(manifest.load_run(pathlib.Path({str(run.root)!r})), {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    cluster.wait(lambda: slurm.state_file(run).is_file() and len(read_json(slurm.state_file(run))["submissions"]) >= 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    slurm.submit(run, {})
    cluster.wait(lambda: all_done(run))
    assert sorted(line["task"] for line in notes(run)) == sorted(graph(run))


def test_after_an_early_stop_the_jobs_that_wait_end_well(cluster, tmp_path):
    run = make_run(tmp_path, rounds="3", **{"stop.patience": "1"})
    write_json(run.root / "stop-later.json", {"last_labelled_round": 0, "mean_agreement": [0.5]})
    plan_tasks(run, {"select-r0": {"seconds": 1}})
    slurm.submit(run, {})
    os.replace(run.root / "stop-later.json", run.paths.stop)
    run = run.current()
    cluster.wait(lambda: not slurm.queue(run) and not cluster.call("squeue", "-h").strip(), 120)
    assert all_done(run) and "train-r1-fall" in graph(run)
    assert set(cluster.call("squeue", "-h", "-t", "all", "-o", "%T").split()) <= {"COMPLETED", "FAILED", "CANCELLED"}
    assert not list(run.root.glob("tasks/*.failed.json"))


@pytest.mark.slow
def test_at_a_real_walltime_the_training_goes_on_in_the_next_one(cluster, tmp_path):
    run = make_run(tmp_path)
    plan_tasks(run, {"train-r0-f0": {"epochs": 900}})
    slurm.submit(run, parse_options(["time=3"]))  # minutes; the signal comes 2 to 3 minutes before the end
    cluster.wait(lambda: all_done(run), 400)
    tries = [line for line in notes(run) if line["task"] == "train-r0-f0"]
    assert len(tries) >= 2 and len({line["SLURM_JOB_ID"] for line in tries}) == 1


@pytest.mark.slow
def test_when_a_node_dies_its_training_goes_on_on_another(tmp_path, monkeypatch):
    with SlurmLab(tmp_path / "lab") as cluster:
        for name, value in {**cluster.environment, "PYTHONPATH": str(tmp_path / "site")}.items():
            monkeypatch.setenv(name, value)
        run = make_run(tmp_path)
        plan_tasks(run, {"train-r0-f0": {"epochs": 300}})
        slurm.submit(run, {})
        checkpoint = run.root / "train-r0-f0.checkpoint"
        cluster.wait(lambda: checkpoint.is_file() and int(checkpoint.read_text()) >= 5)
        lost = next(line["SLURMD_NODENAME"] for line in notes(run) if line["task"] == "train-r0-f0")
        cluster.lose_node(lost)
        cluster.wait(lambda: all_done(run), 240)
    tries = [line for line in notes(run) if line["task"] == "train-r0-f0"]
    assert len(tries) == 2 and tries[1]["SLURMD_NODENAME"] != lost


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_tiny_loop(cluster, tiny_loop, tmp_path, monkeypatch):
    """Training, labelling and selection as they are, on the CPUs of the two nodes."""
    import shutil

    from nnunet_flare.cli.pseudolabel import main

    monkeypatch.delenv("PYTHONPATH")
    for name in ("nnUNet_raw", "unlabelled", "test"):
        shutil.copytree(tiny_loop.folder / name, tmp_path / name, symlinks=True)
    shutil.rmtree(tmp_path / "nnUNet_raw" / "Dataset022_FLAREPhantom" / "imagesUn", ignore_errors=True)
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    loop = type(tiny_loop)(tmp_path, 0)
    for name, value in {**loop.environment, "nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(loop.command("--executor", "slurm", "--shards", "2")) == 0
    run = loop.run()
    cluster.wait(lambda: all_done(run) or list(run.root.glob("tasks/*.failed.json")), 800)
    assert not list(run.root.glob("tasks/*.failed.json"))
    assert (run.final.model / "fold_all" / "checkpoint_final.pth").is_file()
