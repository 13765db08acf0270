"""The recipe resenc from end to end, tiny: stock's ResEnc-L planner for the teacher, a student of 2.5 mm voxels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import do_all, phantom, started

from nnunet_flare.files import read_json
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.model import open_model
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array

TINY = {
    "planner": "nnUNetPlannerResEncL",
    "plan.max_features": "8",
    "plan.convs_per_stage": "1",
    "plan.batch_size": "2",
    "final.plan.spacing_mm": "[2.5, 2.5, 2.5]",
    "final.plan.patch_size": "[16, 32, 32]",
    "final.plan.base_features": "4",
    "final.plan.stages": "3",
    "final.num_epochs": "1",
}
UNLABELLED = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("resenc")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=UNLABELLED, test=0)
        run = started(folder, folders, "resenc", TINY)
        do_all(run, monkeypatch)
    return run


def test_the_presets_and_the_student() -> None:
    recipe = load_recipe("resenc")
    assert (recipe.planner, recipe.final.planner) == ("nnUNetPlannerResEncL", "nnUNetPlannerFlareSmall")
    assert [recipe.member_folds(number) for number in (0, 1)] == [["all"], ["all"]]
    teacher, student = recipe.settings(0, run="x"), recipe.settings(1, run="x")
    assert (teacher.num_epochs, teacher.mirroring) == (1000, True)
    assert (student.num_epochs, student.mirroring) == (1500, False)


def test_the_teacher_is_stocks_residual_encoder_with_the_changes_of_the_plan(finished: Run) -> None:
    plans = read_json(finished.plans_file)
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    assert architecture["network_class_name"].endswith("ResidualEncoderUNet")
    arch = architecture["arch_kwargs"]
    assert (arch["features_per_stage"], arch["n_blocks_per_stage"]) == ([4, 8, 8], [1, 1, 1])
    assert (configuration["patch_size"], configuration["batch_size"]) == ([16, 32, 32], 2)
    model = open_model(Member(finished.round(0).model, "all"))
    assert torch.isfinite(model.network()(torch.zeros(1, 1, 16, 32, 32))).all()


def test_arrays_of_another_spacing_have_a_folder_of_their_own(finished: Run) -> None:
    """Stock's ResEnc planners call their data as the plain planner does, whatever the spacing."""
    configuration = read_json(finished.plans_file)["configurations"]["3d_fullres"]
    assert configuration["data_identifier"] == finished.base.data.name
    assert finished.base.data.name != "nnUNetPlans_3d_fullres"
    assert not (finished.preprocessed / "nnUNetPlans_3d_fullres").exists()


def test_the_student_learns_from_all_scans_at_2_5_mm(finished: Run) -> None:
    taken = [entry.case for entry in read_decisions(finished.paths, 0) if entry.decision == "taken"]
    assert len(taken) == UNLABELLED
    configuration = read_json(finished.final_base.plans_file)["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.5, 2.5, 2.5]
    assert configuration["architecture"]["network_class_name"].endswith("PlainConvUNet")
    for case in taken:
        scan, array = (
            read_array(folder / f"{case}.b2nd").shape for folder in (finished.unlabelled_data, finished.final.data)
        )
        there = read_json(finished.plans_file)["configurations"]["3d_fullres"]["spacing"]
        for edge, other, spacing in zip(array[1:], scan[1:], there, strict=True):
            assert abs(edge * 2.5 - other * spacing) < 0.6 * max(2.5, spacing) + 1e-6
    final = finished.final.model / "fold_all" / "checkpoint_final.pth"
    assert Path(final).is_file()
