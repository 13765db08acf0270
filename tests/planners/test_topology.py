"""Overriding parts of a planned configuration keeps patch, strides, kernels, features and convolutions consistent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_flare.errors import InputError
from nnunet_flare.planners.layers import STOCK_LAYERS
from nnunet_flare.planners.topology import override_configuration, topology


def plain_configuration() -> dict[str, Any]:
    """A 3d_fullres of the tiny planner: six stages of at most 16 features at 4 x 1.2 x 1.2 mm."""
    found = topology((4.0, 1.2, 1.2), (40, 224, 192))
    return {
        "data_identifier": "nnUNetPlansFlareTiny_3d_fullres",
        "batch_size": 2,
        "patch_size": list(found.patch_size),
        "median_image_size_in_voxels": [100.0, 340.0, 340.0],
        "spacing": [4.0, 1.2, 1.2],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": found.stages,
                "features_per_stage": [4, 8, 16, 16, 16, 16],
                "kernel_sizes": [list(k) for k in found.kernel_sizes],
                "strides": [list(s) for s in found.strides],
                "n_conv_per_stage": [2] * 6,
                "n_conv_per_stage_decoder": [2] * 5,
                **STOCK_LAYERS,
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def residual_configuration() -> dict[str, Any]:
    configuration = plain_configuration()
    architecture = configuration["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    arch = architecture["arch_kwargs"]
    del arch["n_conv_per_stage"]
    arch["n_blocks_per_stage"] = [1, 2, 3, 4, 4, 4]
    arch["n_conv_per_stage_decoder"] = [1] * 5
    return configuration


def network_of(configuration: dict[str, Any], classes: int = 14) -> torch.nn.Module:
    architecture = configuration["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        classes,
        allow_init=True,
        deep_supervision=True,
    )


def test_topology_without_a_limit_is_stocks() -> None:
    for spacing, patch in (
        ((4.0, 1.2, 1.2), (40, 224, 192)),
        ((3.0, 1.0, 1.0), (32, 224, 224)),
        ((1, 1, 1), (37, 65, 9)),
    ):
        _, strides, kernels, stock_patch, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
        ours = topology(spacing, patch)
        assert (ours.strides, ours.kernel_sizes, ours.patch_size) == (strides, kernels, tuple(stock_patch))


def test_the_demos_budget_of_the_specification() -> None:
    """Base 8, 4 stages, 1 convolution a stage, the whole phantom as patch: about 0.17 million parameters."""
    before = plain_configuration()
    changed = override_configuration(
        before,
        spacing_mm=(8.5, 5.0, 5.2),
        patch_size=(32, 48, 64),
        base_features=8,
        stages=4,
        convs_per_stage=1,
        batch_size=1,
    )
    arch = changed["architecture"]["arch_kwargs"]
    assert changed["patch_size"] == [32, 48, 64]
    assert changed["batch_size"] == 1
    assert changed["spacing"] == [8.5, 5.0, 5.2]
    assert arch["features_per_stage"] == [8, 16, 32, 64]
    assert arch["n_conv_per_stage"] == [1, 1, 1, 1]
    assert arch["n_conv_per_stage_decoder"] == [1, 1, 1]
    parameters = sum(p.numel() for p in network_of(changed).parameters())
    assert 0.16e6 < parameters < 0.18e6
    assert before == plain_configuration(), "the given configuration must stay as it was"


def test_the_median_image_follows_a_new_spacing() -> None:
    changed = override_configuration(plain_configuration(), spacing_mm=(8.0, 2.4, 0.6))
    assert changed["median_image_size_in_voxels"] == pytest.approx([50.0, 170.0, 680.0])


def test_only_what_is_named_changes() -> None:
    before = plain_configuration()
    assert override_configuration(before) == before
    wider = override_configuration(before, batch_size=7)
    assert wider.pop("batch_size") == 7
    before.pop("batch_size")
    assert wider == before


def test_features_keep_their_cap_until_a_new_base_is_given() -> None:
    tiny = plain_configuration()
    assert override_configuration(tiny, stages=4)["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 16]
    new_base = override_configuration(tiny, base_features=32)["architecture"]["arch_kwargs"]["features_per_stage"]
    assert new_base == [32, 64, 128, 256, 320, 320]
    new_cap = override_configuration(tiny, max_features=12)["architecture"]["arch_kwargs"]["features_per_stage"]
    assert new_cap == [4, 8, 12, 12, 12, 12]


@pytest.mark.parametrize("features", [[32, 64, 128, 256, 512], [32, 48, 96, 96, 200]])
def test_another_batch_or_patch_leaves_the_features_that_are_planned(features: list[int]) -> None:
    """The big teacher on small scans, 2-D networks and given models are wider than stock's 320, or double nothing."""
    wide = override_configuration(plain_configuration(), stages=5)
    wide["architecture"]["arch_kwargs"]["features_per_stage"] = list(features)
    assert override_configuration(wide, batch_size=1)["architecture"] == wide["architecture"]
    for changes in ({"patch_size": (32, 128, 128)}, {"dropout": 0.1}, {"spacing_mm": (3, 1, 1)}):
        arch = override_configuration(wide, **changes)["architecture"]["arch_kwargs"]
        assert arch["features_per_stage"] == features


