"""Recipes: shipped ones load, every wrong key is located, and what reaches the trainer is what was asked."""

from __future__ import annotations

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.recipes.load import load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_under_their_own_name_and_say_what_they_are(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.summary and recipe.paper
    assert load_recipe(name).hash == recipe.hash
    assert load_recipe(name, {"seed": "77"}).hash != recipe.hash


def test_the_radboud_recipe_has_the_papers_numbers():
    recipe = load_recipe("uncertainty")
    assert recipe.planner == "nnUNetPlannerFlare" and recipe.rounds == 4
    assert (recipe.selection.rule, recipe.selection.threshold) == ("min-organ", 0.9)
    assert (recipe.predict.step_size, recipe.predict.tta) == (0.5, "mirror")
    assert recipe.member_folds(3) == ["0", "1", "2", "3", "4"] and recipe.member_folds(4) == ["all"]
    settings = recipe.settings(4, run="uncertainty")
    assert (settings.num_epochs, settings.iterations_per_epoch) == (1000, 250)
    assert (settings.augmentation.labelled, settings.augmentation.pseudo) == ("stock", "stock")
    assert settings.round == 4 and settings.run == "uncertainty" and settings.recipe_hash == recipe.hash


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("selection.treshold", "0.9", "selection.treshold: unknown key"),
        ("selection.threshold", "1.5", "selection.threshold: found 1.5"),
        ("selection.rule", "best", "selection.rule: found 'best'"),
        ("selection.rule", "[all, best]", "selection.rule.1: found 'best'"),
        ("selection.rule", "[]", "selection.rule: found []"),
        ("selection.top_fraction", "[0.5, 2]", "selection.top_fraction.1: found 2"),
        ("members.count", "[5, 0]", "members.count.1: found 0"),
        ("rounds", "0", "rounds: found 0"),
        ("training.num_epochs", "-3", "training.num_epochs: found -3"),
        ("training.num_epochs", "[10, many]", "training.num_epochs"),
        ("training.epochs", "3", "training.epochs: unknown key"),
        ("training.seed", "3", "training.seed: is set by the loop"),
        ("augmentation.pseudo", "wild", "augmentation.pseudo: found 'wild'"),
        ("predict.tta", "rotate", "predict.tta: found 'rotate'"),
        ("members.kind", "checkpoints", "need at least two fractions"),
        ("plan.spacing_mm", "[1, 2]", "plan.spacing_mm"),
        ("rounds.more", "1", "'rounds' has no keys below it"),
        ("name", "a/b", "letters, digits and hyphens"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(key, value, message):
    with pytest.raises(InputError, match=r"recipe demo|--set") as caught:
        load_recipe("demo", {key: value})
    assert message in str(caught.value)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(InputError, match="uncertainty"):
        load_recipe("fosun")
    with pytest.raises(InputError, match="no such file"):
        load_recipe("mine.yaml")


def test_the_users_own_recipe_is_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsummary: s\npaper: p\nrounds: 2\n")
    assert load_recipe(str(path), {"rounds": "3"}).rounds == 3
    path.write_text("name: [unclosed")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- a\n- b\n")
    with pytest.raises(InputError, match="expected keys and values"):
        load_recipe(str(path))


def test_training_length_can_differ_by_round_and_the_last_entry_goes_on():
    recipe = load_recipe("uncertainty", {"training.num_epochs": "[1000, 100]", "final.num_epochs": "7"})
    assert [recipe.num_epochs(r) for r in range(5)] == [1000, 100, 100, 100, 7]


def test_members_and_selection_can_differ_by_round_and_the_last_entry_goes_on():
    settings = {
        "members.count": "[5, 1]",
        "selection.rule": "[min-organ, all]",
        "selection.top_fraction": "[0.5, null]",
    }
    recipe = load_recipe("uncertainty", settings)
    assert [recipe.member_folds(r) for r in range(5)] == [["0", "1", "2", "3", "4"], ["all"], ["all"], ["all"], ["all"]]
    chosen = [recipe.selection_of(r) for r in range(3)]
    assert [(c.rule.name, c.threshold, c.top_fraction) for c in chosen] == [
        ("min-organ", 0.9, 0.5), ("all", 0.9, None), ("all", 0.9, None)
    ]  # fmt: skip


def test_every_round_of_one_member_needs_a_rule_that_asks_for_no_agreement():
    with pytest.raises(
        InputError, match=r"with members.count=1 there is no agreement to judge by in round 1; expected 'all'"
    ):
        load_recipe("uncertainty", {"members.count": "[5, 1]"})
    load_recipe("uncertainty", {"members.count": "[5, 1]", "rounds": "1"})  # round 1 is the final training


def test_round_change_needs_an_earlier_round_and_judges_whole_cases():
    with pytest.raises(InputError, match=r"'round-change' for round 0.*\[all, round-change\]"):
        load_recipe("uncertainty", {"selection.rule": "round-change"})
    late = {"selection.rule": "[all, all, round-change]", "rounds": "3", "members.count": "[5, 1]"}
    recipe = load_recipe("uncertainty", late)  # a single member is enough for it
    assert [recipe.needs_change(number) for number in (1, 2, 3)] == [True, True, False]
    assert not load_recipe("uncertainty").needs_change(1)
    for key, value in (("selection.per_organ", "{liver: 0.9}"), ("fusion.uncertain_organs", "ignore")):
        with pytest.raises(InputError, match=rf"{key}: found .*'round-change' of round 2 judges whole cases"):
            load_recipe("uncertainty", {**late, "members.count": "5", key: value})


def test_checkpoints_of_one_training_can_be_the_members():
    settings = {"members.kind": "checkpoints", "members.at": "[0.36, 0.66, 1.0]", "training.num_epochs": "100"}
    recipe = load_recipe("uncertainty", settings)
    assert recipe.member_folds(0) == ["all"]
    assert recipe.member_checkpoints(0) == ["checkpoint_1of3.pth", "checkpoint_2of3.pth", "checkpoint_3of3.pth"]
    assert recipe.settings(0, run="x").checkpoints_at == (0.36, 0.66, 1.0)
    assert recipe.settings(4, run="x").checkpoints_at == () and recipe.member_checkpoints(4) == ["checkpoint_final.pth"]
    short = load_recipe("uncertainty", {**settings, "training.num_epochs": "2"})
    assert short.member_checkpoints(0) == ["checkpoint_1of3.pth", "checkpoint_3of3.pth"]  # 66 and 100 % coincide
