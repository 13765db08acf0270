"""What goes wrong around a run: hanging tasks, full and read-only disks, a locked ledger, cancelled drivers."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_tasks import finish, make_run, notes, plan_tasks

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import replacing, write_json
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds.do_task import TASK_VARIABLE
from nnunet_flare.rounds.executors.local import run_local
from nnunet_flare.rounds.run import ledger
from nnunet_flare.rounds.run.ledger import Entry, read_ledger, write_round
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.stages.arrays import damage, read_array, write_array


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on the CPU whose tasks are short stand-ins."""
    run = make_run(tmp_path, device="cpu", shards=1)
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return run


def processes_of(run) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TASK_VARIABLE, "").startswith(str(run.root)):
                found.append(process)
        except psutil.Error:
            continue
    return found


# ------------------------------------------------------------------ tasks that hang


def test_a_hanging_training_is_ended_with_its_children_and_reported(run, capsys):
    finish(run, "plan", "unlabelled", "build-r0", "train-r0-f1")
    plan_tasks(run, {"train-r0-f0": {"epochs": 10_000}})
    assert main(["retry", "-o", str(run.root), "--task_timeout", str(4 / 3600)]) == 1
    error = capsys.readouterr().err
    assert "train-r0-f0 failed" in error and "ended by the driver: not done after 4.0 s (--task_timeout)" in error
    assert not processes_of(run) and not run.paths.done("train-r0-f0").is_file()
    plan_tasks(run, {})
    run_local(run)
    assert all(run.paths.done(name).is_file() for name in graph(run))


def test_a_task_within_its_time_is_left_alone(run):
    run_local(run, timeout_s=600)
    assert [line["task"] for line in notes(run)] == list(graph(run))


# ------------------------------------------------------------------ cancel


def test_cancel_ends_the_driver_of_this_machine_and_its_tasks_and_the_run_goes_on_later(run, tmp_path, capsys):
    plan_tasks(run, {"plan": {"seconds": 300}})
    driver = subprocess.Popen([sys.executable, "-m", "nnunet_flare.cli.pseudolabel", "retry", "-o", str(run.root)])
    ends = time.monotonic() + 60
    while not notes(run):
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert main(["cancel", "-o", str(run.root)]) == 0
    driver.wait(timeout=10)
    assert f"the driver (process {driver.pid}) and its tasks were ended" in capsys.readouterr().out
    assert not processes_of(run)
    plan_tasks(run, {})
    run_local(run)
    assert main(["cancel", "-o", str(run.root)]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_a_driver_on_another_machine_is_named(run, capsys):
    write_json(run.paths.driver_lock, {"host": "node-7", "pid": 4711, "token": "x", "since": "now"})
    assert main(["cancel", "-o", str(run.root)]) == 1
    assert "process 4711 on node-7: cancel it there" in capsys.readouterr().err


# ------------------------------------------------------------------ the ledger


def entry(case: str) -> Entry:
    return Entry(0, case, "pseudo", "taken", "good", 0.9, 0.9, 0.9, {"liver": 0.9}, {}, "m", "h", "s")


def test_a_locked_ledger_is_waited_for_and_then_named(run, monkeypatch):
    write_round(run.paths, 0, [entry("a")])
    other = sqlite3.connect(run.paths.ledger, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(ledger, "BUSY_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"ledger.sqlite: the ledger cannot be written .*locked"):
        write_round(run.paths, 0, [entry("a"), entry("b")])
    monkeypatch.setattr(ledger, "BUSY_SECONDS", 20.0)
    timer = threading.Timer(0.5, other.rollback)
    timer.start()
    write_round(run.paths, 0, [entry("a"), entry("b")])
    timer.join()
    other.close()
    assert [e.case for e in read_ledger(run.paths)] == ["a", "b"]


def test_a_damaged_ledger_is_made_anew_from_the_decisions(run):
    write_round(run.paths, 0, [entry("a"), entry("b")])
    content = run.paths.ledger.read_bytes()
    run.paths.ledger.write_bytes(b"\0" * 200 + content[200:])
    assert [e.case for e in read_ledger(run.paths)] == ["a", "b"]


# ------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_on_a_full_disk_nothing_half_written_stays_and_the_run_goes_on_when_there_is_room(small_disk, tmp_path):
    label = np.random.default_rng(0).integers(0, 14, (1, 40, 64, 64)).astype(np.int16)
    path = small_disk / "case_seg.b2nd"
    write_array(path, label[:, :2], [40, 64, 64])
    before = path.read_bytes()
    ballast = small_disk / "ballast"
    _fill(ballast)
    with pytest.raises(OSError, match="No space"):
        write_array(path, label, [40, 64, 64])
    with pytest.raises(OSError):
        write_json(small_disk / "table.json", {"text": "x" * 100_000})
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "case_seg.b2nd"]
    assert path.read_bytes() == before
    ballast.unlink()
    write_array(path, label[:, :20], [40, 64, 64])
    np.testing.assert_array_equal(read_array(path), label[:, :20])


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 4096)
        except OSError:
            return


def _weights(path: Path) -> None:
    import torch

    with replacing(path) as temporary:
        torch.save({"weights": torch.randn(400_000)}, temporary)


def _zip_of_numpy(path: Path) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, np.random.default_rng(0).normal(size=200_000))


