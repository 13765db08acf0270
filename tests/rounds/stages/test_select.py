"""Which cases a round takes: a person's decisions, odd scans, clear stops, the early stop."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace

import pytest
from changed_runs import changed, labelled_cases, select, set_agreement

from nnunet_flare.errors import TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.decisions import Review
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.select import select_round


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def test_a_rejected_case_takes_no_other_cases_place_in_the_top_fraction(run):
    cases = labelled_cases(run)
    for rank, case in enumerate(cases):
        set_agreement(run, case, **dict.fromkeys(organ_ids(run), 0.9 - 0.1 * rank))
    best = changed(run, selection={"rule": "mean-organ", "threshold": 0.0, "top_fraction": 1 / len(cases)})
    write_json(run.paths.reviews, {"version": 1, "cases": [asdict(Review(cases[0], "reject", (), "stent"))]})
    select_round(best, best.round(0))
    decided = {entry.case: entry for entry in read_decisions(run.paths, 0)}
    assert [case for case in cases if decided[case].decision == "taken"] == [cases[1]]
    assert decided[cases[0]].decision == "refused" and decided[cases[0]].score == pytest.approx(0.9)
    assert "reviewed: rejected (stent)" in decided[cases[0]].reason


def test_when_nothing_is_taken_the_stop_names_the_threshold_and_what_to_change(run):
    with pytest.raises(TaskError) as caught:
        select(changed(run, selection={"threshold": 0.99999, "rule": "min-organ", "top_fraction": None}))
    message = str(caught.value)
    assert "none of 7 unlabelled cases" in message and "0.99999" in message and "top_fraction" in message
    assert all(e.reason for e in read_ledger(run.paths))


def test_when_every_scan_is_odd_no_threshold_is_blamed(run):
    """A lower threshold or another rule would not take one of them."""
    for case in labelled_cases(run):
        write_json(run.paths.case(0, case), {**read_json(run.paths.case(0, case)), "odd": ["spacing (20, 1, 1) mm"]})
    with pytest.raises(TaskError, match=r"none of 7 .* was judged .*keep_odd=true") as caught:
        select(changed(run, selection={"rule": "mean-organ", "threshold": 0.0}))
    assert "threshold" not in str(caught.value) and "nan" not in str(caught.value)


def test_agreement_that_could_not_be_computed_counts_as_zero_and_is_logged(run, caplog):
    case, other = labelled_cases(run)[:2]
    set_agreement(run, case, pancreas=None)
    set_agreement(run, other)
    select(changed(run, selection={"rule": "min-organ", "threshold": 0.01, "top_fraction": None}))
    entry = {e.case: e for e in read_ledger(run.paths)}[case]
    assert entry.decision == "refused" and entry.min_organ == 0.0
    assert f"{case}: the agreement of pancreas could not be computed" in caplog.text


def test_odd_scans_are_kept_out_unless_asked(run):
    case = labelled_cases(run)[0]
    document = read_json(run.paths.case(0, case))
    write_json(run.paths.case(0, case), {**document, "odd": ["spacing (z, y, x) (20, 1, 1) mm"]})
    everything = changed(run, selection={"rule": "all", "threshold": 0.0, "top_fraction": None})
    select_round(everything, everything.round(0))
    entry = {e.case: e for e in read_ledger(run.paths)}[case]
    assert entry.decision == "odd" and "spacing" in entry.reason
    select(changed(everything, selection={"keep_odd": True}))
    assert {e.case: e for e in read_ledger(run.paths)}[case].decision == "taken"


def test_early_stop_ends_the_rounds_when_agreement_no_longer_rises(run):
    for case in labelled_cases(run):
        set_agreement(run, case, **dict.fromkeys(organ_ids(run), 0.9))
    patient = changed(run, stop={"patience": 1})
    patient = replace(patient, recipe=patient.recipe.model_copy(update={"rounds": 4}))
    for number in (0, 1):
        if number == 1:
            shutil.copytree(run.paths.round(0), run.paths.round(1))
            for path in run.paths.round(1).glob("cases/*.json"):
                document = read_json(path)
                if "agreement" in document:
                    write_json(path, {**document, "agreement": dict.fromkeys(document["agreement"], 0.01)})
        select_round(patient, patient.round(number))
    assert (
        patient.final.number == 4 and patient.current().final.number == 2
    )  # rounds 0 and 1 were labelled, 2 is the final training
    assert read_json(run.paths.stop)["last_labelled_round"] == 1
    for path in run.paths.round(1).glob("cases/*.json"):  # labelled again by better members
        document = read_json(path)
        if "agreement" in document:
            write_json(path, {**document, "agreement": dict.fromkeys(document["agreement"], 0.99)})
    select_round(patient, patient.round(1))
    assert not run.paths.stop.exists() and patient.current().final.number == 4
