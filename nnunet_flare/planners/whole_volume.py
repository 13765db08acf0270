"""The planners of the whole-volume systems: coarse and fine networks of one fixed input size.

Both plans have two configurations: ``3d_fullres`` is Fosun Aitrox's (S1), ``3d_sztu`` is SZTU's (S4). The coarse model
is trained on whole scans, the fine one on a data set of crops around the organs (the papers add 20 to 40 mm);
``flare-predict --roi COARSE`` puts them together. Stock ``nnUNetv2_predict`` opens the coarse model on scans and the
fine one on the crops that ``flare-predict --save_roi`` writes.

The networks are the nearest that stock nnU-Net's library has: residual encoder and decoder of the papers' widths and
depths, with softmax and deep supervision instead of 13 sigmoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_flare.planners.flare import EVERY_STAGE, nnUNetPlannerFlare

FOSUN, SZTU = "3d_fullres", "3d_sztu"

STAGES = 5
"""Four downsamplings (both papers)."""

BATCH_SIZE = 1
"""Per GPU (S1)."""


class nnUNetPlannerFlareCoarse(nnUNetPlannerFlare, ResEncUNetPlanner):
    """Coarse: whole scans, background removed, at 160 x 160 x 160; S1 with 16 to 256 features, S4 with 8 to 128."""

    spacing_mm = None
    network = ResidualEncoderUNet
    encoder_convs = (2,) * EVERY_STAGE
    decoder_convs = (2,) * EVERY_STAGE
    plans_name = "nnUNetPlansFlareCoarse"
    preprocessor: ClassVar[str] = "FlareWholeVolumePreprocessor"
    size: ClassVar[dict[str, tuple[int, int, int]]] = {FOSUN: (160, 160, 160), SZTU: (160, 160, 160)}
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
        super().__init__(
            dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, overwrite_target_spacing, True
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
        """Writes the plans with the two systems' configurations alone."""
        planned = plans["configurations"][FOSUN]
        extent_mm = np.asarray(planned["spacing"]) * np.asarray(planned["median_image_size_in_voxels"])
        plans["configurations"] = {name: self._fixed(planned, name, extent_mm) for name in self.size}
        super().save_plans(plans)

    def _fixed(self, planned: dict[str, Any], name: str, extent_mm: np.ndarray) -> dict[str, Any]:
        """A configuration of fixed size; its spacing is what the median scan has on that grid, for the record."""
        size = [int(edge) for edge in self.size[name]]
        channels = len(planned["normalization_schemes"])
        changed = {
            **planned,
            "data_identifier": self.generate_data_identifier(name),
            "batch_size": BATCH_SIZE,
            "patch_size": size,
            "median_image_size_in_voxels": [float(edge) for edge in size],
            "spacing": (extent_mm / size).tolist(),
            "normalization_schemes": [self.normalisation[name]] * channels,
            "use_mask_for_norm": [False] * channels,
            "batch_dice": False,
        }
        for kind in ("data", "seg", "probabilities"):
            changed[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
            changed[f"resampling_fn_{kind}_kwargs"] = {
                "is_seg": kind == "seg",
                "order": 1,
                "order_z": 0,
                "force_separate_z": False,
            }
        features = [self.first_features[name] * 2**stage for stage in range(STAGES)]
        changed["architecture"] = {
            **planned["architecture"],
            "arch_kwargs": {
                **planned["architecture"]["arch_kwargs"],
                "n_stages": STAGES,
                "features_per_stage": features,
                "kernel_sizes": [[3, 3, 3]] * STAGES,
                "strides": [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1),
                "n_blocks_per_stage": list(self.encoder_convs[:STAGES]),
                "n_conv_per_stage_decoder": list(self.decoder_convs[: STAGES - 1]),
            },
        }
        return changed


class nnUNetPlannerFlareFine(nnUNetPlannerFlareCoarse):
    """Fine: crops around the organs, at 160 x 192 x 192 (S1) or 192 x 192 x 192 (S4), 16 to 256 features.

    The data set holds the crops; its images are resized as they are.
    """

    plans_name = "nnUNetPlansFlareFine"
    preprocessor = "FlareFixedSizePreprocessor"
    size = {FOSUN: (160, 192, 192), SZTU: (192, 192, 192)}
    first_features = {FOSUN: 16, SZTU: 16}
