"""The network that one of our planners will plan, before a dataset was looked at.

The papers' planners fix spacing, patch and widths, so that only the cap of the patch at the median image is open; on
FLARE's scans it is inactive. It is good for estimates and for nothing else: a run trains what ``plans.json`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from nnunet_flare.planners.flare import BATCH_SIZE, nnUNetPlannerFlare
from nnunet_flare.planners.layers import STOCK_LAYERS
from nnunet_flare.planners.topology import override_configuration, topology
from nnunet_flare.planners.whole_volume import BATCH_SIZE as BATCH_OF_WHOLE_VOLUMES
from nnunet_flare.planners.whole_volume import STAGES, nnUNetPlannerFlareCoarse

UNKNOWN_SPACING_MM = (1.0, 1.0, 1.0)
"""Where a planner takes the data's own spacing."""


def expected_configuration(planner: type, name: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """``batch_size``, ``patch_size``, ``spacing`` and ``architecture`` of a configuration that is not planned yet.

    Args:
        planner: a planner's class.
        name: of the configuration, ``3d_fullres`` or ``3d_sztu``.
        changes: keyword arguments of :func:`override_configuration`, and ``spacing_mm``.

    Returns:
        None where only the data decide: stock's planners, and configurations that this planner does not plan.
    """
    if not issubclass(planner, nnUNetPlannerFlare):
        return None
    if issubclass(planner, nnUNetPlannerFlareCoarse):
        return _whole_volume(planner, name, changes)
    if name != "3d_fullres":
        return None
    return override_configuration(_windows(planner, changes.get("patch_size")), **changes)


def stock_configuration(patch_size: tuple[int, int, int], batch_size: int = 2) -> dict[str, Any]:
    """Stock nnU-Net's plain 3-D U-Net of 32 to 320 features for isotropic voxels."""
    planned = _windows(nnUNetPlannerFlare, patch_size, UNKNOWN_SPACING_MM)
    return {**planned, "batch_size": batch_size}


def _windows(
    planner: type[nnUNetPlannerFlare], patch: Any = None, spacing_mm: tuple[float, float, float] | None = None
) -> dict[str, Any]:
    spacing = spacing_mm or planner.spacing_mm or UNKNOWN_SPACING_MM
    found = topology(spacing, patch or planner.patch_size, max_stages=planner.max_stages)
    stages = found.stages
    is_residual = issubclass(planner.network, ResidualEncoderUNet)
    arch = {
        "n_stages": stages,
        "features_per_stage": [min(planner.max_features, planner.base_features * 2**i) for i in range(stages)],
        "kernel_sizes": [list(kernel) for kernel in found.kernel_sizes],
        "strides": [list(stride) for stride in found.strides],
        "n_blocks_per_stage" if is_residual else "n_conv_per_stage": list(planner.encoder_convs[:stages]),
        "n_conv_per_stage_decoder": list(planner.decoder_convs[: stages - 1]),
        **STOCK_LAYERS,
    }
    return {
        "batch_size": BATCH_SIZE,
        "patch_size": list(found.patch_size),
        "spacing": list(spacing),
        "median_image_size_in_voxels": list(found.patch_size),
        "architecture": {
            "network_class_name": f"{planner.network.__module__}.{planner.network.__name__}",
            "arch_kwargs": arch,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _whole_volume(
    planner: type[nnUNetPlannerFlareCoarse], name: str, changes: Mapping[str, Any]
) -> dict[str, Any] | None:
    if name not in planner.size:
        return None
    network = planner.networks[name]
    features = [planner.first_features[name] * 2**stage for stage in range(STAGES)]
    planned = {
        "batch_size": BATCH_OF_WHOLE_VOLUMES[name],
        "patch_size": list(planner.size[name]),
        "spacing": list(UNKNOWN_SPACING_MM),
        "median_image_size_in_voxels": list(planner.size[name]),
        "architecture": {**network, "arch_kwargs": {**network["arch_kwargs"], "features_per_stage": features}},
    }
    return override_configuration(planned, **changes)
