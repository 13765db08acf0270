"""Pipelines: the built-in ones against their slow twins, orientation, and every way in which a file can be wrong."""

import numpy as np
import pytest
import slow_reference as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, read_labels
from nnunet_flare.images.geometry import LPS
from nnunet_flare.images.orientation import Turn, turn_between, turn_volume
from nnunet_flare.organs import FLARE22
from nnunet_flare.phantom import make_phantom
from nnunet_flare.postprocessing.pipeline import BUILT_IN, load_pipeline

SPACING_MM = (2.5, 0.8, 0.7)


def with_strays(labels, seed, blobs=12):
    """The map with small blobs of random organs anywhere, single voxels among them, as careless models predict."""
    rng = np.random.default_rng(seed)
    labels = labels.copy()
    for _ in range(blobs):
        corner = [int(rng.integers(0, size)) for size in labels.shape]
        size = rng.integers(1, 4, 3)
        labels[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = rng.integers(0, 14)
    return labels


def check(name, labels, spacing_mm):
    before = labels.copy()
    found = load_pipeline(name).apply(labels, spacing_mm)
    np.testing.assert_array_equal(found, slow.PIPELINES[name](labels, spacing_mm))
    np.testing.assert_array_equal(labels, before)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    return found


@pytest.mark.parametrize("name", BUILT_IN)
@given(seed=st.integers(0, 100_000), scale=st.sampled_from([1.0, 10.0]), crowded=st.booleans())
@settings(max_examples=15, deadline=None)
def test_random_maps_come_out_as_from_the_slow_pipeline(name, seed, scale, crowded):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 14, (4, 4, 5), dtype=np.uint8)
    if not crowded:
        coarse[rng.random(coarse.shape) < 0.7] = 0
    labels = with_strays(np.kron(coarse, np.ones((4, 5, 4), dtype=np.uint8)), seed)
    check(name, labels, tuple(scale * s for s in SPACING_MM))


@pytest.mark.parametrize("name", ["flare22", "flare22-paper"])
@given(seed=st.integers(0, 100_000), slice_mm=st.sampled_from([2.0, 2.5, 3.0, 5.0, 7.0]))
@settings(max_examples=30, deadline=None)
def test_vessels_with_gaps_limit_the_field_as_in_the_slow_pipeline(name, seed, slice_mm):
    rng = np.random.default_rng(seed)
    labels = np.zeros((50, 6, 8), dtype=np.uint8)
    labels[:, 1:3, 1:3] = 1  # a liver on every slice shows what is erased
    vessels = np.repeat(rng.random(10) < 0.6, 5)
    vessels[rng.integers(0, 50, 4)] ^= True
    labels[vessels, 4, 4] = rng.choice([5, 6, 10], int(vessels.sum()))
    check(name, labels, (slice_mm, 200.0, 200.0))


def test_gallbladder_at_the_edge_of_all_labels_has_a_neighbour_there():
    """Liver on three sides and background on the fourth, beyond which no label follows: not inside the liver."""
    labels = np.zeros((5, 12, 12), dtype=np.uint8)
    labels[1:4, 3:9, 3:9] = 1
    labels[2, 8, 5], labels[2, 3, 3] = 9, 9
    found = check("flare22-paper", labels, (50.0, 50.0, 50.0))
    assert found[2, 8, 5] == 9


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("domain", ["narrow", "wide"])
def test_phantoms_come_out_as_from_the_slow_pipeline(name, domain):
    image, labels = make_phantom(7, domain=domain)
    found = check(name, with_strays(labels, seed=1), image.spacing_mm)
    assert found.any()


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("scan", ["ts_torso3mm", "ts_slab512"])
def test_real_label_maps_come_out_as_from_the_slow_pipeline(real_data, name, scan):
    volume = read_labels(real_data / f"{scan}_flare13.nii.gz")
    step = 1 if scan == "ts_torso3mm" else 4  # the slow pipeline looks at every voxel a hundred times
    labels = volume.array[:, ::step, ::step]
    spacing_mm = tuple(np.multiply(volume.spacing_mm, (1, step, step)).tolist())
    turn = turn_between(volume.direction)
    labels = np.ascontiguousarray(turn.apply(labels))
    found = check(name, with_strays(labels, seed=2), turn.spacing_mm(spacing_mm))
    assert found.any()


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_empty_map_stays_empty(name):
    assert not check(name, np.zeros((6, 7, 8), dtype=np.uint8), SPACING_MM).any()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_single_voxel_in_every_corner(name):
    labels = np.zeros((6, 7, 8), dtype=np.uint8)
    for place, corner in enumerate(np.ndindex(2, 2, 2), 1):
        labels[tuple(-c for c in corner)] = place
    check(name, labels, (50.0, 40.0, 40.0))


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_organ_that_fills_the_image(name):
    check(name, np.full((6, 7, 8), 5, dtype=np.uint8), SPACING_MM)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("turn", [Turn((0, 1, 2), (True, False, True)), Turn((2, 0, 1), (False, True, True))])
