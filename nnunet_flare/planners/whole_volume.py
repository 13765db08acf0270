"""The planners of the whole-volume systems: coarse and fine networks of one fixed input size.

Both plans have two configurations: ``3d_fullres`` is Fosun Aitrox's (S1), ``3d_sztu`` is SZTU's (S4). The coarse model
is trained on whole scans, the fine one on their crops around the labels, which preprocessing makes;
``flare-predict --roi COARSE`` puts them together. Stock ``nnUNetv2_predict`` opens the coarse model on scans and the
fine one on the crops that ``flare-predict --save_roi`` writes.

Networks are the papers', with softmax over the organs and background instead of 13 sigmoids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_flare.errors import InputError
from nnunet_flare.planners.fixed_size import MARGIN_KEY
from nnunet_flare.planners.flare import EVERY_STAGE, nnUNetPlannerFlare

FOSUN, SZTU = "3d_fullres", "3d_sztu"

STAGES = 5
"""Four downsamplings (both papers)."""

BATCH_SIZE = {FOSUN: 1, SZTU: 2}
"""Per GPU; S4 has one unlabelled scan beside two labelled ones."""

NEGATIVE_SLOPE = 0.01
"""Of S4's activation."""

DROPOUT = 0.2
"""After the first convolution of every residual unit (both papers)."""

Size = tuple[int, int, int]


def residual_unet(*, negative_slope: float | None = None) -> dict[str, Any]:
    """The ``architecture`` of Fosun's residual U-Net, without its widths; with a slope the leaky activation of S4."""
    return _architecture("residual_unet.ResidualUNet", negative_slope)


def efficient_segnet() -> dict[str, Any]:
    """The ``architecture`` of SZTU's fine generator, without its widths."""
    return _architecture("efficient_segnet.EfficientSegNet", NEGATIVE_SLOPE)


def _architecture(network: str, negative_slope: float | None) -> dict[str, Any]:
    activation: dict[str, Any] = {"nonlin": "torch.nn.modules.activation.ReLU", "nonlin_kwargs": {"inplace": True}}
    if negative_slope is not None:
        activation["nonlin"] = "torch.nn.modules.activation.LeakyReLU"
        activation["nonlin_kwargs"] = {"negative_slope": negative_slope, "inplace": True}
    return {
        "network_class_name": f"nnunet_flare.networks.{network}",
        "arch_kwargs": {
            "n_stages": STAGES,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
            "kernel_sizes": [[3, 3, 3]] * STAGES,
            "n_blocks_per_stage": [2] * STAGES,
            "n_conv_per_stage_decoder": [2] * (STAGES - 1),
            "dropout_op": "torch.nn.modules.dropout.Dropout3d",
            "dropout_op_kwargs": {"p": DROPOUT, "inplace": True},
            **activation,
        },
        "_kw_requires_import": ["dropout_op", "nonlin"],
    }


