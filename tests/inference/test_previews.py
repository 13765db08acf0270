"""``--preview``: a picture that shows the right side on the right side."""

from __future__ import annotations

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from PIL import Image

from nnunet_flare.cli import predict
from nnunet_flare.drawing import colour, rgb
from nnunet_flare.images import Volume, write_volume
from nnunet_flare.images.orientation import Turn, turn_volume
from nnunet_flare.inference.previews import PANEL, draw_preview

NAMES = {1: "liver", 2: "spleen"}
SHAPE = (30, 40, 50)


def patient() -> tuple[Volume, Volume]:
    """Scan and label map, LPS: the liver on the patient's right, in front, above; the spleen left, behind, below."""
    scan, labels = np.full(SHAPE, 40, np.int16), np.zeros(SHAPE, np.uint8)
    labels[18:28, 4:16, 4:20] = 1
    labels[2:20, 14:36, 34:46] = 2
    return Volume(scan, (5.0, 2.0, 2.0)), Volume(labels, (5.0, 2.0, 2.0))


def place(picture: np.ndarray, organ: int, panel: int) -> np.ndarray:
    """Mean row and column of an organ's pixels in a panel."""
    part = picture[:PANEL, panel * PANEL : (panel + 1) * PANEL] / 255
    wanted = np.array(rgb(colour(organ)))
    grey = (40 + 160) / 400
    return np.argwhere(np.abs(part - (0.5 * grey + 0.5 * wanted)).max(axis=-1) < 0.01).mean(axis=0)


@pytest.mark.parametrize(
    "turn",
    [
        Turn((0, 1, 2), (False, False, False)),
        Turn((0, 1, 2), (True, True, False)),
        Turn((2, 1, 0), (False, True, True)),
        Turn((1, 0, 2), (True, False, True)),
    ],
    ids=["LPS", "flipped", "sagittal slices", "coronal slices"],
)
def test_right_is_left_in_the_picture_front_and_head_are_above(turn):
    scan, labels = (turn_volume(volume, turn) for volume in patient())
    picture = np.asarray(draw_preview(scan, labels.array, NAMES))
    liver, spleen = ([place(picture, organ, panel) for panel in range(2)] for organ in (1, 2))
    assert liver[0][1] < spleen[0][1] and liver[0][0] < spleen[0][0]  # axial: right left, front above
    assert liver[1][1] < spleen[1][1] and liver[1][0] < spleen[1][0]  # coronal: right left, head above
    straight = np.asarray(draw_preview(*(v if n == 0 else v.array for n, v in enumerate(patient())), NAMES))
    np.testing.assert_array_equal(picture, straight)


def test_organs_have_their_size_in_millimetres():
    scan, labels = patient()
    picture = np.asarray(draw_preview(scan, labels.array, NAMES))[:PANEL, :PANEL] / 255
    mm = max(n * s for n, s in zip(SHAPE, scan.spacing_mm, strict=True)) / PANEL
    wanted = 0.5 * (200 / 400) + 0.5 * np.array(rgb(colour(2)))
    pixels = int((np.abs(picture - wanted).max(axis=-1) < 0.01).sum())
    assert pixels * mm**2 == pytest.approx(22 * 12 * 4, rel=0.06)


def test_one_picture_a_case_and_damaged_ones_are_made_again(tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    for name in "ab":
        write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", scans.blobs((10, 36, 40)))
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--preview", "--continue_prediction"]
    words = [str(word) for word in (*words, "--backend", "torch")]
    assert predict.main(words) == 0
    assert f"previews: {tmp_path / 'out' / 'a.png'}, {tmp_path / 'out' / 'b.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.size[0] == 3 * PANEL and picture.size[1] >= PANEL
    whole = (tmp_path / "out" / "a.png").read_bytes()
    (tmp_path / "out" / "a.png").write_bytes(whole[: len(whole) // 2])
    assert predict.main(words) == 0
    assert "1 written, 1 already there" in capsys.readouterr().out
    assert (tmp_path / "out" / "a.png").read_bytes() == whole


def test_an_empty_label_map_and_a_scan_of_another_modality_are_drawn(tmp_path):
    scan = scans.blobs((10, 36, 40))
    picture = draw_preview(Volume(scan.array * 0.001, scan.spacing_mm), np.zeros((10, 36, 40), np.uint8), {}, ct=False)
    shown = np.asarray(picture)
    assert shown.shape == (PANEL, 3 * PANEL, 3)
    assert len(np.unique(shown)) > 100  # stretched, not black
