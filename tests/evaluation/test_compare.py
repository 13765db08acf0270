"""Paired comparison: means, intervals and p-values against SciPy and by hand."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.compare import MEAN_ROW, compare
from nnunet_flare.evaluation.structures import structures_of
from nnunet_flare.evaluation.table import CaseRow, ScoreTable, read_csv
from nnunet_flare.organs import FLARE22, FLARE23

ORGANS = FLARE22[:3]


def table_of(values, organs=ORGANS, first=0):
    rows = []
    for place, case in enumerate(values, first):
        scores = {organ.id: float(value) for organ, value in zip(organs, case, strict=True)}
        rows.append(CaseRow(f"case_{place:03d}.nii.gz", scores, scores))
    return ScoreTable(structures_of(organs), tuple(rows))


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    a = rng.uniform(0.5, 0.9, (30, 3))
    return a, np.clip(a + rng.normal([0.05, 0.0, 0.01], 0.03, (30, 3)), 0, 1)


def row_of(comparison, structure):
    return next(row for row in comparison.rows if row.structure == structure and row.measure == "DSC")


def test_a_clear_gain_is_significant_and_its_interval_holds_the_difference(scores):
    a, b = scores
    row = row_of(compare(table_of(a), table_of(b)), "Liver")
    assert row.difference == pytest.approx(np.mean(b[:, 0] - a[:, 0]))
    assert 0 < row.low < row.difference < row.high
    assert row.p == pytest.approx(stats.wilcoxon(np.round(b[:, 0] - a[:, 0], 9)).pvalue)
    assert row.p < 0.001


def test_the_interval_is_that_of_scipys_percentile_bootstrap(scores):
    a, b = scores
    row = row_of(compare(table_of(a), table_of(b)), "RK")
    expected = stats.bootstrap((b[:, 1] - a[:, 1],), np.mean, method="percentile", n_resamples=10_000, rng=1)
    interval = expected.confidence_interval
    assert (row.low, row.high) == (pytest.approx(interval.low, abs=5e-4), pytest.approx(interval.high, abs=5e-4))


def test_identical_predictions_do_not_differ(scores):
    a, _ = scores
    for row in compare(table_of(a), table_of(a)).rows:
        assert (row.difference, row.low, row.high, row.p, row.p_holm) == (0, 0, 0, 1, 1)


def test_holms_correction_by_hand(scores):
    a, b = scores
    single = [row for row in compare(table_of(a), table_of(b)).rows if row.measure == "DSC"][1:]
    p = sorted(row.p for row in single)
    expected = [min(1, 3 * p[0]), min(1, max(3 * p[0], 2 * p[1])), min(1, max(3 * p[0], 2 * p[1], p[2]))]
    assert sorted(row.p_holm for row in single) == pytest.approx(expected)


def test_the_organ_mean_leaves_lesions_out():
    organs = (FLARE23[0], FLARE23[13])
    a, b = np.full((5, 2), 0.5), np.full((5, 2), 0.5)
    b[:, 1] = 1.0
    assert row_of(compare(table_of(a, organs), table_of(b, organs)), MEAN_ROW).difference == 0


def test_only_common_cases_are_compared_and_the_others_listed(scores):
    a, b = scores
    comparison = compare(table_of(a), table_of(b[2:], first=2))
    assert len(comparison.cases) == 28
    assert comparison.only_a == ("case_000.nii.gz", "case_001.nii.gz") and comparison.only_b == ()
    expected = np.mean(b[2:, 0] - a[2:, 0])
    assert row_of(comparison, "Liver").difference == pytest.approx(expected)


def test_cases_are_the_same_in_files_of_another_ending(scores):
    """As predictions in NRRD, of which one is missing and so stands under the name of its reference, in NIfTI."""
    a, b = map(table_of, scores)
    other = replace(a, rows=tuple(replace(row, name=row.name.replace(".nii.gz", ".nrrd")) for row in a.rows[:-1]))
    comparison = compare(replace(other, rows=(*other.rows, a.rows[-1])), b)
    assert comparison.rows == compare(a, b).rows and not comparison.only_a and not comparison.only_b


def test_tables_without_common_cases_or_of_other_labels_are_refused(scores):
    a, _ = scores
    with pytest.raises(InputError, match="no case in common"):
        compare(table_of(a), table_of(a, first=100))
    with pytest.raises(InputError, match="--labels"):
        compare(table_of(a), table_of(a[:, :2], ORGANS[:2]))


def test_a_table_that_has_a_case_twice_is_refused_with_the_line(scores, tmp_path):
    """As the joined tables of two folds: which of the rows counts, nobody can tell."""
    a, _ = scores
    table_of(a).write_csv(tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a.csv").write_text("".join([*lines, lines[1]]))
    with pytest.raises(InputError, match=rf"line {len(lines) + 1}: case_000.nii.gz is there twice"):
        read_csv(tmp_path / "a.csv", table_of(a).structures)


def test_the_written_table_has_a_line_per_structure_and_measure(scores, tmp_path):
    a, b = scores
    compare(table_of(a), table_of(b)).write_csv(tmp_path / "c.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "c.csv").read_text())))
    assert rows[0][:4] == ["Structure", "Measure", "Cases", "Mean_A"]
    assert [row[:3] for row in rows[1:5]] == [[name, "DSC", "30"] for name in (MEAN_ROW, "Liver", "RK", "Spleen")]
    assert len(rows) == 1 + 2 * 4
