"""Selection by the stability of one training's checkpoints (Fosun)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request, check_init_members
from nnunet_flare.rounds.stages.label import judged_by
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.rules import RULES

CHECKPOINTS = {"selection.rule": "stability", "members": "{kind: checkpoints, at: [0.36, 0.66, 1.0]}"}


def test_stability_judges_checkpoints_of_one_training_only():
    recipe = load_recipe("uncertainty", CHECKPOINTS)
    assert recipe.member_folds(0) == ["all"]
    assert recipe.member_checkpoints(0)[-1] == "checkpoint_3of3.pth", "the last member is the end of the training"
    with pytest.raises(InputError, match=r"selection\.rule: found 'stability'.*expected members.kind=checkpoints"):
        load_recipe("uncertainty", {"selection.rule": "stability"})


def test_a_case_is_judged_by_the_pairs_that_its_rule_asks_for():
    first, second, last = (np.array([[values]], np.uint8) for values in ([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]))
    agreement = pairwise_dice([first, second, last], 2)
    assert judged_by(agreement, RULES["stability"]) == pytest.approx([2 / 3])
    assert judged_by(agreement, RULES["mean-organ"]) == pytest.approx([(1 + 2 / 3 + 2 / 3) / 3])
    assert judged_by(None, RULES["all"]).size == 0


@pytest.mark.parametrize(
    ("changes", "folds", "message"),
    [
        (CHECKPOINTS, ["0", "1"], "compares checkpoints"),
        ({}, ["0"], "one member has no agreement"),
    ],
)
def test_given_models_that_the_rule_cannot_judge_are_refused(changes, folds, message):
    request = Request("22", Path("un"), init_model=Path("model"), init_folds=folds)
    with pytest.raises(InputError, match=message):
        check_init_members(request, folds, load_recipe("uncertainty", changes))
    check_init_members(request, folds, load_recipe("uncertainty", {"selection.rule": "all"}))


def test_one_training_with_its_checkpoints_can_be_given():
    request = Request("22", Path("un"), init_model=Path("model"), init_folds=["all"])
    check_init_members(request, ["all"], load_recipe("uncertainty", CHECKPOINTS))
    assert load_recipe("uncertainty", CHECKPOINTS).given_checkpoints == [f"checkpoint_{k}of3.pth" for k in (1, 2, 3)]
