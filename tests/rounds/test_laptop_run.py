"""The recipe laptop from end to end, tiny: a teacher, a published one beside it, a student of 2.5 mm, its export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process import do_all, phantom, started

from nnunet_flare.files import read_json
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two unlabelled scans; the published teacher knows the truth of the first."""
    folder = tmp_path_factory.mktemp("laptop")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=2, test=0)
        path = min((folder / "unlabelled_truth").iterdir())
        truth = read_labels(path)
        write_labels(folder / "aladdin5" / path.name, truth.array, truth)
        run = started(folder, folders, "laptop", {**TINY, "fusion.teachers": f"[{folder / 'aladdin5'}]"})
        do_all(run, monkeypatch)
    return run


def test_the_recipe() -> None:
    recipe = load_recipe("laptop")
    assert recipe.final.plan.spacing_mm == (2.5, 2.5, 2.5) and not recipe.settings(1, run=None).mirroring
    assert recipe.final_round == 1 and recipe.member_folds(0) == ["all"]
    assert recipe.loops[0].ids(range(1, 14)) == tuple(range(1, 14))


def test_the_student_learns_what_teacher_and_published_teacher_agree_on(finished: Run) -> None:
    """By hand: where the two differ, 14 (ignored); a scan that only one knows is its word alone."""
    cases = sorted(entry.case for entry in read_decisions(finished.paths, 1) if entry.decision == "taken")
    assert cases
    for case in cases:
        made = read_labels(finished.paths.label(1, case, ".nii.gz")).array
        own = read_labels(finished.paths.label(0, case, ".nii.gz")).array
        published = finished.preprocessed.parents[1] / "aladdin5" / f"{case}.nii.gz"
        if published.is_file():
            other = read_labels(published).array
            np.testing.assert_array_equal(made, np.where(own == other, own, 14))
            assert (made == 14).any()
        else:
            np.testing.assert_array_equal(made, own)


def test_the_student_has_voxels_of_2_5_mm(finished: Run) -> None:
    configuration = read_json(finished.final_base.plans_file)["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.5, 2.5, 2.5]
    assert configuration["architecture"]["network_class_name"].endswith("PlainConvUNet")
    assert (Path(finished.final.model) / "fold_all" / "checkpoint_final.pth").is_file()
