"""The phantom in an MR and a PET scanner: the CT's patient and labels, with contrasts that no CT has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.images import read_volume
from nnunet_flare.images.hounsfield import is_ct
from nnunet_flare.organs import FLARE22
from nnunet_flare.phantom import make_phantom, modalities, write_phantom
from nnunet_flare.phantom.modalities import MODALITIES, acquire

IDS = {organ.name: organ.id for organ in FLARE22}
SIZE = (16, 24, 32)
AXES = tuple((np.arange(n) - (n - 1) / 2) * 5.0 for n in (24, 40, 40))


def medians(domain: str, seeds: range = range(3)) -> dict[str, float]:
    """The median of every organ, as a share of that of the liver, over some patients."""
    values: dict[str, list[float]] = {name: [] for name in IDS}
    for seed in seeds:
        scan, labels = make_phantom(seed, domain=domain)
        liver = np.median(scan.array[labels == IDS["liver"]])
        for name, number in IDS.items():
            if (labels == number).any():
                values[name].append(float(np.median(scan.array[labels == number]) / liver))
    return {name: float(np.median(found)) for name, found in values.items()}


@pytest.mark.parametrize("domain", ["mr", "pet"])
def test_the_patient_and_its_labels_are_those_of_the_ct(domain: str) -> None:
    for seed in range(2):
        ct, labels = make_phantom(seed, domain="wide")
        other, other_labels = make_phantom(seed, domain=domain)
        assert np.array_equal(labels, other_labels)
        assert (ct.spacing_mm, ct.origin) == (other.spacing_mm, other.origin)
        again, _ = make_phantom(seed, domain=domain)
        assert other.array.tobytes() == again.array.tobytes()


def test_an_mr_shows_fat_bright_bone_dark_and_blood_darker_than_liver() -> None:
    mr, ct = medians("mr"), medians("wide")
    assert mr["aorta"] < 0.6 < 1 < ct["aorta"]
    assert mr["spleen"] < 0.8 < 1 < ct["spleen"]
    for seed in range(2):
        painted, _ = make_phantom(seed, domain="wide")
        scan, labels = make_phantom(seed, domain="mr")
        assert scan.array.dtype == np.int16 and scan.array.min() >= 0
        liver = np.median(scan.array[labels == IDS["liver"]])
        fat, bone = (binary_erosion(m) for m in (np.abs(painted.array + 105) < 40, painted.array > 280))
        assert np.median(scan.array[fat]) > 0.8 * liver > 2 * np.median(scan.array[bone]), seed


def test_a_pet_shows_uptake_in_liver_and_kidneys_and_hardly_any_in_fat() -> None:
    pet = medians("pet")
    assert pet["right_kidney"] > 1.1 and pet["gallbladder"] < 0.5
    painted, _ = make_phantom(0, domain="wide")
    scan, labels = make_phantom(0, domain="pet")
    assert scan.array.dtype == np.float32 and 2 < scan.array.max() < 15
    fat = binary_erosion(np.abs(painted.array + 105) < 40)
    assert np.median(scan.array[fat]) < 0.3 * np.median(scan.array[labels == IDS["liver"]])


def test_neither_is_taken_for_a_ct() -> None:
    for seed in range(4):
        assert is_ct(make_phantom(seed, domain="wide")[0].array)
        for domain in ("mr", "pet"):
            assert not is_ct(make_phantom(seed, domain=domain)[0].array), (domain, seed)


@pytest.mark.parametrize("name", MODALITIES)
def test_blur_has_the_resolution_in_mm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point's image has the variance of the blur, whatever the voxels' size."""
    plain = dataclasses.replace(
        MODALITIES[name],
        noise=(0.0, 0.0),
        bias_log=(0.0, 0.0),
        gain=(1.0, 1.0),
        dtype=np.float32,
        curve=((0, 0), (1, 1)),
    )
    monkeypatch.setattr(modalities, "MODALITIES", {name: plain})
    for spacing in (3.0, 1.5):
        axes = tuple((np.arange(33) - 16) * spacing for _ in range(3))
        point = np.zeros((33, 33, 33), np.float32)
        point[16, 16, 16] = 1
        seen = acquire(np.random.default_rng(0), name, point, axes).astype(float)
        for axis, resolution in enumerate(plain.resolution_mm):
            if resolution > 0.6 * spacing:
                profile = seen.sum(axis=tuple(a for a in range(3) if a != axis))
                found = np.sqrt((profile * axes[axis] ** 2).sum() / profile.sum())
                assert found == pytest.approx(resolution, rel=0.05)