class nnUNetPlannerFlareCoarse(nnUNetPlannerFlare, ResEncUNetPlanner):
    """Coarse: whole scans, background removed, at 160 x 160 x 160; S1 with 16 to 256 features, S4 with 8 to 128.

    S1's training cases are a tenth larger than the patch (176 voxels for 160), S4's are not.

    Raises:
        InputError: for a target spacing, or for pictures of one plane.
    """

    spacing_mm = None
    network = ResidualEncoderUNet  # stock's search plans for it; :meth:`save_plans` puts the papers' in its place
    encoder_convs = (2,) * EVERY_STAGE
    decoder_convs = (2,) * EVERY_STAGE
    plans_name = "nnUNetPlansFlareCoarse"
    preprocessor: ClassVar[str] = "FlareWholeVolumePreprocessor"
    size: ClassVar[dict[str, Size]] = {FOSUN: (160, 160, 160), SZTU: (160, 160, 160)}
    training_share: ClassVar[dict[str, float]] = {FOSUN: 1.1, SZTU: 1.0}
    margin_mm: ClassVar[dict[str, float]] = {}
    networks: ClassVar[dict[str, dict[str, Any]]] = {
        FOSUN: residual_unet(),
        SZTU: residual_unet(negative_slope=NEGATIVE_SLOPE),
    }
    first_features: ClassVar[dict[str, int]] = {FOSUN: 16, SZTU: 8}
    normalisation: ClassVar[dict[str, str]] = {FOSUN: "FlareClip500Normalization", SZTU: "FlareClip325Normalization"}

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = True,
    ) -> None:
        if overwrite_target_spacing is not None:
            raise InputError(
                f"{type(self).__name__}: found a target spacing ({list(overwrite_target_spacing)}), but its networks "
                "see every scan at the same size; leave out the spacing, or change plan.patch_size"
            )
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, None, suppress_transpose=True
        )
        if self.is_flat:
            raise InputError(
                f"{type(self).__name__}: {self.dataset_name} has pictures of one plane, but its networks are 3-D; use "
                "another planner"
            )
        self.preprocessor_name = self.preprocessor  # nnUNetv2_plan_experiment names stock's explicitly

    def determine_reader_writer(self) -> type[BaseReaderWriter]:
        """The reader that brings scans to one orientation by exact flips, and label maps back."""
        return SimpleITKIOWithReorient

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray,
        median_shape: np.ndarray,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """Stock's residual plan, which :meth:`save_plans` brings to the fixed size."""
        plan: dict[str, Any] = ResEncUNetPlanner.get_plans_for_configuration(
            self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        return plan

    def save_plans(self, plans: dict) -> None:
        """Writes the plans with the two systems' configurations alone, their training cases sized by the patch."""
        if set(plans["configurations"]) != set(self.size):  # stock's; changed by hand they come here a second time
            planned = plans["configurations"][FOSUN]
            plans["configurations"] = {name: self._fixed(planned, name) for name in self.size}
        for name, configuration in plans["configurations"].items():
            self._set_training_size(configuration, self.training_share[name])
        super().save_plans(plans)

    @staticmethod
    def _set_training_size(configuration: dict[str, Any], share: float) -> None:
        """Sets the size of training cases; the spacing is what the median scan has on that grid, for the record."""
        extent_mm = np.asarray(configuration["spacing"]) * configuration["median_image_size_in_voxels"]
        # Rounded first: 1.1 * 160 is 176.00000000000003 in floating point.
        size = [math.ceil(round(share * edge, 6)) for edge in configuration["patch_size"]]
        configuration["median_image_size_in_voxels"] = [float(edge) for edge in size]
        configuration["spacing"] = (extent_mm / size).tolist()

    def _fixed(self, planned: dict[str, Any], name: str) -> dict[str, Any]:
        """A configuration of fixed size."""
        size = [int(edge) for edge in self.size[name]]
        channels = len(planned["normalization_schemes"])
        changed = {
            **planned,
            "data_identifier": self.generate_data_identifier(name),
            "batch_size": BATCH_SIZE[name],
            "patch_size": size,
            "normalization_schemes": [self.normalisation[name]] * channels,
            "use_mask_for_norm": [False] * channels,
            "batch_dice": False,
        }
        if name in self.margin_mm:
            changed[MARGIN_KEY] = self.margin_mm[name]
        for kind in ("data", "seg", "probabilities"):
            changed[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            changed[f"resampling_fn_{kind}_kwargs"] = {
                "is_seg": kind == "seg",
                "order": 1,
                "order_z": 0,
                "force_separate_z": False,
            }
        features = [self.first_features[name] * 2**stage for stage in range(STAGES)]
        network = self.networks[name]
        changed["architecture"] = {**network, "arch_kwargs": {**network["arch_kwargs"], "features_per_stage": features}}
        return changed


class nnUNetPlannerFlareFine(nnUNetPlannerFlareCoarse):
    """Fine: the organs' box, at 160 x 192 x 192 (S1) or 192 x 192 x 192 (S4), 16 to 256 features.

    Training cases are cropped to their labels with 40 mm (S1) or 20 mm (S4) around them, and S1's resized to
    176 x 212 x 212.
    """

    plans_name = "nnUNetPlansFlareFine"
    preprocessor = "FlareFixedSizePreprocessor"
    size = {FOSUN: (160, 192, 192), SZTU: (192, 192, 192)}
    margin_mm = {FOSUN: 40.0, SZTU: 20.0}
    networks = {FOSUN: residual_unet(), SZTU: efficient_segnet()}
    first_features = {FOSUN: 16, SZTU: 16}
