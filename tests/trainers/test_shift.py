"""Random shift: where a patch is cut out, what moves in, and that image and labels stay together."""

from __future__ import annotations

import pytest
import torch
from scipy import ndimage

from nnunet_flare.trainers.transforms.shift import ShiftTransform, shifted_crop


def ramp(*shape: int) -> torch.Tensor:
    """A value that says where it comes from: 100 z + 10 y + x."""
    z, y, x = torch.meshgrid(*(torch.arange(edge, dtype=torch.float32) for edge in shape), indexing="ij")
    return (100 * z + 10 * y + x)[None]


def test_without_a_shift_the_centre_remains() -> None:
    volume = ramp(6, 7, 8)
    for linear in (True, False):
        cut = shifted_crop(volume, (4, 4, 4), (0, 0, 0), outside=-1, linear=linear)
        assert torch.equal(cut, volume[:, 1:5, 1:5, 2:6]), "as stock crops, rounding down"


def test_a_part_of_a_voxel_is_interpolated_in_the_image_and_rounded_in_labels() -> None:
    volume = ramp(8, 8, 8)
    cut = shifted_crop(volume, (4, 4, 4), (0.25, -1.5, 1.0), outside=0, linear=True)
    torch.testing.assert_close(cut, volume[:, 2:6, 2:6, 2:6] + 100 * 0.25 - 10 * 1.5 + 1)
    labels = shifted_crop(volume, (4, 4, 4), (0.25, -1.6, 0.6), outside=-1, linear=False)
    assert torch.equal(labels, volume[:, 2:6, 0:4, 3:7])


@pytest.mark.parametrize("shift", [(1.3, -2.6, 0.4), (-9.0, 0.0, 0.0), (0.0, 20.0, -20.0)])
def test_it_is_scipys_shift(shift: tuple[float, float, float]) -> None:
    volume = torch.randn(1, 6, 8, 10, generator=torch.Generator().manual_seed(0))
    cut = shifted_crop(volume, (6, 8, 10), shift, outside=0, linear=True)
    expected = ndimage.shift(volume[0].numpy(), [-edge for edge in shift], order=1, mode="grid-constant", cval=0)
    torch.testing.assert_close(cut[0], torch.from_numpy(expected))


def test_labels_keep_their_type_and_what_is_outside_is_unknown() -> None:
    labels = torch.ones(1, 4, 4, 4, dtype=torch.int16)
    cut = shifted_crop(labels, (4, 4, 4), (2, 0, 0), outside=-1, linear=False)
    assert cut.dtype == torch.int16
    assert (cut[:, :2] == 1).all() and (cut[:, 2:] == -1).all()


def test_half_of_the_samples_are_shifted_by_up_to_fifteen_percent_of_each_edge() -> None:
    torch.manual_seed(0)
    transform = ShiftTransform((40, 20, 10))
    shifts = torch.tensor([transform.get_parameters()["shift"] for _ in range(400)])
    moved = shifts.any(1)
    assert 0.4 < moved.float().mean() < 0.6
    largest = shifts[moved].abs().amax(0)
    assert (largest <= torch.tensor([6.0, 3.0, 1.5])).all()
    assert (largest > torch.tensor([5.5, 2.7, 1.3])).all()
    assert (shifts[moved].mean(0).abs() < 0.15 * torch.tensor([6.0, 3.0, 1.5])).all(), "in both directions alike"


def test_image_and_labels_move_together() -> None:
    torch.manual_seed(1)
    image = torch.zeros(1, 20, 20, 20)
    image[:, 8:12, 8:12, 8:12] = 1
    transform = ShiftTransform((16, 16, 16), p=1.0)
    sample = transform(image=image, segmentation=image.to(torch.int16))
    assert sample["image"].shape == sample["segmentation"].shape == (1, 16, 16, 16)
    centres = [
        ndimage.center_of_mass(part[0].clamp(min=0).numpy()) for part in (sample["image"], sample["segmentation"])
    ]
    assert centres[0] == pytest.approx(centres[1], abs=0.5)
    assert centres[0] != pytest.approx((7.5, 7.5, 7.5), abs=0.2)