def test_orientation_of_the_file_does_not_matter(name, turn):
    _, labels = make_phantom(3, domain="wide")
    upright = Volume(with_strays(labels, seed=3), (8.5, 5.0, 5.2), direction=LPS)
    turned = turn_volume(upright, turn)
    expected = turn.apply(load_pipeline(name).apply(upright.array, upright.spacing_mm))
    found = load_pipeline(name).apply(turned.array, turned.spacing_mm, direction=turned.direction)
    np.testing.assert_array_equal(found, expected)


def test_the_axial_field_follows_a_flipped_file():
    labels = np.zeros((20, 4, 4), dtype=np.uint8)
    labels[:, 0, 0] = 1
    labels[5:15, 2, 2] = 5
    pipeline = load_pipeline("flare22-paper")
    feet_first = pipeline.apply(labels[::-1], (500.0, 100.0, 100.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, -1))
    assert np.flatnonzero(feet_first[::-1].any(axis=(1, 2))).tolist() == list(range(5, 15))


def test_flare23_labels_are_taken_and_lesions_kept():
    labels = np.zeros((9, 9, 9), dtype=np.uint8)
    labels[2:7, 2:7, 2:7] = 1
    labels[4, 4, 4] = labels[4, 2, 6] = 14
    for name in BUILT_IN:
        found = load_pipeline(name, labels="flare23").apply(labels, (50.0, 50.0, 50.0))
        assert (found[labels == 14] == 14).all()


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_pipeline_of_ones_own(tmp_path):
    path = write(
        tmp_path,
        """
        description: keep the largest kidney parts, then fill them
        steps:
          - {operation: keep_largest, organs: [Right Kidney, LK], minimum_mm3: 10}
          - {operation: fill_holes, organs: [2, left-kidney], maximum_mm3: 1000}
          - {operation: close_organs, organs: [oesophagus], size_voxels: 3}
        """,
    )
    labels = np.zeros((7, 7, 7), dtype=np.uint8)
    labels[2:6, 2:6, 2:6], labels[3, 3, 3], labels[0, 0, 0] = 2, 0, 2
    found = load_pipeline(path).apply(labels, (1.0, 1.0, 1.0))
    assert found[3, 3, 3] == 2 and found[0, 0, 0] == 0


def test_a_pipeline_is_bound_to_the_ids_of_a_dataset(tmp_path):
    path = write(tmp_path, "steps: [{operation: keep_largest, organs: [liver]}]")
    labels = np.zeros((3, 3, 9), dtype=np.uint8)
    labels[1, 1, :4] = labels[1, 1, 7] = 3
    pipeline = load_pipeline(path, labels={"background": 0, "spleen": 1, "whole": [1, 2], "liver": 3})
    assert pipeline.apply(labels, (1.0, 1.0, 1.0))[1, 1].tolist() == [3, 3, 3, 3, 0, 0, 0, 0, 0]


def test_a_name_of_the_dataset_means_itself_also_where_another_label_is_called_alike(tmp_path):
    dataset = {"background": 0, "tumor": 1, "lesion": 2}
    labels = np.zeros((3, 3, 9), dtype=np.uint8)
    labels[1, 1] = [1, 1, 0, 1, 0, 2, 2, 0, 2]
    path = write(tmp_path, "steps: [{operation: keep_largest, organs: [tumor]}]")
    found = load_pipeline(path, labels=dataset).apply(labels, (1.0, 1.0, 1.0))
    assert found[1, 1].tolist() == [1, 1, 0, 0, 0, 2, 2, 0, 2]
    with pytest.raises(InputError, match="'tumour' may be tumor or lesion"):
        load_pipeline(write(tmp_path, "steps: [{operation: keep_largest, organs: [tumour]}]"), labels=dataset)


def test_all_means_every_organ_of_the_label_set(tmp_path):
    path = write(tmp_path, "labels: flare23\nsteps: [{operation: keep_largest}]")
    labels = np.zeros((3, 3, 9), dtype=np.uint8)
    labels[1, 1, :4] = labels[1, 1, 7] = 14
    assert load_pipeline(path).apply(labels, (1.0, 1.0, 1.0))[1, 1, 7] == 0


