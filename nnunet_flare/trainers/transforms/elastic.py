"""Elastic deformation as nnU-Net v1 had it, which the FLARE22 winner turned on (seed-systems 6.4).

Version 1 blurs uniform noise from -1 to 1 with a Gaussian of 9 to 13 voxels and multiplies it by 0 to 200. The
transform of batchgeneratorsv2 wants the width as a share of the patch, and the largest displacement in voxels; both are
derived here from version 1's two numbers.
"""

from __future__ import annotations

import math
from typing import Any

from batchgeneratorsv2.helpers.scalar_type import sample_scalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

PROBABILITY = 0.2
SIGMA_VOXELS = (9.0, 13.0)
ALPHA = (0.0, 200.0)
PEAK_IN_DEVIATIONS = {2: 2.8, 3: 3.0}
"""Largest value of blurred noise by dimensions, in standard deviations; measured in the winner's two patches."""


class SigmaShare:
    """Draws the width of the blur along one axis, as a share of the patch's edge."""

    def __call__(self, *, dim: int | None, patch_size: tuple[int, ...], **_: Any) -> float:
        return float(sample_scalar(SIGMA_VOXELS)) / patch_size[dim or 0]


class Magnitude:
    """Draws the largest displacement along one axis, in voxels."""

    def __call__(self, *, dim: int, patch_size: tuple[int, ...], deformation_scale: float, **_: Any) -> float:
        dimensions = len(patch_size)
        peak = PEAK_IN_DEVIATIONS[dimensions] * blurred_deviation(deformation_scale * patch_size[dim], dimensions)
        return float(sample_scalar(ALPHA)) * peak


def blurred_deviation(sigma_voxels: float, dimensions: int) -> float:
    """Standard deviation of uniform noise from -1 to 1 after a Gaussian blur: sqrt(1/3) (2 sigma sqrt(pi))^(-d/2)."""
    return math.sqrt(1 / 3) * (2 * sigma_voxels * math.sqrt(math.pi)) ** (-dimensions / 2)


def with_elastic(chain: BasicTransform) -> BasicTransform:
    """Stock's training chain with elastic deformation in its spatial transform.

    Raises:
        ValueError: when the chain has no spatial transform of its own, as a future nnU-Net might.
    """
    parts = chain.transforms if isinstance(chain, ComposeTransforms) else [chain]
    spatial = next((part for part in parts if isinstance(part, SpatialTransform)), None)
    if spatial is None:
        raise ValueError(f"no SpatialTransform among {[type(part).__name__ for part in parts]}")
    spatial.p_elastic_deform = PROBABILITY
    spatial.elastic_deform_scale = SigmaShare()
    spatial.elastic_deform_magnitude = Magnitude()
    return chain