def test_noise_is_the_magnitude_of_a_complex_signal_in_mr_and_grows_with_the_counts_in_pet() -> None:
    flat = {"mr": 200.0, "pet": 120.0}
    for name, hu in flat.items():
        modality = dataclasses.replace(
            MODALITIES[name], noise=(0.1, 0.1), bias_log=(0.0, 0.0), gain=(1000.0, 1000.0), dtype=np.float32
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modalities, "MODALITIES", {name: modality})
            bright = acquire(np.random.default_rng(1), name, np.full((24, 40, 40), hu, np.float32), AXES)
            air = acquire(np.random.default_rng(1), name, np.full((24, 40, 40), -1000, np.float32), AXES)
        if name == "mr":  # of no signal the magnitude is Rayleigh's
            assert air.mean() == pytest.approx(100 * np.sqrt(np.pi / 2), rel=0.03)
            assert bright.mean() == pytest.approx(1000 + 5, rel=0.01) and bright.std() == pytest.approx(100, rel=0.03)
        else:
            assert bright.std() == pytest.approx(100 * np.sqrt(0.95), rel=0.03)
            assert air.std() < 0.15 * bright.std()


def test_the_bias_field_is_smooth_and_no_larger_than_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = dataclasses.replace(
        MODALITIES["mr"], noise=(0.0, 0.0), bias_log=(0.4, 0.4), gain=(1000.0, 1000.0), resolution_mm=(0.01, 0.01, 0.01)
    )
    monkeypatch.setattr(modalities, "MODALITIES", {"mr": biased})
    field = np.log(acquire(np.random.default_rng(2), "mr", np.full((24, 40, 40), 200, np.float32), AXES) / 1000)
    assert 0.05 < np.abs(field).max() <= 0.41
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.04


def test_a_data_set_of_two_modalities_names_them_and_keeps_its_seeds(tmp_path: Path) -> None:
    assert main(["phantom", "-o", str(tmp_path / "mixed"), "--labelled", "1", "--unlabelled", "4", "--test", "2",
                 "--domain", "mr", "pet", "--size", *map(str, SIZE)]) == 0  # fmt: skip
    write_phantom(tmp_path / "wide", labelled=1, unlabelled=4, test=2, size=SIZE)
    names = [f"FLAREPhantom_Un_{m}_{i:04d}" for i, m in enumerate(("mr", "pet") * 2)]
    cases = json.loads((tmp_path / "mixed" / "phantom.json").read_text())["cases"]
    assert [case for case, entry in cases.items() if entry["group"] == "unlabelled"] == names
    assert [cases[name]["domain"] for name in names] == ["mr", "pet", "mr", "pet"]
    truth = [path.name for path in sorted((tmp_path / "mixed" / "unlabelled_truth").iterdir())]
    assert truth == [f"{name}.nii.gz" for name in sorted(names)]
    mixed = read_volume(tmp_path / "mixed" / "unlabelled_truth" / "FLAREPhantom_Un_pet_0003.nii.gz")
    wide = read_volume(tmp_path / "wide" / "unlabelled_truth" / "FLAREPhantom_Un_0003.nii.gz")
    assert np.array_equal(mixed.array, wide.array)
    pet = read_volume(tmp_path / "mixed" / "unlabelled" / "FLAREPhantom_Un_pet_0003_0000.nii.gz")
    assert pet.array.dtype == np.float32 and pet.array.max() < 30


@pytest.mark.parametrize("more", [{"junk": 1}, {"partial": 1}])
def test_junk_and_training_cases_are_cts(tmp_path: Path, more: dict[str, int]) -> None:
    with pytest.raises(InputError, match="with domain mr; training cases and junk are CTs"):
        write_phantom(tmp_path / "out", unlabelled=2, domain=["wide", "mr"], **more)
    with pytest.raises(InputError, match="no domain"):
        write_phantom(tmp_path / "out", domain=[])
