"""DSC and NSD of cases: the official rules, one by one, and together against the spelled-out official script."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_reference import official_scores

from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.measures import evaluate_case
from nnunet_flare.evaluation.overlap import dice
from nnunet_flare.evaluation.structures import Structure, read_structures, structures_of
from nnunet_flare.images import Volume, read_labels
from nnunet_flare.labels import drawn_parts
from nnunet_flare.organs import FLARE22, FLARE23
from nnunet_flare.postprocessing.labelset import label_set

SPACING_MM = (2.5, 0.8, 0.8)
LIVER, AORTA = FLARE22[0], FLARE22[4]


def volume(array, spacing_mm=SPACING_MM):
    return Volume(np.asarray(array, dtype=np.uint8), spacing_mm)


def blocky(rng, shape, n_labels):
    """A label map of boxes that touch each other and every border, as crowded organs do."""
    coarse = rng.integers(0, n_labels + 1, tuple(-(-size // 4) for size in shape))
    return np.kron(coarse, np.ones((4, 4, 4), dtype=np.uint8))[: shape[0], : shape[1], : shape[2]].astype(np.uint8)


@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    seed=st.integers(0, 100_000),
    spacing_mm=st.tuples(*[st.sampled_from([0.7, 0.8, 1.0, 2.0, 2.5, 5.0])] * 3),
    corrected=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_label_maps_score_as_the_official_script_scores_them(shape, seed, spacing_mm, corrected):
    rng = np.random.default_rng(seed)
    reference = blocky(rng, shape, 14)
    prediction = np.roll(reference, tuple(rng.integers(-1, 2, 3)), (0, 1, 2))
    noise = rng.random(shape) < 0.03
    prediction[noise] = rng.integers(0, 15, int(noise.sum()))
    scores = evaluate_case(volume(reference, spacing_mm), volume(prediction, spacing_mm), FLARE23, corrected=corrected)
    for key, (dsc, nsd) in official_scores(
        reference, prediction, spacing_mm, structures_of(FLARE23), corrected=corrected
    ).items():
        assert scores.dsc[key] == pytest.approx(dsc, abs=1e-9), f"DSC of {key}"
        assert scores.nsd[key] == pytest.approx(nsd, abs=1e-9), f"NSD of {key}"


@pytest.mark.parametrize("name", ["ts_torso3mm_flare13", "ts_slab512_flare13", "chaos3_liver_gt"])
def test_real_label_maps_with_stray_voxels_score_as_the_official_script_scores_them(name, real_data):
    reference = read_labels(real_data / f"{name}.nii.gz")
    rng = np.random.default_rng(0)
    prediction = np.roll(reference.array, (1, 1, -1), (0, 1, 2))
    for corner in rng.integers(0, np.array(reference.array.shape) - 2, (6, 3)):
        prediction[tuple(slice(c, c + 2) for c in corner)] = rng.integers(1, 14)
    # The slow script, on the stray-ridden box of every organ, is what takes long here: keep every third voxel in plane.
    step = (slice(None), slice(None, None, 3), slice(None, None, 3)) if reference.array.shape[1] > 200 else ...
    truth, found = reference.array[step].copy(), prediction[step].copy()
    spacing_mm = reference.spacing_mm if step is ... else tuple(np.multiply(reference.spacing_mm, (1, 3, 3)).tolist())
    scores = evaluate_case(volume(truth, spacing_mm), volume(found, spacing_mm), FLARE22)
    for key, (dsc, nsd) in official_scores(truth, found, spacing_mm, structures_of(FLARE22)).items():
        assert (scores.dsc[key], scores.nsd[key]) == (pytest.approx(dsc, abs=1e-9), pytest.approx(nsd, abs=1e-9))


@pytest.mark.parametrize(
    "in_reference, in_prediction, expected", [(False, False, 1), (False, True, 0), (True, False, 0)]
)
def test_organs_absent_on_a_side(in_reference, in_prediction, expected):
    maps = np.zeros((2, 4, 5, 6), dtype=np.uint8)
    for array, present in zip(maps, (in_reference, in_prediction), strict=True):
        array[1:3, 1:3, 1:3] = LIVER.id if present else 0
    scores = evaluate_case(volume(maps[0]), volume(maps[1]), [LIVER])
    assert (scores.dsc[1], scores.nsd[1]) == (expected, expected)


def tube(first, last, label):
    array = np.zeros((10, 6, 6), dtype=np.uint8)
    array[first : last + 1, 2:4, 2:4] = label
    return array


def test_official_rules_leave_out_the_highest_labelled_slice_of_a_vessel():
    reference, prediction = tube(2, 6, AORTA.id), tube(2, 5, AORTA.id)
    assert evaluate_case(volume(reference), volume(prediction), [AORTA]).dsc[5] == 1.0
    corrected = evaluate_case(volume(reference), volume(prediction), [AORTA], corrected=True)
    assert corrected.dsc[5] == pytest.approx(2 * 16 / (20 + 16))


def test_what_a_vessel_has_beyond_the_labelled_slices_does_not_count():
    scores = evaluate_case(volume(tube(3, 6, AORTA.id)), volume(tube(0, 9, AORTA.id)), [AORTA], corrected=True)
    assert (scores.dsc[5], scores.nsd[5]) == (1.0, 1.0)


@pytest.mark.parametrize("organ", FLARE23, ids=lambda organ: organ.name)
def test_only_the_aorta_the_cava_and_the_oesophagus_count_on_labelled_slices_only(organ):
    scores = evaluate_case(volume(tube(3, 6, organ.id)), volume(tube(0, 9, organ.id)), [organ], corrected=True)
    assert (scores.dsc[organ.id] == 1.0) == (organ.id in (5, 6, 10))


def test_other_organs_count_on_all_slices():
    scores = evaluate_case(volume(tube(3, 6, LIVER.id)), volume(tube(0, 9, LIVER.id)), [LIVER])
    assert scores.dsc[1] == round(2 * 16 / (16 + 40), 4)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_vessel_on_a_single_slice_does_not_crash(corrected):
    reference, prediction = tube(4, 4, AORTA.id), tube(2, 6, AORTA.id)
    scores = evaluate_case(volume(reference), volume(prediction), [AORTA], corrected=corrected)
    assert (scores.dsc[5], scores.nsd[5]) == (1.0, 1.0)


def test_nsd_is_zero_under_dsc_a_fifth_by_the_official_rules_only():
    reference, prediction = np.zeros((2, 6, 6, 6), dtype=np.uint8)
    reference[2, 2, 1:3] = prediction[2, 2, 3:5] = LIVER.id
    official = evaluate_case(volume(reference), volume(prediction), [LIVER])
    corrected = evaluate_case(volume(reference), volume(prediction), [LIVER], corrected=True)
    assert (official.dsc[1], official.nsd[1]) == (0.0, 0.0)
    assert corrected.nsd[1] == 1.0  # within 5 mm all the same


def test_rounding_to_four_decimals_is_official_only():
    reference, prediction = np.zeros((2, 3, 7, 7), dtype=np.uint8)
    reference[1, :3, :3], prediction[1, :3, :7] = 1, 1
    reference[2, 0, 0] = 1
    exact = 2 * 9 / (10 + 21)
    assert evaluate_case(volume(reference), volume(prediction), [LIVER]).dsc[1] == round(exact, 4) != exact
    assert evaluate_case(volume(reference), volume(prediction), [LIVER], corrected=True).dsc[1] == exact


def test_a_region_is_scored_as_the_union_of_its_labels():
    region = Structure(1001, "liver_with_lesions", "LiverAll", (1, 14), 5.0)
    lesion = Structure(14, "lesion", "Lesion", (14,), 2.0)
    reference, prediction = np.zeros((2, 5, 8, 8), dtype=np.uint8)
    reference[1:4, 2:6, 2:6], prediction[1:4, 2:6, 2:6] = 1, 1
    reference[2, 3:5, 3:5] = 14  # the lesion was missed, the region is complete
    scores = evaluate_case(volume(reference), volume(prediction), [region, lesion])
    assert (scores.dsc[1001], scores.nsd[1001]) == (1.0, 1.0)
    assert (scores.dsc[14], scores.nsd[14]) == (0.0, 0.0)


OFFICIAL_TOLERANCES_MM = dict(zip(
    (organ.name for organ in FLARE23), (5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3, 2), strict=True
))  # fmt: skip


@pytest.mark.parametrize("from_document", [False, True])
def test_surfaces_count_up_to_each_structures_official_tolerance(tmp_path, from_document):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, **{organ.name: organ.id for organ in FLARE23}}}))
    structures = read_structures(str(path), tolerance_mm=9.0) if from_document else structures_of(FLARE23)
    reference = np.zeros((6, 40, 12))
    reference[1:5, 8:24, 2:10] = 1
    for structure in structures:
        within, beyond = (OFFICIAL_TOLERANCES_MM[structure.name] * share for share in (0.9999, 1.0001))
        found = []
        for shift_mm in (within, beyond):
            maps = (volume(array * structure.id, (30.0, shift_mm / 4, 30.0))
                    for array in (reference, np.roll(reference, 4, 1)))  # fmt: skip
            found.append(evaluate_case(*maps, [structure]).nsd[structure.id])
        assert found[0] == 1 > found[1] > 0, structure.name


def test_regions_and_names_of_a_dataset_json(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(
        '{"labels": {"background": 0, "abdomen": [1, 2, 3], "aorta": 3, "node": 2, "ignore": 4},'
        ' "regions_class_order": [1, 3, 2]}'
    )
    structures = read_structures(str(path), tolerance_mm=1.5)
    assert [(s.name, s.labels, s.nsd_tolerance_mm, s.labelled_slices_only) for s in structures] == [
        ("abdomen", (1, 2, 3), 1.5, False),
        ("aorta", (3,), 2, True),
        ("node", (2,), 1.5, False),
    ]
    assert len({s.id for s in structures}) == 3


def test_a_label_that_a_region_names_twice_counts_once(tmp_path):
    """In the score, in the volumes that post-processing learns, and in statistics."""
    dataset = {"labels": {"background": 0, "organs": [1, 1, 2], "liver": 2}, "regions_class_order": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    (region, _) = read_structures(str(tmp_path / "dataset.json"))
    reference, prediction = np.zeros((2, 3, 3, 9), np.uint8)
    reference[1, 1, :5], prediction[1, 1, :5] = [1, 1, 1, 2, 2], [0, 0, 0, 2, 2]
    scores = evaluate_case(volume(reference, (1, 1, 1)), volume(prediction, (1, 1, 1)), [region], corrected=True)
    assert scores.dsc[region.id] == pytest.approx(2 * 2 / (5 + 2))
    assert label_set(dataset["labels"]).structures["organs"] == drawn_parts(dataset)[1] == (1, 2)


@pytest.mark.parametrize("text", ["[]", "{}", '{"labels": {"background": 0}}', '{"labels": {"liver": "one"}}', "x"])
def test_a_dataset_json_without_usable_labels_is_refused(tmp_path, text):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json"):
        read_structures(str(path))


@pytest.mark.parametrize("labels", [{"aorta": 5, "vessel": [5]}, {"right_kidney": 2, "RK": 3}])
def test_two_structures_of_one_label_or_one_column_are_refused(tmp_path, labels):
    """The second would take the place of the first."""
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, **labels}}))
    with pytest.raises(
        InputError, match=rf"'{next(iter(labels))}' and '{list(labels)[1]}' both have the (label|column)"
    ):
        read_structures(str(path))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_dice_is_that_of_plain_counting(seed):
    rng = np.random.default_rng(seed)
    reference, prediction = rng.integers(0, 5, (2, 4, 5, 6)).astype(np.uint8)
    for label, value in dice(reference, prediction, [1, 4, 9]).items():
        truth, found = reference == label, prediction == label
        total = truth.sum() + found.sum()
        assert value == (2 * (truth & found).sum() / total if total else 1.0)


def test_dice_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="shapes"):
        dice(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), [1])
