"""Small scans for the prediction tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnunet_flare.images import Volume, read_volume

SHARED = Path(os.environ.get("FLARE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def blobs(
    shape: tuple[int, int, int] = (20, 50, 60), *, spacing=(4.0, 1.7, 2.3), seed: int = 0, pad: int = 0
) -> Volume:
    """Smooth CT-like blobs with noise, int16 HU, ``pad`` planes of zeros around them."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=shape), (1.5, 4, 4))
    array = (smooth / smooth.std() * 150 + rng.normal(size=shape) * 20).astype(np.int16)
    array[array == 0] = 1
    if pad:
        array = np.pad(array, pad)
    return Volume(array, spacing, (-10.0, 20.0, 5.5), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


def real_ct(name: str = "ts_torso3mm") -> Volume:
    """A scan of the shared data."""
    path = SHARED / f"{name}_ct.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path}: the shared CT scans are not on this machine (FLARE_SHARED_DATA)")
    return read_volume(path)


def crop(volume: Volume, *ranges: tuple[int, int]) -> Volume:
    """A part of a scan; the origin is left where it is."""
    return Volume(
        np.ascontiguousarray(volume.array[tuple(slice(*r) for r in ranges)]),
        volume.spacing_mm,
        volume.origin,
        volume.direction,
    )
