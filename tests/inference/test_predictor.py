"""flare's prediction against stock nnU-Net's, on the same models and scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import SimpleITK as sitk
import small_scans as scans
import stock_prediction as stock
import torch
from nnunetv2.preprocessing.normalization import default_normalization_schemes

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import Volume, to_sitk, write_volume
from nnunet_flare.inference import model as trained_model
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.predictor import FlarePredictor

EXACT = {"precision": "fp32", "backend": "torch"}
"""What stock computes with."""

TIES = 2e-5
"""Share of voxels that may differ: scores that are equal up to rounding."""


def assert_same_labels(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert len(np.unique(theirs)) > 1, "the reference is one label only, which proves nothing"
    assert (ours != theirs).mean() <= TIES


def compare(tmp_path: Path, volume: Volume, *, folds=(0,), mirror=False, labels=None, **plan) -> np.ndarray:
    folder = models.write_model(tmp_path / "model", folds=folds, plan=models.plans(**plan), labels=labels)
    path = tmp_path / "case_0000.nii.gz"
    write_volume(path, volume)
    theirs = stock.labels(stock.predictor(folder, folds, mirror=mirror), [path])
    predictor = FlarePredictor.from_model_folder(folder, tta="mirror" if mirror else "none", **EXACT)
    ours = predictor.predict(path)
    assert_same_labels(ours, theirs)
    return ours


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param({}, id="separate-z"),
        pytest.param({"spacing": (2.0, 6.5, 2.0)}, id="separate-other-axis"),
        pytest.param({"spacing": (3.0, 2.0, 2.0)}, id="all-axes-together"),
        pytest.param({"transpose": (2, 0, 1)}, id="axes-transposed"),
        pytest.param({"force_separate_z": False}, id="separation-switched-off"),
        pytest.param({"resampling": "resample_torch_fornnunet"}, id="torch-resampling"),
        pytest.param({"resampling": "resample_torch_fornnunet", "spacing": (7.0, 2.0, 2.0)}, id="torch-separate"),
        pytest.param({"normalisation": "ZScoreNormalization", "masked": True}, id="masked-z-score"),
        pytest.param({"patch": (32, 32), "spacing": (2.0, 2.0)}, id="2d"),
        pytest.param({"patch": (32, 96, 96)}, id="patch-larger-than-scan"),
    ],
)
def test_labels_equal_stock(tmp_path, plan):
    compare(tmp_path, scans.blobs(spacing=(6.5, 1.7, 2.3) if plan == {} else (4.0, 1.7, 2.3), pad=2), **plan)


class InsideAlone(default_normalization_schemes.ImageNormalization):
    """A user's own normalisation, which looks at stock's mask of the image in any case."""

    def run(self, image, seg=None):
        inside = image if seg is None else image[seg >= 0]
        return (image - inside.mean()) / inside.std()


def test_a_normalisation_of_ones_own_gets_the_mask_that_stock_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(InsideAlone, "__module__", default_normalization_schemes.__name__)
    monkeypatch.setattr(default_normalization_schemes, "InsideAlone", InsideAlone, raising=False)
    scan = scans.blobs((14, 40, 44))
    scan.array[:] += 300
    scan.array[:, (np.indices((40, 44)) ** 2).sum(0) > 2000] = 0  # no image in a corner
    compare(tmp_path, scan, normalisation="InsideAlone")


def test_folds_are_averaged_and_mirrored_as_stock_does(tmp_path):
    compare(tmp_path, scans.blobs((12, 40, 40)), folds=(0, 1), mirror=True)


def test_regions_equal_stock(tmp_path):
    labels = compare(tmp_path, scans.blobs(), labels=models.REGIONS)
    assert set(np.unique(labels)) <= {0, 1, 2}


def test_real_ct_equals_stock(tmp_path):
    volume = scans.crop(scans.real_ct("chaos3"), (20, 44), (150, 350), (120, 380))
    compare(tmp_path, volume, patch=(16, 48, 64), features=(4, 8, 16))


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_reorienting_readers_predict_a_flipped_copy_alike(tmp_path, reader):
    """The same anatomy stored in another axis order gets the same labels, each on its own grid."""
    folder = models.write_model(tmp_path / "model", plan=models.plans(reader=reader))
    predictor = FlarePredictor.from_model_folder(folder, **EXACT)
    volume = scans.blobs((14, 40, 44))
    stored = to_sitk(volume)
    other = sitk.DICOMOrient(stored, "PIR")
    one = volume.with_array(predictor.predict(stored))
    two = sitk.GetImageFromArray(predictor.predict(other))
    two.CopyInformation(other)
    back = sitk.GetArrayFromImage(sitk.DICOMOrient(two, "LPS"))
    assert len(np.unique(back)) > 1
    np.testing.assert_array_equal(one.array, back)


def test_reorienting_reader_equals_stock_file(tmp_path):
    folder = models.write_model(tmp_path / "model", plan=models.plans(reader="NibabelIOWithReorient"))
    path, written = tmp_path / "case_0000.nii.gz", tmp_path / "stock.nii.gz"
    write_volume(path, scans.blobs((14, 40, 44)))
    predictor = stock.predictor(folder, (0,))
    reader = predictor.plans_manager.image_reader_writer_class()
    reader.write_seg(stock.labels(predictor, [path]), str(written), reader.read_images([str(path)])[1])
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(written)))
    assert_same_labels(FlarePredictor.from_model_folder(folder, **EXACT).predict(path), theirs)


def test_members_give_each_label_map_and_the_mean_softmax(tmp_path):
    one = models.write_model(tmp_path / "one", folds=(0, 1))
    two = models.write_model(tmp_path / "two", folds=("all",), seed=7)
    members = [Member(one, 0), Member(one, 1), Member(two, "all")]
    predictor = FlarePredictor.from_members(members, step_size=0.5, **EXACT)
    data = predictor.segmenter.prepare([scans.blobs()]).prepared.data
    result = predictor.predict_members(data)
    singles = []
    for member, labels in zip(members, result.labels, strict=True):
        logits = stock.predictor(member.folder, (member.fold,), step=0.5).predict_logits_from_preprocessed_data
        singles.append(stock.exact(logits, data).softmax(0))
        assert_same_labels(labels, singles[-1].argmax(0).numpy())
    np.testing.assert_allclose(result.mean_softmax, np.mean(singles, 0), atol=1e-4)
    assert any((a != b).any() for a, b in zip(result.labels, result.labels[1:], strict=False)), "members are alike"


def test_members_with_other_labels_or_spacing_are_refused_naming_both(tmp_path):
    one = models.write_model(tmp_path / "one")
    two = models.write_model(tmp_path / "two", labels={"background": 0, "liver": 1, "aorta": 2, "spleen": 3})
    three = models.write_model(tmp_path / "three", plan=models.plans(spacing=(4.0, 2.5, 2.5)))
    for other, what in ((two, "labels"), (three, "spacings")):
        with pytest.raises(InputError, match=what) as caught:
            FlarePredictor.from_members([Member(one, 0), Member(other, 0)])
        assert str(one) in str(caught.value) and str(other) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "order"),
    [({"background": 0, "lesion": 2, "organ": [1, 2]}, [2, 1]), (models.REGIONS, [2, 1])],
    ids=["listed in another order", "drawn as other labels"],
)
def test_members_whose_outputs_are_other_regions_are_not_averaged(tmp_path, labels, order):
    one = models.write_model(tmp_path / "one", labels=models.REGIONS)
    two = models.write_model(tmp_path / "two", labels=labels)
    document = models.dataset_json(labels=labels)
    (two / "dataset.json").write_text(json.dumps({**document, "regions_class_order": order}))
    with pytest.raises(InputError, match="labels"):
        FlarePredictor.from_members([Member(one, 0), Member(two, 0)])


def test_image_may_be_path_volume_sitk_image_or_array(tmp_path):
    predictor = FlarePredictor.from_model_folder(models.write_model(tmp_path / "model"), **EXACT)
    volume = scans.blobs((12, 40, 40))
    write_volume(tmp_path / "scan.nii.gz", volume)
    expected = predictor.predict(volume)
    np.testing.assert_array_equal(predictor.predict(str(tmp_path / "scan.nii.gz")), expected)
    np.testing.assert_array_equal(predictor.predict(to_sitk(volume)), expected)
    np.testing.assert_array_equal(predictor.predict(volume.array, spacing_mm=volume.spacing_mm), expected)
    with pytest.raises(InputError, match="spacing"):
        predictor.predict(volume.array)


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "says"),
    [
        ((1, 12, 40, 40), (4.0, 2.0, 2.0), "this one 4; give several channels as a list"),
        ((40, 40), (4.0, 2.0, 2.0), "this one 2"),
        ((12, 40, 40), (4.0, float("nan"), 2.0), "nan.*expected three numbers above 0"),
        ((12, 40, 40), (4.0, -2.0, 2.0), "expected three numbers above 0"),
    ],
)
def test_an_array_that_is_no_scan_is_refused(tmp_path, shape, spacing_mm, says):
    predictor = FlarePredictor.from_model_folder(models.write_model(tmp_path / "model"), **EXACT)
    with pytest.raises(InputError, match=says):
        predictor.predict(np.ones(shape, np.int16), spacing_mm=spacing_mm)


@pytest.mark.parametrize("given", [{"roi_margin_mm": 5}, {"roi_rule": "fosun"}])
def test_a_box_without_a_coarse_model_is_refused(tmp_path, given):
    with pytest.raises(InputError, match="go with roi"):
        FlarePredictor.from_model_folder(models.write_model(tmp_path / "model"), **given)


def test_two_channels_want_two_images_on_one_grid(tmp_path):
    predictor = FlarePredictor.from_model_folder(models.write_model(tmp_path / "model", channels=2), **EXACT)
    one, two = scans.blobs((12, 40, 40)), scans.blobs((12, 40, 40), seed=1)
    assert predictor.predict([one, two]).shape == (12, 40, 40)
    with pytest.raises(CaseError, match="1 channels, the model was trained on 2"):
        predictor.predict(one)
    with pytest.raises(CaseError, match="different grids"):
        predictor.predict([one, scans.blobs((12, 40, 40), spacing=(3.0, 1.7, 2.3))])


def test_stock_methods_work_on_it(tmp_path):
    """A drop-in nnUNetPredictor: initialised and called as stock's, it returns stock's result."""
    folder = models.write_model(tmp_path / "model")
    volume = scans.blobs((12, 40, 40))
    write_volume(tmp_path / "case_0000.nii.gz", volume)
    drop_in = FlarePredictor(0.9, use_mirroring=False, device=torch.device("cpu"), **EXACT, allow_tqdm=False)
    drop_in.initialize_from_trained_model_folder(str(folder), (0,))
    image, properties = drop_in.plans_manager.image_reader_writer_class().read_images(
        [str(tmp_path / "case_0000.nii.gz")]
    )
    labels = drop_in.predict_single_npy_array(image, properties)
    assert_same_labels(np.asarray(labels, np.uint8), drop_in.predict(volume))


def test_a_network_that_is_given_by_hand_replaces_the_model_that_was_open(tmp_path):
    theirs = stock.predictor(models.write_model(tmp_path / "other", seed=5), [0])
    theirs.network.load_state_dict(theirs.list_of_parameters[0])
    predictor = FlarePredictor(0.9, use_mirroring=False, device=torch.device("cpu"), **EXACT, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(models.write_model(tmp_path / "model")), (0,))
    predictor.manual_initialization(
        theirs.network, theirs.plans_manager, theirs.configuration_manager, theirs.list_of_parameters,
        theirs.dataset_json, theirs.trainer_name, theirs.allowed_mirroring_axes,
    )  # fmt: skip
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, 32, 32)).astype(np.float32))
    found, expected = (one.predict_logits_from_preprocessed_data(data) for one in (predictor, theirs))
    np.testing.assert_allclose(found, expected, atol=0.05)
    with pytest.raises(InputError, match="no model is open"):
        predictor.predict(scans.blobs((12, 40, 40)))


@pytest.mark.parametrize("when", ["opened", "used"])
def test_a_model_that_is_open_does_not_change_with_its_file(tmp_path, when):
    """Stock nnU-Net writes ``checkpoint_best.pth`` over the one before, and so does ``cp``."""
    folder = models.write_model(tmp_path / "model")
    scan = to_sitk(scans.blobs((20, 50, 60)))
    expected = FlarePredictor.from_model_folder(folder, backend="torch").predict(scan)
    predictor = FlarePredictor.from_model_folder(folder, backend="torch")
    if when == "used":
        predictor.predict(scan)
    other = models.write_model(tmp_path / "other", seed=5)
    name = Path("fold_0", "checkpoint_final.pth")
    inode = (folder / name).stat().st_ino
    shutil.copyfile(other / name, folder / name)
    assert (folder / name).stat().st_ino == inode, "the same file with another content"
    np.testing.assert_array_equal(predictor.predict(scan), expected)
    assert (FlarePredictor.from_model_folder(folder, backend="torch").predict(scan) != expected).any()


def test_a_model_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = models.write_model(tmp_path / "model")
    real = trained_model.load_checkpoint

    def slowly(path, **more):
        content = real(path, **more)
        path.touch()
        return content

    monkeypatch.setattr(trained_model, "load_checkpoint", slowly)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth: .* changed while it was read; try again"):
        FlarePredictor.from_model_folder(folder, backend="torch")
