"""The recipe blackbean: three generations, what changed least is taken, a student with plans of its own."""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from in_process import do_all, phantom, started

from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.do_task import TASK_VARIABLE
from nnunet_flare.rounds.preview import preview
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.replanned import (
    LabelledScan,
    cases_folder,
    has_same_arrays,
    prepare_cases,
    preprocess_scans,
)
from nnunet_flare.rounds.start import plan_run
from nnunet_flare.rounds.status import status

STUDENT = {
    "members.count": "[2, 1]",
    "selection.top_fraction": "[null, null, 0.75]",
    "final.planner": "nnUNetPlannerFlareTiny",
    "final.plan.spacing_mm": "[10.0, 6.0, 6.0]",
    "final.plan.patch_size": "[16, 24, 32]",
    "final.num_epochs": "2",
}


def test_the_winners_numbers() -> None:
    recipe = load_recipe("blackbean")
    assert (recipe.planner, recipe.final.planner) == ("nnUNetPlannerFlareBig", "nnUNetPlannerFlareSmall")
    assert recipe.rounds == 3
    assert [len(recipe.member_folds(number)) for number in range(4)] == [5, 1, 1, 1]
    assert recipe.member_folds(1) == ["all"]
    assert [recipe.selection_of(r).rule.name for r in range(3)] == ["all", "all", "round-change"]
    assert recipe.selection_of(2).top_fraction == 0.962
    teacher, student = recipe.settings(2, run="x"), recipe.settings(3, run="x")
    assert (teacher.num_epochs, teacher.mirroring, teacher.augmentation.labelled) == (1000, True, "elastic")
    assert (student.num_epochs, student.mirroring, student.augmentation.pseudo) == (1500, False, "elastic")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe on the phantom, one process, interrupted while the student's cases are preprocessed."""
    folder = tmp_path_factory.mktemp("blackbean")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=4, unlabelled=4, test=1)
        run = started(folder, folders, "blackbean", STUDENT)
        do_all(run, monkeypatch, until=lambda name: name == "build-r3")
        assert "build-r3" in do_all(run, monkeypatch)
    return run


def test_what_changed_least_is_taken_in_the_last_round(finished: Run) -> None:
    entries = read_decisions(finished.paths, 2)
    maps = [
        [read_labels(finished.paths.label(r, entry.case, ".nii.gz"), entry.case).array for r in range(3)]
        for entry in entries
    ]
    uncertainty = {
        entry.case: np.mean([(a != b).sum() / (b > 0).sum() for a, b in ((one, two), (two, three))])
        for entry, (one, two, three) in zip(entries, maps, strict=True)
    }
    taken = [entry.case for entry in entries if entry.decision == "taken"]
    assert len(taken) == 3, "three quarters of four"
    assert set(taken) == set(sorted(uncertainty, key=uncertainty.__getitem__)[:3])
    for entry in entries:
        assert entry.score == pytest.approx(1 / (1 + uncertainty[entry.case]))
    for number in (0, 1):
        assert all(entry.decision == "taken" for entry in read_decisions(finished.paths, number))
    with open(finished.paths.selection(2), newline="") as stream:
        reasons = {row["case"]: row["reason"] for row in csv.DictReader(stream)}
    assert all("round-change" in reason for reason in reasons.values())


def test_the_student_has_plans_data_and_names_of_its_own(finished: Run) -> None:
    model = finished.round(3).model
    assert model.name == "nnUNetTrainerFlareST__nnUNetPlansFlareTiny_blackbean-final__3d_fullres_blackbean_r3"
    plans = read_json(model / "plans.json")
    own = plans["configurations"]["3d_fullres_blackbean_r3"]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [10.0, 6.0, 6.0]
    assert own["flare"]["num_epochs"] == 2 and own["flare"]["mirroring"] is False and own["flare"]["round"] == 3
    taken = [entry.case for entry in read_decisions(finished.paths, 2) if entry.decision == "taken"]
    table = read_json(finished.preprocessed / "flare_cases.3d_fullres_blackbean_r3.json")["cases"]
    assert sorted(case for case, entry in table.items() if entry["role"] == "pseudo") == sorted(taken)
    assert {p.name[: -len("_seg.b2nd")] for p in finished.round(3).data.glob("*_seg.b2nd")} == set(table)
    labelled = next(case for case, entry in table.items() if entry["role"] == "labelled")
    assert os.path.samefile(finished.round(3).data / f"{labelled}.b2nd", finished.final_base.data / f"{labelled}.b2nd")
    assert not list(finished.preprocessed.glob("*_cases")), "what was kept for a resumed build is gone"


