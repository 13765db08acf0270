"""The planners ``nnUNetPlannerFlare…``: the papers' spacings, patches and networks as plans of stock nnU-Net.

Each writes its own plans and keeps them free of this package: stock's preprocessor, resampling and networks, so that a
model opens where only nnU-Net is installed. The paper's patch is capped at the median image as stock does, rounded up
to what the strides divide; on FLARE data the cap is inactive. There is no ``3d_lowres``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_flare.cases import FILE_NAME, find_table
from nnunet_flare.errors import InputError
from nnunet_flare.files import replacing
from nnunet_flare.planners.topology import STOCK_MAX_FEATURES, STOCK_MAX_FEATURES_2D, override_configuration

BATCH_SIZE = 2
LOWRES_SHARE = 0.25
"""Stock plans a low resolution, and turns batch Dice on, where the patch is a smaller share of the median image."""
EVERY_STAGE = 16
"""More stages than any patch has: stock slices these tuples."""


class nnUNetPlannerFlare(ExperimentPlanner):
    """Radboud's plan (S5): 4 x 1.2 x 1.2 mm, patch 40 x 224 x 192, stock's plain U-Net of 32 to 320 features.

    Axis order of spacing and patch: z, y, x as the reader gives them (largest spacing first after the transposition).
    Pictures (one plane each) keep their own spacing: readers put a plane 999 times its pixels from the next.
    """

    spacing_mm: ClassVar[tuple[float, float, float] | None] = (4.0, 1.2, 1.2)
    patch_size: ClassVar[tuple[int, int, int]] = (40, 224, 192)
    max_stages: ClassVar[int] = EVERY_STAGE
    base_features: ClassVar[int] = 32
    max_features: ClassVar[int] = STOCK_MAX_FEATURES
    network: ClassVar[type] = PlainConvUNet
    encoder_convs: ClassVar[tuple[int, ...]] = (2,) * EVERY_STAGE
    decoder_convs: ClassVar[tuple[int, ...]] = (2,) * EVERY_STAGE
    plans_name: ClassVar[str] = "nnUNetPlansFlare"

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            self.plans_name if plans_name is None else plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.is_flat = bool(np.median([shape[0] for shape in self.dataset_fingerprint["shapes_after_crop"]]) == 1)
        if overwrite_target_spacing is None and self.spacing_mm is not None and not self.is_flat:
            self.overwrite_target_spacing = list(self.spacing_mm)
        self.UNet_class = self.network
        self.UNet_base_num_features = self.base_features
        self.UNet_max_features_3d = self.max_features
        is_capped_as_stock = self.max_features >= STOCK_MAX_FEATURES
        self.UNet_max_features_2d = STOCK_MAX_FEATURES_2D if is_capped_as_stock else self.max_features
        self.UNet_blocks_per_stage_encoder = self.encoder_convs
        self.UNet_blocks_per_stage_decoder = self.decoder_convs
        self.lowres_creation_threshold = 0.0

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Always our own data folder; stock's residual planner would preprocess into ``nnUNetPlans``'s."""
        return f"{self.plans_identifier}_{configuration_name}"

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: tuple[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: tuple[str, ...],
    ) -> float:
        """Voxels of all feature maps, as stock's, whose own function fails where ``nnUNet_n_proc_DA`` is 0."""
        with torch.device("meta"):  # the estimate needs shapes only, no weights
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return float(network.compute_conv_feature_map_size(patch_size))

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray,
        median_shape: np.ndarray,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """Stock's plan with the paper's patch, stages and batch; a 2-D configuration stays stock's."""
        plan: dict[str, Any] = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        if len(spacing) == 2:
            return plan
        capped = [max(1, min(edge, int(median))) for edge, median in zip(self.patch_size, median_shape, strict=True)]
        return override_configuration(
            plan,
            patch_size=capped,
            max_stages=self.max_stages,
            max_features=self.max_features,
            batch_size=BATCH_SIZE,
        )

    def plan_experiment(self) -> dict:
        """Plans the dataset, and carries ``flare_cases.json`` from the raw to the preprocessed folder.

        Raises:
            InputError: where that table is invalid or differs from the one already in the preprocessed folder.
        """
        raw, preprocessed = Path(self.raw_dataset_folder), Path(join(nnUNet_preprocessed, self.dataset_name))
        find_table(preprocessed, raw, "3d_fullres", is_round=False, labels=self.dataset_json["labels"])
        if (raw / FILE_NAME).is_file() and not (preprocessed / FILE_NAME).is_file():
            with replacing(preprocessed / FILE_NAME) as temporary:
                shutil.copyfile(raw / FILE_NAME, temporary)
        plans: dict[str, Any] = super().plan_experiment()
        return plans

    def save_plans(self, plans: dict) -> None:
        """Writes the plans, with batch Dice where stock would have planned a low resolution beside the full one."""
        fullres = plans["configurations"].get("3d_fullres")
        if fullres is not None:
            covered = np.prod(fullres["patch_size"]) / np.prod(fullres["median_image_size_in_voxels"])
            fullres["batch_dice"] = bool(covered < LOWRES_SHARE)
        super().save_plans(plans)


