"""The normalisations of one channel that need no nnU-Net: its own, and that of several modalities, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_flare.images.hounsfield import is_ct

SMALLEST = 1e-8
"""Least divisor, as in stock nnU-Net."""

Normalise = Callable[[np.ndarray, "np.ndarray | None", Mapping[str, Any]], np.ndarray]
"""Values (float32, changed in place), a mask that is negative outside or None, and the channel's intensities."""


def _of_ct(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    """Clipped to the foreground's percentiles, then standardised by the foreground's mean and deviation."""
    np.clip(values, intensities["percentile_00_5"], intensities["percentile_99_5"], out=values)
    values -= intensities["mean"]
    values /= max(intensities["std"], SMALLEST)
    return values


def _z_score(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    """Standardised by the scan's own mean and deviation, inside the mask alone where there is one."""
    inside = ... if mask is None else mask >= 0
    chosen = values[inside]
    values[inside] = (chosen - chosen.mean()) / max(chosen.std(), SMALLEST)
    return values


def _none(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    return values


def _to_one(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    """From the scan's lowest value, 0, to its highest, 1."""
    values -= values.min()
    values /= max(values.max(), SMALLEST)
    return values


def _of_rgb(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    """From 0 to 255.

    Raises:
        ValueError: for other values.
    """
    if values.min() < 0 or values.max() > 255:
        raise ValueError(
            f"values from {values.min():g} to {values.max():g}; the model expects 8-bit pictures, 0 to 255"
        )
    values /= 255.0
    return values


PERCENTILES = (0.5, 99.5)
"""What a scan that is no CT is clipped to."""

ANY_MODALITY = "FlareModalityNormalization"
OF_FOREGROUND = frozenset({ANY_MODALITY, "CTNormalization"})
"""Those that read the plans' intensities of the foreground."""

READ = ("percentile_00_5", "percentile_99_5", "mean", "std")
"""What they read of them."""

DARKEST_CT_HU = -275.0
"""The least value of a CT beside other modalities, as in Ouyang et al. (TMI 2023). Fat and soft tissue lie above; gas
and lung are as dark as the air around the patient, as they are in MR and PET. With -1000 HU as the least, all soft
tissue would lie in the brightest tenth of the values."""


def of_any_modality(values: np.ndarray, mask: np.ndarray | None, intensities: Mapping[str, Any]) -> np.ndarray:
    """CT numbers as stock's of CT, from :data:`DARKEST_CT_HU` up; another scan as :func:`of_signal`.

    Where what is labelled is darker than that, as lungs are, the window is stock's.
    """
    if not is_ct(values):
        return of_signal(values)
    if intensities["mean"] > DARKEST_CT_HU:
        intensities = {**intensities, "percentile_00_5": max(intensities["percentile_00_5"], DARKEST_CT_HU)}
    return _of_ct(values, mask, intensities)


def of_signal(values: np.ndarray) -> np.ndarray:
    """Values without a unit (changed in place): clipped to their percentiles, standardised by their brighter part.

    That part is what lies above the mean: tissue that gives a signal, about the organs by which a CT is standardised.
    """
    np.clip(values, *np.percentile(values, PERCENTILES), out=values)
    bright = values[values > values.mean()]
    if not bright.size:  # all voxels are equal
        bright = values
    values -= bright.mean()
    values /= max(float(bright.std()), SMALLEST)
    return values


BY_NAME: dict[str, Normalise] = {
    ANY_MODALITY: of_any_modality,
    "CTNormalization": _of_ct,
    "ZScoreNormalization": _z_score,
    "NoNormalization": _none,
    "RescaleTo01Normalization": _to_one,
    "RGBTo01Normalization": _of_rgb,
}


def intensities_read(
    schemes: Sequence[str], intensities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The part of the plans' intensities, by channel, that normalisations read; what none reads may be NaN.

    Of a normalisation that is not known here it is all.
    """
    read: dict[str, Mapping[str, Any]] = {}
    for channel, scheme in enumerate(schemes):
        values = intensities.get(str(channel), {})
        if scheme in BY_NAME:
            values = {key: values[key] for key in READ if key in values} if scheme in OF_FOREGROUND else {}
        read[str(channel)] = values
    return read
