"""Epochs that are passes over the data."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_flare.errors import InputError
from nnunet_flare.files import write_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.dataset import raw_cases
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.epoch_lengths import (
    iterations_of_pass,
    pass_of_round,
    samples_of_pass,
    stock_epochs,
    training_share,
)


def test_the_papers_samples():
    assert samples_of_pass(40, 0, (1, 1)) == 40, "supervised: each labelled case once"
    assert samples_of_pass(40, 1000, (1, 1)) == 2000, "then each pseudo case beside a labelled one"


@pytest.mark.parametrize(
    ("true", "pseudo", "ratio", "samples"),
    [(40, 10, None, 50), (40, 10, (3, 1), 40), (40, 10, (1, 0), 40), (0, 10, (1, 1), 10), (7, 3, (1, 3), 4)],
)
def test_samples_of_other_ratios(true, pseudo, ratio, samples):
    assert samples_of_pass(true, pseudo, ratio) == samples


def test_the_last_batch_of_a_pass_is_counted():
    assert [iterations_of_pass(samples, 2) for samples in (1, 2, 3, 2000)] == [1, 1, 2, 1000]
    assert stock_epochs(100, 2000) == 800, "a hundred passes over 2000 samples are 800 epochs of nnU-Net"
    assert math.isclose(stock_epochs(1000, 40), 160)


def test_a_fold_trains_on_the_cases_that_it_does_not_leave_out():
    assert [training_share(cases, 5) for cases in (10, 11, 4)] == [8, 9, 4]
    assert training_share(10, 1) == 10


def test_a_pass_is_over_what_a_fold_trains_on_also_where_a_round_trains_only_some_folds(copied_run):
    """Two members of a dataset that was split into four: each leaves out a quarter of the cases."""
    run, of = copied_run, copied_run.round(0)
    cases = raw_cases(run)
    folds = [{"train": [each for each in cases if each != case], "val": [case]} for case in cases]
    write_json(run.preprocessed / "splits_final.json", folds)
    build_round(run, of)
    for fold in (0, 1):
        trainer = get_trainer_from_args("22", of.configuration, fold, run.recipe.trainer, run.settings.plans_name,
                                        device=torch.device("cpu"))  # fmt: skip
        assert pass_of_round(run, of, len(cases), 0) == len(trainer.do_split()[0]) == 3


def test_the_papers_lengths_and_chains_are_in_the_recipe():
    recipe = load_recipe("selective")
    assert [recipe.num_epochs(number) for number in range(6)] == [1000, 100, 60, 60, 60, 60]
    assert recipe.counts_passes and recipe.coarse_counts_passes and recipe.rounds == 5
    assert recipe.coarse_settings(run="x", iterations=40).iterations_per_epoch == 40
    assert [recipe.selection_of(number).top_fraction for number in range(5)] == [0.5, 1, 1, 1, 1]
    assert [recipe.settings(n, run="x").augmentation.labelled for n in (0, 1, 5)] == ["jitter", "weak", "weak"]
    assert recipe.settings(1, run="x", iterations=2000).num_validation_iterations == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.iterations_per_epoch": "250"}, r"training\.iterations_per_epoch.*epoch is 'pass'.*one of the two"),
        ({"training.epoch": "hour"}, r"training\.epoch: found 'hour', expected iterations or pass"),
        ({"roi.training.seed": "3"}, r"roi\.training\.seed: is set by the loop"),
        ({"roi.training.num_epochs": "0"}, r"roi\.training\.num_epochs"),
        ({"roi.rule": "box"}, r"roi\.rule"),
        ({"training.num_epochs": "[1000, 1]"}, r"fewer than two different checkpoints.*1 epochs \(round 1\)"),
        (
            {"members": "{kind: folds}", "selection.rule": "all"},
            r"fusion\.method: found 'last'.*expected 'checkpoints'",
        ),
        ({"selection.complete": "true", "fusion.uncertain_organs": "ignore"}, r"selection\.complete"),
        (
            {"selection.complete": "false", "fusion.uncertain_organs": "ignore"},
            r"selection\.top_fraction: found 0\.5 in round 0.*organ by organ; expected selection\.top_fraction=null",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_trained(change, message):
    with pytest.raises(InputError, match=message):
        load_recipe("selective", change)
