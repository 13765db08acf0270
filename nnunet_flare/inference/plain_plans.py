"""The part of a model's plans that prediction needs, under stock nnU-Net's names but without nnU-Net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.export import check_resampling
from nnunet_flare.inference.label_resampling import labels_are_ours
from nnunet_flare.inference.normalisation import BY_NAME, intensities_read
from nnunet_flare.inference.opened import OfDocuments
from nnunet_flare.inference.preprocessing import STOCK_PREPROCESSOR
from nnunet_flare.inference.resampling import is_ours

RESAMPLING = tuple(f"resampling_fn_{stage}{end}" for stage in ("data", "probabilities") for end in ("", "_kwargs"))

OF_PLANS = (
    "plans_name",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
)
"""What is kept of plans, besides intensities and one configuration."""

OF_CONFIGURATION = (
    "spacing",
    "patch_size",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    *RESAMPLING,
)
"""What is kept of a configuration."""

OF_SECOND_STAGE = ("previous_stage", "resampling_fn_seg", "resampling_fn_seg_kwargs")
"""What is kept besides of the second stage of a cascade."""

SHAPE: dict[str, Any] = {
    "plans_name": str,
    "image_reader_writer": str,
    "transpose_forward": [int],
    "transpose_backward": [int],
    "foreground_intensity_properties_per_channel": {str: {str: float}},
    "configurations": {
        str: {
            "spacing": [float],
            "patch_size": [int],
            "preprocessor_name": str,
            "normalization_schemes": [str],
            "use_mask_for_norm": [bool],
            **{name: dict if name.endswith("_kwargs") else str for name in RESAMPLING},
            "previous_stage?": str,
            "resampling_fn_seg?": str,
            "resampling_fn_seg_kwargs?": dict,
        }
    },
}
"""What plans of an exported model look like (see :mod:`nnunet_flare.shapes`)."""


class PlainPlans:
    """Plans as a document."""

    def __init__(self, plans: dict[str, Any]) -> None:
        self.plans = plans
        self.transpose_forward: list[int] = plans["transpose_forward"]
        self.transpose_backward: list[int] = plans["transpose_backward"]
        self.foreground_intensity_properties_per_channel = plans["foreground_intensity_properties_per_channel"]


class PlainConfiguration:
    """One configuration of plans as a document."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration
        self.spacing: list[float] = configuration["spacing"]
        self.patch_size: list[int] = configuration["patch_size"]
        self.preprocessor_name: str = configuration["preprocessor_name"]
        self.normalization_schemes: list[str] = configuration["normalization_schemes"]
        self.use_mask_for_norm: list[bool] = configuration["use_mask_for_norm"]
        self.previous_stage_name: str | None = configuration.get("previous_stage")


@dataclass(frozen=True, eq=False)
class PlainModel(OfDocuments):
    """What a model without nnU-Net knows of itself, see :class:`nnunet_flare.inference.opened.Opened`."""

    plans_manager: PlainPlans
    configuration_manager: PlainConfiguration
    dataset_json: dict[str, Any]
    mirroring_axes: tuple[int, ...] | None


def check_plain(plans: dict[str, Any], configuration: Any, where: str) -> None:
    """Refuse plans that ask for what only nnU-Net or another package can do.

    Args:
        plans: the document.
        configuration: stock nnU-Net's manager of one configuration, or a :class:`PlainConfiguration`.
        where: the model, for the message.

    Raises:
        InputError: naming what it is.
    """
    needs = []
    if configuration.preprocessor_name != STOCK_PREPROCESSOR:
        needs.append(f"the preprocessor {configuration.preprocessor_name}")
    needs += [f"the normalisation {name}" for name in configuration.normalization_schemes if name not in BY_NAME]
    if not is_ours(configuration.configuration):
        needs.append(f"the resampling {configuration.configuration['resampling_fn_data']} of images")
    if configuration.previous_stage_name is not None and not labels_are_ours(configuration.configuration):
        needs.append(f"the resampling {configuration.configuration['resampling_fn_seg']} of label maps")
    if plans.get("label_manager", "LabelManager") != "LabelManager":
        needs.append(f"the label manager {plans['label_manager']}")
    if needs:
        raise InputError(
            f"{where}: needs {', '.join(dict.fromkeys(needs))}, which an exported model cannot have; predict from the "
            "trained model's own folder"
        )
    check_resampling(configuration)


def plain_plans(plans_manager: Any, configuration: dict[str, Any], name: str) -> dict[str, Any]:
    """The document that :class:`PlainPlans` reads, of stock nnU-Net's manager and one of its configurations."""
    kept = {key: plans_manager.plans[key] for key in OF_PLANS}
    kept["foreground_intensity_properties_per_channel"] = intensities_read(
        configuration["normalization_schemes"],
        plans_manager.foreground_intensity_properties_per_channel,  # has another name in older plans
    )
    keys = OF_CONFIGURATION + (OF_SECOND_STAGE if configuration.get("previous_stage") else ())
    settings = {key: configuration[key] for key in keys}
    settings["use_mask_for_norm"] = [bool(masked) for masked in settings["use_mask_for_norm"]]  # may be null
    return {**kept, "configurations": {name: settings}}
