"""One synthetic scan: reproducible, anatomically ordered, the same patient on every grid, wider where it should be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from nnunet_flare.errors import InputError
from nnunet_flare.organs import FLARE22
from nnunet_flare.phantom import DEMO_SIZE, FIELD_OF_VIEW_MM, degrade, make_phantom, painting, scan
from nnunet_flare.phantom.anatomy import LESION_ID
from nnunet_flare.phantom.domains import DOMAINS, Domain, domain_of, draw_patient

IDS = {organ.name: organ.id for organ in FLARE22}


def centroids_mm(seed: int, domain: str, size: tuple[int, int, int] = DEMO_SIZE) -> dict[str, np.ndarray]:
    """World position (x, y, z) of every organ present, through the image's own geometry."""
    image, labels = make_phantom(seed, domain=domain, size=size)
    direction = np.asarray(image.direction).reshape(3, 3)
    found = {}
    for name, number in IDS.items():
        index = np.argwhere(labels == number)
        if len(index):
            scaled = index.mean(0)[::-1] * np.asarray(image.spacing_mm)[::-1]
            found[name] = np.asarray(image.origin) + direction @ scaled
    return found


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    one, labels = make_phantom(7, domain="wide")
    same, same_labels = make_phantom(7, domain="wide")
    other, _ = make_phantom(8, domain="wide")
    assert one.array.tobytes() == same.array.tobytes()
    assert labels.tobytes() == same_labels.tobytes()
    assert (one.spacing_mm, one.origin, one.direction) == (same.spacing_mm, same.origin, same.direction)
    assert one.array.tobytes() != other.array.tobytes()


def test_default_grid_is_the_demo_grid() -> None:
    image, labels = make_phantom(0, domain="narrow")
    assert image.array.shape == labels.shape == (32, 48, 64)
    assert image.array.dtype == np.int16
    assert labels.dtype == np.uint8
    assert image.spacing_mm == pytest.approx((8.5, 5.0, 5.2))


def test_any_size_covers_the_same_field_of_view() -> None:
    image, _ = make_phantom(0, domain="narrow", size=(20, 40, 52))
    assert np.multiply(image.spacing_mm, (20, 40, 52)) == pytest.approx(FIELD_OF_VIEW_MM)


def test_a_given_spacing_is_used() -> None:
    image, _ = make_phantom(0, domain="narrow", size=(20, 40, 52), spacing_mm=(10, 6, 6))
    assert image.spacing_mm == (10, 6, 6)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_organ_is_there(domain: str) -> None:
    for seed in range(12):
        _, labels = make_phantom(seed, domain=domain)
        missing = set(IDS.values()) - set(np.unique(labels).tolist())
        assert missing <= {IDS["gallbladder"]}, f"seed {seed}"
        assert labels.max() <= len(FLARE22)


@pytest.mark.parametrize("domain", DOMAINS)
def test_organs_lie_where_they_belong(domain: str) -> None:
    """World coordinates are LPS: x grows to the patient's left, y to the back, z to the head."""
    for seed in range(12):
        at = centroids_mm(seed, domain)
        assert at["liver"][0] < at["stomach"][0] < at["spleen"][0], f"seed {seed}"
        assert at["right_kidney"][0] < at["inferior_vena_cava"][0] < at["aorta"][0] < at["left_kidney"][0]
        assert at["right_adrenal_gland"][2] > at["right_kidney"][2]
        assert at["left_adrenal_gland"][2] > at["left_kidney"][2]
        assert at["liver"][2] > at["right_kidney"][2]
        assert at["esophagus"][2] > at["stomach"][2] > at["duodenum"][2]
        assert at["pancreas"][1] < at["aorta"][1]
        if "gallbladder" in at:
            assert at["gallbladder"][1] < at["right_kidney"][1]
            assert at["gallbladder"][2] < at["liver"][2]


def test_patients_right_is_the_left_of_the_picture() -> None:
    image, labels = make_phantom(3, domain="narrow")
    assert image.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert np.argwhere(labels == IDS["liver"])[:, 2].mean() < labels.shape[2] / 2


def test_the_same_patient_comes_out_on_every_grid() -> None:
    coarse, coarse_labels = make_phantom(4, domain="wide")
    fine, fine_labels = make_phantom(4, domain="wide", size=(64, 96, 128))
    here, there = centroids_mm(4, "wide"), centroids_mm(4, "wide", (64, 96, 128))
    for organ in FLARE22:
        small = (coarse_labels == organ.id).sum() * coarse.voxel_mm3
        large = (fine_labels == organ.id).sum() * fine.voxel_mm3
        assert small == pytest.approx(large, rel=0.3), organ.name
        if organ.name in here:
            # Origins name the first voxel's centre, so half a voxel of the coarse grid is allowed beside the sampling.
            assert np.abs(here[organ.name] - there[organ.name]).max() < 8, organ.name


