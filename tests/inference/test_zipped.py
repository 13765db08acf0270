"""``-m model.zip``: what ``nnUNetv2_export_model_to_zip`` writes opens directly, and nothing else gets out of it."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.cli import predict
from nnunet_flare.images import read_volume, write_volume
from nnunet_flare.inference import zipped

DATASET = "Dataset999_Test"


def run(*words: object) -> int:
    fixed = ("--backend", "torch", "--precision", "fp32", "-device", "cpu")
    return predict.main([str(word) for word in (*words, *fixed)])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """nnUNet_results with a cascade."""
    folder = tmp_path_factory.mktemp("results")
    models.write_cascade(folder / DATASET)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    write_volume(tmp_path / "in" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    return tmp_path / "in"


def pack(root: Path, path: Path, inside: str = "**/*") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.glob(inside)):
            archive.write(file, file.relative_to(root))
    return path


def label_map(folder: Path) -> np.ndarray:
    return read_volume(folder / "a.nii.gz").array


def test_a_file_of_stocks_own_export(results, images, tmp_path, monkeypatch):
    """Stock's function asks for more files than prediction needs; they are made up."""
    from nnunetv2.model_sharing import model_export

    for model in (results / DATASET).iterdir():
        (model / "dataset_fingerprint.json").write_text("{}")
        for fold in model.glob("fold_*"):
            (fold / "progress.png").write_bytes(b"png")
            (fold / "validation").mkdir(exist_ok=True)
            (fold / "validation" / "summary.json").write_text("{}")
    monkeypatch.setattr(model_export, "nnUNet_results", str(results))
    monkeypatch.setattr(model_export, "maybe_convert_to_dataset_name", lambda _: DATASET)
    monkeypatch.setattr(model_export, "get_output_folder", lambda d, t, p, c: str(results / d / f"{t}__{p}__{c}"))
    path = tmp_path / "model.zip"
    model_export.export_pretrained_model(999, str(path), ("3d_lowres",), folds=(0, 1))
    assert run("-i", images, "-o", tmp_path / "zip", "-m", path) == 0
    folder = results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    assert run("-i", images, "-o", tmp_path / "folder", "-m", folder) == 0
    np.testing.assert_array_equal(label_map(tmp_path / "zip"), label_map(tmp_path / "folder"))
    assert len(np.unique(label_map(tmp_path / "zip"))) > 1


def test_a_cascade_brings_its_first_stage(results, images, tmp_path):
    path = pack(results, tmp_path / "both.zip")
    assert run("-i", images, "-o", tmp_path / "zip", "-m", path, "-c", models.CASCADE, "-d", 999) == 0
    folder = results / DATASET / f"nnUNetTrainer__nnUNetPlans__{models.CASCADE}"
    run("-i", images, "-o", tmp_path / "folder", "-m", folder)
    np.testing.assert_array_equal(label_map(tmp_path / "zip"), label_map(tmp_path / "folder"))


def test_several_models_are_named_and_one_is_chosen(results, images, tmp_path, capsys):
    path = pack(results, tmp_path / "both.zip")
    words = ("-i", images, "-o", tmp_path / "out", "-m", path)
    assert run(*words) == 2
    message = capsys.readouterr().err
    assert f"{DATASET}/nnUNetTrainer__nnUNetPlans__3d_lowres" in message and "choose one with -c" in message
    assert run(*words, "-c", "2d") == 2
    assert "no model of -c 2d" in capsys.readouterr().err
    assert run(*words, "-c", "3d_lowres", "-d", "Dataset001_Other") == 2
    assert run(*words, "-c", "3d_lowres", "-chk", "checkpoint_best.pth") == 2
    assert "no fold of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*words, "-c", "3d_lowres") == 0


def test_a_packed_model_folder_opens_too(results, images, tmp_path):
    folder = results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    for number, (root, inside) in enumerate([(folder, "**/*"), (folder.parent, f"{folder.name}/**/*")]):
        assert (
            run("-i", images, "-o", tmp_path / str(number), "-m", pack(root, tmp_path / f"{number}.zip", inside)) == 0
        )
    np.testing.assert_array_equal(label_map(tmp_path / "0"), label_map(tmp_path / "1"))


