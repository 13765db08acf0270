"""Pipelines made from data: organ volumes learned from labels, and operations chosen by validation Dice."""

import numpy as np
import pytest
import yaml

from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.postprocessing.candidates import candidates
from nnunet_flare.postprocessing.document import learned_notes, tuned_notes, write_pipeline
from nnunet_flare.postprocessing.labelset import label_set
from nnunet_flare.postprocessing.learn import smallest_organs, volumes_of, with_learned_volumes
from nnunet_flare.postprocessing.pipeline import BUILT_IN, load_pipeline
from nnunet_flare.postprocessing.steps import FillHoles, KeepLargest, RemoveSmallComponents, RemoveSmallOrgans
from nnunet_flare.postprocessing.tune import tune

VOXEL_MM3 = 2.0 * 1.5 * 1.0
FLARE22 = label_set("flare22")
LIVER, SPLEEN, AORTA = 1, 3, 5


def put(folder, name, labels):
    write_labels(folder / f"{name}.nii.gz", labels, Volume(labels, (2.0, 1.5, 1.0)))


def block(size, label, at=2, shape=(16, 20, 24)):
    labels = np.zeros(shape, dtype=np.uint8)
    labels[at : at + size, at : at + size, at : at + size] = label
    return labels


@pytest.fixture
def training(tmp_path):
    """Livers of three sizes; a spleen in two of the cases."""
    for name, liver, spleen in (("big", 8, 3), ("small", 5, 4), ("none", 6, 0)):
        labels = block(liver, LIVER)
        labels[12:, 15 : 15 + spleen, 20 : 20 + spleen] = SPLEEN
        put(tmp_path / "labels", name, labels)
    return tmp_path / "labels"


def test_the_smallest_volume_of_each_organ_is_measured_in_mm3(training):
    learned = smallest_organs(training, FLARE22, processes=1)
    assert [(e.organ, e.case, e.cases) for e in learned.smallest] == [("liver", "small", 3), ("spleen", "big", 2)]
    assert learned.smallest[0].volume_mm3 == pytest.approx(5**3 * VOXEL_MM3)
    assert learned.smallest[1].volume_mm3 == pytest.approx(4 * 3 * 3 * VOXEL_MM3)
    assert "aorta" in learned.unseen and learned.cases == 3


def test_a_base_that_judges_organs_by_volume_gets_their_learned_volumes(training):
    base = load_pipeline("flare22")
    content = with_learned_volumes(base, smallest_organs(training, FLARE22, processes=1))
    assert dict(content.steps[0].minimum_mm3) == {"spleen": pytest.approx(36 * VOXEL_MM3)}  # the code spares the liver
    assert content.steps[1:] == base.content.steps[1:]


@pytest.mark.parametrize("spacing_mm", [(2.5, 0.7, 0.7), (0.02, 0.02, 0.02)])
def test_the_smallest_organ_in_training_is_not_erased_and_a_smaller_one_is(tmp_path, spacing_mm):
    """Also in a scan of micrometres, where an organ has hundredths of a mm3."""
    labels = np.zeros((5, 6, 7), dtype=np.uint8)
    labels[2, 1:4] = labels[2, 4, :2] = LIVER  # 23 voxels: 28.175 mm3
    write_labels(tmp_path / "a.nii.gz", labels, Volume(labels, spacing_mm))
    content = with_learned_volumes(
        load_pipeline("largest"), smallest_organs(tmp_path, FLARE22, processes=1), fraction=1
    )
    write_pipeline(tmp_path / "p.yaml", content, notes=[[]] * len(content.steps))
    learned = load_pipeline(tmp_path / "p.yaml")
    np.testing.assert_array_equal(learned.apply(labels, spacing_mm), labels)
    labels[2, 1, 0] = 0
    assert not learned.apply(labels, spacing_mm).any()


