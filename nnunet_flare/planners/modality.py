"""Plans for scans of several modalities: labelled CTs, and MR or PET scans that a model shall learn too.

A network is trained on arrays of all of them, so one normalisation must serve them all and say itself what a scan is:
CT numbers are treated as nnU-Net treats them, any other scan by its own percentiles, mean and deviation
(:func:`nnunet_flare.inference.normalisation.of_any_modality`).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization

from nnunet_flare.inference.normalisation import ANY_MODALITY, of_any_modality
from nnunet_flare.planners.flare import nnUNetPlannerFlare


class FlareModalityNormalization(ImageNormalization):
    """Each scan as its modality is normalised, told by its values; in the plans of the planner below."""

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true: ClassVar[bool] = False

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Of an image of any shape; ``seg`` is not looked at."""
        normalised = of_any_modality(image.astype(np.float32), None, self.intensityproperties)
        return normalised.astype(self.target_dtype, copy=False)


class nnUNetPlannerFlareModality(nnUNetPlannerFlare):
    """Radboud's plan (S5), for scans of any modality beside the CTs of the dataset."""

    plans_name = "nnUNetPlansFlareModality"

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """Stock's, with ours for every channel of CT."""
        schemes, masked = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        is_ct = [scheme == "CTNormalization" for scheme in schemes]
        return (
            [ANY_MODALITY if ct else scheme for scheme, ct in zip(schemes, is_ct, strict=True)],
            [masks and not ct for masks, ct in zip(masked, is_ct, strict=True)],
        )
