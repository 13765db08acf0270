"""Real CT, unlabelled scans at full resolution, through the recipes that find the organs with a coarse model first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process import TINY_COARSE_TO_FINE, do_all, nnunet_folders
from real_scans import TORSO_HIGH, TORSO_LOW, write_labelled

from nnunet_flare.files import read_json
from nnunet_flare.images import geometry_difference, read_labels, read_volume
from nnunet_flare.inference.predictor import FlarePredictor
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.start import plan_run, start_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = {
    "selective": {"rounds": "1", "selection.threshold": "0.0", "selection.keep_odd": "true"},
    "adversarial": {"training.adversarial.discriminator_features": "2", "selection.keep_odd": "true"},
}
ANOTHER_STUDENT = {
    "final.planner": "nnUNetPlannerFlareFine",
    "final.plan.patch_size": "[16, 24, 24]",
    "final.plan.base_features": "4",
    "final.plan.stages": "3",
}
UNLABELLED = {"chaos3": "chaos3_ct", "slab": "ts_slab512_ct"}


@pytest.fixture(scope="module", params=[("selective", {}), ("selective", ANOTHER_STUDENT), ("adversarial", {})])
def run(request: pytest.FixtureRequest, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two labelled pieces of a torso and two unlabelled scans of 512 x 512 voxels a slice."""
    folder = tmp_path_factory.mktemp("real")
    name, more = request.param
    write_labelled(folder / "nnUNet_raw" / "Dataset022_Real", real_data, {"low": TORSO_LOW, "high": TORSO_HIGH})
    (folder / "unlabelled").mkdir()
    for case, file in UNLABELLED.items():
        (folder / "unlabelled" / f"{case}_0000.nii.gz").symlink_to((real_data / f"{file}.nii.gz").resolve())
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = nnunet_folders(folder, monkeypatch)
        recipe = load_recipe(name, {**TINY_COARSE_TO_FINE, **SETTINGS[name], **more})
        made = start_run(
            plan_run(Request(dataset="22", unlabelled=folder / "unlabelled", device="cpu"), recipe, folders)
        )
        do_all(made, monkeypatch)
    return made


def test_every_unlabelled_scan_is_seen_by_its_box(run: Run) -> None:
    for case in UNLABELLED:
        found = read_array(run.unlabelled_data / f"{case}.b2nd")
        assert found.shape[0] == 1 and found.shape[1:] in ((18, 36, 36), (16, 32, 32)), "of the size of the network"
        assert np.isfinite(found).all() and found.std() > 0.1
        box = read_json(run.paths.box(case))["box"]
        whole = read_volume(Path(run.settings.unlabelled_dir) / f"{case}_0000.nii.gz").array.shape
        assert box is None or all(0 <= low < high <= n for (low, high), n in zip(box, whole, strict=True))


def test_the_final_model_labels_the_scan_on_its_own_grid(run: Run, real_data: Path) -> None:
    if not run.recipe.is_online:
        assert {entry.case for entry in read_decisions(run.paths, 0) if entry.decision == "taken"} <= set(UNLABELLED)
        for case, name in UNLABELLED.items():
            label = read_labels(run.paths.label(0, case, ".nii.gz"), allowed=range(14))
            assert geometry_difference(label, read_volume(real_data / f"{name}.nii.gz")) is None
    predictor = FlarePredictor.from_model_folder(
        run.final.model, folds=["all"], roi=str(run.coarse_model), roi_rule=run.recipe.roi.rule
    )
    labels = predictor.predict(real_data / "chaos3_ct.nii.gz")
    assert labels.shape == read_volume(real_data / "chaos3_ct.nii.gz").array.shape
    assert set(np.unique(labels)) <= set(range(14))
