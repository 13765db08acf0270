"""Coarse to fine: which box a coarse label map gives, where it lies in the stored scan, and what comes back."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import SimpleITK as sitk
import small_scans as scans
import stock_prediction

from nnunet_flare.cli import predict
from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, read_volume, to_sitk, write_volume
from nnunet_flare.images.orientation import Turn
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter, coarse_model_folder, cropped, pasted
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime
from nnunet_flare.inference.roi import find_box, to_image_box, widened
from nnunet_flare.inference.settings import PredictionSettings

SHAPE = (24, 60, 70)
BRIGHT = (slice(9, 13), slice(20, 32), slice(40, 52))
"""Where the body of the test scans holds something bright, which the coarse stand-in calls an organ."""

RIGHT_TO_LEFT = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
SAGITTAL = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def scan(direction: tuple[float, ...] = scans.Volume((), (1, 1, 1)).direction, *, bright: tuple = BRIGHT) -> Volume:
    """Blobs with one bright block, at any orientation."""
    array = scans.blobs(SHAPE, seed=3).array.clip(-900, 500)
    array[bright] = 1500
    return Volume(array, (4.0, 1.7, 2.3), (-10.0, 20.0, 5.5), direction)


def bright_is_organ(self: Segmenter, scan, *, progress=None) -> np.ndarray:
    """Stands in for a trained coarse network: all bright voxels on its grid."""
    values = self.plans_manager.foreground_intensity_properties_per_channel["0"]
    least = (900 - values["mean"]) / values["std"]
    clipped = (values["percentile_99_5"] - values["mean"]) / values["std"]
    return (scan.prepared.data[0] >= min(least, clipped) - 1e-3).astype(np.uint8)


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("fine") / "nnUNetTrainer__P__3d_fullres", folds=(0, 1))


def coarse_plans(**settings) -> dict:
    plan = models.plans(spacing=(8.0, 6.0, 6.0), patch=(8, 16, 16), **settings)
    plan["foreground_intensity_properties_per_channel"]["0"]["percentile_99_5"] = 1200.0
    return plan


@pytest.fixture(scope="module")
def coarse(fine) -> Path:
    return models.write_model(fine.parent / "nnUNetTrainer__P__3d_lowres", plan=coarse_plans())


@pytest.fixture
def images(tmp_path) -> Path:
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scan())
    return tmp_path / "images"


def run(*words: object) -> int:
    try:
        return predict.main([str(word) for word in (*words, "--backend", "torch", "--precision", "fp32")])
    except SystemExit as stopped:  # argparse, for a number that is none
        return int(stopped.code or 0)


def segmenters(fine: Path, coarse: Path, **options) -> RoiSegmenter:
    settings = PredictionSettings(backend="torch", precision="fp32")
    both = [Segmenter.from_model_folder(folder, settings, folds=[0]) for folder in (coarse, fine)]
    return RoiSegmenter(*both, **options)


# The rules


def organs() -> np.ndarray:
    """Six organs one above the other, 1 mm voxels; a piece of organ 1 far below and of organ 6 far above."""
    labels = np.zeros((100, 40, 40), np.uint8)
    for label in range(1, 7):
        labels[20 + 5 * label : 40 + 5 * label, 10:40, 8 + 2 * label : 10 + 2 * label] = label
    labels[3:6, 10:40, 10:14] = 1
    labels[95:98, 10:20, 1:4] = 6
    return labels


def test_union_takes_every_voxel():
    assert find_box(organs(), (1, 1, 1)) == ((3, 98), (10, 40), (1, 22))
    assert find_box(np.zeros((4, 5, 6), np.uint8), (1, 1, 1)) is None


def test_fosun_drops_specks_and_one_outlying_organ_on_either_side():
    labels = organs()
    labels[40:42, 2:4, 30:35] = 3  # 20 mm3, a speck
    # starts 3 (organ 1), 30, 35, ...; ends 98 (organ 6; a piece of 90 mm3 is dropped), 65, ...
    assert find_box(labels, (1, 1, 1), rule="fosun") == ((30, 65), (10, 40), (10, 22))
    # in larger voxels the piece counts, and with it the columns
    assert find_box(labels, (2, 2, 2), rule="fosun") == ((30, 65), (2, 40), (1, 35))
    few = np.where(labels == 6, 0, labels).astype(np.uint8)
    assert find_box(few, (1, 1, 1), rule="fosun") == ((3, 65), (10, 40), (10, 20))


def test_fosun_trims_along_the_patients_length():
    turned = organs().transpose(1, 2, 0)
    assert find_box(turned, (1, 1, 1), rule="fosun", slice_axis=2) == ((10, 40), (10, 22), (30, 65))


def test_sztu_takes_the_largest_piece_of_each_organ():
    assert find_box(organs(), (1, 1, 1), rule="sztu") == ((25, 70), (10, 40), (10, 22))
    specks = np.zeros((9, 9, 9), np.uint8)
    specks[2, 2:4, 2:4] = 5
    assert find_box(specks, (1, 1, 1), rule="sztu") is None


def test_margin_is_in_mm_and_ends_at_the_border():
    assert widened(((5, 8), (1, 9), (20, 30)), (10, 12, 100), (5.0, 2.0, 1.0), 5.0) == ((4, 9), (0, 12), (15, 35))
    assert widened(((9, 10), (3, 4), (0, 1)), (10, 12, 100), (5.0, 2.0, 1.0), 0.0) == ((8, 10), (3, 5), (0, 2))


@pytest.mark.parametrize("forward", list(permutations(range(3))))
@pytest.mark.parametrize("flip", list(product((False, True), repeat=3)))
def test_a_box_covers_the_same_voxels_in_the_stored_scan_however_it_is_turned(forward, flip):
    stored = np.zeros((12, 18, 14), np.uint8)
    stored[3:5, 7:16, 1:9] = 1
    turn = Turn((2, 0, 1), flip)
    network = turn.apply(stored).transpose(forward)
    crop = [[1, n - 1] for n in network.shape]
    inner = network[tuple(slice(*c) for c in crop)]
    properties = {
        "shape_after_cropping_and_before_resampling": inner.shape,
        "shape_before_cropping": network.shape,
        "bbox_used_for_cropping": crop,
    }
    box = find_box(inner, (1, 1, 1))
    backward = [int(axis) for axis in np.argsort(forward)]
    assert to_image_box(box, inner.shape, properties, backward, turn) == ((3, 5), (7, 16), (1, 9))
    twice = tuple((2 * low, 2 * high) for low, high in box)
    half = [2 * n for n in inner.shape]
    assert to_image_box(twice, half, properties, backward, turn) == ((3, 5), (7, 16), (1, 9))


# The prediction


@pytest.mark.parametrize("direction", [scan().direction, RIGHT_TO_LEFT, SAGITTAL])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)])
def test_the_box_holds_the_organ_in_any_orientation(fine, tmp_path, monkeypatch, direction, reader, transpose):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    coarse = models.write_model(tmp_path / "coarse", plan=coarse_plans(reader=reader, transpose=transpose))
    roi = segmenters(fine, coarse, margin_mm=8)  # a voxel of the coarse grid
    box = roi.box(roi.prepare([scan(direction)]))
    for (low, high), organ, size in zip(box, BRIGHT, SHAPE, strict=True):
        assert low <= organ.start < organ.stop <= high
        assert high - low < 0.6 * size


def test_the_rule_decides_in_the_prediction(fine, coarse, monkeypatch):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    two = scan()
    two.array[2:6, 42:48, 3:9] = 1500  # smaller
    boxes = {}
    for rule in ("union", "sztu"):
        roi = segmenters(fine, coarse, rule=rule)
        boxes[rule] = roi.box(roi.prepare([two]))
    assert boxes["union"][1][1] > 55 > boxes["sztu"][1][1]


def test_the_result_is_the_crops_own_prediction_pasted(fine, coarse, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    options = ("--roi", "3d_lowres", "--roi-margin", 6, "--save-roi", "--profile", "--save-members")
    assert run("-i", images, "-o", tmp_path / "out", "-m", fine, *options) == 0
    printed = capsys.readouterr().out
    stages = [line.split("  ")[0] for line in printed.splitlines()]
    both = {"model", "check", "crop", "normalise + resample"}
    assert {*both, *(f"coarse {stage}" for stage in both), "coarse pass", "network", "export", "write"} <= set(stages)
    assert "volume seen by the fine model: " in printed
    assert run("-i", tmp_path / "out" / "roi", "-o", tmp_path / "alone", "-m", fine, "--save_members") == 0
    for name in ("a.nii.gz", "members/0/a.nii.gz", "members/1/a.nii.gz"):
        result, alone = (read_volume(tmp_path / folder / name) for folder in ("out", "alone"))
        assert result.array.shape == SHAPE
        index = sitk_index(result, alone.origin)
        inside = tuple(slice(at, at + n) for at, n in zip(index, alone.array.shape, strict=True))
        assert alone.array.any()
        np.testing.assert_array_equal(result.array[inside], alone.array)
        outside = result.array.copy()
        outside[inside] = 0
        assert not outside.any()
    assert alone.array.size < 0.5 * result.array.size


def sitk_index(volume: Volume, point: tuple[float, ...]) -> list[int]:
    """The voxel (Z, Y, X) at a point, by SimpleITK."""
    return list(to_sitk(volume).TransformPhysicalPointToIndex(point))[::-1]


@pytest.mark.parametrize("direction", [RIGHT_TO_LEFT, SAGITTAL])
def test_a_crop_stays_at_its_place_in_space(direction):
    volume = scan(direction)
    box = ((2, 9), (11, 40), (3, 50))
    crop = cropped(volume, box)
    same = sitk.RegionOfInterest(to_sitk(volume), [47, 29, 7], [3, 11, 2])
    np.testing.assert_allclose(crop.origin, same.GetOrigin())
    np.testing.assert_array_equal(crop.array, sitk.GetArrayFromImage(same))
    np.testing.assert_array_equal(pasted(crop.array, box, SHAPE)[2:9, 11:40, 3:50], crop.array)


def test_stock_predicts_the_saved_crop_the_same(fine, coarse, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    assert run("-i", images, "-o", tmp_path / "out", "-m", fine, "-f", 0, "--roi", coarse, "--save_roi") == 0
    crop = tmp_path / "out" / "roi" / "a_0000.nii.gz"
    stock = stock_prediction.labels(stock_prediction.predictor(fine, [0]), [crop])
    result, grid = read_volume(tmp_path / "out" / "a.nii.gz"), read_volume(crop)
    index = sitk_index(result, grid.origin)
    inside = tuple(slice(at, at + n) for at, n in zip(index, stock.shape, strict=True))
    assert (result.array[inside] != stock).mean() < 1e-3


def test_the_coarse_networks_memory_is_given_back_before_the_fine_one_takes_its_own(fine, coarse, monkeypatch):
    pytest.importorskip("openvino")
    settings = PredictionSettings(backend="openvino", precision="fp32")
    both = RoiSegmenter(Segmenter.from_model_folder(coarse, settings), Segmenter.from_model_folder(fine, settings))
    done: list[tuple[str, tuple[int, ...]]] = []
    call, release = OpenVinoRuntime.__call__, OpenVinoRuntime.release
    noted = lambda self, window: done.append(("window", self.window[2:])) or call(self, window)  # noqa: E731
    monkeypatch.setattr(OpenVinoRuntime, "__call__", noted)
    given_back = lambda self: done.append(("given back", self.window[2:])) or release(self)  # noqa: E731
    monkeypatch.setattr(OpenVinoRuntime, "release", given_back)
    for _ in range(2):  # a second scan takes the memory again
        done.clear()
        both.segment(both.prepare([scan()]))
        at = done.index(("given back", (8, 16, 16)))
        assert set(done[:at]) == {("window", (8, 16, 16))}
        assert {shape for _, shape in done[at + 1 :]} == {both.fine.patch}


def test_an_organ_at_the_border_is_seen_to_the_last_voxel(fine, coarse, monkeypatch):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    roi = segmenters(fine, coarse)
    edge = (slice(20, 24), slice(0, 12), slice(58, 70))
    (z, y, x) = roi.box(roi.prepare([scan(bright=edge)]))
    assert (z[1], y[0], x[1]) == (24, 0, 70)
    assert z[0] > 0
    assert y[1] < 60


def test_a_box_of_one_value_is_no_empty_scan(fine, coarse, tmp_path, monkeypatch):
    """As where the coarse model takes air for an organ, or one channel of several holds nothing around the organs."""
    found = scan()
    found.array[BRIGHT] = -1000
    write_volume(tmp_path / "images" / "a_0000.nii.gz", found)

    def middle(self: Segmenter, scan, *, progress=None) -> np.ndarray:
        shape = scan.prepared.data.shape[1:]
        labels = np.zeros(shape, np.uint8)
        labels[tuple(at * n // size for at, n, size in zip((10, 26, 46), shape, SHAPE, strict=True))] = 1
        return labels

    monkeypatch.setattr(Segmenter, "network_labels", middle)
    options = ("--roi", coarse, "--roi_margin", 0, "--save_roi")
    assert run("-i", tmp_path / "images", "-o", tmp_path / "out", "-m", fine, *options) == 0
    assert set(read_volume(tmp_path / "out" / "roi" / "a_0000.nii.gz").array.ravel().tolist()) == {-1000}
    assert read_volume(tmp_path / "out" / "a.nii.gz").array.shape == SHAPE


def test_whole_volume_where_the_coarse_pass_finds_nothing(fine, coarse, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Segmenter, "network_labels", lambda self, scan, progress=None: np.zeros(scan.prepared.data.shape[1:], np.uint8)
    )
    assert run("-i", images, "-o", tmp_path / "out", "-m", fine, "--roi", coarse) == 0
    assert "a: the coarse model found nothing; the fine model predicts the whole scan" in capsys.readouterr().err
    run("-i", images, "-o", tmp_path / "whole", "-m", fine)
    result, whole = (read_volume(tmp_path / folder / "a.nii.gz").array for folder in ("out", "whole"))
    np.testing.assert_array_equal(result, whole)


def test_the_coarse_network_decides_on_its_own_grid(fine, coarse):
    roi = segmenters(fine, coarse)
    prepared = roi.prepare([scan()]).coarse
    labels = roi.coarse.network_labels(prepared)
    expected = roi.coarse.logits(prepared.prepared.data).argmax(0)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint8
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--save_roi"], "go with --roi MODEL"),
        (["--roi_rule", "fosun"], "go with --roi MODEL"),
        (["--roi", "3d_nowhere"], "there: 3d_lowres"),
        (["--roi", "3d_lowres", "--roi_margin", "-1"], "expected a number from 0"),
    ],
)
def test_what_cannot_be_is_refused(fine, coarse, images, tmp_path, capsys, words, says):
    assert run("-i", images, "-o", tmp_path / "out", "-m", fine, *words) == 2
    assert says in capsys.readouterr().err


def test_models_of_different_channels_are_refused(fine, tmp_path):
    two = models.write_model(tmp_path / "two", channels=2)
    with pytest.raises(InputError, match="takes 2 channels, the fine one 1"):
        segmenters(fine, two)


def test_a_model_folder_or_a_configuration_beside_the_fine_one(fine, coarse):
    assert coarse_model_folder("3d_lowres", fine) == coarse.resolve()
    assert coarse_model_folder(str(coarse), fine) == coarse
