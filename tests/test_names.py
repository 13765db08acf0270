"""File names that are no UTF-8 go through every command, beside good ones."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from bad_dicom import DICOM_KINDS

from nnunet_flare.dicom.series import read_scan
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.names import is_plain, plain_folder, readable

NAMES = [b"\xb8\xce\xd4\xe0_liver", b"m\xfcller", "Löwe".encode(), b"plain"]
"""GBK, Latin-1, UTF-8, ASCII."""


def ct() -> Volume:
    array = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    return Volume(array, (3.0, 2.0, 1.0), (4.0, 5.0, 6.0))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".NII.GZ"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_and_read_in_any_folder(tmp_path: Path, name: bytes, suffix: str) -> None:
    folder = tmp_path / os.fsdecode(b"\xe4 folder")
    path = folder / (os.fsdecode(name) + suffix)
    write_volume(path, ct())
    files = {os.fsencode(file.name) for file in folder.iterdir()}
    assert os.fsencode(path.name) in files and len(files) == (2 if suffix == ".mhd" else 1)
    again = read_volume(path)
    assert np.array_equal(again.array, ct().array)
    assert again.spacing_mm == (3.0, 2.0, 1.0) and again.origin == (4.0, 5.0, 6.0)


def test_names_that_libraries_take_as_they_are(tmp_path: Path) -> None:
    assert [is_plain(os.fsdecode(name)) for name in NAMES] == [False, False, True, True]
    with readable(tmp_path / "Löwe.nii.gz") as name:
        assert name == str(tmp_path / "Löwe.nii.gz")


def test_no_link_or_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(Path("/tmp").glob("flare-*"))
    path = tmp_path / os.fsdecode(b"\xb8.nii.gz")
    write_volume(path, ct())
    read_volume(path)
    with pytest.raises(RuntimeError), plain_folder(beside=tmp_path):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert set(Path("/tmp").glob("flare-*")) == before


def command(module: str, *words: object, locale: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, since the fault ended the whole process."""
    environment = {**os.environ, "LC_ALL": locale, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, "-m", f"nnunet_flare.cli.{module}", *map(str, words)],
        capture_output=True, text=True, errors="backslashreplace", env=environment, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_predict_evaluate_and_postprocess_take_such_names_beside_good_ones(tmp_path: Path, locale: str) -> None:
    model = models.write_model(tmp_path / "model")
    names = [os.fsdecode(name) for name in NAMES]
    for seed, name in enumerate(names):
        write_volume(tmp_path / "images" / f"{name}_0000.nii.gz", scans.blobs((10, 36, 40), seed=seed))
    backend = ("--backend", "torch")
    done = command("predict", "-i", tmp_path / "images", "-o", tmp_path / "out", "-m", model, *backend, locale=locale)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    written = sorted(os.fsencode(path.name) for path in (tmp_path / "out").iterdir())
    assert written == sorted(name + b".nii.gz" for name in NAMES)
    for name in names:
        labels = read_labels(tmp_path / "out" / f"{name}.nii.gz")
        write_labels(tmp_path / "truth" / f"{name}.nii.gz", labels.array, labels)

    done = command(
        "evaluate", "-ref", tmp_path / "truth", "-pred", tmp_path / "out", "-o", tmp_path / "scores.csv",
        "-np", 2, locale=locale,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    rows = list(csv.reader((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 1 + len(names)
    assert {row[0] for row in rows[1:]} >= {"plain.nii.gz", "Löwe.nii.gz", "m\\udcfcller.nii.gz"}
    assert all(float(value) == 1.0 for row in rows[1:] for value in row[1:4])
    assert len(json.loads((tmp_path / "scores.json").read_text())["cases"]) == len(names)

    done = command("postprocess", "-i", tmp_path / "out", "-o", tmp_path / "clean", "-np", 2, locale=locale)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert sorted(os.fsencode(path.name) for path in (tmp_path / "clean").iterdir()) == written


def test_a_dicom_series_in_such_a_folder(tmp_path: Path) -> None:
    kind = next(kind for kind in DICOM_KINDS if kind.fate == "fine")
    kind.write(tmp_path / "plain")
    expected = read_scan(tmp_path / "plain", "a")
    folder = tmp_path / os.fsdecode(b"\xb8\xce")
    (tmp_path / "plain").rename(folder)
    for path in list(folder.iterdir()):
        path.rename(folder / f"{os.fsdecode(bytes([0xFC]))}{path.name}")
    found = read_scan(folder, "a")
    assert np.array_equal(found.array, expected.array) and found.spacing_mm == expected.spacing_mm
