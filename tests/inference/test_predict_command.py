"""``flare-predict`` as a user runs it: files in, files out, faults, exit codes."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import model_folders as models
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import small_scans as scans
import torch

from nnunet_flare.cli import predict
from nnunet_flare.images import read_volume, to_sitk, write_volume

SMALL = (10, 36, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model", folds=(0, 1))


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    for seed, name in enumerate(("a", "b")):
        write_volume(folder / f"{name}_0000.nii.gz", scans.blobs(SMALL, seed=seed))
    return folder


def run(*words: object) -> int:
    """The command with PyTorch, unless it says otherwise: converting a network costs seconds."""
    backend = () if "--backend" in words else ("--backend", "torch")
    try:
        return predict.main([str(word) for word in (*words, *backend)])
    except SystemExit as stopped:  # argparse, for a number that is none
        return int(stopped.code or 0)


def refused(capsys, *words: object) -> str:
    """The message of a command that must refuse to start."""
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_folder_in_folder_out_in_exact_geometry(model, tmp_path):
    volume = scans.blobs(SMALL)
    stored = to_sitk(volume)
    stored.SetOrigin((-123.456, 77.7, 1234.5))
    stored.SetDirection((0.0, 0.8, -0.6, 1.0, 0.0, 0.0, 0.0, 0.6, 0.8))
    (tmp_path / "images").mkdir()
    sitk.WriteImage(stored, str(tmp_path / "images" / "tilted_0000.nii.gz"))
    stored = sitk.ReadImage(str(tmp_path / "images" / "tilted_0000.nii.gz"))
    assert run("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model) == 0
    labels = sitk.ReadImage(str(tmp_path / "out" / "tilted.nii.gz"))
    assert labels.GetPixelID() == sitk.sitkUInt8
    assert labels.GetSize() == stored.GetSize()
    np.testing.assert_allclose(labels.GetSpacing(), stored.GetSpacing(), rtol=0, atol=0)
    np.testing.assert_allclose(labels.GetOrigin(), stored.GetOrigin(), rtol=0, atol=0)
    # NIfTI keeps directions as a quaternion in single precision
    np.testing.assert_allclose(labels.GetDirection(), stored.GetDirection(), rtol=0, atol=1e-7)
    assert len(np.unique(sitk.GetArrayFromImage(labels))) > 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tilted.nii.gz"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_single_file_of_any_format(model, tmp_path, suffix):
    write_volume(tmp_path / f"scan{suffix}", scans.blobs(SMALL))
    assert run("-i", tmp_path / f"scan{suffix}", "-o", tmp_path / "out", "-m", model, "-f", 0) == 0
    assert read_volume(tmp_path / "out" / f"scan{suffix}").array.shape == SMALL


def test_folder_in_another_format_than_the_training_data(model, tmp_path):
    write_volume(tmp_path / "images" / "scan_0000.mha", scans.blobs(SMALL))
    assert run("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model, "-f", 0) == 0
    assert (tmp_path / "out" / "scan.mha").is_file()


def test_all_numbered_folds_by_default_else_all(model, images, tmp_path):
    run("-i", images, "-o", tmp_path / "default", "-m", model, "--precision", "fp32")
    run("-i", images, "-o", tmp_path / "both", "-m", model, "-f", 0, 1, "--precision", "fp32")
    run("-i", images, "-o", tmp_path / "one", "-m", model, "-f", 1, "--precision", "fp32")
    default, both, one = (read_volume(tmp_path / d / "a.nii.gz").array for d in ("default", "both", "one"))
    np.testing.assert_array_equal(default, both)
    assert (default != one).any()
    only_all = models.write_model(tmp_path / "all", folds=("all",))
    assert run("-i", images, "-o", tmp_path / "out", "-m", only_all) == 0


def test_save_members_writes_each_folds_own_label_map(model, images, tmp_path):
    fp32 = ("--precision", "fp32")
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--save-members", *fp32) == 0
    run("-i", images, "-o", tmp_path / "mean", "-m", model, *fp32)
    for fold in (0, 1):
        run("-i", images, "-o", tmp_path / f"fold{fold}", "-m", model, "-f", fold, *fp32)
        member = read_volume(tmp_path / "out" / "members" / str(fold) / "a.nii.gz").array
        np.testing.assert_array_equal(member, read_volume(tmp_path / f"fold{fold}" / "a.nii.gz").array)
    run("-i", images, "-o", tmp_path / "second", "-m", model, "-f", 1, "--save_members", *fp32)  # numbered by order
    np.testing.assert_array_equal(member, read_volume(tmp_path / "second" / "members" / "0" / "a.nii.gz").array)
    mean = read_volume(tmp_path / "mean" / "a.nii.gz").array
    assert (mean != read_volume(tmp_path / "out" / "a.nii.gz").array).mean() < 1e-4


@pytest.mark.parametrize("folds", [("0", "0"), ("0", "1", "00")])
def test_a_fold_that_is_named_twice_is_refused(model, images, tmp_path, capsys, folds):
    """It would count double in the mean, and never disagree with itself."""
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "-f", *folds, "--uncertainty", "disagreement")
    assert f"-f {' '.join(folds)}: names a fold twice" in refused(capsys, *words)


def test_one_kind_of_uncertainty_is_never_taken_for_the_other(model, images, tmp_path):
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "-f", 0, 1, "--continue_prediction", "--uncertainty")
    file = tmp_path / "out" / "uncertainty" / "a.nii.gz"
    found, times = [], []
    for kind in ("entropy", "disagreement", "disagreement"):
        assert run(*words, kind) == 0
        image = nibabel.load(file)
        assert image.header["descrip"].item().decode() == kind
        found.append(np.asanyarray(image.dataobj))
        times.append(file.stat().st_mtime_ns)
    assert (found[0] != found[1]).any()
    assert times[0] < times[1] == times[2], "the second call predicts again, the third has nothing to do"


def test_mirroring_changes_the_result_and_contradicting_flags_are_refused(model, images, tmp_path, capsys):
    run("-i", images, "-o", tmp_path / "plain", "-m", model, "-f", 0, "--disable_tta", "--disable_progress_bar")
    run("-i", images, "-o", tmp_path / "mirror", "-m", model, "-f", 0, "--tta", "mirror")
    plain, mirror = (read_volume(tmp_path / d / "a.nii.gz").array for d in ("plain", "mirror"))
    assert (plain != mirror).any()
    assert "contradict" in refused(
        capsys, "-i", images, "-o", tmp_path / "x", "-m", model, "--disable_tta", "--tta", "mirror"
    )


def test_crop_rotate_averages_the_scan_and_its_middle_each_also_turned(tmp_path):
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.settings import PredictionSettings

    folder = models.write_model(tmp_path / "model", plan=models.plans(patch=(8, 40, 40)))
    options = {"backend": "torch", "precision": "fp32"}
    plain = Segmenter.from_model_folder(folder, PredictionSettings(**options))
    data = plain.prepare([scans.blobs((8, 40, 44), spacing=(4.0, 1.8, 1.8))]).prepared.data  # one window
    assert data.shape == (1, 8, 36, 40)

    def both_ways(part: np.ndarray) -> np.ndarray:
        turned = np.ascontiguousarray(part[:, :, ::-1, ::-1])
        return (plain.logits(part) + np.flip(plain.logits(turned), (2, 3))) / 2

    expected = both_ways(data)
    middle = (slice(None), slice(0, 7), slice(2, 34), slice(2, 38))
    expected[middle] = (expected[middle] + both_ways(data[middle])) / 2
    scores = Segmenter.from_model_folder(folder, PredictionSettings(tta="crop-rotate", **options)).logits(data)
    np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=1e-3)


def test_postprocessing_is_applied_before_writing(model, images, tmp_path, capsys):
    words = ("-i", images, "-m", model, "-f", 0, "--precision", "fp32")
    run(*words, "-o", tmp_path / "raw")
    pipeline = tmp_path / "largest.yaml"
    pipeline.write_text("steps:\n  - operation: keep_largest\n    organs: [liver]\n")
    assert run(*words, "-o", tmp_path / "clean", "--postprocess", pipeline) == 0, capsys.readouterr().err
    raw, clean = (read_volume(tmp_path / d / "a.nii.gz").array for d in ("raw", "clean"))
    assert 0 < (clean == 1).sum() < (raw == 1).sum()
    assert "not built in" in refused(capsys, *words, "-o", tmp_path / "x", "--postprocess", "magic")


def test_step_size_decides_the_number_of_windows(model, images, tmp_path, capsys):
    write_volume(tmp_path / "scan.nii.gz", scans.blobs((24, 70, 80)))

    def windows(step: float) -> int:
        run(
            "-i",
            tmp_path / "scan.nii.gz",
            "-o",
            tmp_path / "out",
            "-m",
            model,
            "-f",
            0,
            "-step_size",
            step,
            "--profile",
        )
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("network"))
        return int(row.split()[-1])

    assert windows(0.25) > windows(0.5) > windows(1.0)
    assert "found '1.5', expected a number above 0 up to 1" in refused(
        capsys, "-i", images, "-o", tmp_path / "x", "-m", model, "-step_size", 1.5, "--disable_progress_bar"
    )


def test_parts_share_the_cases_and_are_checked(model, images, tmp_path, capsys):
    for part in (0, 1):
        assert (
            run("-i", images, "-o", tmp_path / str(part), "-m", model, "-f", 0, "-num_parts", 2, "-part_id", part) == 0
        )
    assert [p.name for p in (tmp_path / "0").iterdir()] == ["a.nii.gz"]
    assert [p.name for p in (tmp_path / "1").iterdir()] == ["b.nii.gz"]
    assert "from 0 to 1" in refused(
        capsys, "-i", images, "-o", tmp_path / "x", "-m", model, "-num_parts", 2, "-part_id", 2
    )


def test_continue_prediction_keeps_what_is_there(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    run("-i", images, "-o", out, "-m", model, "-f", 0)
    (out / "b.nii.gz").unlink()
    before = (out / "a.nii.gz").stat().st_mtime_ns
    assert run("-i", images, "-o", out, "-m", model, "-f", 0, "--continue-prediction") == 0
    assert "1 written, 1 already there" in capsys.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert (out / "b.nii.gz").is_file()


def test_continuing_with_more_folds_makes_the_label_maps_of_all_of_them(images, tmp_path, capsys):
    model = models.write_model(tmp_path / "two", folds=(0, 1))
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "--save_members", "--continue_prediction")
    assert run(*words, "-f", 0) == 0
    for said in ("2 written, 0 already there", "0 written, 2 already there"):
        assert run(*words) == 0
        assert said in capsys.readouterr().out
    for number in "01":
        files = sorted((tmp_path / "out" / "members" / number).iterdir())
        assert [path.name for path in files] == ["a.nii.gz", "b.nii.gz"]
    shutil.rmtree(tmp_path / "out" / "members" / "1")
    for said in ("2 written, 0 already there", "0 written, 2 already there"):  # one fold needs the other's no more
        assert run(*words, "-f", 0) == 0
        assert said in capsys.readouterr().out


def test_a_label_map_that_is_kept_and_older_than_its_scan_is_named(model, images, tmp_path, capsys, caplog):
    words = ("-i", images, "-o", tmp_path / "out", "-m", model, "-f", 0, "--continue_prediction")
    assert run(*words) == 0
    assert run(*words) == 0
    assert "older than their scans" not in caplog.text
    scan = images / "a_0000.nii.gz"
    write_volume(scan, read_volume(scan).with_array(read_volume(scan).array[::-1].copy()))
    assert run(*words) == 0
    assert "0 written, 2 already there" in capsys.readouterr().out
    assert "1 label map(s) are older than their scans (a)" in caplog.text


def test_model_by_dataset_configuration_trainer_and_plans(images, tmp_path, capsys, nnunet_folders):
    results = nnunet_folders["nnUNet_results"] / "Dataset022_Abdomen"
    models.write_model(results / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    out = ("-i", images, "-o", tmp_path / "out")
    assert run(*out, "-d", 22, "-c", "3d_fullres") == 0
    models.write_model(results / "nnUNetTrainerFlareST__nnUNetPlans__3d_fullres", trainer="nnUNetTrainerFlareST")
    assert "choose with -tr and -p" in refused(capsys, *out, "-d", "Dataset022_Abdomen", "-c", "3d_fullres")
    assert run(*out, "-d", 22, "-c", "3d_fullres", "-tr", "nnUNetTrainerFlareST") == 0
    assert "no model" in refused(capsys, *out, "-d", 22, "-c", "2d")
    assert "no dataset 7" in refused(capsys, *out, "-d", 7, "-c", "3d_fullres")
    assert "-m MODEL_FOLDER" in refused(capsys, *out)


def test_model_of_another_label_set_than_its_dataset_is_refused(images, tmp_path, capsys, nnunet_folders):
    models.write_model(
        nnunet_folders["nnUNet_results"] / "Dataset022_Abdomen" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    )
    raw = nnunet_folders["nnUNet_raw"] / "Dataset022_Abdomen"
    raw.mkdir()
    other = models.dataset_json(labels={"background": 0, "liver": 1})
    (raw / "dataset.json").write_text(json.dumps(other))
    message = refused(capsys, "-i", images, "-o", tmp_path / "out", "-d", 22, "-c", "3d_fullres")
    assert "kidney" in message and str(raw) in message


def _write_broken(folder: Path) -> dict[str, str]:
    """One broken file per row of the table of faults; name to what its line must say."""
    good = to_sitk(scans.blobs(SMALL))
    path = lambda name: str(folder / f"{name}_0000.nii.gz")  # noqa: E731

    sitk.WriteImage(good, path("truncated"))
    data = Path(path("truncated")).read_bytes()
    Path(path("truncated")).write_bytes(data[: len(data) // 2])
    Path(path("damaged")).write_bytes(data[:200] + bytes(64) + data[264:])
    Path(path("empty")).write_bytes(b"")
    Path(path("text")).write_text("no image")
    array = scans.blobs(SMALL).array.astype(np.float32)
    array[2, 3, 4] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array), path("nan"))
    array[2, 3, 4] = np.inf
    sitk.WriteImage(sitk.GetImageFromArray(array), path("infinite"))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 8, 8), np.int16)), path("constant"))
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((8, 8), np.int16)), path("flat"))
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 8, 3), np.int16), np.eye(4)), path("series"))
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((8, 8, 8, 2), np.int16), isVector=True), path("vector"))
    sitk.WriteImage(sitk.GetImageFromArray(array[:1]), path("thin"))
    for name, spacing in (("zero-spacing", 0.0), ("spacing-nan", np.nan)):
        nibabel.save(nibabel.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.eye(4)), path(name))
        content = bytearray(gzip.decompress(Path(path(name)).read_bytes()))
        content[88:92] = np.float32(spacing).tobytes()  # pixdim[3]
        Path(path(name)).write_bytes(gzip.compress(bytes(content)))
    sitk.WriteImage(good, path("two-channels"))
    sitk.WriteImage(good, str(folder / "two-channels_0001.nii.gz"))
    return {
        "truncated": "truncated after",
        "damaged": "damaged",
        "empty": "0 bytes",
        "text": "truncated",
        "nan": "NaN or infinite",
        "infinite": "NaN or infinite",
        "constant": "the scan is empty",
        "flat": "expected 3",
        "series": "expected 3",
        "vector": "expected",
        "thin": "fewer than 2 voxels",
        "zero-spacing": "expected three numbers above 0",
        "spacing-nan": "expected three numbers above 0",
        "two-channels": "more channels than the 1",
    }


def test_broken_cases_are_set_aside_with_a_line_each_and_the_others_written(model, images, tmp_path, capsys):
    broken = _write_broken(images)
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "-f", 0) == 1
    captured = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert f"2 written, 0 already there, {len(broken)} set aside" in captured.out
    for name, says in broken.items():
        for text in (captured.err, captured.out):
            lines = [line for line in text.splitlines() if line.strip().startswith(f"{name}:")]
            assert len(lines) == 1, f"{name}: one line expected, got {lines}"
            assert says in lines[0]
            assert str(images) in lines[0] or name in ("nan", "infinite", "constant", "thin")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("volume", "says"),
    [
        (scans.blobs((4, 20, 20)), "smaller than its patch"),
        (scans.blobs(SMALL, spacing=(20.0, 1.7, 2.3)), "outside 0.2 to 15 mm"),
        (scans.blobs(SMALL).with_array(scans.blobs(SMALL).array.astype(np.int32) * 100), "outside CT's"),
        (scans.blobs(SMALL).with_array(scans.blobs(SMALL).array + np.int16(1024)), "rescale intercept"),
        (scans.blobs(SMALL).with_array(scans.blobs(SMALL).array.astype(np.float32) / 150), "a few units"),
    ],
)
def test_odd_scans_are_predicted_with_a_warning(model, tmp_path, capsys, volume, says):
    write_volume(tmp_path / "odd.nii.gz", volume)
    assert run("-i", tmp_path / "odd.nii.gz", "-o", tmp_path / "out", "-m", model, "-f", 0) == 0
    assert says in capsys.readouterr().err
    assert read_volume(tmp_path / "out" / "odd.nii.gz").array.shape == volume.array.shape


def test_a_scan_longer_than_any_body_is_set_aside_before_any_work(model, tmp_path, capsys, monkeypatch):
    write_volume(tmp_path / "in" / "long_0000.nii.gz", scans.blobs(SMALL, spacing=(900.0, 1.7, 2.3)))
    monkeypatch.setattr("nnunet_flare.inference.scans.preprocess", lambda *args: pytest.fail("it was resampled"))
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-f", 0) == 1
    printed = "".join(capsys.readouterr())
    assert "long: " in printed and "(9000, 61, 92) mm" in printed and "the spacing is wrong" in printed
    assert not (tmp_path / "out" / "long.nii.gz").exists()


def test_model_faults_are_refused_in_one_line(images, tmp_path, capsys):
    def message(folder: Path, *more: object) -> str:
        text = refused(capsys, "-i", images, "-o", tmp_path / "out", "-m", folder, *more)
        assert len(text.strip().splitlines()) == 1
        return text

    assert "no such file" in message(tmp_path / "nowhere")
    folder = models.write_model(tmp_path / "model")
    assert "fold_3" in message(folder, "-f", 3)
    assert "checkpoint_best.pth" in message(folder, "-chk", "checkpoint_best.pth")
    assert "expected a number or 'all'" in message(folder, "-f", "none")
    path = folder / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in message(folder)
    torch.save({"weights": 1}, path)
    assert "is not a checkpoint of an nnU-Net trainer" in message(folder)
    other = models.plans(features=(6, 8))
    torch.save(models.checkpoint(other, models.dataset_json(), fold=0, seed=0), path)
    assert "do not fit the network" in message(folder)
    torch.save(models.checkpoint(models.plans(), models.dataset_json(), fold=0, seed=0, trainer="MyTrainer"), path)
    assert "MyTrainer, which is not installed" in message(folder)
    (folder / "plans.json").write_text("{")
    assert "copy it again" in message(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resampling_fn_probabilities": "resample_by_magic"}, "resample_by_magic"),
        ({"resampling_fn_data": "resample_by_magic"}, "resample_by_magic"),
        ({"normalization_schemes": ["MyNormalization"]}, "MyNormalization"),
        ({"preprocessor_name": "MyPreprocessor"}, "MyPreprocessor"),
        ({"previous_stage": "3d_lowres"}, "cascade"),
    ],
)
def test_plans_that_are_not_known_are_refused(images, tmp_path, capsys, change, says):
    plan = models.plans(spacing=(4.0, 2.5, 2.5))
    plan["configurations"]["3d_fullres"].update(change)
    folder = models.write_model(tmp_path / "model", plan=plan)
    message = refused(capsys, "-i", images, "-o", tmp_path / "out", "-m", folder)
    assert says in message
    assert len(message.strip().splitlines()) == 1


class _Payload:
    """A program in a pickle: it makes a file when it is opened as code."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self):
        return (Path.touch, (self._trace,))


