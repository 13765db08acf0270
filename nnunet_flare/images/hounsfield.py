"""Whether the values of a scan can be Hounsfield units, judged by several signs.

Air is -1000 HU, fat about -100, soft tissue 0 to 200; only dense bone, metal and strong contrast lie above 700. A scan
that was stored without its rescale intercept (all values 1024 too high), normalised or scaled breaks that; a CT model
sees no organ in it and gives an empty map.

A scan cropped wholly inside the body has no air either and is fine. So *nothing like air* alone is no sign; it takes a
second one. The signs:

- a span of a few units, other than of air: z-scores, 0 to 1, -1 to 1, attenuation coefficients. Noise alone makes real
  CT numbers span more.
- nothing like air, and a tenth above 700 HU with less between 300 and 700: values that are shifted upwards. A crop of
  bone has more spongy bone (300 to 700) than dense bone.
- nothing like air, and many voxels at exactly the lowest value: values that were cut off or scaled (a window).
- nothing like air, and a middle value that is neither fat nor soft tissue.

What scanners put outside their field of view (-2000, -3024) counts neither as air nor as anything else.
"""

from __future__ import annotations

import numpy as np

SMALLEST_SPAN = 50.0
"""Real CT numbers span at least this much; z-scores of a CT stay below 30."""

AIR_HU = (-1200.0, -200.0)
"""Air and lung, and what is between them and fat. Below is what lies outside a scanner's field of view."""

AIR_SHARE = 1e-3
"""Fewer voxels of air than this are noise, or a bubble of gas."""

FAT_HU = -50.0
"""Fat lies below; every CT of a body has some."""

DENSE_HU, SPONGY_HU = 700.0, 300.0

DENSE_SHARE = 0.1
"""No larger crop inside a body has so much above ``DENSE_HU``."""

LOWEST_SHARE = 0.05
"""A share of voxels at exactly the lowest value that noise does not leave."""

TISSUE_HU = (-160.0, 300.0)
"""Where the middle value of a crop inside a body lies: between fat and vessels full of contrast."""

SAMPLE_VOXELS = 1_000_000

EXPECTED = "expected CT numbers, with air at -1000"


def not_hounsfield(array: np.ndarray) -> str | None:
    """Why the values of a scan cannot be Hounsfield units, in words, or None where they can be.

    Args:
        array: finite real numbers of any shape; shares are those of about a million of its voxels.
    """
    low, high = float(array.min()), float(array.max())
    if high - low < SMALLEST_SPAN and high >= AIR_HU[1]:
        return f"values from {low:.4g} to {high:.4g}, a span of a few units; {EXPECTED}"
    sample = _sample(array)
    inside = sample[sample >= AIR_HU[0]]
    if inside.size == 0 or np.mean(inside < AIR_HU[1]) >= AIR_SHARE:
        return None
    dense = float(np.mean(inside > DENSE_HU))
    spongy = float(np.mean(inside > SPONGY_HU)) - dense
    lowest, middle = np.mean(inside == inside.min()), float(np.median(inside))
    if dense > max(DENSE_SHARE, spongy):
        found = f"{dense:.0%} above {DENSE_HU:g} HU; perhaps the rescale intercept (often -1024) was not applied"
    elif lowest > LOWEST_SHARE:
        found = f"{lowest:.0%} at the lowest value {inside.min():g}, as in a window of grey values"
    elif not TISSUE_HU[0] <= middle <= TISSUE_HU[1]:
        found = f"a median of {middle:.4g}, neither fat nor soft tissue"
    else:
        return None
    return f"no air-like voxels and {found}; {EXPECTED}"


def is_ct(array: np.ndarray) -> bool:
    """Whether the values of a scan are CT numbers and not another modality's signal: some are those of fat or air.

    MR and PET have no negative signal, also where :func:`not_hounsfield` finds nothing wrong with their values; a CT
    that was stored without its intercept is none either.
    """
    sample = _sample(array)
    return bool(np.mean(sample < FAT_HU) >= AIR_SHARE) and not_hounsfield(array) is None


def _sample(array: np.ndarray) -> np.ndarray:
    """About a million voxels, evenly from all of the array; an odd stride, so that rows do not line up."""
    stride = max(1, array.size // SAMPLE_VOXELS) | 1
    return array.reshape(-1)[::stride]
