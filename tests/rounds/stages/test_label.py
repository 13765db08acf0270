"""Labelling by a given model."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from changed_runs import labelled_cases

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.stages.label import label_shard


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_a_given_model_labels_in_round_0_when_it_expects_the_same_input_and_is_refused_else(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run.round(0).model, model)
    given = Run(tmp_path / "given", replace(run.settings, init_model=str(model), init_folds=("0", "1")), run.recipe)
    given.root.mkdir()
    shutil.copyfile(run.paths.unlabelled, given.paths.unlabelled)
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
