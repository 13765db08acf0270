"""Organ shift, painting and clipping, one transform at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnunet_flare.trainers.transforms.organ_shift import OrganShiftTransform, shift_labels
from nnunet_flare.trainers.transforms.painting import IN_SIDES, OUT_SIDES, PaintingTransform, random_boxes
from nnunet_flare.trainers.transforms.shuffled import ShuffledTransforms
from nnunet_flare.trainers.transforms.window import ClipToWindowTransform, Window, channel_windows

INTENSITIES = {"mean": 80.0, "std": 140.0, "percentile_00_5": -970.0, "percentile_99_5": 280.0}
WINDOW = Window(low=(-970 - 80) / 140, high=(280 - 80) / 140, hu=140.0)


def normalised(hu: np.ndarray) -> torch.Tensor:
    """HU (Z, Y, X) as nnU-Net's preprocessing leaves them, with a channel axis."""
    done = CTNormalization(use_mask_for_norm=False, intensityproperties=INTENSITIES).run(hu.astype(np.float32))
    return torch.from_numpy(done)[None]


def test_the_window_is_what_nnunets_normalisation_clips_to() -> None:
    assert channel_windows(["CTNormalization"], {"0": INTENSITIES}) == (WINDOW,)
    extremes = normalised(np.array([[[-5000.0, 5000.0]]]))
    assert extremes.min() == pytest.approx(WINDOW.low)
    assert extremes.max() == pytest.approx(WINDOW.high)
    assert channel_windows(["ZScoreNormalization", "CTNormalization"], {"0": INTENSITIES, "1": INTENSITIES})[0] is None


def test_shifting_the_normalised_organ_is_shifting_its_hu_before() -> None:
    hu = np.random.default_rng(0).uniform(-400, 180, (4, 6, 6))
    labels = torch.zeros(1, 4, 6, 6, dtype=torch.int16)
    labels[0, :2, :3], labels[0, 2:, 3:] = 1, 2
    image = normalised(hu)
    shifts_hu = torch.tensor([0.0, 57.0, -120.0])
    shift_labels(image[0], labels[0], shifts_hu / WINDOW.hu)
    expected = hu + shifts_hu.numpy()[labels[0].numpy()]
    assert torch.allclose(image, normalised(expected), atol=1e-5)


def test_padding_background_and_unknown_values_are_not_shifted() -> None:
    labels = torch.tensor([[[-1, 0, 1, 2, 3, 9]]], dtype=torch.int16)
    image = torch.zeros(1, 1, 6)
    shift_labels(image, labels, torch.tensor([0.0, 1.0, 2.0]))
    assert image.flatten().tolist() == [0, 0, 1, 2, 0, 0]


def test_organ_shifts_have_the_papers_range_and_rate() -> None:
    transform = OrganShiftTransform(range(1, 14), [WINDOW])
    shifts = torch.stack([transform.get_parameters()["shifts_hu"] for _ in range(400)])
    assert not shifts[:, 0].any(), "background stays"
    assert shifts.min() >= -200
    assert shifts.max() <= 199
    assert shifts.min() < -190
    assert shifts.max() > 190
    assert torch.equal(shifts, shifts.round())
    assert (shifts[:, 1:] != 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_an_organ_shift_stays_in_the_window_and_leaves_other_channels_and_labels() -> None:
    transform = OrganShiftTransform([1], [WINDOW, None], p_per_label=1.0)
    segmentation = torch.ones(1, 3, 4, 4, dtype=torch.int16)
    seen = set()
    for _ in range(60):
        image = torch.stack([torch.full((3, 4, 4), WINDOW.high), torch.full((3, 4, 4), 9.0)])
        done = transform(image=image, segmentation=segmentation.clone())
        assert done["image"][0].max() <= WINDOW.high + 1e-6
        assert torch.equal(done["image"][1], torch.full((3, 4, 4), 9.0))
        assert torch.equal(done["segmentation"], segmentation)
        seen.add(round(float(done["image"][0, 0, 0, 0]), 4))
    assert len(seen) > 10


def test_clipping_leaves_channels_without_a_window() -> None:
    image = torch.tensor([-99.0, 0.0, 99.0]).repeat(2, 1, 1, 1)
    done = ClipToWindowTransform([WINDOW, None])(image=image.clone())["image"]
    assert done[0].flatten().tolist() == pytest.approx([WINDOW.low, 0, WINDOW.high])
    assert torch.equal(done[1], image[1])


@settings(deadline=None, max_examples=40)
@given(
    shape=array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=60), sides=st.sampled_from([IN_SIDES, OUT_SIDES])
)
def test_boxes_lie_within_any_patch(shape: tuple[int, ...], sides: tuple[float, float]) -> None:
    for _ in range(5):
        boxes = random_boxes(shape, sides)
        assert len(boxes) <= 3
        for box in boxes:
            for part, edge in zip(box, shape, strict=True):
                assert 0 <= part.start < part.stop <= edge
                length = part.stop - part.start
                assert max(1, round(sides[0] * edge)) <= length <= max(1, round(sides[1] * edge))
                if edge - length >= 6:
                    assert part.start >= 3
                    assert part.stop <= edge - 3


