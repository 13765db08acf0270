"""Files that a crash left half-written: found where they are read, made anew, and never silently used."""

from __future__ import annotations

import errno
import pickle
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from fake_tasks import make_run

from nnunet_flare.cli.common import run_command
from nnunet_flare.errors import TaskError
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase
from nnunet_flare.rounds.stages import label as labelling
from nnunet_flare.rounds.stages import plan as plans
from nnunet_flare.rounds.stages import preprocess
from nnunet_flare.rounds.stages.arrays import damage, write_array, write_properties
from nnunet_flare.rounds.stages.case_arrays import read_unless_failed

SHAPE = (1, 12, 16, 16)


def write_case(folder: Path, case: str) -> None:
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    write_array(folder / f"{case}.b2nd", image, SHAPE[1:])
    write_array(folder / f"{case}_seg.b2nd", np.zeros(SHAPE, np.int16), SHAPE[1:])
    write_properties(folder / f"{case}.pkl", {"class_locations": {}})


def cut(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def zeros(path: Path) -> None:
    """What a file system can leave after the power failed: the length, and no content."""
    path.write_bytes(bytes(path.stat().st_size))


def no_pickle_of_ours(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2]))


DAMAGES = [
    (".b2nd", cut), (".b2nd", zeros), ("_seg.b2nd", cut), ("_seg.b2nd", zeros), (".pkl", cut), (".pkl", zeros),
    (".pkl", no_pickle_of_ours), (".b2nd", Path.unlink), (".pkl", Path.unlink),
]  # fmt: skip

damaged = pytest.mark.parametrize(("ending", "spoil"), DAMAGES, ids=[f"{e[1:]}-{f.__name__}" for e, f in DAMAGES])


@damaged
def test_every_damage_of_a_case_is_recognised(tmp_path, ending, spoil):
    write_case(tmp_path, "a")
    assert damage(tmp_path, "a") is None
    spoil(tmp_path / f"a{ending}")
    assert f"a{ending}" in str(damage(tmp_path, "a"))


def test_an_image_and_labels_of_two_sizes_are_recognised(tmp_path):
    write_case(tmp_path, "a")
    (tmp_path / "a_seg.b2nd").unlink()
    write_array(tmp_path / "a_seg.b2nd", np.zeros((1, 6, 16, 16), np.int16), SHAPE[1:])
    assert "of shape (1, 12, 16, 16), labels of (1, 6, 16, 16)" in str(damage(tmp_path, "a"))


