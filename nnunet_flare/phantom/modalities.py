"""What an MR or a PET scanner makes of the patient that was painted for a CT.

The painter draws in HU. Here a curve takes HU to the signal of another modality, in no order that a CT has: bone is
dark in MR, fat bright, blood darker than liver; in PET fat and air are alike. How organs compare with each other is
that modality's own row of :data:`~nnunet_flare.phantom.anatomy.PHASE_HU`. Then come the coil's bias field (MR), the
resolution, and the noise: of the magnitude of a complex signal (MR), or growing with the root of the counts (PET).
Stylised, as the whole phantom: it shows that adaptation works, not how well on patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from scipy.ndimage import gaussian_filter

from nnunet_flare.phantom.shapes import Point, SmoothField

BIAS_KNOT_MM = 160.0
"""A coil's sensitivity is smooth on the scale of the body."""

BIAS_EXTENT_MM: Point = (400.0, 360.0, 460.0)


@dataclass(frozen=True)
class Modality:
    """How HU become the signal of one modality; pairs are uniform ranges.

    Attributes:
        curve: (HU, signal) points, straight between them; a signal of 1 is a bright organ.
        bias_log: largest logarithm of the bias field, (0, 0) for none.
        resolution_mm: standard deviation (z, y, x) of the blur.
        noise: standard deviation of the noise where the signal is 1.
        is_magnitude: Rician noise (MR); else Gaussian noise that grows with the root of the signal (PET).
        gain: value of a signal of 1 in the file.
        dtype: of the file: whole numbers of no unit (MR), SUV (PET).
    """

    curve: tuple[tuple[float, float], ...]
    bias_log: tuple[float, float]
    resolution_mm: Point
    noise: tuple[float, float]
    is_magnitude: bool
    gain: tuple[float, float]
    dtype: type[np.generic]


MODALITIES: Mapping[str, Modality] = MappingProxyType(
    {
        "mr": Modality(
            curve=(
                (-1000, 0.01), (-800, 0.03), (-300, 0.1), (-150, 0.9), (-80, 0.9), (-45, 0.25), (0, 0.2), (60, 0.45),
                (120, 0.75), (200, 1.0), (260, 0.3), (330, 0.1), (600, 0.05),
            ),
            bias_log=(0.15, 0.4),
            resolution_mm=(3.5, 1.0, 1.0),
            noise=(0.02, 0.05),
            is_magnitude=True,
            gain=(250.0, 1400.0),
            dtype=np.int16,
        ),
        "pet": Modality(
            curve=(
                (-1000, 0.01), (-850, 0.15), (-400, 0.1), (-105, 0.1), (0, 0.12), (60, 0.35), (120, 0.95), (200, 2.0),
                (260, 0.8), (420, 0.5), (1000, 0.4),
            ),
            bias_log=(0.0, 0.0),
            resolution_mm=(3.4, 3.4, 3.4),
            noise=(0.06, 0.14),
            is_magnitude=False,
            gain=(1.8, 3.0),
            dtype=np.float32,
        ),
    }
)  # fmt: skip
"""By the ``modality`` of a :class:`~nnunet_flare.phantom.domains.Domain`; ``ct`` is what the painter paints."""


def acquire(
    rng: np.random.Generator, name: str, hu: np.ndarray, axes: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """The scan that a modality makes of painted HU.

    Args:
        rng: source of bias field, gain and noise.
        name: one of :data:`MODALITIES`.
        hu: (Z, Y, X) float32, without noise.
        axes: coordinates of its voxels in mm, (z, y, x).

    Returns:
        (Z, Y, X) of the modality's own type, never negative.
    """
    modality = MODALITIES[name]
    levels, signals = zip(*modality.curve, strict=True)
    signal = np.interp(hu, levels, signals).astype(np.float32)
    if modality.bias_log[1] > 0:
        field = SmoothField(rng, BIAS_EXTENT_MM, BIAS_KNOT_MM, float(rng.uniform(*modality.bias_log)))
        signal *= np.exp(field(*axes))
    sigma = [mm / abs(float(axis[1] - axis[0])) for mm, axis in zip(modality.resolution_mm, axes, strict=True)]
    signal = gaussian_filter(signal, sigma)
    deviation = np.float32(rng.uniform(*modality.noise))
    if modality.is_magnitude:
        real, imaginary = (deviation * rng.standard_normal(hu.shape, np.float32) for _ in range(2))
        signal = np.hypot(signal + real, imaginary)
    else:
        signal += deviation * np.sqrt(signal) * rng.standard_normal(hu.shape, np.float32)
    scan = np.maximum(signal, 0) * np.float32(rng.uniform(*modality.gain))
    return (np.rint(scan) if np.issubdtype(modality.dtype, np.integer) else scan).astype(modality.dtype)