def test_the_number_of_boxes_is_the_papers() -> None:
    counts = np.bincount([len(random_boxes((40, 40, 40), IN_SIDES)) for _ in range(2000)], minlength=4) / 2000
    assert counts == pytest.approx([0.05, 0.95 * 0.05, 0.95**2 * 0.05, 0.95**3], abs=0.02)


def painted(p_in: float, *, seed: int, windows: Any = (WINDOW,)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    before = torch.full((1, 40, 50, 60), 0.5)
    segmentation = torch.ones(1, 40, 50, 60, dtype=torch.int16)
    after = PaintingTransform(windows, p_in=p_in)(image=before.clone(), segmentation=segmentation.clone())
    assert torch.equal(after["segmentation"], segmentation), "labels stay under the paint"
    return before, after["image"]


def test_in_painting_replaces_small_boxes_with_noise_of_the_upper_half_of_the_window() -> None:
    """S1: U[0, 1] in an image that goes from -1 to 1. Of the window -970 to 280 HU: from -345 HU on."""
    middle = (-345 - 80) / 140
    shares = []
    for seed in range(20):
        before, after = painted(1.0, seed=seed)
        changed = after != before
        shares.append(changed.float().mean().item())
        if changed.any():
            assert after[changed].min() >= middle
            assert after[changed].max() <= WINDOW.high
            assert after[changed].mean() == pytest.approx((-32.5 - 80) / 140, abs=0.3)
            assert after[changed].std() == pytest.approx((WINDOW.high - middle) / 12**0.5, rel=0.2)
    assert 0 < max(shares) <= 3 * 0.2**3 * 1.3
    assert sum(share > 0 for share in shares) >= 15


def test_out_painting_keeps_large_boxes_and_paints_the_border() -> None:
    for seed in range(20):
        before, after = painted(0.0, seed=seed)
        kept = (after == before).float().mean().item()
        assert kept == 1.0 or 0.8**3 * 0.9 <= kept <= 0.95
        if kept < 1:
            assert (after[:, 0] != before[:, 0]).all(), "three voxels at each border are painted"
            assert after[after != before].min() >= (-345 - 80) / 140


def test_a_channel_without_a_window_is_painted_in_the_upper_half_of_its_own_range() -> None:
    torch.manual_seed(3)
    image = torch.rand(1, 30, 30, 30) * 7 + 100
    after = PaintingTransform((None,), p_in=0.0)(image=image.clone())["image"]
    painted_over = after != image
    assert painted_over.any()
    assert after[painted_over].min() >= (image.min() + image.max()) / 2
    assert after.max() <= image.max()


class Append(BasicTransform):
    """Notes that it was applied."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def __call__(self, **data_dict: Any) -> dict:
        self.log.append(self.name)
        return data_dict


def test_shuffled_transforms_are_all_applied_in_changing_order() -> None:
    orders = set()
    for _ in range(60):
        log: list[str] = []
        ShuffledTransforms([Append(name, log) for name in "abc"])(image=torch.zeros(1))
        assert sorted(log) == ["a", "b", "c"]
        orders.add("".join(log))
    assert len(orders) == 6
