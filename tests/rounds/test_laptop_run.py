"""The recipe laptop, tiny: a download with published teachers, a teacher, a student of 2.5 mm, its export."""

from __future__ import annotations

import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from in_process import TINY_PLAN, TINY_TRAINING, do_all, nnunet_folders

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import read_json
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.phantom import write_phantom
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.start import plan_run, start_run

TINY = {
    "planner": "nnUNetPlannerResEncL",
    "plan.max_features": "8",
    "plan.convs_per_stage": "1",
    "plan.batch_size": "2",
    "final.plan.patch_size": "[16, 32, 32]",
    "final.plan.base_features": "4",
    "final.plan.stages": "3",
    "final.num_epochs": "1",
}


def downloaded(phantom: Path, download: Path) -> Path:
    """A phantom as the hub has FLARE's task 2; of three unlabelled scans aladdin5 labelled two, blackbean one."""
    data, pseudo = phantom / "nnUNet_raw" / "Dataset022_FLAREPhantom", download / "train_pseudo_label"

    def move(source: Path, target: str) -> None:
        (download / target).parent.mkdir(parents=True, exist_ok=True)
        source.rename(download / target)

    for number, label in enumerate(sorted((data / "labelsTr").iterdir()), 1):
        (scan,) = (data / "imagesTr").glob(f"{label.name.removesuffix('.nii.gz')}_*")
        move(scan, f"train_gt_label/imagesTr/FLARE22_Tr_{number:04d}_0000.nii.gz")
        move(label, f"train_gt_label/labelsTr/FLARE22_Tr_{number:04d}.nii.gz")
    truths = sorted((phantom / "unlabelled_truth").iterdir())
    for number, scan in enumerate(sorted((phantom / "unlabelled").iterdir()), 1):
        move(scan, f"train_pseudo_label/imagesTr/Case_{number:05d}_0000.nii.gz")
        truth = read_labels(truths[number - 1])
        if number < 3:
            write_labels(pseudo / "flare22_aladdin5_pseudo" / f"Case{number}.nii.gz", truth.array, truth)
        if number == 1:  # one voxel beside the other's
            shifted = np.roll(truth.array, 1, axis=2)
            write_labels(pseudo / "flare22_blackbean_pseudo" / "Case_00001.nii.gz", shifted, truth)
    move(next((phantom / "test" / "images").iterdir()),
         "validation/Validation-Public-Images/FLARETs_0001_0000.nii.gz")  # fmt: skip
    move(next((phantom / "test" / "labels").iterdir()), "validation/Validation-Public-Labels/FLARETs_0001.nii.gz")
    return download


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A download of FLARE24's task 2, prepared, and run as ``prepare`` and the recipe's page say."""
    folder = tmp_path_factory.mktemp("laptop")
    write_phantom(folder / "phantom", size=(20, 32, 32), seed=3, labelled=2, unlabelled=3, test=1)
    download = downloaded(folder / "phantom", folder / "FLARE-Task2-LaptopSeg")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = nnunet_folders(folder, monkeypatch)
        said = StringIO()
        with redirect_stdout(said):
            assert main(["prepare", "--flare24", str(download), "--task", "2"]) == 0
        told = next(line for line in said.getvalue().splitlines() if line.startswith("next: "))
        words = shlex.split(told.removeprefix("next: flare-pseudolabel run "))
        assert [words[0], words[2], words[4], words[7:]] == ["-d", "-u", "--eval", ["--dry-run"]]
        added = shlex.split(said.getvalue().split("with published labels as teachers, add: ")[1].splitlines()[0])
        assert added[:3] == ["--recipe", "laptop", "--set"] and added[3].count(str(folder)) == 2
        settings = {**TINY_PLAN, **TINY_TRAINING, **TINY, **dict([added[3].split("=")])}
        request = Request(
            dataset=words[1],
            unlabelled=Path(words[3]),
            eval_images=Path(words[5]),
            eval_labels=Path(words[6]),
            device="cpu",
        )
        run = start_run(plan_run(request, load_recipe("laptop", settings), folders))
        do_all(run, monkeypatch)
    return run


def test_the_recipe() -> None:
    recipe = load_recipe("laptop")
    assert recipe.final.plan.spacing_mm == (2.5, 2.5, 2.5) and not recipe.settings(1, run=None).mirroring
    assert recipe.final_round == 1 and recipe.member_folds(0) == ["all"]
    assert recipe.loops[0].ids(range(1, 14)) == tuple(range(1, 14))


def test_the_student_learns_what_teacher_and_published_teachers_agree_on(finished: Run) -> None:
    """By hand: what all say who labelled a scan; where they differ, 14 (ignored)."""
    cases = sorted(entry.case for entry in read_decisions(finished.paths, 1) if entry.decision == "taken")
    assert cases == ["Case_00001", "Case_00002", "Case_00003"]
    said = {case: [] for case in cases}
    for case in cases:
        made = read_labels(finished.paths.label(1, case, ".nii.gz")).array
        own = read_labels(finished.paths.label(0, case, ".nii.gz")).array
        expected = own.copy()
        for team in ("aladdin5", "blackbean"):
            published = finished.raw / "pseudo" / team / f"{case}.nii.gz"
            if published.is_file():
                said[case].append(team)
                expected[read_labels(published).array != own] = 14
        np.testing.assert_array_equal(made, expected)
        assert (made == 14).any() == bool(said[case])
    assert said == {"Case_00001": ["aladdin5", "blackbean"], "Case_00002": ["aladdin5"], "Case_00003": []}


def test_the_final_model_trains_on_that_and_is_scored(finished: Run) -> None:
    """Ignored voxels of the fused labels are ignored in the training data of 2.5 mm, to the rounding of grids."""
    for case in ("Case_00001", "Case_00002"):
        made = read_labels(finished.paths.label(1, case, ".nii.gz")).array
        trained = read_array(finished.final.data / f"{case}_seg.b2nd")[0]
        assert (trained == 14).mean() == pytest.approx((made == 14).mean(), abs=0.05)
    assert set(read_json(finished.paths.evaluation(1) / "dice.json")["cases"]) == {"FLARETs_0001"}


def test_the_student_has_voxels_of_2_5_mm(finished: Run) -> None:
    configuration = read_json(finished.final_base.plans_file)["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.5, 2.5, 2.5]
    assert configuration["architecture"]["network_class_name"].endswith("PlainConvUNet")
    assert (Path(finished.final.model) / "fold_all" / "checkpoint_final.pth").is_file()