def test_a_further_stage_doubles_the_last_one_unless_that_is_capped() -> None:
    tiny = override_configuration(plain_configuration(), stages=5)
    for features, sixth in (([32, 64, 128, 256, 512], 512), ([8, 16, 32, 64, 128], 256), ([8, 16, 32, 64, 64], 64)):
        tiny["architecture"]["arch_kwargs"]["features_per_stage"] = features
        arch = override_configuration(tiny, patch_size=(40, 224, 192), stages=6)["architecture"]["arch_kwargs"]
        assert arch["features_per_stage"] == [*features, sixth]


def test_a_larger_patch_does_not_silently_add_stages() -> None:
    large = override_configuration(plain_configuration(), patch_size=(48, 512, 512))
    assert large["architecture"]["arch_kwargs"]["n_stages"] == 6
    asked = override_configuration(plain_configuration(), patch_size=(48, 512, 512), stages=8)
    assert asked["architecture"]["arch_kwargs"]["n_stages"] == 8
    room = override_configuration(plain_configuration(), patch_size=(48, 512, 512), max_stages=99)
    assert room["architecture"]["arch_kwargs"]["n_stages"] == 8


def test_a_residual_encoder_counts_blocks_and_keeps_its_decoder() -> None:
    fewer = override_configuration(residual_configuration(), patch_size=(32, 64, 64), stages=4)
    assert fewer["architecture"]["arch_kwargs"]["n_blocks_per_stage"] == [1, 2, 3, 4]
    assert fewer["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] == [1, 1, 1]
    light = override_configuration(residual_configuration(), stages=4, convs_per_stage=[1, 1, 2, 2])
    assert light["architecture"]["arch_kwargs"]["n_blocks_per_stage"] == [1, 1, 2, 2]
    network_of(light)


@pytest.mark.parametrize("made", [plain_configuration, residual_configuration])
def test_dropout_is_in_the_network_that_stock_builds_of_the_plan(made: Any) -> None:
    def probabilities(configuration: dict[str, Any]) -> set[float]:
        modules = network_of(configuration).modules()
        return {module.p for module in modules if isinstance(module, torch.nn.Dropout3d)}

    with_dropout = override_configuration(made(), stages=3, base_features=4, dropout=0.2)
    assert probabilities(with_dropout) == {0.2}
    assert probabilities(override_configuration(with_dropout)) == {0.2}, "what is not given stays"
    assert probabilities(override_configuration(with_dropout, dropout=0.0)) == set()


@pytest.mark.parametrize(
    ("overrides", "found", "expected"),
    [
        ({"stages": 5, "patch_size": (16, 16, 16)}, "found 5", "allows"),
        ({"stages": 2}, "plan.stages: found 2", "3 or more"),
        ({"patch_size": (10, 10, 10)}, "allows 2", "larger patch"),
        ({"patch_size": (32, 32)}, "plan.patch_size: found 2 numbers", "expected 3"),
        ({"patch_size": (32, 32.5, 32)}, "plan.patch_size", "whole numbers"),
        ({"spacing_mm": (4.0, 0.0, 1.2)}, "plan.spacing_mm", "above 0"),
        ({"base_features": 0}, "plan.base_features", "1 or more"),
        ({"batch_size": -2}, "plan.batch_size", "1 or more"),
        ({"dropout": 1.0}, "plan.dropout: found 1.0", "below 1"),
        ({"convs_per_stage": [1, 2]}, "plan.convs_per_stage: found 2 numbers", "expected 1 or 6"),
    ],
)
def test_impossible_overrides_are_refused(overrides: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        override_configuration(plain_configuration(), **overrides)
    assert found in str(error.value)
    assert expected in str(error.value)


@settings(max_examples=25, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(2.0, 4.0)] * 3),
    patch=st.tuples(*[st.integers(16, 48)] * 3),
    max_stages=st.integers(3, 7),
    convs=st.integers(1, 2),
)
def test_any_override_gives_a_network_that_runs_on_its_patch(
    spacing: tuple[float, ...], patch: tuple[int, ...], max_stages: int, convs: int
) -> None:
    configuration = copy.deepcopy(plain_configuration())
    changed = override_configuration(
        configuration,
        spacing_mm=spacing,
        patch_size=patch,
        max_stages=max_stages,
        convs_per_stage=convs,
        base_features=2,
        max_features=4,
    )
    arch = changed["architecture"]["arch_kwargs"]
    divisors = [math.prod(stride[axis] for stride in arch["strides"]) for axis in range(3)]
    for edge, asked, divisor in zip(changed["patch_size"], patch, divisors, strict=True):
        assert edge % divisor == 0
        assert asked <= edge < asked + divisor
    network = network_of(changed, classes=3).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, 1, *changed["patch_size"]))
    assert list(outputs[0].shape) == [1, 3, *changed["patch_size"]]