@pytest.mark.parametrize(
    "text, complaints",
    [
        (
            "steps: [{operation: keep_largest, organs: [liver, livr]}]",
            ["steps.0.organs", "livr", "did you mean 'liver'"],
        ),
        ("steps: [{operation: keep_largest, organs: [99]}]", ["steps.0.organs", "99"]),
        ("steps: [{operation: remove_small_organs, minimum_mm3: {spleeen: 4}}]", ["minimum_mm3.spleeen", "spleen"]),
        ("steps: [{operation: remove_small_organs, minimum_mm3: {spleen: -4}}]", ["steps.0", "spleen", "-4"]),
        ("steps: [{operation: remove_small_components, share: -0.1}]", ["steps.0.share", "-0.1"]),
        ("steps: [{operation: remove_small_components, share: 1.5}]", ["steps.0.share", "1.5"]),
        ("steps: [{operation: keep_largest, minimum_mm3: -1}]", ["steps.0.minimum_mm3", "-1"]),
        ("steps: [{operation: keep_largest, minimum_mm3: .nan}]", ["steps.0.minimum_mm3"]),
        ("steps: [{operation: keep_largest_pooled, at_most: 0}]", ["steps.0.at_most", "0"]),
        ("steps: [{operation: close_organs, organs: [liver], size_voxels: 4}]", ["steps.0.size_voxels", "odd"]),
        ("steps: [{operation: close_organs, organs: [], size_voxels: 5}]", ["steps.0.organs"]),
        ("steps: [{operation: keep_axial_field, references: [aorta], gap_mm: -20}]", ["steps.0.gap_mm", "-20"]),
        ("steps: [{operation: keep_largest}, {operation: polish}]", ["steps.1", "polish", "keep_largest"]),
        ("steps: [{operation: keep_largest, organ: liver}]", ["steps.0.organ"]),
        ("steps: [{organs: [liver]}]", ["steps.0", "operation"]),
        ("description: no steps", ["steps"]),
        ("stages: []", ["stages"]),
        ("- just a list", ["mine.yaml"]),
        ("steps: [", ["YAML"]),
        ("labels: flare99\nsteps: [{operation: keep_largest}]", ["flare99"]),
    ],
)
def test_what_is_wrong_in_a_file_is_refused_with_its_place(tmp_path, text, complaints):
    with pytest.raises(InputError) as refusal:
        load_pipeline(write(tmp_path, text))
    for complaint in complaints:
        assert complaint in str(refusal.value)


def test_all_unknown_organs_are_named_at_once(tmp_path):
    path = write(tmp_path, "steps: [{operation: keep_largest, organs: [a1]}, {operation: fill_holes, organs: [b2]}]")
    with pytest.raises(InputError, match=r"steps\.0\.organs.*a1.*steps\.1\.organs.*b2"):
        load_pipeline(path)


def test_an_unknown_pipeline_is_refused_with_the_built_in_names():
    with pytest.raises(InputError, match="flare22-paper"):
        load_pipeline("flare21")


def test_ids_outside_the_label_set_are_refused_and_named():
    labels = np.zeros((3, 3, 3), dtype=np.uint8)
    labels[1, 1, 1], labels[0, 0, 0] = 14, 200
    with pytest.raises(InputError, match=r"\[14, 200\].*flare23"):
        load_pipeline("flare22").apply(labels, SPACING_MM)


@pytest.mark.parametrize(
    "spacing_mm", [None, (), (1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0)]
)
def test_a_missing_or_impossible_spacing_is_refused(spacing_mm):
    with pytest.raises(InputError, match="spacing"):
        load_pipeline("flare22").apply(np.ones((3, 3, 3), dtype=np.uint8), spacing_mm)


@pytest.mark.parametrize("array", [np.zeros((3, 3), np.uint8), np.zeros((3, 3, 3), np.float32)])
def test_arrays_that_are_no_label_map_are_refused(array):
    with pytest.raises(InputError, match="integer label map"):
        load_pipeline("flare22").apply(array, SPACING_MM)


def test_built_in_thresholds_are_those_of_the_organ_table():
    for name in ("flare22", "flare22-paper"):
        minimum = load_pipeline(name).content.steps[0].minimum_mm3
        table = {organ.name: organ.min_volume_mm3 for organ in FLARE22}
        assert minimum == {organ: table[organ] for organ in minimum}
