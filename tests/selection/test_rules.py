"""Selection rules: what they take, that they are monotone, and that NaN is never taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_flare.selection.choose import accepted_organs, room_for, scores, select
from nnunet_flare.selection.rules import RULES

ORGANS = ["liver", "spleen", "pancreas", "aorta"]
tables = st.integers(1, 12).flatmap(lambda n: arrays(np.float64, (n, len(ORGANS)), elements=st.floats(0, 1)))
with_rule = st.sampled_from(list(RULES))


def taken(table, **how):
    cases = [f"case_{row}" for row in range(len(table))]
    return {d.case for d in select(cases, table, organs=ORGANS, **how) if d.taken}


def test_the_papers_rule_takes_a_case_whose_worst_organ_reaches_the_threshold_exactly():
    table = np.array([[0.95, 0.9, 0.99, 1.0], [0.95, 0.8999, 0.99, 1.0]])
    assert taken(table, rule="min-organ", threshold=0.9) == {"case_0"}


def test_each_rule_reduces_a_row_as_it_says():
    row = np.array([[0.1, 0.4, 0.8, 0.9]])
    assert scores(row, "min-organ")[0] == 0.1
    assert scores(row, "trimmed-min")[0] == 0.8  # the third smallest
    assert scores(row, "mean-organ")[0] == pytest.approx(0.55)
    assert scores(row, "stability")[0] == pytest.approx(0.55)
    assert scores(row, "all")[0] == 1.0
    with pytest.raises(ValueError, match="unknown rule"):
        scores(row, "best")


@settings(max_examples=60, deadline=None)
@given(tables, with_rule, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_takes_more(table, rule, one, other):
    low, high = sorted((one, other))
    assert taken(table, rule=rule, threshold=high) <= taken(table, rule=rule, threshold=low)


@settings(max_examples=60, deadline=None)
@given(tables, with_rule, st.floats(0.01, 1), st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(table, rule, fraction, random):
    cases = [f"case_{row}" for row in range(len(table))]
    order = list(range(len(table)))
    random.shuffle(order)
    how = {"organs": ORGANS, "rule": rule, "threshold": 0.3, "top_fraction": fraction}
    straight = {d.case: d for d in select(cases, table, **how)}
    shuffled = {d.case: d for d in select([cases[i] for i in order], table[order], **how)}
    assert straight == shuffled


@settings(max_examples=60, deadline=None)
@given(tables, with_rule.filter(lambda rule: rule != "all"), st.floats(0, 1))
def test_nan_is_never_taken(table, rule, threshold):
    table[0] = np.nan
    assert "case_0" not in taken(table, rule=rule, threshold=threshold)


def test_round_change_prefers_what_changed_least_and_one_unknown_change_refuses():
    changes = np.array([[0.1, 0.3], [0.02, 0.0], [3.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])
    assert scores(changes, "round-change") == pytest.approx([1 / 1.2, 1 / 1.01, 1 / 3, 0, 0])
    names = ["r0 to r1", "r1 to r2"]
    decided = select(list("abcde"), changes, organs=names, rule="round-change", threshold=0.0, top_fraction=0.6)
    assert [d.taken for d in decided] == [True, True, True, False, False]
    assert "could not be computed" in decided[3].reason and "rank 4 of 5" in decided[4].reason
    strict = select(["a"], changes[:1], organs=names, rule="round-change", threshold=0.9)[0]
    assert strict.reason == "round-change 0.833 < 0.9; largest change r1 to r2 0.300"


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.floats(0, 50))), st.floats(0.01, 1))
def test_round_change_keeps_the_lowest_quantile_of_the_papers_uncertainty(changes, fraction):
    cases = [f"case_{row:02}" for row in range(len(changes))]
    chosen = select(cases, changes, organs=["one", "two"], rule="round-change", threshold=0.0, top_fraction=fraction)
    uncertainty = 0.5 * (changes[:, 0] + changes[:, 1])
    kept = [u for u, d in zip(uncertainty, chosen, strict=True) if d.taken]
    left = [u for u, d in zip(uncertainty, chosen, strict=True) if not d.taken]
    assert len(kept) == max(1, int(np.floor(fraction * len(changes) + 0.5)))
    assert not left or max(kept) <= min(left) + 1e-9


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0.01, 1))
def test_a_top_fraction_takes_that_share_of_all_cases_and_the_best_of_them(table, fraction):
    found = taken(table, rule="mean-organ", threshold=0.0, top_fraction=fraction)
    assert len(found) == max(1, int(np.floor(fraction * len(table) + 0.5)))
    means = {f"case_{row}": table[row].mean() for row in range(len(table))}
    left = set(means) - found
    assert not left or min(means[c] for c in found) >= max(means[c] for c in left) - 1e-12


@pytest.mark.parametrize(("fraction", "cases", "room"), [(0.5, 5, 3), (0.5, 4, 2), (0.1, 4, 1), (0.962, 2000, 1924)])
def test_half_a_case_is_one(fraction, cases, room):
    assert room_for(fraction, cases) == room


def test_thresholds_of_single_organs_hold_beside_the_rule():
    table = np.array([[1.0, 1.0, 0.6, 1.0], [1.0, 1.0, 0.7, 1.0]])
    assert taken(table, rule="mean-organ", threshold=0.5, per_organ={"pancreas": 0.65}) == {"case_1"}
    with pytest.raises(ValueError, match="unknown organs"):
        taken(table, per_organ={"heart": 0.5})


def test_every_refusal_names_what_was_too_low():
    table = np.array([[1.0, 0.2, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.99, 1.0, 1.0, 1.0]])
    low, best, second = select(["a", "b", "c"], table, organs=ORGANS, threshold=0.9, top_fraction=1 / 3)
    assert "min-organ 0.200 < 0.9" in low.reason and "spleen 0.200" in low.reason
    assert best.taken and ">= 0.9" in best.reason
    assert not second.taken and "rank 2 of 3" in second.reason


def test_organs_are_accepted_one_by_one():
    table = np.array([[0.95, 0.5, np.nan, 0.85]])
    assert accepted_organs(table, 0.9).tolist() == [[True, False, False, False]]
    assert accepted_organs(table, 0.9, {3: 0.8}).tolist() == [[True, False, False, True]]
    assert accepted_organs(table, 0.0).tolist() == [[True, True, False, True]], "NaN is never certain"


# Complete labels


@settings(max_examples=60, deadline=None)
@given(tables, with_rule, st.floats(0, 1), st.sets(st.integers(0, 11)))
def test_a_case_that_lacks_an_organ_is_never_taken_and_no_other_case_is_lost_by_it(table, rule, threshold, rows):
    missing = {f"case_{row}": ["pancreas"] for row in rows}
    complete = taken(table, rule=rule, threshold=threshold, missing=missing)
    assert complete == taken(table, rule=rule, threshold=threshold) - set(missing)
    assert taken(table, rule=rule, threshold=threshold, missing={}) == taken(table, rule=rule, threshold=threshold)


def test_incomplete_cases_leave_their_place_in_a_top_fraction_to_others():
    table = np.array([[1.0] * 4, [0.99] * 4, [0.98] * 4, [0.97] * 4])
    how = {"rule": "stability", "threshold": 0.9, "top_fraction": 0.5}
    assert taken(table, **how) == {"case_0", "case_1"}
    assert taken(table, **how, missing={"case_0": ["liver", "aorta"], "case_1": []}) == {"case_1", "case_2"}
    reasons = [d.reason for d in select(list("abcd"), table, organs=ORGANS, **how, missing={"a": ["liver", "aorta"]})]
    assert reasons[0] == "not complete: no liver, aorta"


def test_a_share_of_each_domain_is_taken_so_that_none_fills_the_others_places():
    """One domain is better throughout; by hand, the best half of each of 4 and 2 cases."""
    cases = ["a1", "a2", "a3", "a4", "b1", "b2"]
    table = np.array([[0.9], [0.95], [0.8], [0.85], [0.3], [0.4]])
    domains = {case: case[0] for case in cases}
    options = {"organs": ["liver"], "rule": "mean-organ", "threshold": 0.0, "top_fraction": 0.5}
    together = select(cases, table, **options)
    apart = select(cases, table, **options, domains=domains)
    assert [d.case for d in together if d.taken] == ["a1", "a2", "a4"]
    assert [d.case for d in apart if d.taken] == ["a1", "a2", "b2"]
    assert apart[4].reason == "mean-organ 0.300 is rank 2 of 2 of domain b, below the best 50 %"
    assert apart[5].reason == "mean-organ 0.400 >= 0, among the best 50 % of domain b"
    order = [5, 0, 3, 1, 4, 2]
    shuffled = select([cases[i] for i in order], table[order], **options, domains=domains)
    assert {d.case: d.reason for d in shuffled} == {d.case: d.reason for d in apart}
    least = select(cases, table, **{**options, "threshold": 0.35, "top_fraction": 0.1}, domains=domains)
    assert [d.case for d in least if d.taken] == ["a2", "b2"], "at least one of each, if it passes the threshold"
