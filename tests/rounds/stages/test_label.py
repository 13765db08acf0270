"""Labelling by a given model."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from changed_runs import labelled_cases

from nnunet_flare.errors import DeviceError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.rounds.retry import forget_failures
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph, is_done
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages import label
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.label import label_shard
from nnunet_flare.rounds.stages.preprocess import preprocess_unlabelled
from nnunet_flare.rounds.stages.select import select_round


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def with_given_model(run: Run, folder: Path) -> Run:
    """A run whose scans are labelled by a copy of that run's first model."""
    model = folder / "model"
    shutil.copytree(run.round(0).model, model)
    given = Run(folder / "given", replace(run.settings, init_model=str(model), init_folds=("0", "1")), run.recipe)
    given.root.mkdir()
    shutil.copyfile(run.paths.unlabelled, given.paths.unlabelled)
    return given


def test_a_given_model_labels_in_round_0_when_it_expects_the_same_input_and_is_refused_else(run, tmp_path):
    given = with_given_model(run, tmp_path)
    model = given.round(0).model
    assert "train-r0-f0" not in graph(given) and "label-r0-p0" in graph(given)
    case = labelled_cases(run)[0]
    assert label_shard(given, given.round(0), 0, 1) == {"labelled": 6, "failed": 1}
    assert read_json(given.paths.case(0, case))["label_sha256"] == read_json(run.paths.case(0, case))["label_sha256"]
    plans = read_json(model / "plans.json")
    plans["configurations"][run.recipe.configuration]["spacing"] = [3.0, 1.0, 1.0]
    write_json(model / "plans.json", plans)
    given.paths.case(0, case).unlink()
    with pytest.raises(TaskError, match=r"expects a different input .*spacing \[3.0, 1.0, 1.0\] there"):
        label_shard(given, given.round(0), 0, 1)


def test_scans_that_a_given_model_labelled_before_it_was_trained_again_are_labelled_again(run, tmp_path):
    """Labelling was killed, and checkpoint_final.pth is another one when it goes on."""
    given = with_given_model(run, tmp_path)
    model = given.round(0).model
    label_shard(given, given.round(0), 0, 2)
    first = {path: path.stat().st_mtime_ns for path in given.paths.round(0).glob("cases/*.json")}
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    trained = torch.load(checkpoint, weights_only=False)
    for weight in trained["network_weights"].values():
        weight += 0.1
    torch.save(trained, checkpoint)
    label_shard(given, given.round(0), 1, 2)
    with pytest.raises(TaskError, match=r"changed while it labelled the scans.*start a new run"):
        select_round(given, given.round(0))
    label_shard(given, given.round(0), 0, 2)
    again = {path for path, at in first.items() if path.stat().st_mtime_ns != at}
    assert again == {path for path in first if "failed" not in read_json(path)} and again
    before = {path: path.stat().st_mtime_ns for path in first}
    label_shard(given, given.round(0), 0, 2)
    assert before == {path: path.stat().st_mtime_ns for path in first}
    documents = [read_json(path) for path in given.paths.round(0).glob("cases/*.json")]
    assert len({tuple(one["weights"]) for one in documents if "failed" not in one}) == 1


def test_a_scan_that_was_set_aside_stops_no_run_where_it_is_alone_in_its_part(run):
    """A run on as many GPUs as it has scans."""
    parts = len(read_list(run.paths.unlabelled))
    found = [label_shard(run, run.round(0), part, parts) for part in range(parts)]
    assert sorted(part["failed"] for part in found) == [*[0] * (parts - 1), 1]
    assert select_round(run, run.round(0))["failed"] == 1


