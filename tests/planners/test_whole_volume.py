"""The whole-volume systems: their plans, the fixed-size preprocessing, and both ends of a prediction with them."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import stock_prediction
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare import plugin
from nnunet_flare.cli import predict
from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, read_volume, to_sitk, write_volume
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.planners import flare, whole_volume
from nnunet_flare.planners.fixed_size import body_box, label_box, training_size

SIZE = (16, 24, 20)
ORIENTATIONS = {
    "LPS": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "RAS": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0),
    "feet first": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
}


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def patient(direction: tuple[float, ...] = ORIENTATIONS["LPS"]) -> Volume:
    """A body in air, with a table below it and a bright organ in it."""
    array = np.full((20, 44, 40), -1000, np.int16)
    array[3:18, 6:34, 5:37] = scans.blobs((15, 28, 32), seed=4).array.clip(-300, 250)
    array[3:18, 38:40, 2:39] = 200
    array[8:12, 12:20, 20:30] = 900
    return Volume(array, (4.0, 1.7, 2.3), (-10.0, 20.0, 5.5), direction)


def fixed_plans(preprocessor: str, normalisation: str = "FlareClip500Normalization") -> dict[str, Any]:
    """Plans as the planner writes them, with a small network of a small size."""
    plan = models.plans(
        patch=SIZE, reader="SimpleITKIOWithReorient", normalisation=normalisation, force_separate_z=False
    )
    configuration = plan["configurations"]["3d_fullres"]
    configuration["preprocessor_name"] = preprocessor
    configuration["median_image_size_in_voxels"] = [float(edge) for edge in SIZE]
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}_kwargs"]["order"] = 1
    return plan


# Plans


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw data set and its fingerprint; planning reads nothing else of the images."""
    name = "Dataset022_Abdomen"
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind / name).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    raw = tmp_path / "raw" / name
    tiny = Volume(np.zeros((2, 2, 2), np.int16), (1.0, 1.0, 1.0))
    write_volume(raw / "imagesTr" / "a_0000.nii.gz", tiny)
    write_volume(raw / "labelsTr" / "a.nii.gz", tiny)
    document = {**models.dataset_json(labels={"background": 0, **{f"o{k}": k for k in range(1, 14)}})}
    (raw / "dataset.json").write_text(json.dumps(document))
    values = models.plans()["foreground_intensity_properties_per_channel"]
    fingerprint = {
        "spacings": [[2.5, 0.8, 0.8]],
        "shapes_after_crop": [[100, 512, 400]],
        "foreground_intensity_properties_per_channel": values,
        "median_relative_size_after_cropping": 1.0,
    }
    (tmp_path / "preprocessed" / name / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return tmp_path / "preprocessed" / name


NETWORKS = {
    ("nnUNetPlannerFlareFine", "3d_sztu"): "nnunet_flare.networks.efficient_segnet.EfficientSegNet",
}
NETWORK = "nnunet_flare.networks.residual_unet.ResidualUNet"
TRAINING = {
    "nnUNetPlannerFlareCoarse": {"3d_fullres": ([176, 176, 176], None), "3d_sztu": ([160, 160, 160], None)},
    "nnUNetPlannerFlareFine": {"3d_fullres": ([176, 212, 212], 40.0), "3d_sztu": ([192, 192, 192], 20.0)},
}
PAPERS = {
    "nnUNetPlannerFlareCoarse": {
        "preprocessor": "FlareWholeVolumePreprocessor",
        "3d_fullres": ([160, 160, 160], [16, 32, 64, 128, 256], "FlareClip500Normalization"),
        "3d_sztu": ([160, 160, 160], [8, 16, 32, 64, 128], "FlareClip325Normalization"),
    },
    "nnUNetPlannerFlareFine": {
        "preprocessor": "FlareFixedSizePreprocessor",
        "3d_fullres": ([160, 192, 192], [16, 32, 64, 128, 256], "FlareClip500Normalization"),
        "3d_sztu": ([192, 192, 192], [16, 32, 64, 128, 256], "FlareClip325Normalization"),
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_planner_writes_the_papers_sizes(name, dataset):
    with redirect_stdout(StringIO()):
        plan_experiment_dataset(22, plugin.resolve(name), preprocess_class_name="DefaultPreprocessor")
    plans = json.loads((dataset / f"{name.replace('Planner', 'Plans')}.json").read_text())
    expected = dict(PAPERS[name])
    preprocessor = expected.pop("preprocessor")
    assert sorted(plans["configurations"]) == sorted(expected)
    assert plans["image_reader_writer"] == "SimpleITKIOWithReorient"
    assert plans["transpose_forward"] == [0, 1, 2]
    manager = PlansManager(plans)
    for configuration, (size, features, normalisation) in expected.items():
        found = plans["configurations"][configuration]
        arguments = found["architecture"]["arch_kwargs"]
        assert found["preprocessor_name"] == preprocessor
        assert found["patch_size"] == size
        assert arguments["features_per_stage"] == features
        assert found["architecture"]["network_class_name"] == NETWORKS.get((name, configuration), NETWORK)
        activation = "LeakyReLU" if configuration == "3d_sztu" else "ReLU"
        assert arguments["nonlin"].endswith(f".{activation}")
        assert arguments["dropout_op_kwargs"]["p"] == 0.2
        assert found["normalization_schemes"] == [normalisation]
        assert found["batch_size"] == (2 if configuration == "3d_sztu" else 1)
        for kind in ("data", "seg", "probabilities"):
            assert found[f"resampling_fn_{kind}_kwargs"]["force_separate_z"] is False
        opened = manager.get_configuration(configuration)
        training, margin_mm = TRAINING[name][configuration]
        assert training_size(opened) == training
        assert found.get("crop_margin_mm") == margin_mm
        np.testing.assert_allclose(np.multiply(found["spacing"], training), [250, 409.6, 320])
        assert opened.preprocessor_class is plugin.resolve(preprocessor)
        with torch.device("meta"):
            network = models.get_network_from_plans(
                opened.network_arch_class_name, opened.network_arch_init_kwargs,
                opened.network_arch_init_kwargs_req_import, 1, 14, allow_init=False, deep_supervision=False,
            )  # fmt: skip
            assert network(torch.zeros(1, 1, *size)).shape == (1, 14, *size)


def test_a_changed_patch_changes_the_training_cases_too(dataset):
    with redirect_stdout(StringIO()):
        plans, _ = flare.plan_dataset(
            22, whole_volume.nnUNetPlannerFlareFine, plans_name="mine", patch_size=[32, 48, 40], base_features=4,
            max_features=16,
        )  # fmt: skip
    found = plans["configurations"]["3d_fullres"]
    assert found["patch_size"] == [32, 48, 40]
    assert found["median_image_size_in_voxels"] == [36, 53, 44]
    assert found["architecture"]["arch_kwargs"]["features_per_stage"][:2] == [4, 8]
    assert plans["configurations"]["3d_sztu"]["patch_size"] == [192, 192, 192]
    with pytest.raises(InputError, match="see every scan at the same size"):
        whole_volume.nnUNetPlannerFlareFine(22, overwrite_target_spacing=[3, 1, 1])


# Preprocessing


def test_the_body_is_kept_to_its_last_voxel_and_the_table_is_not():
    assert body_box(patient().array) == [(3, 18), (6, 34), (5, 37)]


def test_the_largest_piece_is_the_body_where_the_centre_is_gas():
    array = patient().array.copy()
    array[9:12, 20:25, 18:23] = -900
    assert body_box(array) == [(3, 18), (6, 34), (5, 37)]
    assert body_box(np.full((4, 5, 6), -1000)) == [(0, 4), (0, 5), (0, 6)]


@pytest.mark.parametrize(("name", "bound"), [("FlareClip500Normalization", 500), ("FlareClip325Normalization", 325)])
def test_normalisation_is_clip_then_the_volumes_own_z_score(name, bound):
    image = patient().array
    scheme = plugin.resolve(name)(use_mask_for_norm=False, intensityproperties={})
    clipped = np.clip(image, -bound, bound).astype(float)
    np.testing.assert_allclose(
        scheme.run(image.astype(np.float32)), (clipped - clipped.mean()) / (clipped.std() + 1e-5), atol=1e-5
    )


def test_image_and_labels_are_resized_to_the_networks_size():
    plan = PlansManager(fixed_plans("FlareWholeVolumePreprocessor"))
    configuration = plan.get_configuration("3d_fullres")
    volume = patient()
    labels = np.where(volume.array == 900, 2, 0).astype(np.int8)
    preprocessor = plugin.resolve("FlareWholeVolumePreprocessor")(verbose=False)
    data, seg, properties = preprocessor.run_case_npy(
        volume.array[None], labels[None], {"spacing": volume.spacing_mm}, plan, configuration, models.dataset_json()
    )
    assert data.shape == seg.shape == (1, *SIZE)
    assert (data.dtype, seg.dtype) == (np.float32, np.int8)
    assert abs(data.mean()) < 1e-3
    assert abs(data.std() - 1) < 1e-2
    organ = np.argwhere(seg[0] == 2)
    # the organ's middle in the body's box, on either grid
    for axis, (low, high, first, last) in enumerate([(8, 12, 3, 18), (12, 20, 6, 34), (20, 30, 5, 37)]):
        there = ((low + high) / 2 - first) / (last - first)
        assert abs((organ[:, axis].mean() + 0.5) / SIZE[axis] - there) < 0.03
    places = properties["class_locations"][2]
    assert len(places) == len(organ)
    assert (seg[tuple(places.T)] == 2).all()
    with pytest.raises(ValueError, match="do not fit"):
        preprocessor.run_case_npy(
            volume.array[None], labels[None, 1:], {"spacing": volume.spacing_mm}, plan, configuration, {}
        )


def test_training_cases_are_the_labels_box_with_a_margin_and_what_is_predicted_is_not():
    plan = fixed_plans("FlareFixedSizePreprocessor")
    plan["configurations"]["3d_fullres"] |= {"median_image_size_in_voxels": [18, 27, 22], "crop_margin_mm": 6.0}
    manager = PlansManager(plan)
    configuration = manager.get_configuration("3d_fullres")
    volume = patient()
    labels = np.where(volume.array == 900, 2, 0).astype(np.int8)
    preprocessor = plugin.resolve("FlareFixedSizePreprocessor")(verbose=False)
    documents = (manager, configuration, models.dataset_json())
    given = {"spacing": volume.spacing_mm}
    data, seg, properties = preprocessor.run_case_npy(volume.array[None], labels[None], dict(given), *documents)
    # 6 mm are 2 voxels of 4 mm, 4 of 1.7 mm, 3 of 2.3 mm, around 8:12, 12:20, 20:30
    assert properties["bbox_used_for_cropping"] == [[6, 14], [8, 24], [17, 33]]
    assert data.shape == seg.shape == (1, 18, 27, 22)
    back = by_stock_export(seg[0], properties, manager, configuration)
    assert back.shape == labels.shape
    overlap = 2 * ((back == 2) & (labels == 2)).sum() / ((back == 2).sum() + (labels == 2).sum())
    assert overlap > 0.9
    data, _, properties = preprocessor.run_case_npy(volume.array[None], None, dict(given), *documents)
    assert data.shape == (1, *SIZE) and properties["bbox_used_for_cropping"] == [[0, 20], [0, 44], [0, 40]]
    preprocessor.makes_training_cases = True
    assert preprocessor.run_case_npy(volume.array[None], None, dict(given), *documents)[0].shape == (1, 18, 27, 22)
    assert label_box(np.zeros((3, 4, 5)), (1, 1, 1), margin_mm=1) == [(0, 3), (0, 4), (0, 5)]


def by_stock_export(labels: np.ndarray, properties: dict, manager: PlansManager, configuration: Any) -> np.ndarray:
    """A label map on the network's grid brought back by stock nnU-Net."""
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), 4).permute(3, 0, 1, 2).float()
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        scores, manager, configuration, manager.get_label_manager(models.dataset_json()), properties
    )