def test_the_students_data_is_what_stock_preprocessing_makes_of_scan_and_label_map(finished: Run) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    case = next(entry.case for entry in read_decisions(finished.paths, 2) if entry.decision == "taken")
    plans = PlansManager(str(finished.final_base.plans_file))
    manager = plans.get_configuration("3d_fullres")
    scan = finished.raw / "imagesUn" / f"{case}_0000.nii.gz"
    label = finished.paths.label(2, case, ".nii.gz")
    document = read_json(finished.raw / "dataset.json")
    data, seg, _ = manager.preprocessor_class(verbose=False).run_case([str(scan)], str(label), plans, manager, document)
    np.testing.assert_array_equal(read_array(finished.round(3).data / f"{case}.b2nd"), data)
    np.testing.assert_array_equal(read_array(finished.round(3).data / f"{case}_seg.b2nd"), seg)


def test_stock_nnunet_predicts_with_the_student(finished: Run, tmp_path: Path) -> None:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(finished.round(3).model), ("all",))
    assert predictor.allowed_mirroring_axes is None
    scan = next((finished.root.parents[2] / "test" / "images").glob("*.nii.gz"))
    predictor.predict_from_files_sequential([[str(scan)]], [str(tmp_path / "out")])
    assert read_labels(tmp_path / "out.nii.gz").array.shape == (20, 32, 32)


def test_a_killed_build_keeps_finished_cases_and_a_broken_scan_is_set_aside(finished: Run) -> None:
    taken = [entry for entry in read_decisions(finished.paths, 2) if entry.decision == "taken"]
    data = finished.preprocessed / "elsewhere"
    folder = cases_folder(data)
    assert prepare_cases(finished, finished.final_base, data, 2, taken) == {}
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    redone = taken[0].case
    (folder / f"{redone}.pkl").unlink()
    changed = [*taken[:1], replace(taken[1], label_sha256="0" * 64), *taken[2:]]
    scan = finished.raw / "imagesUn" / f"{taken[1].case}_0000.nii.gz"
    kept = scan.resolve().read_bytes()
    try:
        scan.resolve().write_bytes(kept[:300])
        failed = prepare_cases(finished, finished.final_base, data, 2, changed)
    finally:
        scan.resolve().write_bytes(kept)
    assert list(failed) == [taken[1].case]
    assert f"{scan.name} changed since the scan was labelled" in failed[taken[1].case]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    assert {name for name in after if after[name] != before[name]} == {f"{redone}.b2nd", f"{redone}_seg.b2nd"}
    assert not list(folder.glob("label_*"))
    lost = LabelledScan(taken[1].case, (str(scan),), folder / "lost.nii.gz", "a label map that is not there")
    failed = preprocess_scans(finished, finished.final_base, data, [lost])
    assert list(failed) == [lost.case] and "preprocessing for the final model failed" in failed[lost.case]
    shutil.rmtree(folder)


def test_a_student_that_differs_in_its_network_only_takes_the_rounds_arrays(finished: Run) -> None:
    assert not has_same_arrays(finished.base, finished.final_base)
    plans = read_json(finished.base.plans_file)
    plans["configurations"]["3d_fullres"]["patch_size"] = [8, 16, 16]
    other = replace(finished.base, plans_name="narrow", task="plan-final")
    write_json(other.plans_file, plans)
    assert has_same_arrays(finished.base, other)
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"]
    write_json(other.plans_file, plans)
    assert not has_same_arrays(finished.base, other)
    other.plans_file.unlink()


def test_a_dry_run_counts_the_time_and_disk_of_the_students_preprocessing(finished: Run, monkeypatch) -> None:
    for name, value in finished.settings.folders.items():
        monkeypatch.setenv(name, value)
    request = Request("22", Path(finished.settings.unlabelled_dir), name="blackbean", device="cpu")
    folders = {name: Path(folder) for name, folder in finished.settings.folders.items()}
    text = preview(plan_run(request, finished.recipe, folders))
    assert "0.00 GB  arrays for the final model" in text
    assert "(nnUNetPlansFlareTiny_blackbean-final) preprocess every taken scan again: about" in text
    assert "plan-final" in text
    assert "nnUNetv2_train 22 3d_fullres_blackbean_r3 all -tr nnUNetTrainerFlareST" in text
    assert "-p nnUNetPlansFlareTiny_blackbean-final -device cpu" in text
    assert "\ntrain-r3-fall: 2 epochs" in text


# ------------------------------------------------------------------ distillation and fine-tuning

GIVEN = {
    "planner": "given-model",
    **dict.fromkeys(("plan.spacing_mm", "plan.patch_size", "plan.base_features", "plan.stages"), "null"),
}