def test_a_base_without_volumes_gets_a_step_for_all_organs_seen(training):
    content = with_learned_volumes(
        load_pipeline("largest"), smallest_organs(training, FLARE22, processes=1), fraction=0.25
    )
    assert set(content.steps[0].minimum_mm3) == {"liver", "spleen"} and content.steps[0].fraction == 0.25
    assert isinstance(content.steps[1], KeepLargest)


@pytest.mark.parametrize("base", BUILT_IN)
def test_a_learned_pipeline_is_written_with_its_reasons_and_reads_back(training, tmp_path, base):
    learned = smallest_organs(training, FLARE22, processes=1)
    content = with_learned_volumes(load_pipeline(base), learned)
    notes, remarks = learned_notes(content, learned)
    write_pipeline(tmp_path / "p.yaml", content, notes=notes, remarks=remarks)
    text = (tmp_path / "p.yaml").read_text()
    assert "liver: 375.0 mm3 in small (3 cases)" in text and "aorta" in text.splitlines()[-1]
    assert load_pipeline(tmp_path / "p.yaml").content == content
    assert volumes_of(load_pipeline(tmp_path / "p.yaml"))["spleen"] == pytest.approx(36 * VOXEL_MM3)


def test_a_pipeline_without_volumes_cannot_give_any():
    with pytest.raises(InputError, match="learn"):
        volumes_of(load_pipeline("largest"))


def test_labels_without_any_organ_teach_nothing(tmp_path):
    put(tmp_path / "labels", "empty", np.zeros((4, 4, 4), dtype=np.uint8))
    with pytest.raises(InputError, match="empty"):
        smallest_organs(tmp_path / "labels", FLARE22, processes=1)


def test_bad_label_maps_are_named_and_left_out(training):
    (training / "broken.nii.gz").write_bytes(b"")
    put(training, "foreign", block(3, 14))
    learned = smallest_organs(training, FLARE22, processes=1)
    assert learned.cases == 3
    assert [case for case, _ in learned.failed] == ["broken", "foreign"] and "[14]" in learned.failed[1][1]


@pytest.fixture
def validation(tmp_path):
    """Livers predicted with far strays (largest component helps) and an aorta that truly is in two pieces."""
    for place in range(3):
        truth = block(8, LIVER)
        truth[1:3, 15, 15], truth[13:15, 15, 15] = AORTA, AORTA
        prediction = truth.copy()
        prediction[14, 17:19, 20 + place] = LIVER
        put(tmp_path / "ref", f"case_{place}", truth)
        put(tmp_path / "pred", f"case_{place}", prediction)
    return tmp_path / "pred", tmp_path / "ref"


def steps_of(tuned, kind):
    return [step for step in tuned.content.steps if isinstance(step, kind)]


def test_what_helps_is_kept_for_the_organs_that_gain(validation):
    tuned = tune(*validation, FLARE22, processes=1, progress=False)
    (step,) = steps_of(tuned, RemoveSmallComponents)
    assert step.organs == ["liver"]
    assert tuned.after > tuned.before and tuned.after == pytest.approx(1.0)
    assert not steps_of(tuned, KeepLargest)  # nothing left to gain after it, and the aorta would lose


def test_an_operation_that_costs_more_than_it_mends_is_refused(tmp_path):
    """A hole of three voxels, of which one is a fault of the prediction and two are true: filling makes it worse."""
    truth, prediction = block(9, LIVER), block(9, LIVER)
    truth[5, 5, 5:7] = prediction[5, 5, 5:7] = prediction[5, 6, 5] = 0
    put(tmp_path / "ref", "case", truth)
    put(tmp_path / "pred", "case", prediction)
    tuned = tune(tmp_path / "pred", tmp_path / "ref", FLARE22, processes=1, progress=False)
    assert steps_of(tuned, FillHoles) == [] and tuned.after == tuned.before


