"""Elastic deformation: as large and as smooth as nnU-Net v1's, of image and label alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import create_zero_centered_coordinate_mesh, elastic_deform_coordinates
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_flare.trainers.transforms import elastic


def spatial_of(chain: ComposeTransforms) -> SpatialTransform:
    return next(part for part in chain.transforms if isinstance(part, SpatialTransform))


def stock_chain(patch: tuple[int, ...], *, dummy_2d: bool) -> ComposeTransforms:
    return nnUNetTrainer.get_training_transforms(np.array(patch), (-0.5, 0.5), None, None, dummy_2d)


@pytest.mark.parametrize(("patch", "dummy_2d"), [((8, 128, 192), True), ((32, 128, 192), False)])
def test_points_move_as_far_as_in_version_1(patch: tuple[int, ...], dummy_2d: bool, monkeypatch) -> None:
    monkeypatch.setattr(elastic, "ALPHA", (100.0, 100.0))
    monkeypatch.setattr(elastic, "SIGMA_VOXELS", (11.0, 11.0))
    spatial = spatial_of(elastic.with_elastic(stock_chain(patch, dummy_2d=dummy_2d)))
    spatial.p_elastic_deform, spatial.p_rotation, spatial.p_scaling = 1.0, 0.0, 0.0
    shape = tuple(spatial.patch_size)
    offsets = spatial.get_parameters(image=torch.zeros((1, *shape)))["elastic_offsets"]
    ours = [float(offsets[..., axis].abs().max()) for axis in range(len(shape))]
    mesh = create_zero_centered_coordinate_mesh(shape)
    theirs = np.abs(np.concatenate([elastic_deform_coordinates(mesh.copy(), 100.0, 11.0) - mesh for _ in range(3)]))
    assert ours == pytest.approx([np.mean([axis.max() for axis in theirs])] * len(shape), rel=0.2)


def test_a_fifth_of_the_samples_is_deformed_by_the_winners_numbers() -> None:
    spatial = spatial_of(elastic.with_elastic(stock_chain((16, 32, 32), dummy_2d=False)))
    assert (spatial.p_elastic_deform, elastic.SIGMA_VOXELS, elastic.ALPHA) == (0.2, (9.0, 13.0), (0.0, 200.0))
    spatial.p_rotation = spatial.p_scaling = 0.0
    np.random.seed(1)  # noqa: NPY002 - the stream of batchgeneratorsv2
    image = torch.zeros((1, 16, 32, 32))
    deformed = sum(spatial.get_parameters(image=image)["elastic_offsets"] is not None for _ in range(200))
    assert 20 < deformed < 60


def test_labels_move_with_the_image() -> None:
    spatial = spatial_of(elastic.with_elastic(stock_chain((4, 64, 64), dummy_2d=True)))
    spatial.p_elastic_deform, spatial.p_rotation, spatial.p_scaling = 1.0, 0.0, 0.0
    label = torch.zeros((1, 64, 64), dtype=torch.int16)
    label[:, 20:40, 15:50] = 3
    torch.manual_seed(0)
    out = spatial(image=label.float(), segmentation=label.clone())
    assert not torch.equal(out["segmentation"], label)
    clear = (out["image"] < 0.5) | (out["image"] > 2.5)
    assert torch.equal((out["image"] > 1.5)[clear], (out["segmentation"] == 3)[clear])


def test_a_chain_without_a_spatial_transform_is_an_error() -> None:
    with pytest.raises(ValueError, match="no SpatialTransform"):
        elastic.with_elastic(ComposeTransforms([RemoveLabelTansform(-1, 0)]))
