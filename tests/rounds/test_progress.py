"""How far a run is, by what its trainings have logged: ``status``, ``status --watch`` and the log of ``run``."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from test_training_log import write as write_log

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import write_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.executors.telling import Teller
from nnunet_flare.rounds.progress import task_state, time_left
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run, create_run
from nnunet_flare.rounds.run.settings import RunSettings
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.status import status


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three members of 100 epochs, one final model of 200; the data is prepared, nothing is trained."""
    recipe = load_recipe("demo", {"training.num_epochs": "[100, 200]"})
    settings = RunSettings(
        name="look",
        dataset="Dataset022_Boxes",
        plans_name="plans",
        unlabelled_dir=str(tmp_path),
        recipe=recipe.model_dump(mode="json"),
        folders={name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        device="cpu",
        shards=1,
    )
    made = create_run(tmp_path / "run", settings, recipe)
    for name in ("plan", "unlabelled", "build-r0"):
        done(made, name, 0.1)
    return made


def done(run: Run, name: str, seconds: float) -> None:
    write_json(run.paths.done(name), {"task": name, "seconds": seconds})


def log_epochs(run: Run, number: int, fold: str, count: int, seconds: float) -> None:
    write_log(run.round(number).model / f"fold_{fold}", "1", *((n, 1.0 - n / 100, 0.5, seconds) for n in range(count)))


def left(run: Run):
    tasks = graph(run)
    return time_left(run, tasks, {name: task_state(run, task) for name, task in tasks.items()})


def test_with_everything_to_do_no_time_is_claimed(run):
    text = status(run)
    assert "time left: known after the first epoch of a training" in " ".join(text.split())
    assert "0.1 s of computing" not in text and "--dry-run" in text


def test_the_time_left_comes_from_the_epochs_of_a_running_training(run):
    log_epochs(run, 0, "0", 40, seconds=60.0)
    with LockFile(run.paths.task_lock("train-r0-f0"), "task"):
        found, text = left(run), status(run)
    # 60 epochs of fold 0, two more members of 100, a final model of 200
    assert found.seconds == pytest.approx(60 * (60 + 100 + 100 + 200), abs=1)
    assert found.unknown["label"] == 1 and "train" not in found.unknown
    row = next(line for line in text.splitlines() if line.startswith("train-r0-f0"))
    assert row.split()[1:7] == ["40/100", "1", "min", "00", "s", "0.610"]
    assert row.endswith("1 h 00 min") and "0.500" in row
    assert "time left: about 7 h 40 min of computing" in text


def test_longer_epochs_of_a_later_round_take_longer(run):
    write_json(
        run.plans_file,
        {
            "configurations": {
                run.round(0).configuration: {"flare": {"iterations_per_epoch": 100}},
                run.round(1).configuration: {"flare": {"iterations_per_epoch": 300}},
            }
        },
    )
    log_epochs(run, 0, "0", 100, seconds=10.0)
    for fold in ("0", "1", "2"):
        done(run, f"train-r0-f{fold}", 1100.0 if fold == "0" else 1000.0)
    # 200 epochs of three times the length, and what followed the last epoch of fold 0
    assert left(run).seconds == pytest.approx(200 * 30 + 100, abs=1)


def test_trainings_whose_logs_are_gone_still_tell_how_long_one_takes(run):
    for fold in ("0", "1", "2"):
        done(run, f"train-r0-f{fold}", 1000.0)
    assert left(run).seconds == pytest.approx(200 * 10.0, abs=1)


def test_a_last_task_that_takes_longer_than_those_before_is_said_to(run):
    tasks = list(graph(run))
    for name in tasks[:-1]:
        done(run, name, 0.0)
    with LockFile(run.paths.task_lock(tasks[-1]), "task"):
        assert status(run).splitlines()[-1] == "time left: the running tasks take longer than usual"


def test_a_task_whose_process_is_gone_is_said_to_have_stopped(run):
    lock = run.paths.task_lock("train-r0-f0")
    with LockFile(lock, "task"):
        text = lock.read_text()
        assert task_state(run, graph(run)["train-r0-f0"]) == "running"
    lock.write_text(re.sub(r'"pid": \d+', '"pid": 4194303', text))
    assert task_state(run, graph(run)["train-r0-f0"]) == "stopped"
    told = status(run)
    assert "stopped" in told and "No process is working on this run. To go on, type the same run command" in told


def test_the_driver_tells_the_first_epoch_and_then_seldom(run, caplog):
    caplog.set_level(logging.INFO, logger="nnunet_flare")
    teller = Teller()
    assert teller.look(run, ["train-r0-f0"]) and teller.words == "train-r0-f0 epoch 0/100"
    log_epochs(run, 0, "0", 25, seconds=4.0)
    assert not teller.look(run, ["train-r0-f0"])  # not every moment
    assert teller.look(run, ["train-r0-f0"], at_once=True)
    assert teller.part_done == 0.25 and "train-r0-f0 epoch 25/100, about" in teller.words
    assert "train-r0-f0: epoch 25/100, 4.0 s each, loss 0.760 (validation 2.927), moving Dice 0.500, " in caplog.text
    assert "time left: about" in caplog.text
    caplog.clear()
    log_epochs(run, 0, "0", 26, seconds=4.0)
    teller.look(run, ["train-r0-f0"], at_once=True)
    assert caplog.text == "" and "epoch 26/100" in teller.words


def test_watch_shows_the_state_until_the_run_is_over(run, capsys, monkeypatch):
    tasks = list(graph(run))
    for name in tasks[:-1]:
        done(run, name, 1.0)
    monkeypatch.setattr("time.sleep", lambda seconds: done(run, tasks[-1], 1.0))  # meanwhile the last task ends
    assert main(["status", "-o", str(run.root), "--watch", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Run look") == 2 and "Ctrl-C ends this view only" in shown


def test_watch_ends_where_the_run_has_failed(run, capsys):
    write_json(run.paths.failed("train-r0-f0"), {"task": "train-r0-f0", "exit_code": 1, "last_lines": "no memory"})
    assert main(["status", "-o", str(run.root), "--watch", "0.1"]) == 1
    assert "FAILED train-r0-f0" in capsys.readouterr().out
