"""Values that cannot be Hounsfield units are told; real scans, phantoms and crops inside a body are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, check_values, oddities, read_volume
from nnunet_flare.images.hounsfield import not_hounsfield
from nnunet_flare.phantom.scan import degrade, make_phantom

REAL = ("chaos3_ct", "ts_slab512_ct", "ts_torso3mm_ct")

WRONG = {
    "shifted by 1024": (lambda hu: hu + 1024, "rescale intercept"),
    "shifted, below 0 cut": (lambda hu: (hu + 1024).clip(0), "rescale intercept"),
    "shifted, outside the field of view -2000": (lambda hu: np.where(hu <= -1000, -2000, hu + 1024), "intercept"),
    "z-scores": (lambda hu: (hu - hu.mean()) / hu.std(), "a few units"),
    "z-scores of the foreground": (lambda hu: (hu - 80) / 140, "a few units"),
    "-1 to 1": (lambda hu: 2 * (hu - hu.min()) / np.ptp(hu) - 1, "a few units"),
    "0 to 1": (lambda hu: (hu - hu.min()) / np.ptp(hu), "a few units"),
    "thousands of HU": (lambda hu: hu / 1000, "a few units"),
    "attenuation per cm": (lambda hu: 0.19 * (1 + hu / 1000), "a few units"),
    "a window": (lambda hu: hu.clip(-160, 240), "at the lowest value"),
    "0 to 4095": (lambda hu: (hu - hu.min()) / np.ptp(hu) * 4095, "above 700 HU"),
    "0 to 255": (lambda hu: (hu.clip(-160, 240) + 160) / 400 * 255, "8-bit picture"),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_phantom_in_other_units_is_told(how: str, seed: int) -> None:
    scan, _ = make_phantom(seed)
    change, says = WRONG[how]
    found = oddities(scan.with_array(change(scan.array.astype(np.float32))))
    assert len(found) == 1 and says in found[0]


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", REAL)
def test_a_real_scan_in_other_units_is_told(real_data: Path, name: str, how: str) -> None:
    scan = read_volume(real_data / f"{name}.nii.gz")
    change, says = WRONG[how]
    found = oddities(scan.with_array(change(scan.array.astype(np.float32))))
    assert len(found) == 1 and says in found[0]


@pytest.mark.parametrize("domain", ["narrow", "between", "wide"])
def test_phantoms_good_and_degraded_are_fine(domain: str) -> None:
    for seed in range(6):
        scan, _ = make_phantom(seed, domain=domain)
        assert not_hounsfield(scan.array) is None and not_hounsfield(degrade(seed, scan).array) is None


@pytest.mark.parametrize("name", REAL)
def test_real_scans_are_fine_and_so_are_crops_of_them_without_air(real_data: Path, name: str) -> None:
    scan = read_volume(real_data / f"{name}.nii.gz")
    assert oddities(scan) == []
    rng, inside = np.random.default_rng(0), 0
    step = np.asarray(scan.spacing_mm)
    for _ in range(1500):
        size = np.minimum(np.maximum(2, rng.uniform(60, 150, 3) / step), scan.array.shape).astype(int)
        first = [int(rng.integers(0, whole - part + 1)) for whole, part in zip(scan.array.shape, size, strict=True)]
        crop = scan.array[tuple(slice(at, at + part) for at, part in zip(first, size, strict=True))]
        inside += bool((crop < -200).mean() < 1e-3)
        assert not_hounsfield(crop) is None, (first, size)
    assert inside or name == "chaos3_ct", "no crop without air was tried"


def test_fat_water_and_air_alone_are_fine() -> None:
    noise = np.random.default_rng(0).normal(0, 12, (20, 60, 60))
    for middle in (-100, 0, 60, 130, -1000):
        assert not_hounsfield(noise + middle) is None, middle
    assert not_hounsfield(noise + 600) is not None


@pytest.mark.parametrize(
    ("spacing", "says"),
    [
        ((125.0, 1.0, 1.0), None),
        ((126.0, 1.0, 1.0), r"extends over \(z, y, x\) \(2520, 30, 40\) mm at a spacing of \(126.0, 1.0, 1.0\) mm"),
        ((900.0, 1.0, 1.0), "the spacing is wrong"),
        ((1.0, 90.0, 1.0), "expected at most 2500 mm"),
        ((1.0, 1.0, 63.0), "expected at most 2500 mm"),
    ],
)
def test_a_scan_longer_than_any_body_is_refused(spacing: tuple[float, float, float], says: str | None) -> None:
    volume = Volume(np.random.default_rng(0).integers(-1000, 200, (20, 30, 40)), spacing)
    if says is None:
        check_values(volume, "case")
    else:
        with pytest.raises(CaseError, match=says):
            check_values(volume, "case")
