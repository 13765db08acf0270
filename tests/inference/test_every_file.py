"""``flare-predict``: no output onto a scan, every image-like file predicted or named, damaged outputs made anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from small_series import write_series

from nnunet_flare.cli import predict
from nnunet_flare.dicom.series import read_scan
from nnunet_flare.images import Volume, geometry_difference, read_labels, read_volume, write_volume

SHAPE = (8, 32, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model")


def run(*words: object) -> int:
    return predict.main([str(word) for word in (*words, "--backend", "torch")])


def put(path: Path, seed: int = 0) -> Path:
    """A scan under any name, also one that its writer would not take."""
    plain = path.with_name(f"x{path.name}".lower())
    write_volume(plain, scans.blobs(SHAPE, seed=seed))
    return plain.rename(path)


@pytest.mark.parametrize(
    ("scan", "words"),
    [
        ("scan.nii.gz", "-i {d}/scan.nii.gz -o {d}"),
        ("scan.nii.gz", "-i {d} -o {d}/sub/.. --continue_prediction"),
        ("members/0/scan.nii.gz", "-i {d}/members/0/scan.nii.gz -o {d} --save_members"),
        ("roi/scan_0000.nii.gz", "-i {d}/roi -o {d} --roi {m} --save_roi"),
    ],
)
def test_a_scan_is_never_replaced_by_its_label_map(model, tmp_path, capsys, scan, words):
    path = put(tmp_path / scan)
    (tmp_path / "sub").mkdir()
    before = path.read_bytes()
    assert run(*words.format(d=tmp_path, m=model).split(), "-m", model) == 2
    assert "would be overwritten" in capsys.readouterr().err and path.read_bytes() == before


def test_a_label_map_beside_its_scan_is_an_earlier_output_there(model, tmp_path):
    put(tmp_path / "a_0000.nii.gz")
    for _ in range(2):
        assert run("-i", tmp_path, "-o", tmp_path, "-m", model) == 0
    assert run("-i", tmp_path, "-o", tmp_path, "-m", model, "--continue_prediction") == 0


def test_every_image_like_file_is_predicted_or_named(model, tmp_path, capsys):
    folder = tmp_path / "in"
    same = ("bare.nii.gz", "FLARE23_0007.nii.gz")
    taken = {"a_0000.nii.gz": "a.nii.gz", "b_0000.nii": "b.nii", "c_0000.mha": "c.mha", "d_0000.nrrd": "d.nrrd"}
    taken |= {"E_0000.NII.GZ": "E.nii.gz", **{name: name for name in same}}
    for seed, name in enumerate(taken):
        put(folder / name, seed)
    write_series(folder / "series", scans.blobs(SHAPE))
    left = [put(folder / "deep" / "er" / "x_0000.nii.gz"), put(folder / "series" / "y.nii.gz")]
    for name in ("loose.dcm", "z.nii.bz2", "deep/slice.dcm"):
        (folder / name).write_bytes(b"BZh9" if name.endswith("bz2") else bytes(128) + b"DICM")
        left.append(folder / name)
    twice = [put(folder / "two_0000.nii.gz"), put(folder / "two.mha")]
    assert run("-i", folder, "-o", tmp_path / "out", "-m", model) == 1
    said = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*taken.values(), "series.nii.gz"])
    for path in left:
        assert f"{path}: " in said.out, path
    assert all(path.name in said.out for path in twice) and "both give the case 'two'" in said.out
    alone = put(tmp_path / "alone" / "b_0000.nii", 1)
    assert run("-i", alone, "-o", tmp_path / "alone_out", "-m", model) == 0
    one, other = (read_labels(tmp_path / o / "b.nii").array for o in ("out", "alone_out"))
    np.testing.assert_array_equal(one, other)


def test_missing_channels_set_their_case_aside(tmp_path, capsys):
    model = models.write_model(tmp_path / "model", channels=2)
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "bare.nii.gz"):
        put(tmp_path / "in" / name)
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model) == 1
    said = capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.nii.gz"]
    assert "b_0001" in said and "bare.nii.gz" in said


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "other grid"])
def test_a_damaged_output_is_not_already_there(model, tmp_path, capsys, damage):
    words = ("-i", put(tmp_path / "in" / "a_0000.nii.gz"), "-o", tmp_path / "out", "-m", model)
    assert run(*words) == 0
    path = tmp_path / "out" / "a.nii.gz"
    good, data = read_labels(path).array, path.read_bytes()
    half = len(data) // 2
    if damage == "other grid":
        write_volume(path, scans.blobs((4, 8, 8)))
    else:
        path.write_bytes(
            {"empty": b"", "cut": data[:half], "zeroed": data[:half] + bytes(20) + data[half + 20 :]}[damage]
        )
    assert run(*words, "--continue_prediction") == 0
    np.testing.assert_array_equal(read_labels(path).array, good)
    assert run(*words, "--continue_prediction") == 0
    assert "0 written, 1 already there" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a_0000.nii.gz", "a_0000.mha", "a_0000.nrrd", "a"])
@pytest.mark.parametrize("what", ["size", "place"])
def test_a_label_map_of_an_earlier_scan_of_this_name_is_not_taken_for_todays(model, tmp_path, capsys, name, what):
    scan = scans.blobs(SHAPE)
    z, y, x = SHAPE
    turned = Volume(scan.array, scan.spacing_mm, (7.0, -8.0, 300.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    other = turned if what == "place" else scans.blobs((z + 1, y, x + 3))
    path = tmp_path / "in" / name
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--continue_prediction")
    for volume in (scan, other):
        if name == "a":
            shutil.rmtree(path, ignore_errors=True)
            write_series(path, volume)
        else:
            write_volume(path, volume)
        for said in ("1 written, 0 already there", "0 written, 1 already there"):
            assert run(*words) == 0
            assert said in capsys.readouterr().out
    (made,) = (tmp_path / "out").iterdir()
    found, expected = read_volume(made), read_scan(path, "a")
    assert geometry_difference(found, expected) is None
