"""The weak and strong chains as a whole: shapes, labels, ranges, and what each kind does to a sample."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_flare.trainers.augmentation import (
    NOISE_WITHOUT_UNIT,
    Geometry,
    modality_transforms,
    region_of,
    shift_transforms,
    strong_transforms,
    weak_transforms,
    with_tail,
    without_timing,
)
from nnunet_flare.trainers.sampling import PerCaseTransforms
from nnunet_flare.trainers.seeding import seed_everything
from nnunet_flare.trainers.transforms.bias_field import BiasFieldTransform
from nnunet_flare.trainers.transforms.histogram import HistogramMatchTransform, landmarks
from nnunet_flare.trainers.transforms.invert import InvertTissueTransform
from nnunet_flare.trainers.transforms.own_scale import OwnScaleTransform
from nnunet_flare.trainers.transforms.random_convolution import RandomConvolutionTransform
from nnunet_flare.trainers.transforms.window import Window

WINDOW = Window(-7.5, 1.43, 140.0)
GEOMETRIES = {
    "3d": Geometry((16, 24, 20), (22, 34, 30), (-0.5, 0.5), (0, 1, 2), dummy_2d=False),
    "dummy 2d": Geometry((8, 40, 32), (8, 60, 60), (-3.1, 3.1), (0, 1, 2), dummy_2d=True),
    "2d": Geometry((32, 24), (44, 44), (-0.2, 0.2), (0, 1), dummy_2d=False),
    "no mirroring": Geometry((16, 24, 20), (22, 34, 30), (-0.5, 0.5), None, dummy_2d=False),
}


def sample(geometry: Geometry, seed: int = 0) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    shape = (1, *geometry.initial_patch_size)
    segmentation = torch.randint(-1, 4, shape, generator=stream).to(torch.int16)
    return {"image": torch.rand(shape, generator=stream) * 8 - 7, "segmentation": segmentation}


def chain(kind: str, geometry: Geometry) -> Any:
    make = {"weak": weak_transforms, "strong": strong_transforms, "shift": shift_transforms}[kind]
    scales = [[1.0] * len(geometry.patch_size), [0.5] * len(geometry.patch_size)]
    return with_tail(make(geometry, [1, 2, 3], [WINDOW]), nnUNetTrainer.get_validation_transforms(scales), None)


def flattened(transform: Any) -> list[Any]:
    found = [transform]
    for part in [*getattr(transform, "transforms", []), *getattr(transform, "list_of_transforms", [])]:
        found += flattened(part)
    return found + flattened(transform.transform) if hasattr(transform, "transform") else found


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("kind", ["weak", "shift", "strong"])
def test_the_region_that_is_loaded_has_all_that_a_chain_reaches(kind: str, geometry: Geometry) -> None:
    """What lies further out makes no difference."""
    whole = sample(geometry)
    region = region_of(kind, geometry)
    offsets = [(edge - part) // 2 for edge, part in zip(geometry.initial_patch_size, region, strict=True)]
    inside = tuple(slice(at, at + part) for at, part in zip(offsets, region, strict=True))
    transforms = chain(kind, geometry)
    without_timing(transforms)
    for seed in range(12):
        results = []
        for part in (slice(None), (slice(None), *inside)):
            seed_everything(seed)
            results.append(transforms(**{key: value[part].clone() for key, value in whole.items()}))
        torch.testing.assert_close(results[0]["image"], results[1]["image"], atol=1e-4, rtol=0, msg=f"seed {seed}")
        assert torch.equal(results[0]["segmentation"][0], results[1]["segmentation"][0]), seed


def test_the_region_is_no_larger_than_it_must_be() -> None:
    geometry = Geometry((192, 192, 192), (308, 308, 308), (-0.5, 0.5), None, dummy_2d=False)
    sizes = {kind: region_of(kind, geometry) for kind in ("stock", "elastic", "strong", "weak", "jitter", "shift")}
    assert sizes == {
        **dict.fromkeys(("stock", "elastic", "strong"), (308,) * 3),
        **dict.fromkeys(("weak", "jitter"), (240,) * 3),
        "shift": (250,) * 3,
    }


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_chain_gives_patches_and_targets_of_the_plan(kind: str, name: str) -> None:
    geometry = GEOMETRIES[name]
    made = chain(kind, geometry)
    for seed in range(25):
        seed_everything(seed)
        done = made(**sample(geometry))
        assert done["image"].shape == (1, *geometry.patch_size)
        assert done["image"].dtype == torch.float32
        assert torch.isfinite(done["image"]).all()
        target, half = done["segmentation"]
        assert target.shape == (1, *geometry.patch_size)
        assert half.shape == (1, *(edge // 2 for edge in geometry.patch_size))
        assert set(target.unique().tolist()) <= {0, 1, 2, 3}, "-1 has become background, and no label is invented"
        assert done["image"].min() >= WINDOW.low - 1e-4
        assert done["image"].max() <= max(WINDOW.high, 1.0) + 1e-4


@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_image_and_labels_move_together(kind: str) -> None:
    """A label that is its own image: only intensities may differ afterwards, not places."""
    geometry = GEOMETRIES["dummy 2d"]
    spatial_only = chain(kind, geometry)
    spatial_only.transforms = spatial_only.transforms[:5]
    assert isinstance(spatial_only.transforms[-1], MirrorTransform)
    moved = 0
    for seed in range(30):
        seed_everything(seed)
        block = torch.zeros((1, *geometry.initial_patch_size))
        block[0, 2:5, 15:40, 22:48] = 1
        done = spatial_only(image=block.clone(), segmentation=block.to(torch.int16))
        image, labels = done["image"][0], done["segmentation"][0].clamp(0)
        overlap = ((image > 0.5) & (labels == 1)).sum() * 2 / ((image > 0.5).sum() + (labels == 1).sum())
        assert overlap > 0.97
        moved += int(not torch.equal(labels, block[0, :, 10:50, 14:46].to(torch.int16)))
    assert moved > 15


def test_weak_samples_lack_what_makes_strong_ones_strong() -> None:
    geometry = GEOMETRIES["3d"]
    strong = {type(part).__name__ for part in flattened(chain("strong", geometry))}
    weak = {type(part).__name__ for part in flattened(chain("weak", geometry))}
    added = {
        "ShuffledTransforms",
        "ContrastTransform",
        "MultiplicativeBrightnessTransform",
        "GammaTransform",
        "OneOfTransform",
        "GaussianNoiseTransform",
        "GaussianBlurTransform",
        "PaintingTransform",
        "ClipToWindowTransform",
    }
    assert strong - weak == added
    assert weak < strong
    rotations = {
        kind: next(part for part in flattened(chain(kind, geometry)) if isinstance(part, SpatialTransform)).p_rotation
        for kind in ("weak", "strong")
    }
    assert rotations == {"weak": 0.0, "strong": 0.2}


def test_resizing_is_the_papers_and_inverse_to_batchgenerators() -> None:
    """A resize by 1.2 makes objects larger, which is a sampling grid scaled by 1 / 1.2."""
    spatial = next(part for part in flattened(chain("weak", GEOMETRIES["3d"])) if isinstance(part, SpatialTransform))
    assert spatial.scaling == pytest.approx((1 / 1.2, 1 / 0.8))
    assert spatial.p_scaling == 0.5


def test_turns_by_90_degrees_need_room() -> None:
    wide = Geometry((8, 40, 20), (8, 44, 22), (-0.5, 0.5), (0, 1, 2), dummy_2d=True)
    turns = [
        next(part for part in flattened(chain("weak", geometry)) if isinstance(part, Rot90Transform))
        for geometry in (GEOMETRIES["dummy 2d"], wide)
    ]
    assert turns[0].num_rot_per_combination == (0, 1, 2, 3)
    assert turns[1].num_rot_per_combination == (0, 2)
    assert turns[0].allowed_axes == {1, 2}, "in the axial plane"


def test_noise_is_up_to_100_hu_in_units_of_the_plan() -> None:
    geometry = GEOMETRIES["3d"]
    for windows, strongest in (([WINDOW], 100 / 140), ([None], NOISE_WITHOUT_UNIT), ([None, WINDOW], 100 / 140)):
        parts = [part for each in strong_transforms(geometry, [1], windows) for part in flattened(each)]
        noise = next(part for part in parts if isinstance(part, GaussianNoiseTransform))
        assert noise.noise_variance == pytest.approx((0, strongest))
        block = next(part for part in parts if isinstance(part, OneOfTransform))
        assert {type(part) for part in block.list_of_transforms} == {GaussianNoiseTransform, GaussianBlurTransform}


def test_the_mask_of_the_normalisation_is_kept() -> None:
    geometry = GEOMETRIES["3d"]
    tail = nnUNetTrainer.get_validation_transforms(None)
    made = with_tail(strong_transforms(geometry, [1], [None]), tail, [True])
    given = sample(geometry)
    given["segmentation"][:] = -1
    seed_everything(1)
    assert not made(**given)["image"].any()


def test_without_timing_a_chain_depends_on_its_streams_alone() -> None:
    stock = nnUNetTrainer.get_training_transforms(np.array((16, 16, 16)), (-0.5, 0.5), None, (0, 1, 2), False)
    for made in (stock, chain("strong", GEOMETRIES["3d"])):
        blurs = [part for part in flattened(made) if isinstance(part, GaussianBlurTransform)]
        assert [blur.benchmark for blur in blurs] == [True]
        without_timing(PerCaseTransforms({"pseudo": made}, {}))
        assert [blur.benchmark for blur in blurs] == [False]


def test_chains_can_be_sent_to_spawned_workers() -> None:
    made = chain("strong", GEOMETRIES["3d"])
    without_timing(made)
    copied = pickle.loads(pickle.dumps(made))
    results = []
    for each in (made, copied):
        seed_everything(5)
        results.append(each(**sample(GEOMETRIES["3d"]))["image"])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_modality_chain_gives_patches_and_targets_of_the_plan_and_most_in_another_contrast(name: str) -> None:
    geometry = GEOMETRIES[name]
    reference = landmarks(torch.rand(geometry.patch_size) + 40)[None]
    scales = [[1.0] * len(geometry.patch_size), [0.5] * len(geometry.patch_size)]
    made = with_tail(
        modality_transforms(geometry, [WINDOW], [reference]), nnUNetTrainer.get_validation_transforms(scales), None
    )
    kinds = next(part for part in flattened(made) if isinstance(part, OneOfTransform)).list_of_transforms
    assert [[type(part) for part in getattr(kind, "transforms", [kind])] for kind in kinds] == [
        [RandomConvolutionTransform, OwnScaleTransform],
        [InvertTissueTransform, OwnScaleTransform],
        [HistogramMatchTransform],
    ]
    matched = 0
    for seed in range(24):
        seed_everything(seed)
        done = made(**sample(geometry))
        assert done["image"].shape == (1, *geometry.patch_size) and torch.isfinite(done["image"]).all()
        target, half = done["segmentation"]
        assert target.shape == (1, *geometry.patch_size) and set(target.unique().tolist()) <= {0, 1, 2, 3}
        assert half.shape == (1, *(edge // 2 for edge in geometry.patch_size))
        matched += bool(done["image"].median() > 20)
    assert 1 <= matched <= 13, "a quarter is matched to the reference, whose values are about 40"


def test_without_references_no_histogram_is_matched() -> None:
    made = flattened(with_tail(modality_transforms(GEOMETRIES["3d"], [None]), RandomConvolutionTransform(), None))
    assert not any(isinstance(part, HistogramMatchTransform) for part in made)
    assert any(isinstance(part, BiasFieldTransform) for part in made)
    assert region_of("modality", GEOMETRIES["3d"]) == GEOMETRIES["3d"].initial_patch_size