@pytest.mark.parametrize(("name", "bound"), [("FlareClip500Normalization", 500), ("FlareClip325Normalization", 325)])
def test_the_window_of_a_case_leads_back_to_hu(name, bound):
    plan = PlansManager(fixed_plans("FlareFixedSizePreprocessor", normalisation=name))
    volume = patient()
    preprocessor = plugin.resolve("FlareFixedSizePreprocessor")(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        volume.array[None], None, {"spacing": volume.spacing_mm}, plan, plan.get_configuration("3d_fullres"), {}
    )
    ((low, high, unit),) = properties["windows"]
    assert (high - low) * unit == pytest.approx(2 * bound)
    assert data.min() == pytest.approx(low, abs=1e-4), "air is below the window"
    assert data.max() == pytest.approx(high, abs=1e-4), "the organ above it"


# Prediction


def run(*words: object) -> int:
    return predict.main([str(word) for word in (*words, "--backend", "torch", "--precision", "fp32")])


def by_stock(model: Path, image: Path, output: Path) -> np.ndarray:
    """What stock nnU-Net writes for an image, its sums in single precision."""
    output.parent.mkdir()
    stock = stock_prediction.predictor(model, [0])
    with redirect_stdout(StringIO()), mock.patch.object(torch, "half", torch.float32):
        stock.predict_from_files_sequential([[str(image)]], [str(output)], overwrite=True)
    return read_volume(output.with_name(output.name + ".nii.gz")).array


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stock_and_flare_predict_agree_in_every_orientation(orientation, tmp_path):
    model = models.write_model(tmp_path / "model", plan=fixed_plans("FlareWholeVolumePreprocessor"))
    volume = patient(ORIENTATIONS[orientation])
    write_volume(tmp_path / "in" / "a_0000.nii.gz", volume)
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model) == 0
    result = read_volume(tmp_path / "out" / "a.nii.gz").array
    stock = by_stock(model, tmp_path / "in" / "a_0000.nii.gz", tmp_path / "stock" / "a")
    assert result.shape == stock.shape == volume.array.shape
    assert len(np.unique(stock)) > 2
    assert (result != stock).mean() < 1e-3