def test_checkpoint_that_holds_a_program_is_not_run(images, tmp_path, capsys):
    folder = models.write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["logging"] = _Payload(tmp_path / "ran")
    torch.save(content, path)
    message = refused(capsys, "-i", images, "-o", tmp_path / "out", "-m", folder)
    assert "--trust-checkpoint" in message
    assert not (tmp_path / "ran").exists()
    content["logging"] = {"trainer": Path("a/b")}  # harmless, yet no plain data
    torch.save(content, path)
    assert "--trust-checkpoint" in refused(capsys, "-i", images, "-o", tmp_path / "out", "-m", folder)
    assert run("-i", images, "-o", tmp_path / "out", "-m", folder, "--trust-checkpoint") == 0


def test_nothing_to_predict_and_colliding_names_are_refused(model, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no image named" in refused(capsys, "-i", tmp_path / "empty", "-o", tmp_path / "out", "-m", model)
    assert "no such file or folder" in refused(capsys, "-i", tmp_path / "x", "-o", tmp_path / "out", "-m", model)
    (tmp_path / "notes.txt").write_text("x")
    assert "is not an image file" in refused(capsys, "-i", tmp_path / "notes.txt", "-o", tmp_path / "out", "-m", model)
    write_volume(tmp_path / "a.nii.gz", scans.blobs(SMALL))
    assert "would both be written" in refused(
        capsys, "-i", images, tmp_path / "a.nii.gz", "-o", tmp_path / "out", "-m", model
    )


def test_output_that_is_no_folder_is_refused(model, images, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capsys, "-i", images, "-o", tmp_path / "file", "-m", model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_folder_is_refused(model, images, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot be written" in refused(capsys, "-i", images, "-o", tmp_path / "out", "-m", model)


def test_an_output_folder_of_a_read_only_file_system_is_refused(model, images, capsys):
    if not os.path.ismount("/sys"):
        pytest.skip("no file system here that nobody may write to")
    assert "cannot be written" in refused(capsys, "-i", images, "-o", "/sys/flare_out", "-m", model)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_full_disk_sets_the_case_aside_and_leaves_no_half_file(model, tmp_path, capsys, suffix):
    """No file may grow beyond a limit, which ITK's writers meet like a full disk."""
    write_volume(tmp_path / f"large{suffix}", scans.blobs((24, 100, 110)))
    write_volume(tmp_path / f"small{suffix}", scans.blobs((4, 20, 24)))
    words = ("-i", tmp_path / f"large{suffix}", tmp_path / f"small{suffix}", "-m", model, "-f", 0)
    assert run(*words, "-o", tmp_path / "whole") == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    limit = (sizes[f"large{suffix}"] + sizes[f"small{suffix}"]) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = run(*words, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in capsys.readouterr().err.splitlines() if "large: set aside" in line]
    assert code == 1
    assert len(lines) == 1 and "written" in lines[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"small{suffix}"]


def test_no_threads_are_left_and_no_process_was_started(model, images, tmp_path, monkeypatch):
    def no_process(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", no_process)
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "-f", 0) == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("flare-")]


def test_help_is_there_at_once_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom nnunet_flare.cli import predict\n"
        "try: predict.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'nnunetv2', 'numpy', 'SimpleITK', 'openvino'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-step_size" in done.stdout and "--trust-checkpoint" in done.stdout


def test_prediction_imports_neither_the_trainer_nor_stocks_predictor(model, images, tmp_path):
    """Start-up: the trainer module takes seconds."""
    code = (
        "import sys\nfrom nnunet_flare.cli import predict\n"
        f"words = ['-i', {str(images)!r}, '-o', {str(tmp_path / 'out')!r}, '-m', {str(model)!r}]\n"
        "assert predict.main([*words, '--backend', 'torch']) == 0\n"
        "slow = [m for m in sys.modules if m.startswith(('nnunetv2.training.nnUNetTrainer', 'torch._dynamo', "
        "'nnunetv2.inference'))]\nassert not slow, slow"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
