"""``--save_probabilities`` and ``--uncertainty``: stock's files, and what follows from them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import stock_prediction as stock
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_flare.cli import export, predict
from nnunet_flare.images import Volume, read_volume, write_volume
from nnunet_flare.images.orientation import Turn
from nnunet_flare.inference import probabilities as ours
from nnunet_flare.inference.forms import View
from nnunet_flare.inference.uncertainty import Entropy, disagreement

SMALL = (10, 36, 40)
TILTED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
"""Stored slices are sagittal."""


def run(*words: object) -> int:
    fixed = ("--backend", "torch", "--precision", "fp32", "-device", "cpu")
    return predict.main([str(word) for word in (*words, *fixed)])


def write_scan(folder: Path, *, direction=Volume.direction, pad: int = 2, channels: int = 1) -> Path:
    scan = scans.blobs(SMALL, pad=pad)
    scan = Volume(scan.array, scan.spacing_mm, scan.origin, direction)
    for channel in range(channels):
        write_volume(folder / f"a_{channel:04d}.nii.gz", scan.with_array(scan.array + channel))
    return folder


def by_stock(model: Path, images: Path, out: Path, folds=(0,)) -> Path:
    """Stock's three files of case a, through its preprocessing, network and export."""
    predictor = stock.predictor(model, folds)
    data, _, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(path) for path in sorted(images.iterdir())], None, predictor.plans_manager,
        predictor.configuration_manager, predictor.dataset_json,
    )  # fmt: skip
    logits = stock.exact(predictor.predict_logits_from_preprocessed_data, data)
    out.mkdir()
    with redirect_stdout(StringIO()):
        export_prediction_from_logits(
            logits.numpy(), properties, predictor.configuration_manager, predictor.plans_manager,
            predictor.dataset_json, str(out / "a"), True, 1,
        )  # fmt: skip
    return out


@pytest.mark.parametrize(
    "plan, labels, direction, folds",
    [
        ({}, None, Volume.direction, (0, 1)),
        ({"transpose": (1, 2, 0), "reader": "NibabelIOWithReorient", "spacing": (2.0, 2.0, 4.0)}, None, TILTED, (0,)),
        ({"reader": "SimpleITKIOWithReorient", "spacing": (2.0, 3.0, 3.0)}, None, TILTED, (0,)),
        ({"reader": "NibabelIO", "masked": True}, models.REGIONS, Volume.direction, (0,)),
        ({"patch": (32, 32), "spacing": (2.0, 2.0)}, None, Volume.direction, (0,)),
    ],
    ids=["two folds", "turned and transposed", "turned by simpleitk", "regions", "2d"],
)
def test_probabilities_are_stocks(tmp_path, plan, labels, direction, folds):
    model = models.write_model(tmp_path / "model", plan=models.plans(**plan), labels=labels, folds=folds)
    images = write_scan(tmp_path / "in", direction=direction)
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--save_probabilities") == 0
    expected = by_stock(model, images, tmp_path / "stock", folds)
    found, wanted = (np.load(folder / "a.npz") for folder in (tmp_path / "out", expected))
    assert found.files == wanted.files == ["probabilities"]
    assert found["probabilities"].dtype == wanted["probabilities"].dtype == np.float32
    np.testing.assert_allclose(found["probabilities"], wanted["probabilities"], atol=5e-4)
    notes, stocks = (pickle.loads((folder / "a.pkl").read_bytes()) for folder in (tmp_path / "out", expected))
    assert notes.keys() == stocks.keys()
    for key in ("shape_before_cropping", "shape_after_cropping_and_before_resampling", "spacing"):
        assert tuple(notes[key]) == pytest.approx(tuple(stocks[key]))
    for key in notes.keys() & {"sitk_stuff", "nibabel_stuff"}:
        assert notes[key].keys() == stocks[key].keys()
        for name, value in stocks[key].items():
            if isinstance(value, str):
                assert notes[key][name] == value
            else:
                np.testing.assert_allclose(notes[key][name], value, atol=1e-6)


WITHOUT_PYTORCH = """
import sys
sys.modules["torch"] = sys.modules["nnunetv2"] = None  # not importable
from nnunet_flare.cli import predict
sys.exit(predict.main(sys.argv[1:]))
"""