def test_it_is_unpacked_once_and_again_when_the_cache_is_damaged(results, images, tmp_path, capsys):
    path = pack(results, tmp_path / "m.zip", "*/*3d_lowres/**/*")
    words = ("-i", images, "-o", tmp_path / "out", "-m", path)
    assert run(*words) == 0
    assert "unpacking" in capsys.readouterr().err
    assert run(*words) == 0
    assert "unpacking" not in capsys.readouterr().err
    entry = next(tmp_path.glob("flare-cache/models/*/*/plans.json"))
    entry.write_text("{}")
    assert run(*words) == 0
    message = capsys.readouterr().err
    assert "damaged" in message and "unpacking" in message


def test_without_a_cache_it_is_unpacked_for_this_run(results, tmp_path, monkeypatch):
    monkeypatch.setenv("NNUNET_FLARE_CACHE", "")
    path = pack(results, tmp_path / "m.zip", "*/*3d_lowres/**/*")
    folder = zipped.unpacked_model(path, checkpoint="checkpoint_final.pth")
    assert (folder / "fold_1" / "checkpoint_final.pth").is_file()
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "fold_0", "fold_1", "plans.json"]


def bad_zip(path: Path, name: str, content: bytes = b"x", *, mode: int = 0) -> Path:
    """A file that holds a model and one thing more."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("T__P__3d/plans.json", "{}")
        archive.writestr("T__P__3d/dataset.json", "{}")
        archive.writestr("T__P__3d/fold_0/checkpoint_final.pth", "x")
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name, mode, expected",
    [
        ("../../evil.json", 0, "outside the folder"),
        ("T__P__3d/fold_0/../../../evil", 0, "outside the folder"),
        ("/etc/evil", 0, "outside the folder"),
        ("C:\\evil", 0, "outside the folder"),
        ("T__P__3d/fold_1/checkpoint_final.pth", stat.S_IFLNK | 0o777, "link"),
        ("T__P__3d/fold_1", stat.S_IFIFO | 0o644, "link or not a regular file"),
        ("T__P__3d/plans.json", 0, "twice"),
    ],
)
def test_what_would_leave_the_cache_is_refused(tmp_path, name, mode, expected):
    with pytest.warns(UserWarning) if expected == "twice" else _nothing():
        path = bad_zip(tmp_path / "m.zip", name, b"/etc/passwd", mode=mode)
    with pytest.raises(zipped.InputError, match=expected):
        zipped.unpacked_model(path, checkpoint="checkpoint_final.pth")
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("fold_*"))


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "SMALL", 2**20)
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("T__P__3d/plans.json", "{}")
        archive.writestr("T__P__3d/fold_0/checkpoint_final.pth", bytes(32 * 2**20))
    with pytest.raises(zipped.InputError, match="would unpack to"):
        zipped.unpacked_model(path, checkpoint="checkpoint_final.pth")
    assert not list(tmp_path.rglob("fold_*"))


def test_a_size_that_is_a_lie_is_found_out(results, tmp_path):
    path = pack(results, tmp_path / "m.zip", "*/*3d_lowres/**/*")
    with zipfile.ZipFile(path) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith(".pth"))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02" + data[data.index(b"PK\x01\x02") + 4 : data.index(b"PK\x01\x02") + 4])
    while data[at + 46 : at + 46 + len(info.filename)] != info.filename.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    data[at + 24 : at + 28] = struct.pack("<I", 1000)  # uncompressed size in the central directory
    path.write_bytes(data)
    with pytest.raises(zipped.InputError, match="cannot be unpacked"):
        zipped.unpacked_model(path, checkpoint="checkpoint_final.pth")


@pytest.mark.parametrize("kind", ["half", "text", "flipped", "no model"])
def test_a_damaged_or_foreign_file_is_one_line(results, images, tmp_path, capsys, kind):
    path = pack(results, tmp_path / "m.zip", "*/*3d_lowres/**/*")
    data = bytearray(path.read_bytes())
    if kind == "half":
        data = data[: len(data) // 2]
    elif kind == "text":
        data = bytearray(b"a checkpoint, says who")
    elif kind == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    if kind == "no model":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")
    assert run("-i", images, "-o", tmp_path / "out", "-m", path) == 2
    message = capsys.readouterr().err
    assert str(path) in message and "Traceback" not in message
    assert len(message.strip().splitlines()) <= 2  # one may say that it is being unpacked
    assert not os.path.exists(tmp_path / "out")