def test_an_organ_is_judged_by_its_mean_over_the_cases(tmp_path):
    """Erasing small organs removes three false spleens and one true one."""
    for place in range(4):
        truth, prediction = block(9, LIVER), block(9, LIVER)
        prediction[12, 15, 15] = SPLEEN
        if place == 0:
            truth[13, 2, 2] = prediction[13, 2, 2] = SPLEEN
            prediction[12, 15, 15] = 0
        put(tmp_path / "ref", f"case_{place}", truth)
        put(tmp_path / "pred", f"case_{place}", prediction)
    tuned = tune(tmp_path / "pred", tmp_path / "ref", FLARE22, processes=1, progress=False)
    (step,) = steps_of(tuned, RemoveSmallOrgans)
    assert list(step.minimum_mm3) == ["spleen"]  # three cases gain, one loses: the organ's mean rises


@pytest.mark.parametrize("max_loss, kept", [(0.0, False), (0.002, False), (0.02, True)])
def test_no_organ_loses_more_than_stated(tmp_path, max_loss, kept):
    """The axial field cuts a stray that is above the aorta, and with it a little true liver."""
    truth = block(9, LIVER)
    truth[2:11, 15, 15] = AORTA
    truth[11, 5, 5:10] = LIVER
    prediction = truth.copy()
    prediction[14, 2:8, 2:8] = SPLEEN
    put(tmp_path / "ref", "case", truth)
    put(tmp_path / "pred", "case", prediction)
    volumes = {"kidney": 1.0}  # names that the label set lacks are not judged
    tuned = tune(
        tmp_path / "pred",
        tmp_path / "ref",
        FLARE22,
        minimum_mm3=volumes,
        max_loss=max_loss,
        processes=1,
        progress=False,
    )
    trial = next(t for t in tuned.trials if t.title.startswith("keep the slices"))
    assert (trial.step is not None) == kept
    assert kept or "liver loses" in trial.reason


def test_the_written_pipeline_explains_itself_and_does_what_was_measured(validation, tmp_path):
    tuned = tune(*validation, FLARE22, processes=2, progress=False)
    notes, remarks = tuned_notes(tuned)
    write_pipeline(tmp_path / "t.yaml", tuned.content, notes=notes, remarks=remarks)
    text = (tmp_path / "t.yaml").read_text()
    assert f"mean Dice {tuned.before:.4f} to" in text and "gains: liver" in text and "tried and not kept:" in text
    assert "close gaps" in text
    assert load_pipeline(tmp_path / "t.yaml").content == tuned.content


def test_when_nothing_helps_the_pipeline_is_empty_and_says_so(tmp_path):
    put(tmp_path / "ref", "case", block(8, LIVER))
    put(tmp_path / "pred", "case", block(8, LIVER))
    tuned = tune(tmp_path / "pred", tmp_path / "ref", FLARE22, processes=1, progress=False)
    notes, remarks = tuned_notes(tuned)
    write_pipeline(tmp_path / "t.yaml", tuned.content, notes=notes, remarks=remarks)
    assert yaml.safe_load((tmp_path / "t.yaml").read_text())["steps"] == []
    labels = block(8, LIVER)
    np.testing.assert_array_equal(load_pipeline(tmp_path / "t.yaml").apply(labels, (1.0, 1.0, 1.0)), labels)


def test_operations_that_need_absent_organs_are_not_tried(validation):
    small_set = label_set({"background": 0, "liver": 1, "aorta_thing": 5})
    trials = {t.title: t for t in tune(*validation, small_set, processes=1, progress=False).trials}
    assert trials["give gallbladder inside the liver to the liver"].reason == "the label set lacks its organs"
    assert trials["keep the slices of the great vessels"].reason == "the label set lacks its organs"


def test_candidates_use_the_data_sets_own_names():
    own = label_set({"background": 0, "Liver": 1, "IVC": 2, "Gall-Bladder": 3})
    steps = {c.title: c.make(c.organs) for c in candidates(own, {"gallbladder": 100.0}) if c.organs}
    assert steps["keep the slices of the great vessels"].references == ["IVC"]
    assert steps["give gallbladder inside the liver to the liver"].organ == "Gall-Bladder"
    assert list(steps["erase organs below half their smallest volume"].minimum_mm3) == ["Gall-Bladder"]