def test_an_exported_model_gives_them_without_pytorch(tmp_path):
    model, exported = models.write_model(tmp_path / "model", folds=(0, 1)), tmp_path / "exported"
    assert export.main(["-m", str(model), "-o", str(exported), "--precision", "fp32"]) == 0
    images = write_scan(tmp_path / "in")
    asked = ("--save_probabilities", "--uncertainty", "--statistics", "--preview")
    words = ("-i", images, "-o", tmp_path / "out", "-m", exported, *asked)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert run("-i", images, "-o", tmp_path / "trained", "-m", model, *asked) == 0
    found, expected = (np.load(tmp_path / name / "a.npz")["probabilities"] for name in ("out", "trained"))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    maps = (read_volume(tmp_path / name / "uncertainty/a.nii.gz").array for name in ("out", "trained"))
    np.testing.assert_allclose(*(one.astype(float) for one in maps), atol=2)
    files = ({path.name for path in (tmp_path / name).iterdir()} for name in ("out", "trained"))
    assert next(files) == next(files) >= {"a.png", "a.pkl", "statistics.csv"}


def test_nnunetv2_ensemble_reads_them(tmp_path):
    plan = models.plans(reader="NibabelIOWithReorient")
    model = models.write_model(tmp_path / "model", plan=plan, folds=(0, 1))
    images = write_scan(tmp_path / "in", direction=TILTED)
    for fold in (0, 1):
        words = ("-i", images, "-o", tmp_path / f"fold{fold}", "-m", model, "-f", fold, "--save_probabilities")
        assert run(*words) == 0
    command = Path(sys.executable).with_name("nnUNetv2_ensemble")
    inputs = [str(tmp_path / f"fold{fold}") for fold in (0, 1)]
    done = subprocess.run(
        [str(command), "-i", *inputs, "-o", str(tmp_path / "both"), "-np", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mean = sum(np.load(Path(folder) / "a.npz")["probabilities"] for folder in inputs)
    labels, label = read_volume(tmp_path / "both" / "a.nii.gz"), read_volume(tmp_path / "fold0" / "a.nii.gz")
    np.testing.assert_allclose(labels.matrix, label.matrix, atol=1e-5)
    assert np.bincount(labels.array.ravel()).tolist() == np.bincount(mean.argmax(0).ravel()).tolist()


def test_probabilities_of_a_crop_lie_in_the_whole_scan(tmp_path):
    plan = models.plans(reader="NibabelIOWithReorient")
    model, coarse = (models.write_model(tmp_path / name, plan=plan) for name in ("fine", "coarse"))
    images = write_scan(tmp_path / "in", direction=TILTED, pad=0)
    box = ((1, 9), (3, 30), (5, 38))
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "--roi", coarse, "--save_probabilities")
    with mock.patch("nnunet_flare.inference.coarse_to_fine.organs_box", return_value=box):
        assert run(*words, "--uncertainty") == 0
    found = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    whole = read_volume(images / "a_0000.nii.gz")
    from nnunet_flare.images.orientation import turn_for_reader

    turn = turn_for_reader("NibabelIOWithReorient", whole)
    labels = read_volume(tmp_path / "out" / "a.nii.gz").array
    back = np.stack([turn.undo(one) for one in found])
    np.testing.assert_array_equal(back.argmax(0), labels)
    outside = np.ones(SMALL, bool)
    outside[tuple(slice(*edge) for edge in box)] = False
    assert (back[0][outside] == 1).all() and (back[1:, outside] == 0).all()
    np.testing.assert_allclose(back.sum(0), 1, atol=1e-5)
    entropy = read_volume(tmp_path / "out" / "uncertainty" / "a.nii.gz").array
    np.testing.assert_allclose(entropy, reference_entropy(back) * 255, atol=1)


def reference_entropy(mean: np.ndarray) -> np.ndarray:
    """By SciPy, as a share of the most."""
    from scipy.stats import entropy

    return np.asarray(entropy(mean.astype(float), axis=0) / np.log(len(mean)))


def test_uncertainty_is_the_entropy_of_the_mean_softmax(tmp_path, capsys):
    model = models.write_model(tmp_path / "model", folds=(0, 1))
    images = write_scan(tmp_path / "in", direction=TILTED)
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--uncertainty") == 0
    assert f"{tmp_path / 'out' / 'uncertainty' / 'a.nii.gz'}" in capsys.readouterr().out
    for fold in (0, 1):
        run("-i", images, "-o", tmp_path / f"fold{fold}", "-m", model, "-f", fold, "--save_probabilities")
    mean = sum(np.load(tmp_path / f"fold{fold}" / "a.npz")["probabilities"] for fold in (0, 1)) / 2
    found, scan = read_volume(tmp_path / "out" / "uncertainty" / "a.nii.gz"), read_volume(images / "a_0000.nii.gz")
    assert found.array.dtype == np.uint8
    np.testing.assert_allclose(found.matrix, scan.matrix, atol=1e-5)
    np.testing.assert_allclose(found.array, reference_entropy(mean) * 255, atol=1)
    assert found.array.max() > 100


def test_disagreement_is_the_share_of_folds_with_another_label(tmp_path, capsys):
    model = models.write_model(tmp_path / "model", folds=(0, 1, 2))
    images = write_scan(tmp_path / "in")
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "--uncertainty", "disagreement")
    assert run(*words, "--save_members") == 0
    labels = read_volume(tmp_path / "out" / "a.nii.gz").array
    members = [read_volume(tmp_path / "out" / "members" / str(k) / "a.nii.gz").array for k in range(3)]
    expected = np.rint(sum((member != labels).astype(float) for member in members) / 3 * 255)
    found = read_volume(tmp_path / "out" / "uncertainty" / "a.nii.gz").array
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 2
    np.testing.assert_array_equal(disagreement(labels, members), expected)
    assert run(*words, "-f", 0) == 2
    assert "one fold" in capsys.readouterr().err
    run("-i", images, "-o", tmp_path / "plain", "-m", model, "--uncertainty", "disagreement")
    assert not (tmp_path / "plain" / "members").exists()


