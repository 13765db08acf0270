"""What agreeing on an organ's absence is worth: every way computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.selection.absence import with_absence
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.anatomy import anatomy_of, presence
from nnunet_flare.selection.choose import accepted_organs, scores, select

LIVER, SPLEEN = 1, 2


def three_members() -> list[np.ndarray]:
    """All draw the same liver; the first two have no spleen, the third has."""
    maps = [np.zeros((2, 4, 4), np.uint8) for _ in range(3)]
    for labels in maps:
        labels[0, :2] = LIVER
    maps[2][1, 0] = SPLEEN
    return maps


def test_the_share_of_pairs_that_both_lack_an_organ():
    agreement = pairwise_dice(three_members(), 4)
    assert agreement.per_organ == pytest.approx([1, 1 / 3, 1])
    assert agreement.absent == pytest.approx([0, 1 / 3, 1])  # of three pairs one, and nobody has organ 3
    assert agreement.with_last == pytest.approx([1, 0, 1])
    assert agreement.absent_with_last == pytest.approx([0, 0, 1])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("one", [1, 1 / 3, 1]),
        ("zero", [1, 0, 0]),
        ("skip", [1, 0, np.nan]),  # of the spleen the two pairs are left that disagree
        ("expected", [1, 0.1 / 3, 0.6]),  # 1/3 of (1 - 0.9), and 1 - 0.4
    ],
)
def test_each_way_of_counting_an_absence(how, expected):
    agreement = pairwise_dice(three_members(), 4)
    there = np.array([0.99, 0.9, 0.4])
    found = with_absence(agreement.per_organ, agreement.absent, how, presence=there)
    assert found == pytest.approx(expected, nan_ok=True)


def test_expected_needs_the_labelled_cases():
    with pytest.raises(ValueError, match="probability"):
        with_absence(np.ones((1, 2)), np.ones((1, 2)), "expected")


def test_agreement_that_could_not_be_computed_stays_unknown():
    assert np.isnan(with_absence(np.array([np.nan]), np.array([0.0]), "zero")).all()


# ------------------------------------------------------------------------------------ what the labelled cases say


def anatomy():
    """Two labelled cases of 10 slices. Liver in slices 0-5, spleen 2-4 (in the first case), kidney 5-10."""
    volumes = np.array([[1000.0, 100.0, 200.0], [4000.0, 0.0, 200.0]])
    slices = np.array([[[0, 5], [2, 4], [4, 10]], [[0, 5], [0, 0], [5, 10]]])
    return anatomy_of(volumes, slices, np.ones((2, 3), dtype=bool))


def test_prevalence_and_neighbours_come_from_the_labelled_cases():
    found = anatomy()
    assert found.prevalence == pytest.approx([3 / 4, 2 / 4, 3 / 4])  # (with + 1) / (cases + 2)
    liver_kidney = ((5 - 4) / 5 + 0 / 5) / 2  # one of the liver's five slices in the first case, none in the second
    kidney_liver = ((5 - 4) / 6 + 0 / 5) / 2
    expected = [[0, 2 / 5, liver_kidney], [1, 0, 0], [kidney_liver, 0, 0]]
    assert found.overlap == pytest.approx(np.array(expected))
    logs = np.log([1000, 4000])
    assert found.log_volume[0] == pytest.approx([logs.mean(), logs.std(ddof=1)])
    assert np.isnan(found.log_volume[1]).all()  # a single case has no range


def test_an_absent_organ_is_missed_where_its_neighbours_are():
    there = presence(anatomy(), np.array([[True, False, True], [False, False, True]]))
    assert there[0, 1] == pytest.approx(0.5)  # its only neighbour, the liver, is there: the prevalence
    assert there[1, 1] == 0  # no liver in the field of view, so no spleen either
    assert there[0, 0] == pytest.approx(0.75 * 0.1 / (0.4 + 0.1))  # of its neighbours the kidney alone


def test_an_organ_that_nobody_annotated_says_nothing():
    volumes, slices = np.array([[10.0, 0.0], [10.0, 10.0]]), np.array([[[0, 2], [0, 0]], [[0, 2], [0, 2]]])
    annotated = np.array([[True, False], [True, True]])
    assert anatomy_of(volumes, slices, annotated).prevalence == pytest.approx([3 / 4, 2 / 3])


# -------------------------------------------------------------------------------------------- scores and selection


def test_bad_members_that_miss_the_same_organs_no_longer_pass():
    """Of four organs two are found and agree at 0.8, two are missed by all: 0.9 in the papers, and taken."""
    agreement, absent = np.array([[0.8, 0.8, 1.0, 1.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])
    there = np.array([[0.95, 0.95, 0.95, 0.95]])
    found = {
        how: scores(with_absence(agreement, absent, how, presence=there), "mean-organ", skipped=absent == 1)[0]
        if how == "skip"
        else scores(with_absence(agreement, absent, how, presence=there), "mean-organ")[0]
        for how in ("one", "skip", "zero", "expected")
    }
    assert found == pytest.approx({"one": 0.9, "skip": 0.8, "zero": 0.4, "expected": (1.6 + 0.1) / 4})


def test_skipped_organs_count_neither_in_the_score_nor_alone():
    table = np.array([[0.9, np.nan, 0.7], [0.9, 0.2, 0.7], [np.nan, np.nan, np.nan]])
    skipped = np.array([[False, True, False], [False, False, False], [True, True, True]])
    names, organs = ["without", "with", "nothing"], ["liver", "spleen", "aorta"]
    assert scores(table, "min-organ", skipped=skipped) == pytest.approx([0.7, 0.2, 0])
    assert scores(table, "mean-organ", skipped=skipped) == pytest.approx([0.8, 0.6, 0])
    assert scores(table, "trimmed-min", skipped=skipped) == pytest.approx([0.9, 0.9, 0])
    decided = select(
        names, table, organs=organs, rule="min-organ", threshold=0.3, per_organ={"spleen": 0.5}, skipped=skipped
    )
    assert [d.taken for d in decided] == [True, False, False]
    low = select(names[:1], table[:1], organs=organs, rule="min-organ", threshold=0.8, skipped=skipped[:1])[0]
    assert low.reason == "min-organ 0.700 < 0.8; lowest organ aorta 0.700"


def test_nan_that_is_not_skipped_still_counts_zero():
    table = np.array([[0.9, np.nan]])
    assert scores(table, "mean-organ", skipped=np.array([[False, False]])) == pytest.approx([0.45])
    assert not accepted_organs(table, 0.5)[0, 1]
