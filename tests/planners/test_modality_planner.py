"""Plans for several modalities: CT numbers as stock normalises them, any other scan by itself, told by the values."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnunet_flare import plugin
from nnunet_flare.images.hounsfield import is_ct
from nnunet_flare.inference import normalisation
from nnunet_flare.phantom import make_phantom
from nnunet_flare.planners.modality import FlareModalityNormalization, nnUNetPlannerFlareModality

INTENSITIES = {"mean": 80.0, "std": 60.0, "percentile_00_5": -90.0, "percentile_99_5": 280.0}


def normalised(array: np.ndarray) -> np.ndarray:
    return FlareModalityNormalization(use_mask_for_norm=False, intensityproperties=INTENSITIES).run(array)


def test_a_ct_of_organs_without_gas_is_normalised_as_stock_does() -> None:
    for domain in ("narrow", "wide"):
        array = make_phantom(1, domain=domain)[0].array.astype(np.float32)
        stock = CTNormalization(use_mask_for_norm=False, intensityproperties=INTENSITIES).run(array.copy())
        np.testing.assert_allclose(normalised(array), stock, atol=1e-6)


def test_gas_in_a_ct_is_as_dark_as_air_and_soft_tissue_keeps_most_of_the_values() -> None:
    """Organs with gas bring the least value of stock's window down to air, and soft tissue into its brightest tenth."""
    with_gas = {"mean": 80.0, "std": 110.0, "percentile_00_5": -950.0, "percentile_99_5": 280.0}
    array = make_phantom(1, domain="narrow")[0].array.astype(np.float32)
    scheme = FlareModalityNormalization(use_mask_for_norm=False, intensityproperties=with_gas)
    expected = (np.minimum(np.maximum(array, -275), 280) - 80) / 110
    np.testing.assert_allclose(scheme.run(array.copy()), expected, atol=1e-5)


def test_lungs_that_are_labelled_keep_the_window_of_stock() -> None:
    lungs = {"mean": -820.0, "std": 120.0, "percentile_00_5": -1000.0, "percentile_99_5": -300.0}
    array = make_phantom(1, domain="wide")[0].array.astype(np.float32)
    stock = CTNormalization(use_mask_for_norm=False, intensityproperties=lungs).run(array.copy())
    found = FlareModalityNormalization(use_mask_for_norm=False, intensityproperties=lungs).run(array)
    np.testing.assert_array_equal(found, stock)


@pytest.mark.parametrize("domain", ["mr", "pet"])
def test_another_scan_is_normalised_by_itself_whatever_its_unit(domain: str) -> None:
    """By hand: percentiles by sorting, mean and deviation of what is brighter than the mean."""
    array = make_phantom(1, domain=domain)[0].array.astype(np.float64)
    ranked = np.sort(array.ravel())
    low, high = (np.interp(q * (ranked.size - 1), np.arange(ranked.size), ranked) for q in (0.005, 0.995))
    clipped = np.minimum(np.maximum(array, low), high)
    bright = clipped[clipped > clipped.mean()]
    expected = (clipped - bright.mean()) / np.sqrt(((bright - bright.mean()) ** 2).mean())
    found = normalised(array)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(normalised(7 * array), expected, atol=2e-3)


def test_what_has_no_signal_below_zero_is_no_ct() -> None:
    ct = make_phantom(2, domain="wide")[0].array
    assert is_ct(ct) and is_ct(ct[8:24, 16:36, 20:44]), "a crop inside the body has fat"
    assert not is_ct(ct + 1024), "stored without its intercept"
    assert not is_ct((ct - 40) / 400.0), "normalised"
    assert np.isfinite(normalised(np.full((4, 4, 4), 7.0))).all()


def test_prediction_without_nnunet_normalises_alike() -> None:
    for domain in ("wide", "mr"):
        array = make_phantom(3, domain=domain)[0].array.astype(np.float32)
        alone = normalisation.BY_NAME["FlareModalityNormalization"](array.copy(), None, INTENSITIES)
        np.testing.assert_array_equal(alone, normalised(array))


def test_the_planner_and_its_normalisation_are_found_by_name() -> None:
    assert plugin.resolve("nnUNetPlannerFlareModality") is nnUNetPlannerFlareModality
    assert plugin.resolve("FlareModalityNormalization") is FlareModalityNormalization
    planner = object.__new__(nnUNetPlannerFlareModality)
    planner.dataset_json = {"channel_names": {"0": "CT", "1": "T2"}}
    planner.dataset_fingerprint = {"median_relative_size_after_cropping": 0.5}
    schemes, masked = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    assert schemes == ["FlareModalityNormalization", "ZScoreNormalization"] and masked == [False, True]
