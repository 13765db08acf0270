"""The recipe selective from end to end, tiny: coarse model, boxes, checkpoints as members, labels, the fine model."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import stock_prediction
from in_process import TINY_COARSE_TO_FINE, do_all, phantom
from scipy import ndimage

from nnunet_flare.cli import predict
from nnunet_flare.files import read_json
from nnunet_flare.images import read_labels, read_volume
from nnunet_flare.images.orientation import turn_for_reader
from nnunet_flare.inference.coarse_to_fine import pasted
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.preview import preview
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import read_array, read_properties
from nnunet_flare.rounds.start import plan_run, start_run

TINY = {**TINY_COARSE_TO_FINE, "rounds": "1", "training.num_epochs": "[3, 1]", "selection.threshold": "0.0"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three labelled, four unlabelled and one held-out scan."""
    folder = tmp_path_factory.mktemp("selective")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=3, unlabelled=4, test=1)
        request = Request(
            dataset="22",
            unlabelled=folder / "unlabelled",
            device="cpu",
            eval_images=folder / "test" / "images",
            eval_labels=folder / "test" / "labels",
        )
        plan = plan_run(request, load_recipe("selective", TINY), folders)
        (folder / "before.txt").write_text(preview(plan))
        run = start_run(plan)
        do_all(run, monkeypatch)
        (folder / "after.txt").write_text(preview(plan))
    return run


def folder_of(run: Run) -> Path:
    return run.raw.parents[1]


def test_everything_was_done_in_order(finished: Run) -> None:
    done = sorted((finished.root / "tasks").glob("*.done.json"), key=lambda path: read_json(path)["started"])
    names = [path.name.removesuffix(".done.json") for path in done]
    assert names[:5] == ["plan", "plan-coarse", "train-coarse", "locate-p0", "unlabelled"]
    assert (finished.coarse_model / "fold_all" / "checkpoint_final.pth").is_file()
    assert finished.coarse_model.name == (
        "nnUNetTrainerFlareSelective__nnUNetPlansFlareCoarse_selective-coarse__3d_fullres_selective_coarse"
    )


def test_arrays_are_the_box_of_the_scan_and_labels_come_back_to_all_of_it(finished: Run) -> None:
    for case in read_list(finished.paths.unlabelled):
        box = read_json(finished.paths.box(case.case))["box"]
        whole = read_volume(Path(case.images[0])).array.shape
        properties = read_properties(finished.unlabelled_data / f"{case.case}.pkl")
        assert properties["shape_before_cropping"] == whole
        expected = [[0, n] for n in whole] if box is None else box
        assert [list(edge) for edge in properties["bbox_used_for_cropping"]] == expected
        assert read_array(finished.unlabelled_data / f"{case.case}.b2nd").shape == (1, 18, 36, 36), "a tenth larger"
        label = read_labels(finished.paths.label(0, case.case, ".nii.gz"), case.case).array
        assert label.shape == whole
        turn = turn_for_reader(read_json(finished.plans_file)["image_reader_writer"], read_volume(Path(case.images[0])))
        oriented = turn.apply(label)
        inside = tuple(slice(low, high) for low, high in expected)
        np.testing.assert_array_equal(oriented, pasted(oriented[inside], [tuple(edge) for edge in expected], whole))


def test_the_members_are_the_distinct_checkpoints_of_one_training(finished: Run) -> None:
    case = read_decisions(finished.paths, 0)[0]
    document = read_json(finished.paths.case(0, case.case))
    assert document["members"] == 2, "after 2, 2 and 3 of 3 epochs"
    assert (finished.round(0).model / "fold_all" / "checkpoint_1of3.pth").is_file()
    members = read_array(finished.paths.members(0, case.case))
    label = np.maximum(read_array(finished.paths.training_label(0, case.case))[0], 0)
    assert members.shape == (2, *label.shape)
    for organ in np.unique(label[label > 0]):
        assert ndimage.label(label == organ, np.ones((3, 3, 3)))[1] == 1, "the largest component alone"
    properties = read_properties(finished.paths.properties(0, case.case))
    box = np.diff(properties["bbox_used_for_cropping"], axis=1)[:, 0]
    box_mm3 = np.prod(box) * np.prod(properties["spacing"])
    for name, organ in organ_ids(finished).items():
        expected = (label == organ).mean() * box_mm3
        assert document["volume_mm3"][name] == pytest.approx(expected), "on a grid of any spacing"


def test_half_of_the_cases_are_taken_and_a_pass_is_each_of_them_with_a_labelled_one(finished: Run) -> None:
    taken = [entry.case for entry in read_decisions(finished.paths, 0) if entry.decision == "taken"]
    configurations = read_json(finished.plans_file)["configurations"]
    first, second = (configurations[finished.round(number).configuration]["flare"] for number in (0, 1))
    assert first["iterations_per_epoch"] == 3, "three labelled cases, one a batch"
    assert second["iterations_per_epoch"] == 2 * len(taken)
    assert (first["augmentation"]["labelled"], second["augmentation"]["labelled"]) == ("jitter", "weak")
    coarse = read_json(finished.coarse_base.plans_file)["configurations"][finished.coarse_configuration]
    assert coarse["flare"]["iterations_per_epoch"] == 3


def test_the_dry_run_counts_passes_in_epochs_of_stock_nnunet(finished: Run) -> None:
    before, after = ((folder_of(finished) / f"{name}.txt").read_text() for name in ("before", "after"))
    assert (
        "train-r0-fall" in before
        and "3 passes over 3 samples = 0.036 epochs of 250 iterations at a batch of 1" in before
    )
    assert "train-coarse" in before and "1 passes over 3 samples" in before
    assert "3 passes over 3 samples = 0.036 epochs of 250 iterations" in after


def test_flare_predict_and_stock_open_the_models_that_the_run_trained(
    finished: Run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "cache"))
    images, fine = folder_of(finished) / "test" / "images", finished.rounds[-1].model
    words = ["-i", images, "-o", tmp_path / "out", "-m", fine, "--roi", finished.coarse_model, "--roi_rule", "fosun",
             "--save_roi", "--backend", "torch", "--precision", "fp32"]  # fmt: skip
    assert predict.main([str(word) for word in words]) == 0
    (result,) = (tmp_path / "out").glob("*.nii.gz")
    (scan,) = images.glob("*_0000.nii.gz")
    assert read_volume(result).array.shape == read_volume(scan).array.shape
    (crop,) = (tmp_path / "out" / "roi").glob("*_0000.nii.gz")
    (tmp_path / "stock").mkdir()
    stock = stock_prediction.predictor(fine, ["all"])
    with redirect_stdout(StringIO()):
        stock.predict_from_files_sequential([[str(crop)]], [str(tmp_path / "stock" / "a")], overwrite=True)
    assert read_volume(tmp_path / "stock" / "a.nii.gz").array.shape == read_volume(crop).array.shape
    dice = read_json(finished.paths.evaluation(1) / "dice.json")
    assert len(dice["cases"]) == 1
