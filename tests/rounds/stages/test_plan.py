"""Planning stops where the data, the splits or the plans do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from changed_runs import changed
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.dataset import raw_cases
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.plan import plan_and_preprocess


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_fewer_cases_than_folds_is_said_before_training(run):
    (run.preprocessed / "splits_final.json").unlink()
    with pytest.raises(InputError, match=r"4 labelled case\(s\), but members.count=5 needs 5"):
        plan_and_preprocess(changed(run, members={"count": 5}))


def test_a_split_file_with_too_few_folds_is_named(run):
    with pytest.raises(InputError, match=r"has 2 folds, members.count is 3"):
        plan_and_preprocess(changed(run, members={"count": 3}))


def test_labelled_cases_that_no_fold_trains_on_are_named(run, caplog):
    """Labelled after the split was made, such as corrected pseudo-labels."""
    splits = json.loads((run.preprocessed / "splits_final.json").read_text())
    late = splits[0]["val"][0]
    plan_and_preprocess(run)
    assert "in no fold" not in caplog.text
    without = [{part: [case for case in fold[part] if case != late] for part in fold} for fold in splits]
    write_json(run.preprocessed / "splits_final.json", without)
    plan_and_preprocess(run)
    assert f"1 of 4 labelled cases are in no fold ({late})" in caplog.text


def test_a_labelled_case_that_was_taken_out_of_the_dataset_trains_no_longer(run, caplog):
    """Its annotation was bad; the next run is on the same plans."""
    bad, *others = raw_cases(run)
    for path in [*(run.raw / "imagesTr").glob(f"{bad}_*"), *(run.raw / "labelsTr").glob(f"{bad}.*")]:
        path.unlink()
    with pytest.raises(InputError, match=rf"1 case\(s\) that are no labelled cases .*\({bad}\)\. Remove that file"):
        plan_and_preprocess(run)
    (run.preprocessed / "splits_final.json").unlink()
    plan_and_preprocess(run)
    assert f"their arrays are removed: {bad}" in caplog.text
    build_round(run, run.round(0))
    trained = set()
    for fold in (0, 1):
        trainer = get_trainer_from_args("22", run.round(0).configuration, fold, run.recipe.trainer,
                                        run.settings.plans_name, device=torch.device("cpu"))  # fmt: skip
        trained |= set(trainer.do_split()[0])
    assert trained == set(others)
    assert (run.round(1).data / f"{bad}.pkl").is_file(), "what an earlier round was trained on stays"


def test_plans_made_anew_stop_the_run(run):
    plans = read_json(run.plans_file)
    plans["configurations"][run.recipe.configuration]["patch_size"] = [8, 8, 8]
    write_json(run.plans_file, plans)
    with pytest.raises(TaskError, match="planned again"):
        build_round(run, run.round(1))


def test_a_dataset_without_a_labelled_case_is_refused(run, capsys):
    for folder in ("imagesTr", "labelsTr"):
        for path in (run.raw / folder).iterdir():
            path.unlink()
    code = main(["run", "-d", "22", "-u", run.settings.unlabelled_dir, "--recipe", "demo", "--name", "none", "-device",
                 "cpu"])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2 and "imagesTr: no image named" in error