def test_windows_that_are_left_out_have_no_scores(tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    images = write_scan(tmp_path / "in")
    for option in ("--save_probabilities", "--uncertainty"):
        assert run("-i", images, "-o", tmp_path / "out", "-m", model, option, "--windows", "skip-empty") == 2
        assert f"{option} needs --windows all" in capsys.readouterr().err


def test_probabilities_that_are_there_are_kept_and_cut_ones_made_again(tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    images = write_scan(tmp_path / "in")
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "--save_probabilities", "--continue_prediction")
    assert run(*words) == 0
    assert run(*words) == 0
    assert "0 written, 1 already there" in capsys.readouterr().out
    whole = (tmp_path / "out" / "a.npz").read_bytes()
    (tmp_path / "out" / "a.npz").write_bytes(whole[: len(whole) // 2])
    assert run(*words) == 0
    assert (tmp_path / "out" / "a.npz").read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.nii.gz", "a.npz", "a.pkl", "dataset.json", "plans.json",
    ]  # fmt: skip


def test_another_models_documents_are_not_replaced(tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    images = write_scan(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.json").write_text("{}")
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--save_probabilities") == 2
    assert "belongs to another model" in capsys.readouterr().err
    assert (tmp_path / "out" / "dataset.json").read_text() == "{}"


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_without_the_room_sets_the_case_aside_before_it_is_predicted(tmp_path, capsys, monkeypatch, reserves):
    model = models.write_model(tmp_path / "model")
    images = write_scan(tmp_path / "in")
    if reserves:
        ending = mock.patch.object(ours.os, "posix_fallocate", side_effect=OSError(28, "No space left on device"))
    else:  # macOS and Windows
        monkeypatch.delattr(ours.os, "posix_fallocate")
        ending = mock.patch.object(ours.shutil, "disk_usage", return_value=mock.Mock(free=1000))
    with ending:
        assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--save_probabilities") == 1
    assert "GB in" in (message := capsys.readouterr().err) and "No space left" in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("receiver", ["probabilities", "entropy"])
def test_no_full_resolution_scores_are_in_memory(tmp_path, receiver):
    heads, shape = 14, (40, 128, 128)
    nothing = Volume(np.broadcast_to(np.uint8(0), shape), (1.0, 1.0, 1.0))
    box = tuple((0, n) for n in shape)
    view = View(heads, 1, shape, box, (0, 1, 2), Turn((0, 1, 2), (False,) * 3), False, {}, nothing, box)
    made = ours.Probabilities("a", tmp_path) if receiver == "probabilities" else Entropy()
    plane = np.asarray(torch.randn(1, heads, *shape[1:]))
    tracemalloc.start()
    made.begin(view)
    for target in range(shape[0]):
        made.take(np.array([target]), plane)
    if isinstance(made, Entropy):
        made.finish()
    else:
        made.save(tmp_path / "a.npz", "SimpleITKIO")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.4 * heads * np.prod(shape) * 4


def test_every_further_output_of_a_scan_of_one_slice(tmp_path):
    """As 2-D plans predict it."""
    model = models.write_model(tmp_path / "model", plan=models.plans(patch=(32, 32), spacing=(2.0, 2.0)))
    scan = scans.blobs((10, 36, 40))
    write_volume(tmp_path / "in" / "a_0000.nii.gz", Volume(scan.array[:1], scan.spacing_mm))
    words = ("--save_probabilities", "--uncertainty", "--statistics", "--preview")
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, *words) == 0
    expected = by_stock(model, tmp_path / "in", tmp_path / "stock")
    found, wanted = (np.load(folder / "a.npz")["probabilities"] for folder in (tmp_path / "out", expected))
    assert found.shape == (4, 1, 36, 40)
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    assert read_volume(tmp_path / "out" / "uncertainty" / "a.nii.gz").array.shape == (1, 36, 40)
    assert (tmp_path / "out" / "a.png").is_file() and (tmp_path / "out" / "statistics.csv").is_file()
