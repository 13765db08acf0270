"""A final model that differs from the rounds: its plans, trainer and length, its fine-tuning, an early stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_tasks import make_run

from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import write_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds.run.tasks import graph, stand_in, train_arguments
from nnunet_flare.rounds.stages import plan as plans
from nnunet_flare.rounds.stages.build import initial_weights
from nnunet_flare.rounds.start import _final_plans_name


def test_without_keys_of_its_own_it_has_the_plans_of_the_rounds() -> None:
    assert _final_plans_name(load_recipe("uncertainty"), "x", None) is None
    assert _final_plans_name(load_recipe("uncertainty", {"plan.base_features": "16"}), "x", None) is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"final.planner": "nnUNetPlannerFlareSmall"}, "nnUNetPlansFlareSmall"),
        ({"final.planner": "nnUNetPlannerFlareSmall", "plan.stages": "4"}, "nnUNetPlansFlareSmall"),
        ({"final.plan.dropout": "0.2"}, "nnUNetPlansFlare_x-final"),
        ({"final.configuration": "2d"}, "nnUNetPlansFlare"),
    ],
)
def test_its_plans_are_named_after_its_planner(settings: dict[str, str], name: str) -> None:
    assert _final_plans_name(load_recipe("uncertainty", settings), "x", None) == name


def test_a_change_of_the_students_plan_leaves_the_rounds_alone_and_inherits_theirs() -> None:
    recipe = load_recipe("noisy_student", {"final.plan.dropout": "0.2", "plan.stages": "4"})
    assert recipe.base_changes(final=False)[2] == {"stages": 4}
    assert recipe.base_changes(final=True)[2] == {"stages": 4, "dropout": 0.2}
    other = load_recipe("noisy_student", {"final.planner": "nnUNetPlannerFlareSmall", "plan.stages": "4"})
    assert other.base_changes(final=True) == ("nnUNetPlannerFlareSmall", "3d_fullres", {})


def test_a_teacher_plans_the_rounds_and_leaves_the_student_the_recipes_plan() -> None:
    larger = {"teacher.planner": "nnUNetPlannerFlareBig", "plan.base_features": "24"}
    recipe = load_recipe("selective", larger)
    assert recipe.base_changes(final=False) == ("nnUNetPlannerFlareBig", "3d_fullres", {"base_features": 24})
    assert recipe.base_changes(final=True) == ("nnUNetPlannerFlareFine", "3d_fullres", {})
    spelled_out = {"planner": "nnUNetPlannerFlareBig", "final.planner": "nnUNetPlannerFlareFine"}
    assert recipe == load_recipe("selective", {**spelled_out, "plan.base_features": "24"})
    for nothing in ({"teacher": "null"}, {"teacher.planner": "null"}):
        assert load_recipe("selective", nothing) == load_recipe("selective")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher.planer": "nnUNetPlannerFlareBig"}, "teacher: found .*, expected only the key planner"),
        ({"teacher": "nnUNetPlannerFlareBig"}, "teacher: found .*, expected only the key planner"),
        ({"teacher.planner": "a", "final.planner": "b"}, "teacher.planner: found 'a', but final.planner is 'b'"),
        ({"teacher.planner": "a", "final.start": "member"}, "final.planner: found 'nnUNetPlannerFlareFine', but"),
        ({"teacher.planner": "[1]"}, "planner: found"),
        ({"teacher.planner": "a", "final": "[1]"}, r"final: found \[1\]"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("selective", settings)


def test_training_keys_of_the_final_model_hold_for_it_alone() -> None:
    changes = {
        "final.training": "{mirroring: false}",
        "final.augmentation": "{pseudo: strong}",
        "final.num_epochs": "9",
    }
    recipe = load_recipe("uncertainty", changes)
    rounds, final = recipe.settings(3, run="x"), recipe.settings(4, run="x")
    assert (rounds.mirroring, rounds.num_epochs, rounds.augmentation.pseudo) == (True, 1000, "stock")
    assert (final.mirroring, final.num_epochs, final.augmentation.pseudo) == (False, 9, "strong")
    for key in ("num_epochs", "seed", "num_gpus"):
        with pytest.raises(InputError, match=rf"final.training.{key}: is set by the loop"):
            load_recipe("uncertainty", {"final.training": f"{{{key}: 1}}"})
    with pytest.raises(InputError, match=r"training.epochs: unknown key"):
        load_recipe("uncertainty", {"final.training": "{epochs: 1}"})


def test_fine_tuning_is_one_more_training_after_the_final_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"final.finetune": "{num_epochs: 7}", "final.trainer": "nnUNetTrainerFlareDistill"})
    tasks = graph(run)
    assert tasks["build-r2"].needs == ("train-r1-fall",)
    assert tasks["train-r2-fall"].needs == ("build-r2",) and "select-r1" not in tasks
    settings = run.recipe.settings(2, run="x", init_from="checkpoint")
    assert (settings.num_epochs, settings.initial_lr, settings.init_from) == (7, 0.001, "checkpoint")
    assert run.rounds[-1].number == 2 and run.round(2).model.name.startswith("nnUNetTrainerFlareDistill__")
    assert run.round(2).data == run.base_data, "on the labelled cases alone"
    assert run.round(0).model.name.startswith("nnUNetTrainerFlareST__")


def test_an_early_stop_moves_the_final_training_and_its_fine_tuning(tmp_path: Path) -> None:
    settings = {"rounds": "4", "stop.patience": "1", "final.finetune": "{num_epochs: 7}", "final.num_epochs": "3"}
    run = make_run(tmp_path, **settings)
    write_json(run.paths.stop, {"last_labelled_round": 1})
    run = run.current()
    trainings = [task.name for task in graph(run).values() if task.stage == "train"]
    assert trainings == ["train-r0-f0", "train-r0-f1", "train-r1-f0", "train-r1-f1", "train-r2-fall", "train-r3-fall"]
    assert [run.recipe.num_epochs(run.round(number).planned) for number in (1, 2, 3)] == [1000, 3, 7]
    for submitted, done in (("train-r2-f0", "train-r2-fall"), ("train-r3-f0", "train-r3-fall")):
        task = stand_in(run, submitted)
        assert task is not None and task.name == done
    for submitted in ("train-r2-f1", "train-r3-f1", "train-r4-fall", "train-r5-fall", "label-r2-p0"):
        assert stand_in(run, submitted) is None


def test_weights_to_start_from_are_not_forced_on_another_network(tmp_path: Path) -> None:
    settings = {"training.pretrained_weights": "w.pth", "final.planner": "nnUNetPlannerFlareSmall"}
    run = make_run(tmp_path, **settings)
    run = replace(run, settings=replace(run.settings, final_plans_name="nnUNetPlansFlareSmall"))
    tasks = graph(run)
    start = {"init_from": str(Path("w.pth").absolute()), "init_part": "but-head"}
    assert [initial_weights(run, run.round(number)) for number in (0, 1)] == [start, {}]
    assert "-pretrained_weights" not in train_arguments(run, tasks["train-r0-f0"]), "the settings say it"
    stock = make_run(tmp_path / "stock", **{**settings, "trainer": "nnUNetTrainer"})
    assert initial_weights(stock, stock.round(0)) == {}
    assert "-pretrained_weights" in train_arguments(stock, tasks["train-r0-f0"])
    final = train_arguments(run, tasks["train-r1-fall"])
    assert "-pretrained_weights" not in final and final[final.index("-p") + 1] == "nnUNetPlansFlareSmall"
    assert tasks["plan-final"].needs == ("plan",) and "plan-final" in tasks["build-r1"].needs


def test_the_final_training_goes_on_from_the_first_member_of_the_last_round(tmp_path: Path) -> None:
    settings = {"rounds": "2", "final.start": "member", "training.pretrained_weights": "w.pth"}
    run = make_run(tmp_path, **settings)
    given = {"init_from": str(Path("w.pth").absolute()), "init_part": "but-head"}
    assert [initial_weights(run, run.round(number)) for number in (0, 1)] == [given, given]
    member = str(run.round(1).model / "fold_0" / "checkpoint_final.pth")
    assert initial_weights(run, run.round(2)) == {"init_from": member}, "its head too"
    write_json(run.paths.stop, {"last_labelled_round": 0})
    run = run.current()
    member = str(run.round(0).model / "fold_0" / "checkpoint_final.pth")
    assert initial_weights(run, run.round(1)) == {"init_from": member}, "after an early stop"


@pytest.mark.parametrize(
    "change",
    [
        {"final.planner": "nnUNetPlannerFlareSmall"},
        {"final.configuration": "3d_lowres"},
        {"final.plan.base_features": "4"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_member_s_weights_are_not_forced_on_another_network(change: dict[str, str]) -> None:
    key = next(iter(change)).replace(".base_features", "")
    with pytest.raises(InputError, match=rf"{key}: found .*, but with final.start=member"):
        load_recipe("uncertainty", {"final.start": "member", **change})


def test_a_given_model_with_another_network_is_refused_before_anything_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the planning, which is left out here."""
    run = make_run(tmp_path, **{"final.start": "member"})
    given = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    run = replace(run, settings=replace(run.settings, init_model=str(given), init_folds=("1", "2")))
    assert initial_weights(run, run.round(1)) == {"init_from": str(given / "fold_1" / "checkpoint_final.pth")}
    unet = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    ours, theirs = (
        {
            "architecture": {
                "network_class_name": unet,
                "arch_kwargs": {"n_stages": stages},
                "_kw_requires_import": [],
            }
        }
        for stages in (5, 6)
    )
    write_json(run.base.plans_file, {"configurations": {run.base.configuration: ours}})
    write_json(given / "plans.json", {"configurations": {"3d_fullres": ours}})
    monkeypatch.setattr(plans, "plan_and_preprocess", lambda run, base: "hash")
    plan = graph(run)["plan"]
    assert work._plan(run, plan) == {"base_hash": "hash"}
    write_json(given / "plans.json", {"configurations": {"3d_fullres": theirs}})
    with pytest.raises(TaskError, match=r"the network of .*nnUNetTrainer__nnUNetPlans__3d_fullres is not that of"):
        work._plan(run, plan)