def test_cases_that_cannot_be_scored_are_left_out_and_named(validation):
    (validation[0] / "case_1.nii.gz").write_bytes(b"broken")
    put(validation[0], "case_2", block(8, 77))
    tuned = tune(*validation, FLARE22, processes=1, progress=False)
    assert tuned.cases == ("case_0",)
    assert [case for case, _ in tuned.failed] == ["case_1", "case_2"] and "[77]" in tuned.failed[1][1]


def test_folders_without_a_common_case_are_refused(tmp_path):
    put(tmp_path / "pred", "a", block(3, LIVER))
    put(tmp_path / "ref", "b", block(3, LIVER))
    with pytest.raises(InputError, match="share no case"):
        tune(tmp_path / "pred", tmp_path / "ref", FLARE22, processes=1)


REGIONS = label_set({"background": 0, "organs": [1, 2, 3], "pair": [2, 3], "spleen": 3, "ignore": 4})


def nested(size, at=2, shape=(16, 20, 24)):
    """A block of label 1 whose middle is 2 and 3."""
    labels = block(size, 1, at, shape)
    labels[at + 1 : at + 3, at + 1 : at + 3, at + 1 : at + 3] = 2
    labels[at + 1, at + 1, at + 1] = 3
    return labels


def test_regions_are_measured_as_unions_and_unfinished_cases_not_at_all(tmp_path):
    for name, size in (("large", 6), ("small", 5), ("unfinished", 4)):
        labels = nested(size)
        if name == "unfinished":
            labels[-2:] = 4
        put(tmp_path / "labels", name, labels)
    learned = smallest_organs(tmp_path / "labels", REGIONS, processes=1)
    expected = {"spleen": 1, "organs": 5**3, "pair": 8}
    assert {e.organ: e.volume_mm3 for e in learned.smallest} == pytest.approx(
        {organ: voxels * VOXEL_MM3 for organ, voxels in expected.items()}
    )
    ((case, reason),) = learned.failed
    assert case == "unfinished" and f"{2 * 20 * 24} voxels are not annotated" in reason


def test_tuning_judges_regions_and_counts_no_ignored_voxel(tmp_path):
    """A stray piece of the region is erased; one where nobody annotated costs nothing, nor does erasing it help."""
    truth, predicted = nested(6), nested(6)
    truth[-2:] = 4
    predicted[10:12, 15:17, 15:17] = 2
    predicted[-1, 5:9, 5:9] = 1
    put(tmp_path / "ref", "a", truth)
    put(tmp_path / "pred", "a", predicted)
    tuned = tune(tmp_path / "pred", tmp_path / "ref", REGIONS, minimum_mm3={}, processes=1)
    organs, pair = 6**3, 8
    before = [2 * 1 / 2, 2 * organs / (2 * organs + 8), 2 * pair / (2 * pair + 8)]
    assert tuned.before == pytest.approx(np.mean(before)) and tuned.after == pytest.approx(1.0)
    kept = tuned.content.steps[0]
    assert isinstance(kept, RemoveSmallComponents) and "organs" in kept.organs
    write_pipeline(tmp_path / "p.yaml", tuned.content, notes=[[]] * len(tuned.content.steps))
    labels = {"background": 0, "organs": [1, 2, 3], "pair": [2, 3], "spleen": 3, "ignore": 4}
    cleaned = load_pipeline(tmp_path / "p.yaml", labels=labels).apply(predicted, (2.0, 1.5, 1.0))
    assert not cleaned[10:12].any() or not (cleaned[10:12, 15:17, 15:17] == 2).any()


def test_a_region_where_voxels_would_be_given_to_a_label_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("steps:\n  - {operation: fill_holes, organs: [pair]}\n")
    with pytest.raises(InputError, match="'pair' is a region of the labels"):
        load_pipeline(tmp_path / "p.yaml", labels={"background": 0, "pair": [1, 2], "spleen": 2})