def _scan(path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(90, 64, 64)).astype(np.float32)
    write_volume(path, Volume(values, (1.0, 1.0, 1.0)))


def _stored_array(path: Path) -> None:
    write_array(path, np.random.default_rng(0).normal(size=(1, 40, 96, 96)).astype(np.float32), [40, 96, 96])


def _compressed_by_blosc2_itself(path: Path) -> None:
    import blosc2

    with replacing(path) as temporary:
        blosc2.asarray(np.random.default_rng(0).normal(size=(40, 96, 96)), urlpath=str(temporary), contiguous=True)


def _own_error(path: Path) -> None:
    """A writer whose error says nothing, as torch's zip writer: "unexpected pos 1876928 vs 1876822"."""
    with replacing(path) as temporary:
        _fill(temporary)
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1876928 vs 1876822")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("checkpoint.pth", _weights), ("a.npz", _zip_of_numpy), ("a.nii.gz", _scan), ("a.nii", _scan), ("a.mha", _scan),
        ("a.nrrd", _scan), ("a.b2nd", _stored_array), ("a.b2nd", _compressed_by_blosc2_itself), ("x.bin", _own_error),
        ("a.json", lambda path: write_json(path, {"text": "x" * 2_000_000})),
    ],
)  # fmt: skip
def test_every_writer_names_a_full_disk_and_the_file(small_disk, name, write):
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(small_disk / name)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small_disk / name)
    assert list(small_disk.iterdir()) == [], "nothing half-written is left"


def test_an_error_of_a_writer_on_a_disk_with_room_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected pos"), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("unexpected pos 12")
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_on_a_full_disk_is_not_said_to_be_in_use(small_disk, tmp_path):
    run = make_run(tmp_path, root=small_disk / "run")
    write_round(run.paths, 0, [entry("a")])
    ballast = small_disk / "ballast"
    _fill(ballast)
    many = [entry(f"case{number}" * 30) for number in range(500)]
    with pytest.raises(OSError, match="No space left") as caught:
        ledger._insert(run.paths.ledger, 0, many)
    assert caught.value.filename == str(run.paths.ledger)
    ballast.unlink()
    assert [e.case for e in read_ledger(run.paths)] == ["a"]


def test_a_training_on_a_full_disk_says_so(small_disk, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    task = graph(run)["train-r0-f0"]
    folder = run.round(0).model / "fold_0"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(small_disk)
    _fill(small_disk / "ballast")
    monkeypatch.setattr(work, "_check_given", lambda run, task, arguments: None)
    monkeypatch.setattr(work, "run_child", lambda command: 1)
    with pytest.raises(TaskError, match=r"exit code 1.*fold_0: No space left on device; make room"):
        work.STAGES["train"](run, task)


STOCK_SAVES = """
import sys
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
image = np.random.default_rng(0).normal(size=(1, 40, 96, 96)).astype(np.float32)
nnUNetDatasetBlosc2.save_case(image, np.zeros(image.shape, np.int16), {}, sys.argv[1], chunks=None, blocks=None)
"""


def test_what_stock_preprocessing_leaves_on_a_full_disk_is_recognised(small_disk):
    """It writes 1.4 MB through a memory map where 1 MB fits: the process fails, and a part stays under its name."""
    done = subprocess.run(
        [sys.executable, "-c", STOCK_SAVES, str(small_disk / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and (small_disk / "a.b2nd").is_file()
    assert "a.b2nd: cannot be read" in str(damage(small_disk, "a"))


def test_a_run_on_a_full_disk_stops_with_the_systems_words_and_resumes(small_disk, tmp_path, monkeypatch):
    run = make_run(tmp_path, device="cpu", shards=1, root=small_disk / "run")
    write_json(run.paths.unlabelled, {"version": 1, "cases": []})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    ballast = small_disk / "ballast"
    _fill(ballast)
    with pytest.raises((OSError, TaskError), match="No space left"):
        run_local(run)
    assert not list(run.root.glob("tasks/*.done.json"))
    ballast.unlink()
    run_local(run)
    assert all(run.paths.done(name).is_file() for name in graph(run))


def test_a_read_only_run_folder_can_still_be_looked_at(run, monkeypatch, capsys):
    write_round(run.paths, 0, [entry("a")])
    if os.getuid() == 0:  # root writes everywhere; a read-only mount stops it too
        bound = subprocess.run(["mount", "--bind", str(run.root), str(run.root)], capture_output=True, check=False)
        if bound.returncode != 0:
            pytest.skip("root, and no right to mount read-only")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run.root)], check=True)
    else:
        run.root.chmod(0o555)
    try:
        assert main(["status", "-o", str(run.root)]) == 0
        assert "round" in capsys.readouterr().out
        with pytest.raises(OSError, match=r"Read-only|Permission"):
            run_local(run)
    finally:
        if os.getuid() == 0:
            subprocess.run(["umount", "-l", str(run.root)], check=True)
        else:
            run.root.chmod(0o755)
