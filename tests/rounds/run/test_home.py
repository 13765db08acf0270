"""A run lives in one folder: a copy of it is refused by every command that writes, a moved one goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import psutil
import pytest
from fake_tasks import make_run
from test_locks import in_new_namespace

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.processes import this_process
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds import job
from nnunet_flare.rounds.executors.local import run_local
from nnunet_flare.rounds.run.home import other_home, owner_file
from nnunet_flare.rounds.run.manifest import create_run, load_run, load_run_to_write
from nnunet_flare.rounds.run.tasks import find_task, graph


@pytest.fixture
def run(tmp_path, monkeypatch):
    run = make_run(tmp_path, device="cpu", shards=1)
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return run


@pytest.fixture
def copy(run, tmp_path):
    target = tmp_path / "RUN2"
    shutil.copytree(run.root, target)
    return target


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


WRITERS = {
    "retry": ["retry"],
    "cancel": ["cancel"],
    "clean": ["clean", "--yes"],
    "report": ["report"],
    "task": ["task", "plan"],
    "export": ["export", "--dataset", "77"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_copied_run_is_refused_by_every_command_that_writes(run, copy, command, capsys):
    before = contents(copy)
    name, *more = WRITERS[command]
    assert main([name, "-o", str(copy), *more]) == 2
    error = capsys.readouterr().err
    assert f"is a copy of the run in {run.root}" in error and "another --name" in error and error.count("\n") == 1
    assert contents(copy) == before


def test_a_copied_run_is_refused_by_run_and_by_slurm_jobs_too(run, copy):
    with pytest.raises(InputError, match="is a copy of the run"):
        create_run(copy, run.settings, run.recipe)
    assert job.main([str(copy), "plan"]) == 2


def test_a_copy_can_be_read_and_says_what_it_is(run, copy, capsys):
    assert main(["status", "-o", str(copy)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "COPY: this folder is a copy of the run in" in said and "can only be read" in said
    assert main(["status", "-o", str(run.root)]) == 0
    assert "COPY" not in capsys.readouterr().out


def test_the_run_itself_goes_on_beside_its_copy(run, copy):
    run_local(load_run_to_write(run.root))
    assert all(run.paths.done(name).is_file() for name in graph(run))


def test_a_run_that_was_moved_goes_on_and_that_is_said(run, tmp_path, caplog):
    moved = tmp_path / "elsewhere"
    shutil.move(run.root, moved)
    with caplog.at_level(logging.WARNING):
        there = load_run_to_write(moved)
    assert str(run.root) in caplog.text and str(moved) in caplog.text
    assert read_json(owner_file(run.settings))["run_dir"] == str(moved.resolve())
    shutil.copytree(moved, run.root)  # what is at the old place now is the copy
    assert other_home(there.root, there.settings) is None
    assert other_home(run.root, load_run(run.root).settings) == moved.resolve()


def test_a_link_to_a_run_is_the_run(run, tmp_path):
    (tmp_path / "link").symlink_to(run.root)
    assert load_run_to_write(tmp_path / "link").settings == run.settings


def test_a_run_of_an_earlier_version_and_its_copy_are_told_apart(run, copy):
    for root in (run.root, copy):
        document = read_json(root / "run.json")
        del document["token"]
        write_json(root / "run.json", document)
    owner = read_json(owner_file(run.settings))
    write_json(owner_file(run.settings), {key: value for key, value in owner.items() if key != "token"})
    assert load_run_to_write(run.root).settings == run.settings
    with pytest.raises(InputError, match="is a copy of the run"):
        load_run_to_write(copy)


def test_another_run_of_the_same_name_is_no_copy_but_refused_too(run, copy):
    write_json(copy / "run.json", {**read_json(copy / "run.json"), "token": "another"})
    with pytest.raises(InputError, match="has the name of the run"):
        load_run_to_write(copy)


@pytest.mark.parametrize("text", ["", "{half", "[]"])
def test_a_damaged_owner_file_is_named_with_the_remedy(run, text):
    owner_file(run.settings).write_text(text)
    with pytest.raises(InputError, match="remove it"):
        load_run_to_write(run.root)
    owner_file(run.settings).unlink()
    load_run_to_write(run.root)
    assert json.loads(owner_file(run.settings).read_text())["run_dir"] == str(run.root.resolve())


# ------------------------------------------------------------------ process numbers of other containers


def test_cancel_ends_no_process_that_only_has_the_drivers_number(run, capsys):
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        entry = {**this_process(), "pid": innocent.pid, "namespace": "pid:[1]", "token": "x", "since": "now"}
        write_json(run.paths.driver_lock, entry)
        assert main(["cancel", "-o", str(run.root)]) == 1
        assert "cancel it in the container or session that started it" in capsys.readouterr().err
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_task_that_still_runs_in_another_container_is_not_ended_and_not_done_twice(run):
    task = find_task(run, "plan")
    command = in_new_namespace(sys.executable, "-c", "import time; print('in', flush=True); time.sleep(60)")
    mark = work._mark(run, task)
    other = subprocess.Popen(command, env={**os.environ, work.TASK_VARIABLE: mark}, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        below = psutil.Process(other.pid).children()
        os.environ.pop(work.TASK_VARIABLE, None)
        with pytest.raises(TaskError, match="still runs in another container"):
            work._end_orphans(run, task)
        assert below and all(process.is_running() for process in below)
    finally:
        for process in [*psutil.Process(other.pid).children(recursive=True), psutil.Process(other.pid)]:
            process.kill()
        other.wait()