def test_painting_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = make_phantom(5, domain="wide")
    monkeypatch.setattr(scan, "BLOCK_VOXELS", 3 * 48 * 64)
    blocks, block_labels = make_phantom(5, domain="wide")
    assert np.array_equal(labels, block_labels)
    assert np.array_equal(image.array, blocks.array)


def test_boxes_never_cut_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape is painted in its box only; painting it everywhere must give the same scan."""
    scans = [make_phantom(seed, domain="wide", lesions=True) for seed in range(6)]
    monkeypatch.setattr(painting.Frame, "slices", lambda self, shape, axes: tuple(slice(0, len(axis)) for axis in axes))
    for seed, (image, labels) in enumerate(scans):
        whole, whole_labels = make_phantom(seed, domain="wide", lesions=True)
        assert np.array_equal(labels, whole_labels)
        assert np.array_equal(image.array, whole.array)


def test_ct_numbers_are_plausible() -> None:
    for seed in range(8):
        image, labels = make_phantom(seed, domain="narrow")
        hu = image.array
        assert hu.min() >= -1024
        assert hu.max() <= 3071
        assert hu[:, 0, 0].mean() == pytest.approx(-1000, abs=30), "air in front of the patient"
        assert 80 < np.median(hu[labels == IDS["liver"]]) < 135
        assert np.median(hu[labels == IDS["aorta"]]) > np.median(hu[labels == IDS["liver"]])
        assert np.median(hu[labels == IDS["gallbladder"]]) < 45
        assert (hu > 250).mean() > 0.004, "bones"
        assert (hu < -700)[20:, 8:40, 12:52].mean() > 0.02, "lungs"


def test_phases_differ_as_they_should() -> None:
    aorta = {}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        phase = draw_patient(rng, domain_of("wide"), lesions_labelled=False).phase
        if phase not in aorta:
            image, labels = make_phantom(seed, domain="wide")
            aorta[phase] = float(np.median(image.array[labels == IDS["aorta"]]))
    assert aorta["arterial"] > aorta["portal"] > aorta["late"] > aorta["native"]


@pytest.mark.parametrize(("name", "domain"), DOMAINS.items())
def test_patients_fill_the_ranges_of_their_domain(name: str, domain: Domain) -> None:
    patients = [draw_patient(np.random.default_rng(s), domain, lesions_labelled=False) for s in range(400)]

    def fills(values: list[float], low: float, high: float) -> bool:
        edge = 0.1 * (high - low)
        return low <= min(values) <= low + edge and high - edge <= max(values) <= high

    assert fills([p.rotation_deg for p in patients], -domain.max_rotation_deg, domain.max_rotation_deg)
    assert fills([p.shift_mm[0] for p in patients], -domain.max_z_shift_mm, domain.max_z_shift_mm)
    assert fills([p.noise_sd_hu for p in patients], *domain.noise_sd_hu)
    assert fills([p.blur_voxels for p in patients], *domain.blur_voxels)
    assert fills([p.fat_mm for p in patients], *domain.fat_mm)
    scale = np.array([p.scale for p in patients])
    assert np.log(scale[:, 0] / scale[:, 1]).std() > 0.7 * domain.aspect_sd
    assert np.cbrt(scale.prod(1)).std() == pytest.approx(np.diff(domain.size_scale)[0] / 12**0.5, rel=0.3)
    for phase, share in domain.phases.items():
        assert np.mean([p.phase == phase for p in patients]) == pytest.approx(share, abs=0.08)
    assert np.mean([p.lesions > 0 for p in patients]) == pytest.approx(domain.lesion_probability, abs=0.08)
    assert np.std([p.hu["liver"] for p in patients]) == pytest.approx(domain.organ_hu_sd, rel=0.15)
    assert np.std(np.log([p.radius["liver"] for p in patients])) == pytest.approx(domain.organ_log_radius_sd, rel=0.15)
    offsets = np.array([p.offset_mm["liver"] for p in patients])
    assert offsets.std() == pytest.approx(100 * domain.organ_position_sd, rel=0.15)


def test_the_noise_of_a_scan_is_the_drawn_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        patient = draw_patient(np.random.default_rng(seed), domain_of("wide"), lesions_labelled=False)
        noisy, labels = make_phantom(seed, domain="wide")
        with monkeypatch.context() as patch:
            patch.setattr(scan, "_noise", lambda rng, size, grain, sd: np.zeros(size, np.float32))
            clean, _ = make_phantom(seed, domain="wide")
        difference = (noisy.array.astype(float) - clean.array)[labels > 0]
        assert difference.std() == pytest.approx(patient.noise_sd_hu, rel=0.1)


def test_organs_of_the_wide_domain_vary_more_in_size_and_place() -> None:
    def spreads(domain: str) -> tuple[float, float]:
        volumes, places = [], []
        for seed in range(24):
            image, labels = make_phantom(seed, domain=domain)
            volumes.append((labels == IDS["liver"]).sum() * image.voxel_mm3)
            places.append(np.argwhere(labels == IDS["left_kidney"])[:, 0].mean() * image.spacing_mm[0])
        return float(np.std(np.log(volumes))), float(np.std(places))

    narrow, wide = spreads("narrow"), spreads("wide")
    assert wide[0] > 2 * narrow[0]
    assert wide[1] > 1.5 * narrow[1]


def test_scanners_of_the_wide_domain_differ_in_field_of_view() -> None:
    narrow = {make_phantom(seed, domain="narrow")[0].spacing_mm for seed in range(10)}
    wide = {make_phantom(seed, domain="wide")[0].spacing_mm for seed in range(20)}
    assert len(narrow) == 1
    assert len(wide) >= 3
    nominal = next(iter(narrow))
    assert all(s <= n for spacing in wide for s, n in zip(spacing, nominal, strict=True))


def test_some_wide_patients_have_no_gallbladder_and_narrow_ones_all_do() -> None:
    def without(domain: str) -> int:
        patients = [
            draw_patient(np.random.default_rng(s), domain_of(domain), lesions_labelled=False) for s in range(200)
        ]
        return sum(not patient.gallbladder for patient in patients)

    assert without("narrow") == 0
    assert 8 < without("wide") < 40
    missing = next(
        s
        for s in range(200)
        if not draw_patient(np.random.default_rng(s), domain_of("wide"), lesions_labelled=False).gallbladder
    )
    assert not (make_phantom(missing, domain="wide")[1] == IDS["gallbladder"]).any()


def test_lesions_are_label_14_and_darker_than_their_organ() -> None:
    """Narrow patients are healthy unless lesions are labelled, and otherwise the same: voxel by voxel comparable."""
    cases = 0
    for seed in range(12):
        ill, labels = make_phantom(seed, domain="narrow", lesions=True)
        healthy, organs = make_phantom(seed, domain="narrow", lesions=False)
        lesion = labels == LESION_ID
        assert LESION_ID not in organs
        assert np.array_equal(labels[~lesion], organs[~lesion])
        if lesion.any():
            cases += 1
            away = ~binary_dilation(lesion, iterations=6)
            assert np.array_equal(ill.array[away], healthy.array[away])
            assert (organs[lesion] > 0).all(), "lesions lie inside organs"
            assert (healthy.array[lesion].astype(float) - ill.array[lesion]).mean() > 15
    assert cases >= 6, "lesions are common where they are a label"


def test_an_unlabelled_lesion_belongs_to_its_organ() -> None:
    compared = 0
    for seed in range(20):
        labelled, labels = make_phantom(seed, domain="wide", lesions=True)
        plain, organs = make_phantom(seed, domain="wide", lesions=False)
        lesion = labels == LESION_ID
        if lesion.any() and np.array_equal(labelled.array, plain.array):
            compared += 1
            assert (organs[lesion] > 0).all()
            assert organs.max() < LESION_ID
    assert compared >= 5


def test_junk_is_junk() -> None:
    image, _ = make_phantom(2, domain="wide")
    spoiled = degrade(2, image)
    assert spoiled.array.dtype == np.int16
    lost = (spoiled.array == -1024).all(axis=(1, 2))
    assert 0.25 < lost.mean() < 0.55
    kept = ~lost
    correlation = np.corrcoef(image.array[kept].ravel(), spoiled.array[kept].ravel())[0, 1]
    assert correlation < 0.97
    assert np.array_equal(spoiled.array, degrade(2, image).array)


def test_an_unknown_domain_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="'huge' is unknown; expected one of narrow, between, wide"):
        make_phantom(0, domain="huge")


def test_a_grid_too_small_to_show_anything_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(4, 48, 64\).*at least 8"):
        make_phantom(0, size=(4, 48, 64))
    assert make_phantom(0, size=(8, 8, 8))[1].shape == (8, 8, 8)
