"""``3d_cascade_fullres``: both stages at once, as stock's two commands with label maps on disk in between."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import stock_prediction as stock
import torch
from nnunetv2.inference.data_iterators import PreprocessAdapter
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunet_flare.cli import predict
from nnunet_flare.images import Volume, read_volume, write_volume
from nnunet_flare.inference.cascade import open_any
from nnunet_flare.inference.settings import PredictionSettings

TILTED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def run(*words: object) -> int:
    fixed = ("--backend", "torch", "--precision", "fp32", "-device", "cpu")
    return predict.main([str(word) for word in (*words, *fixed)])


def write_scan(folder: Path, direction=Volume.direction) -> Path:
    scan = scans.blobs((14, 40, 44), spacing=(4.0, 1.7, 2.3), pad=2)
    write_volume(folder / "a_0000.nii.gz", Volume(scan.array, scan.spacing_mm, scan.origin, direction))
    return folder / "a_0000.nii.gz"


def stock_chain(second: Path, image: Path, between: Path) -> np.ndarray:
    """Stock's prediction of the first stage, written as a file, and of the second one with that file."""
    first = stock.predictor(second.with_name(second.name.replace(models.CASCADE, "3d_lowres")), (0, 1))
    reader = first.plans_manager.image_reader_writer_class()
    _, properties = reader.read_images([str(image)])
    between.mkdir()
    labels = between / "a.nii.gz"
    reader.write_seg(stock.labels(first, [image]), str(labels), properties)
    predictor = stock.predictor(second, (0, 1))
    iterator = PreprocessAdapter(
        [[str(image)]], [str(labels)], DefaultPreprocessor(verbose=False), [None], predictor.plans_manager,
        predictor.dataset_json, predictor.configuration_manager, 1,
    )  # fmt: skip
    batch = iterator.generate_train_batch()
    logits = stock.exact(predictor.predict_logits_from_preprocessed_data, np.asarray(batch["data"]))
    with redirect_stdout(StringIO()):
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager,
            batch["data_properties"], num_threads_torch=1,
        )  # fmt: skip
    reader.write_seg(np.asarray(found), str(between / "second.nii.gz"), batch["data_properties"])
    return read_volume(between / "second.nii.gz").array


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": models.REGIONS},
        {"transpose": (2, 0, 1), "spacing": (2.0, 4.0, 2.0), "reader": "NibabelIOWithReorient", "direction": TILTED},
        {"spacing": (7.0, 2.0, 2.0)},
        {"resampling": "resample_torch_fornnunet"},
    ],
    ids=["labels", "regions", "turned and transposed", "separate z", "torch resampling"],
)
def test_labels_equal_stocks_chain(tmp_path, options):
    direction = options.pop("direction", Volume.direction)
    model = models.write_cascade(tmp_path / "models", **options)
    image = write_scan(tmp_path / "in", direction)
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model) == 0
    expected = stock_chain(model, image, tmp_path / "between")
    found = read_volume(tmp_path / "out" / "a.nii.gz").array
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-4


@pytest.mark.parametrize("spacing", [(3.0, 2.0, 2.0), (7.0, 1.1, 1.3)], ids=["three axes", "separate z"])
def test_channels_of_labels_are_stocks_where_the_image_is_zero_at_its_edge(tmp_path, spacing):
    """Stock's resampling takes what it marks as outside of the image for a label of its own."""
    cascade = open_any(models.write_cascade(tmp_path / "models", spacing=spacing), PredictionSettings(backend="torch"))
    scan = scans.blobs((14, 40, 44), spacing=(4.0, 1.7, 2.3), pad=1)
    array = scan.array
    z, y, x = np.indices(array.shape)
    array[(y - 20) ** 2 + (x - 22) ** 2 > 300] = 0  # a round field of view
    labels = np.digitize(np.sin(z / 3 + y / 4) + np.cos(x / 5), [-0.5, 0.4, 1.2]).astype(np.uint8)
    prepared = cascade.prepare([scan.with_array(array)])
    found = cascade.with_labels(prepared, labels).prepared.data
    manager, configuration = cascade.second.plans_manager, cascade.second.configuration_manager
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case_npy(
        array[None].astype(np.float32), labels[None].astype(np.float32), {"spacing": scan.spacing_mm}, manager,
        configuration, models.dataset_json(),
    )  # fmt: skip
    expected = convert_labelmap_to_one_hot(seg[0], cascade.second.label_manager.foreground_labels, data.dtype)
    assert prepared.outside is not None and (seg == -1).any()
    np.testing.assert_array_equal(found[1:], expected)