def test_a_scan_that_cannot_be_labelled_stops_no_run_where_it_is_alone_in_its_part(run, monkeypatch):
    parts = len(read_list(run.paths.unlabelled))
    bad, tried = labelled_cases(run)[0], [case.case for case in read_list(run.paths.unlabelled)].index
    for case in labelled_cases(run):
        run.paths.case(0, case).unlink()
    predict = Segmenter.predict_members
    part = None

    def fails(segmenter, data, **options):
        if part == tried(bad):
            raise ValueError("a network that meets odd values")
        return predict(segmenter, data, **options)

    monkeypatch.setattr(Segmenter, "predict_members", fails)
    for part in range(parts):
        label_shard(run, run.round(0), part, parts)
    assert "odd values" in read_json(run.paths.case(0, bad))["failed"]
    assert select_round(run, run.round(0))["failed"] == 2
    for case in labelled_cases(run):
        run.paths.case(0, case).unlink()
    monkeypatch.setattr(Segmenter, "predict_members", lambda *_, **__: 1 / 0)
    with pytest.raises(TaskError, match="none of 7 unlabelled cases could be labelled"):
        label_shard(run, run.round(0), 0, 1)


def test_a_scan_that_makes_the_gpu_unusable_is_set_aside_and_the_next_try_goes_on(run, monkeypatch):
    """CUDA then fails in every later call of the process: the next scans would all be called bad."""
    cases = labelled_cases(run)
    for case in cases:
        run.paths.case(0, case).unlink()
    predict, done = Segmenter.predict_members, []

    def breaks(segmenter, data, **options):
        done.append(data)
        if len(done) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return predict(segmenter, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "predict_members", breaks)
        patch.setattr(label, "lost_gpu", lambda: "CUDA error: an illegal memory access was encountered")
        with pytest.raises(DeviceError, match=r": set aside .* the GPU cannot be used any more"):
            label_shard(run, run.round(0), 0, 1)
    assert len(done) == 2
    assert label_shard(run, run.round(0), 0, 1) == {"labelled": len(cases) - 1, "failed": 2}


def test_retry_labels_a_failed_case_again_whichever_part_it_belongs_to(run):
    """Nothing was taken in round 0 of a run with three parts, and no scan could be labelled."""
    run = replace(run, settings=replace(run.settings, shards=3))
    tasks = [task for task in graph(run).values() if task.stage == "label" and task.round == 0]
    for task in tasks:
        label_shard(run, run.round(0), task.part, 3)
        if task.part:
            shutil.copyfile(run.paths.done("label-r0-p0"), run.paths.done(task.name))
    run.paths.done("select-r0").unlink()
    cases = labelled_cases(run)
    for case in cases:
        write_json(run.paths.case(0, case), {"case": case, "round": 0, "failed": "no memory"})
    forget_failures(run)
    preprocess_unlabelled(run)
    for task in tasks:
        if not is_done(run, task):
            label_shard(run, run.round(0), task.part, 3)
    select_round(run, run.round(0))
    assert labelled_cases(run) == cases


def written(run: Run, case: str) -> dict[str, bytes]:
    """What a labelling writes of a case, but for how long it took; of blosc2 files what they hold."""
    ending = read_json(run.preprocessed / "dataset.json")["file_ending"]
    paths = (run.paths.members(0, case), run.paths.training_label(0, case))
    arrays = {path.parent.name: read_array(path) for path in paths}
    return {
        "label map": run.paths.label(0, case, ending).read_bytes(),
        "properties": run.paths.properties(0, case).read_bytes(),
        "says": repr({**read_json(run.paths.case(0, case)), "seconds": 0}).encode(),
        **{name: repr(array.shape).encode() + array.tobytes() for name, array in arrays.items()},
    }


def test_the_next_scan_is_read_while_one_is_labelled(run, monkeypatch):
    """And what is written is the same, byte for byte."""
    cases = labelled_cases(run)
    before = {case: written(run, case) for case in cases}
    for case in cases:
        run.paths.case(0, case).unlink()
    readings, labelled = threading.Semaphore(0), []
    read, predict = label.read_unless_failed, Segmenter.predict_members

    def noted(*arguments):
        readings.release()
        return read(*arguments)

    def waits(segmenter, data, **options):
        labelled.append(data)
        for _ in range(2 if len(labelled) == 1 else len(labelled) < len(cases)):
            assert readings.acquire(timeout=60), "the next reading has not begun"
        return predict(segmenter, data, **options)

    monkeypatch.setattr(label, "read_unless_failed", noted)
    monkeypatch.setattr(Segmenter, "predict_members", waits)
    assert label_shard(run, run.round(0), 0, 1)["labelled"] == len(labelled) == len(cases) > 2
    assert {case: written(run, case) for case in cases} == before
