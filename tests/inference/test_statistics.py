"""``--statistics``: volumes and mean CT numbers, compared with SimpleITK's own."""

from __future__ import annotations

import json
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import SimpleITK as sitk
import small_scans as scans

from nnunet_flare.cli import predict
from nnunet_flare.documents import load_rows
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.inference.statistics import organ_statistics

SMALL = (10, 36, 40)
HEADER = ["case", "id", "organ", "voxels", "volume_ml", "mean_hu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def images(tmp_path) -> Path:
    for seed, name in enumerate(("a", "b")):
        scan = scans.blobs(SMALL, seed=seed)
        turned = Volume(scan.array, scan.spacing_mm, scan.origin, (0.0, 0.8, -0.6, 1.0, 0.0, 0.0, 0.0, 0.6, 0.8))
        write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", turned)
    return tmp_path / "in"


def run(*words: object) -> int:
    return predict.main([str(w) for w in (*words, "--backend", "torch", "--precision", "fp32", "-device", "cpu")])


def by_simpleitk(scan: Path, labels: Path) -> dict[int, tuple[int, float, float]]:
    """Voxels, ml and mean of every label that is there, by SimpleITK's filters."""
    image, map_ = sitk.Cast(sitk.ReadImage(str(scan)), sitk.sitkFloat64), sitk.ReadImage(str(labels))
    shapes, values = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelStatisticsImageFilter()
    shapes.Execute(map_)
    values.Execute(image, map_)
    return {
        one: (shapes.GetNumberOfPixels(one), shapes.GetPhysicalSize(one) / 1000, values.GetMean(one))
        for one in shapes.GetLabels()
    }


def table(out: Path) -> list[list[str]]:
    return [row for _, row in load_rows(out / "statistics.csv")]


def test_volumes_and_means_are_simpleitks(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("-i", images, "-o", out, "-m", model, "--statistics") == 0
    header, *rows = table(out)
    assert header == HEADER
    assert [row[0] for row in rows] == ["a"] * 3 + ["b"] * 3
    document = json.loads((out / "statistics.json").read_text())["cases"]
    for case in ("a", "b"):
        expected = by_simpleitk(images / f"{case}_0000.nii.gz", out / f"{case}.nii.gz")
        for _, number, organ, voxels, ml, mean in (row for row in rows if row[0] == case):
            assert models.ORGANS[organ] == int(number)
            count, volume, hu = expected.get(int(number), (0, 0.0, None))
            assert int(voxels) == count
            assert float(ml) == pytest.approx(volume, abs=1e-3)
            assert (float(mean) if mean else None) == (None if hu is None else pytest.approx(hu, abs=1e-3))
            assert document[case][organ] == {
                "id": int(number), "voxels": int(voxels), "volume_ml": float(ml),
                "mean_hu": float(mean) if mean else None,
            }  # fmt: skip
    assert sum(bool(row[5]) for row in rows) >= 2, "the network found nothing to measure"
    assert f"statistics: {out / 'statistics.csv'}, {out / 'statistics.json'}" in capsys.readouterr().out


def test_means_are_exact_for_values_that_differ_in_every_voxel():
    labels = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(np.uint8) % 3
    image = (np.arange(24).reshape(2, 3, 4) ** 2).astype(np.int16) - 1000
    found = organ_statistics(labels, image, 2.5, {1: "liver", 2: "spleen", 7: "aorta"})
    assert found["liver"] == (1, 8, 0.02, image[labels == 1].mean())
    assert found["spleen"] == (2, 8, 0.02, image[labels == 2].mean())
    assert found["aorta"] == (7, 0, 0.0, None)


def test_a_prediction_goes_on_with_the_cases_that_have_no_row(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("-i", images, "-o", out, "-m", model, "--statistics", "-num_parts", 2, "-part_id", 0) == 0
    assert {row[0] for row in table(out)[1:]} == {"a"}
    run("-i", images, "-o", out, "-m", model, "-num_parts", 2, "-part_id", 1)  # without a row of b
    capsys.readouterr()
    assert run("-i", images, "-o", out, "-m", model, "--statistics", "--continue_prediction") == 0
    assert "1 written, 1 already there" in capsys.readouterr().out
    assert {row[0] for row in table(out)[1:]} == {"a", "b"}


def test_a_row_stands_before_the_next_case_is_done(model, images, tmp_path):
    (images / "b_0000.nii.gz").write_bytes(b"no image")
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--statistics") == 1
    assert {row[0] for row in table(tmp_path / "out")[1:]} == {"a"}


def test_somebody_elses_table_is_left_alone(model, images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "statistics.csv").write_text("mine\n")
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--statistics") == 2
    assert "already exists without" in capsys.readouterr().err
    assert (tmp_path / "out" / "statistics.csv").read_text() == "mine\n"
    (tmp_path / "out" / "statistics.json").write_text("[1]")
    assert run("-i", images, "-o", tmp_path / "out", "-m", model, "--statistics") == 2
    assert "move it away" in capsys.readouterr().err


def test_a_case_named_like_a_formula_is_no_formula_in_the_table(model, tmp_path):
    write_volume(tmp_path / "in" / "=1+1_0000.nii.gz", scans.blobs(SMALL))
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--statistics") == 0
    assert "\n'=1+1," in (tmp_path / "out" / "statistics.csv").read_text()