@pytest.mark.parametrize("labelled", ["outside of the image too", "inside of the image"])
def test_a_masked_normalisation_counts_what_the_first_stage_labels_as_image(tmp_path, labelled):
    """As stock's does, which marks as outside only what has no label."""
    options = {"normalisation": "ZScoreNormalization", "masked": True, "transpose": (2, 0, 1)}
    cascade = open_any(models.write_cascade(tmp_path / "models", **options), PredictionSettings(backend="torch"))
    scan = scans.blobs((14, 40, 44), spacing=(4.0, 1.7, 2.3), pad=1)
    array = scan.array + 300
    z, y, x = np.indices(array.shape)
    array[(y - 20) ** 2 + (x - 22) ** 2 > 300] = 0
    labels = np.digitize(np.sin(z / 3 + y / 4) + np.cos(x / 5), [-0.5, 0.4, 1.2]).astype(np.uint8)
    labels[(array == 0) & (labelled == "inside of the image")] = 0
    found = cascade.with_labels(cascade.prepare([scan.with_array(array)]), labels).prepared.data
    expected, _, _ = DefaultPreprocessor(verbose=False).run_case_npy(
        array[None].astype(np.float32), labels[None].astype(np.float32), {"spacing": scan.spacing_mm},
        cascade.second.plans_manager, cascade.second.configuration_manager, models.dataset_json(),
    )  # fmt: skip
    np.testing.assert_allclose(found[:1], expected, atol=1e-4)


def test_the_first_stage_matters(tmp_path):
    model = models.write_cascade(tmp_path / "models")
    write_scan(tmp_path / "in")
    other = models.write_cascade(tmp_path / "other")
    first = other.with_name(other.name.replace(models.CASCADE, "3d_lowres"))
    for fold in (0, 1):
        path = first / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        content["network_weights"] = {key: -value for key, value in content["network_weights"].items()}
        torch.save(content, path)
    assert run("-i", tmp_path / "in", "-o", tmp_path / "own", "-m", model) == 0
    assert run("-i", tmp_path / "in", "-o", tmp_path / "given", "-m", model, "--prev_stage", first) == 0
    own, given = (read_volume(tmp_path / name / "a.nii.gz").array for name in ("own", "given"))
    assert (own != given).mean() > 0.01


def test_openvino_and_members_and_a_region_of_interest_work_with_cascades(tmp_path):
    pytest.importorskip("openvino")
    model = models.write_cascade(tmp_path / "models")
    write_scan(tmp_path / "in")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "torch", "-m", model, "--save_members", "--uncertainty") == 0
    words = ("-i", tmp_path / "in", "-o", tmp_path / "openvino", "-m", model, "--precision", "fp32")
    assert predict.main([str(w) for w in (*words, "--backend", "openvino")]) == 0
    one, two = (read_volume(tmp_path / name / "a.nii.gz").array for name in ("torch", "openvino"))
    assert (one != two).mean() < 1e-3
    assert (tmp_path / "torch" / "members" / "1" / "a.nii.gz").is_file()
    assert run("-i", tmp_path / "in", "-o", tmp_path / "roi", "-m", model, "--roi", "3d_lowres") == 0


def test_a_first_stage_that_is_missing_or_another_models_is_named(tmp_path, capsys):
    model = models.write_cascade(tmp_path / "models")
    write_scan(tmp_path / "in")
    alone = tmp_path / "alone" / model.name
    alone.parent.mkdir()
    model.rename(alone)
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", alone)
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert "nnUNetTrainer__nnUNetPlans__3d_lowres" in message and "--prev_stage" in message
    other = models.write_model(tmp_path / "other", labels={"background": 0, "liver": 1})
    assert run(*words, "--prev_stage", other) == 2
    assert "labels differ" in capsys.readouterr().err
    plain = models.write_model(tmp_path / "plain")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", plain, "--prev_stage", other) == 2
    assert "not the second stage" in capsys.readouterr().err


def test_models_that_do_not_resample(tmp_path):
    """Stock's ``nnUNetPlans_noResampling``: the network sees every scan on its own grid."""
    plan = models.plans()
    stage = plan["configurations"]["3d_fullres"]
    for name in ("data", "seg", "probabilities"):
        stage[f"resampling_fn_{name}"], stage[f"resampling_fn_{name}_kwargs"] = "no_resampling_hack", {}
    model = models.write_model(tmp_path / "model", plan=plan)
    image = write_scan(tmp_path / "in")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model) == 0
    expected = stock.labels(stock.predictor(model, (0,)), [image])
    found = read_volume(tmp_path / "out" / "a.nii.gz").array
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 1e-4


def test_a_cascade_that_does_not_resample(tmp_path):
    model = models.write_cascade(tmp_path / "models", resampling="no_resampling_hack")
    image = write_scan(tmp_path / "in")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model) == 0
    found = read_volume(tmp_path / "out" / "a.nii.gz").array
    assert (found != stock_chain(model, image, tmp_path / "between")).mean() < 1e-4