def test_the_recipe_distill_needs_a_model_named_as_nnunet_does(finished: Run, tmp_path: Path) -> None:
    folders = {name: Path(folder) for name, folder in finished.settings.folders.items()}
    request = Request("22", Path(finished.settings.unlabelled_dir), device="cpu")
    with pytest.raises(InputError, match=r"given-model: takes the plans of a trained model; give its folder"):
        plan_run(request, load_recipe("distill"), folders)
    copy = tmp_path / "my_model"
    shutil.copytree(finished.round(3).model, copy)
    with pytest.raises(InputError, match=r"expected a folder TRAINER__PLANS__CONFIGURATION.*found 'my_model'"):
        plan_run(replace(request, init_model=copy), load_recipe("distill"), folders)


def test_a_student_learns_from_a_given_models_labels_and_is_fine_tuned(finished: Run, monkeypatch) -> None:
    """The teacher's plans are foreign to the student's; both are used by stock's own names."""
    folder = Path(finished.settings.unlabelled_dir).parent
    folders = {name: Path(path) for name, path in finished.settings.folders.items()}
    for name, path in {**finished.settings.folders, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}.items():
        monkeypatch.setenv(name, path)
    monkeypatch.setenv(TASK_VARIABLE, "")
    settings = {
        **GIVEN,
        "final.planner": "nnUNetPlannerFlareTiny",
        "final.plan.patch_size": "[16, 24, 32]",
        "final.finetune": "{num_epochs: 1, initial_lr: 0.002}",
    }
    run = started(folder, folders, "distill", settings, init_model=finished.round(3).model)
    assert run.settings.plans_name == "nnUNetPlansFlareTiny_blackbean-final_distill"
    teacher = read_json(finished.round(3).model / "plans.json")
    done = do_all(run, monkeypatch)
    assert [name for name in done if name.startswith("train")] == ["train-r1-fall", "train-r2-fall"]
    mine = read_json(run.plans_file)
    assert mine["configurations"]["3d_fullres"]["spacing"] == [10.0, 6.0, 6.0]
    key = "foreground_intensity_properties_per_channel"
    assert mine[key] == teacher[key]
    tuned = read_json(run.final_base.plans_file)["configurations"][run.round(2).configuration]["flare"]
    assert tuned["init_from"] == str(run.round(1).model / "fold_all" / "checkpoint_final.pth")
    assert (tuned["num_epochs"], tuned["initial_lr"], tuned["mirroring"]) == (1, 0.002, False)
    table = read_json(run.preprocessed / f"flare_cases.{run.round(2).configuration}.json")["cases"]
    assert {entry["role"] for entry in table.values()} == {"labelled"}, "fine-tuning sees no pseudo-label"
    assert run.rounds[-1].number == 2 and (run.round(2).model / "fold_all" / "checkpoint_final.pth").is_file()
    text = status(run)
    assert "\ntuned " in text and "\nfinal " in text


def test_a_student_that_learns_from_logits_has_the_teachers_input_or_is_refused_early(
    finished: Run, monkeypatch
) -> None:
    folder = Path(finished.settings.unlabelled_dir).parent
    folders = {name: Path(path) for name, path in finished.settings.folders.items()}
    for name, path in {**finished.settings.folders, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}.items():
        monkeypatch.setenv(name, path)
    monkeypatch.setenv(TASK_VARIABLE, "")
    model = finished.round(3).model
    soft = {**GIVEN, "final.trainer": "nnUNetTrainerFlareDistill", "final.plan.base_features": "2", "name": "soft"}
    run = started(folder, folders, "distill", {**soft, "final.planner": "given-model"}, init_model=model)
    do_all(run, monkeypatch, until=lambda name: name == "train-r1-fall")
    plans = read_json(run.final_base.plans_file)["configurations"]
    assert plans["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][0] == 2
    assert plans[run.round(1).configuration]["flare"]["teacher"] == {"folder": str(model), "fold": "all"}
    unlabelled = read_decisions(run.paths, 0)[0].case
    assert os.path.samefile(run.round(1).data / f"{unlabelled}.b2nd", run.unlabelled_data / f"{unlabelled}.b2nd")
    own = {**soft, "name": "own", "final.planner": "nnUNetPlannerFlareTiny"}
    other = started(folder, folders, "distill", own, init_model=model)
    with pytest.raises(TaskError, match=r"expects a different input than .* \(spacing.*final.planner=given-model"):
        do_all(other, monkeypatch)
    assert not other.paths.done("label-r0-p0").is_file()
