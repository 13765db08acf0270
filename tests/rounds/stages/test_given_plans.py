"""Plans of a given model or of a data set, whichever nnU-Net made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.files import write_json
from nnunet_flare.networks.planned import planned_network
from nnunet_flare.planners.expected import expected_configuration
from nnunet_flare.planners.flare import nnUNetPlannerFlareSmall
from nnunet_flare.planners.topology import override_configuration
from nnunet_flare.rounds.stages.given_plans import model_plans


def older(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the first versions of nnU-Net 2 wrote it: numbers, and the name of the network."""
    rest = {key: value for key, value in configuration.items() if key != "architecture"}
    architecture = configuration["architecture"]
    arch = architecture["arch_kwargs"]
    return {
        **rest,
        "UNet_class_name": architecture["network_class_name"].rpartition(".")[2],
        "UNet_base_num_features": arch["features_per_stage"][0],
        "unet_max_num_features": max(arch["features_per_stage"]),
        "n_conv_per_stage_encoder": arch["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arch["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [3, 4, 4],
        "pool_op_kernel_sizes": arch["strides"],
        "conv_kernel_sizes": arch["kernel_sizes"],
    }


def write_model(folder: Path, configuration: dict[str, Any]) -> Path:
    model = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    model.mkdir()
    write_json(model / "plans.json", {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": configuration}})
    return model


def test_a_student_is_planned_from_a_model_that_an_older_nnunet_trained(tmp_path: Path) -> None:
    """As its soft teacher's, with fewer features: final.planner=given-model final.plan.base_features=8."""
    today = expected_configuration(nnUNetPlannerFlareSmall, "3d_fullres", {})
    assert today is not None
    _, found = model_plans(write_model(tmp_path, older(today)))
    assert found["architecture"] == today["architecture"]
    student = override_configuration(found, base_features=8)["architecture"]["arch_kwargs"]
    assert student["features_per_stage"][:3] == [8, 16, 32]


def test_the_network_of_older_plans_of_a_data_set_is_built_for_a_dry_run() -> None:
    today = expected_configuration(nnUNetPlannerFlareSmall, "3d_fullres", {"base_features": 2, "max_features": 4})
    assert today is not None
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}
    both = [planned_network(each, dataset, allow_init=False) for each in (today, older(today))]
    assert str(both[0]) == str(both[1])


def test_a_model_without_any_network_in_its_plans_is_refused(tmp_path: Path) -> None:
    today = expected_configuration(nnUNetPlannerFlareSmall, "3d_fullres", {})
    assert today is not None
    del today["architecture"]
    with pytest.raises(InputError, match=r"plans\.json: does not say which network it plans"):
        model_plans(write_model(tmp_path, today))