def test_stock_opens_the_fine_model_on_the_saved_crop(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Segmenter, "network_labels", lambda self, scan, progress=None: (scan.prepared.data[0] > 1.5).astype(np.uint8)
    )
    coarse = models.write_model(tmp_path / "coarse", plan=fixed_plans("FlareWholeVolumePreprocessor"))
    fine = models.write_model(tmp_path / "fine", plan=fixed_plans("FlareFixedSizePreprocessor"), seed=5)
    write_volume(tmp_path / "in" / "a_0000.nii.gz", patient(ORIENTATIONS["feet first"]))
    options = ("--roi", coarse, "--roi_margin", 8, "--save_roi")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", fine, *options) == 0
    crop = tmp_path / "out" / "roi" / "a_0000.nii.gz"
    assert 900 in read_volume(crop).array
    assert read_volume(crop).array.size < 0.5 * patient().array.size
    stock = by_stock(fine, crop, tmp_path / "stock" / "a")
    result = read_volume(tmp_path / "out" / "a.nii.gz")
    corner = to_sitk(result).TransformPhysicalPointToIndex(read_volume(crop).origin)[::-1]
    inside = tuple(slice(at, at + n) for at, n in zip(corner, stock.shape, strict=True))
    assert np.count_nonzero(result.array) == np.count_nonzero(result.array[inside]) > 0
    assert (result.array[inside] != stock).mean() < 1e-3


def test_the_names_are_registered():
    assert set(PAPERS) < set(plugin.PLANNERS)
    assert issubclass(whole_volume.nnUNetPlannerFlareFine, flare.nnUNetPlannerFlare)