class nnUNetPlannerFlareBig(nnUNetPlannerFlare):
    """The FLARE22 winner's teacher (S6): 2.5 x 0.8 x 0.8 mm, patch 48 x 224 x 224, 3 convolutions, 32 to 512 wide."""

    spacing_mm = (2.5, 0.8, 0.8)
    patch_size = (48, 224, 224)
    max_stages = 6
    max_features = 512
    encoder_convs = (3,) * EVERY_STAGE
    decoder_convs = (3,) * EVERY_STAGE
    plans_name = "nnUNetPlansFlareBig"


class nnUNetPlannerFlareSmall(nnUNetPlannerFlare):
    """The FLARE22 winner's student (S6): 4 x 1.2 x 1.2 mm, patch 32 x 128 x 192, 5 stages of 16 to 256 features."""

    patch_size = (32, 128, 192)
    max_stages = 5
    base_features = 16
    plans_name = "nnUNetPlansFlareSmall"


class nnUNetPlannerFlareNoisyStudent(nnUNetPlannerFlare, ResEncUNetPlanner):
    """Xidian's noisy student (S3): 3 x 1 x 1 mm, patch 32 x 224 x 224, nnU-Net v1's residual encoder.

    The paper gives 63.1 million parameters but no widths; stock's 32 to 320 features give 71.6 million.
    """

    spacing_mm = (3.0, 1.0, 1.0)
    patch_size = (32, 224, 224)
    network = ResidualEncoderUNet
    # nnU-Net v1's ResencUNet, the paper's "FabiansUNet"; v2's own residual planner has (1, 3, 4, 6, ...) blocks.
    encoder_convs = (1, 2, 3) + (4,) * EVERY_STAGE
    decoder_convs = (1,) * EVERY_STAGE
    plans_name = "nnUNetPlansFlareNoisyStudent"


class nnUNetPlannerFlareTiny(nnUNetPlannerFlare):
    """For the demo and for tests: the data's median spacing, patch of at most 32 x 64 x 64, 4 to 16 features."""

    spacing_mm = None
    patch_size = (32, 64, 64)
    base_features = 4
    max_features = 16
    plans_name = "nnUNetPlansFlareTiny"


def plan_dataset(
    dataset_id: int,
    planner_class: type[ExperimentPlanner],
    *,
    configuration: str = "3d_fullres",
    plans_name: str | None = None,
    spacing_mm: Sequence[float] | None = None,
    **overrides: Any,
) -> tuple[dict[str, Any], str]:
    """Plan a dataset (its fingerprint must exist) with some of the plan set by hand, before preprocessing.

    Args:
        dataset_id: as in ``DatasetXXX_Name``.
        planner_class: any planner of stock nnU-Net or ours.
        configuration: the configuration that ``overrides`` change.
        plans_name: other than the planner's own; the data folder of ``configuration`` is then named by it.
        spacing_mm: target spacing in the reader's axis order (z, y, x), or of a 2-D configuration (y, x).
        overrides: keyword arguments of :func:`override_configuration`.

    Returns:
        The plans as written, and their name.

    Raises:
        InputError: for an override out of range, or a configuration that this planner does not plan.
    """
    keywords: dict[str, Any] = {} if plans_name is None else {"plans_name": plans_name}
    if spacing_mm is not None and len(spacing_mm) == 2:  # of slices: planners take the spacing of volumes alone
        overrides["spacing_mm"] = spacing_mm
    elif spacing_mm is not None:
        keywords["overwrite_target_spacing"] = [float(edge) for edge in spacing_mm]
    planner = planner_class(dataset_id, **keywords)
    plans = planner.plan_experiment()
    configurations = plans["configurations"]
    if configuration not in configurations:
        raise InputError(
            f"{planner_class.__name__} plans no configuration '{configuration}' for {planner.dataset_name}; "
            f"it plans {', '.join(configurations)}"
        )
    identifier = f"{planner.plans_identifier}_{configuration}"
    is_renamed = plans_name is not None and configurations[configuration].get("data_identifier") != identifier
    if overrides:
        configurations[configuration] = override_configuration(configurations[configuration], **overrides)
    if is_renamed:  # stock's ResEnc planners call their data as the plain planner does, whatever the spacing
        configurations[configuration]["data_identifier"] = identifier
    if overrides or is_renamed:
        planner.save_plans(plans)
    return plans, planner.plans_identifier