# ------------------------------------------------------------------ labelled cases


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A run whose two labelled cases are preprocessed; returns the run and the list of preprocessings."""
    run = make_run(tmp_path)
    run.plans_file.parent.mkdir(parents=True, exist_ok=True)
    run.plans_file.write_text("{}")
    (run.preprocessed / plans.FINGERPRINT).write_text("{}")
    files = {}
    for case in ("a", "b"):
        files[case] = {"images": [run.raw / f"{case}_0000.nii.gz"], "label": run.raw / f"{case}.nii.gz"}
        for path in (*files[case]["images"], files[case]["label"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"as it was when it was preprocessed")
    done: list[str] = []

    def again(run, base):
        done.append("again")
        for case in ("a", "b"):
            for path in base.data.glob(f"{case}*"):
                path.unlink()
            write_case(base.data, case)

    monkeypatch.setattr(plans, "raw_cases", lambda run: ["a", "b"])
    monkeypatch.setattr(plans, "raw_files", lambda run: files)
    monkeypatch.setattr(plans, "check_names", lambda run, base: {"normalization_schemes": ["CTNormalization"]})
    monkeypatch.setattr(plans, "_preprocess", again)
    monkeypatch.setattr(plans, "_write_splits", lambda run, cases: None)
    monkeypatch.setattr(plans, "copy_case_table", lambda run: None)
    for case in ("a", "b"):
        write_case(run.base_data, case)
    return run, done


@damaged
def test_a_labelled_case_that_a_killed_preprocessing_left_half_written_is_made_anew(planned, ending, spoil):
    run, done = planned
    spoil(run.base_data / f"b{ending}")
    plans.plan_and_preprocess(run)
    assert done == ["again"] and damage(run.base_data, "b") is None


def test_whole_labelled_cases_are_kept(planned):
    run, done = planned
    plans.plan_and_preprocess(run)
    assert done == []


def test_cases_that_are_not_whole_after_preprocessing_stop_the_run_and_say_how_much_room_there_is(planned, monkeypatch):
    run, _ = planned
    cut(run.base_data / "b.b2nd")
    monkeypatch.setattr(plans, "_preprocess", lambda run, base: None)
    with pytest.raises(TaskError, match=r"1 of 2 labelled cases are incomplete .*b\.b2nd.* GB free; make room"):
        plans.plan_and_preprocess(run)


def test_preprocessing_whose_workers_die_names_the_disk(tmp_path, monkeypatch):
    """nnU-Net writes through memory maps: on a full disk a worker gets SIGBUS and says nothing."""
    import nnunetv2.experiment_planning.plan_and_preprocess_api as stock

    run = make_run(tmp_path)
    run.preprocessed.mkdir(parents=True, exist_ok=True)

    def die(*words, **options):
        raise RuntimeError("Some background worker is 6 feet under. Yuck.")

    monkeypatch.setattr(stock, "preprocess_dataset", die)
    monkeypatch.setattr(plans, "raw_cases", lambda run: ["a"])
    with pytest.raises(TaskError, match=r"6 feet under.*ran out of disk space or memory.* GB free"):
        plans._preprocess(run, run.base)


# ------------------------------------------------------------------ unlabelled cases


@damaged
def test_an_unlabelled_scan_whose_arrays_are_damaged_is_preprocessed_again(
    tmp_path, monkeypatch, caplog, ending, spoil
):
    run = make_run(tmp_path)
    write_case(run.unlabelled_data, "u")
    spoil(run.unlabelled_data / f"u{ending}")

    def again(case, *, folder, **given):
        for path in folder.glob("u*"):
            path.unlink()
        write_case(folder, case.case)

    monkeypatch.setattr(preprocess, "_preprocess_case", again)
    monkeypatch.setattr(preprocess, "_documents", lambda run: ("", "", {}))
    image, mask, properties = read_unless_failed(run, UnlabelledCase("u", "u.nii.gz", ("u.nii.gz",), 1))
    assert (image.shape, mask.shape, properties) == (SHAPE, SHAPE[1:], {"class_locations": {}})
    assert f"u{ending}" in caplog.text and "preprocessed again" in caplog.text


# ------------------------------------------------------------------ memory and disks


class NoRoom:
    """A predictor on a GPU that is full."""

    def predict_members(self, data, **options):
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.81 GiB")


def test_a_scan_that_needs_more_gpu_memory_than_there_is_is_set_aside_with_that_reason(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    write_case(run.unlabelled_data, "u")
    monkeypatch.setattr(labelling, "odd", lambda folder, case: [])
    case = UnlabelledCase("u", "u.nii.gz", ("u.nii.gz",), 1)
    reading = Future()
    reading.set_result(read_unless_failed(run, case))
    reason = labelling._label_case(run, run.round(0), case, reading, NoRoom(), {"liver": 1}).failed
    assert "OutOfMemoryError" in reason and "Tried to allocate 7.81 GiB" in reason


def test_a_training_out_of_gpu_memory_says_what_makes_it_smaller(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    task = graph(run)["train-r0-f0"]
    log = run.paths.log(task.name)
    log.parent.mkdir(parents=True)
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    monkeypatch.setattr(work, "_check_given", lambda run, task, arguments: None)
    monkeypatch.setattr(work, "run_child", lambda command: 1)
    with pytest.raises(TaskError, match=r"exit code 1.*out of GPU memory.*plan\.batch_size"):
        work.STAGES["train"](run, task)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x.nii.gz"), "/data/x.nii.gz: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied"),
        (OSError("ITK: cannot be written"), "ITK: cannot be written"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_full_disk_or_memory_is_one_line_of_every_command(capsys, error, words):
    def body():
        raise error

    assert run_command("flare-x", body) == 1
    printed = capsys.readouterr().err
    assert words in printed and printed.startswith("flare-x: error: ") and printed.count("\n") == 1
