"""A person's decisions in a run: kept, honoured by the next select task, and written into the ledger."""

from __future__ import annotations

import csv
import logging

import numpy as np
import pytest
from changed_runs import changed
from fake_run import ORGANS, fake_run

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.report.gather import gather
from nnunet_flare.report.page import write_report
from nnunet_flare.rounds import do_task as work
from nnunet_flare.rounds.run.decisions import keep_reviews, load_reviews
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import FOLDERS, Run
from nnunet_flare.rounds.run.tasks import find_task, graph
from nnunet_flare.rounds.stages.select import select_round

CASES = [f"case_{number:03d}" for number in range(10)]


@pytest.fixture
def run(tmp_path) -> Run:
    made = fake_run(tmp_path, cases=CASES, rounds=2, pictured=0)
    made.paths.done("select-r1").unlink()
    return made


def decide(run: Run, *rows: str) -> None:
    path = run.root.parent / "decisions.csv"
    path.write_text("\n".join(["case,decision,organ,comment", *rows, ""]))
    keep_reviews(run, path)


def by_case(run: Run, number: int) -> dict:
    return {entry.case: entry for entry in read_decisions(run.paths, number)}


def test_the_next_round_honours_accepted_and_rejected_cases(run):
    select_round(run, run.round(1))
    before = by_case(run, 1)
    taken = next(case for case in CASES if before[case].decision == "taken")
    refused = next(case for case in CASES if before[case].decision == "refused")
    decide(run, f"{taken},reject,,stent", f"{refused},accept,,")
    select_round(run, run.round(1))
    after = {e.case: e for e in read_ledger(run.paths) if e.round == 1}
    assert after[taken].decision == "refused"
    assert after[taken].reason == f"reviewed: rejected (stent); {before[taken].reason}"
    assert after[refused].decision == "taken" and after[refused].reason.startswith("reviewed: accepted; mean-organ")
    best = sorted(set(CASES) - {taken}, key=lambda case: -before[case].score)[:5]  # half of the nine that are left
    for case in set(CASES) - {taken, refused}:
        assert (after[case].decision == "taken") == (case in best)
        assert after[case].score == before[case].score
    rows = {row["case"]: row for row in csv.DictReader(run.paths.selection(1).read_text().splitlines())}
    assert rows[taken]["taken"] == "0" and rows[refused]["taken"] == "1"


def test_the_agreement_of_a_wrong_organ_counts_as_zero(run):
    select_round(run, run.round(1))
    case = max(by_case(run, 1).values(), key=lambda e: e.score).case
    before = by_case(run, 1)[case]
    decide(run, f"{case},organ-wrong,liver,", f"{case},organ-wrong,spleen,cut off")
    select_round(run, run.round(1))
    after = by_case(run, 1)[case]
    assert after.agreement["liver"] == after.agreement["spleen"] == after.min_organ == 0
    lost = (before.agreement["liver"] + before.agreement["spleen"]) / 13
    assert after.score == pytest.approx(before.score - lost)
    assert after.reason.startswith("reviewed: liver, spleen wrong (cut off); ")
    assert read_json(run.paths.case(1, case))["agreement"]["liver"] == before.agreement["liver"]  # as measured


def test_the_mean_agreement_is_that_of_the_cases(run):
    """As in the report; a case with few organs counts as much as one with many."""
    own = changed(run, selection={"absent": "skip"})
    path = run.paths.case(1, CASES[0])
    document = read_json(path)
    lacking = dict.fromkeys(list(document["agreement"])[1:], 1.0)
    seen = {organ: organ not in lacking for organ in document["agreement"]}
    agreement = {organ: 1.0 if organ in lacking else 0.1 for organ in document["agreement"]}
    write_json(path, {**document, "agreement": agreement, "present": seen, "absent_pairs": lacking})
    found = select_round(own, own.round(1))["mean_agreement"]
    judged = by_case(run, 1)
    assert judged[CASES[0]].mean_organ == pytest.approx(0.1)
    assert found == pytest.approx(np.mean([judged[case].mean_organ for case in CASES]))


def test_an_organ_that_was_called_wrong_is_no_longer_steady(run):
    steady = changed(run, selection={"rule": "steady"})
    case = CASES[0]
    path = run.paths.case(1, case)
    document = read_json(path)
    write_json(path, {**document, "steady": dict.fromkeys(document["agreement"], 1.0)})
    decide(run, f"{case},organ-wrong,liver,")
    select_round(steady, steady.round(1))
    assert by_case(run, 1)[case].agreement["liver"] == 0


@pytest.mark.parametrize(("rule", "trains"), [("all", True), ("min-organ", False)])
def test_that_a_case_trains_with_a_wrong_organ_all_the_same_is_said(run, caplog, rule, trains):
    own = changed(run, selection={"rule": rule, "threshold": 0.01, "top_fraction": None})
    decide(run, "case_000,organ-wrong,liver,", "case_001,accept,,", "case_002,reject,,")
    select_round(own, own.round(1))
    assert by_case(run, 1)["case_000"].decision == ("taken" if trains else "refused")
    said = "takes 1 case(s) with organs that were called wrong, and trains on these: case_000 (liver)"
    assert (said in caplog.text) == trains


def test_a_later_file_replaces_what_was_said_about_the_same_case(run):
    decide(run, "case_000,reject,,", "case_001,reject,,")
    decide(run, "case_000,accept,,")
    kept = load_reviews(run)
    assert kept["case_000"].decision == "accept" and kept["case_001"].decision == "reject"


def test_a_wrong_file_changes_nothing(run):
    decide(run, "case_000,reject,,")
    with pytest.raises(InputError, match="line 2"):
        decide(run, "case_999,reject,,")
    assert set(load_reviews(run)) == {"case_000"}


def test_decisions_that_come_too_late_are_said(run, caplog):
    caplog.set_level(logging.INFO, "nnunet_flare")
    decide(run, "case_000,reject,,")
    assert "applied from round 1 on" in caplog.text
    write_json(run.paths.done("select-r1"), {"task": "select-r1", "seconds": 1.0})
    decide(run, "case_000,reject,,")
    assert "this run has no selection left" in caplog.text


def test_retry_reads_the_decisions_before_anything_runs(run, tmp_path, capsys):
    path = tmp_path / "wrong.csv"
    path.write_text("case,decision\nnobody,accept\n")
    assert main(["retry", "-o", str(run.root), "--decisions", str(path)]) == 2
    assert "nobody" in capsys.readouterr().err


def test_every_round_and_the_final_model_are_reported(run):
    tasks = graph(run)
    assert tasks["report-r0"].needs == ("select-r0",) and tasks["report-r1"].needs == ("select-r1",)
    assert tasks["report-r2"].needs == ("train-r2-fall",)
    for name, task in tasks.items():
        assert not any(need.startswith("report") for need in task.needs), name


@pytest.mark.parametrize("code", [0, 3])
def test_a_failing_report_does_not_fail_the_run(run, monkeypatch, caplog, code):
    for name in (*FOLDERS, work.TASK_VARIABLE):
        monkeypatch.setenv(name, "")  # do_task sets them; this puts them back
    commands = []
    monkeypatch.setattr(work, "run_child", lambda command: commands.append(command) or code)
    work.do_task(run, find_task(run, "report-r0"))
    assert commands[0][-3:] == ["report", "-o", str(run.root)]
    assert read_json(run.paths.done("report-r0"))["result"] == {"exit_code": code}
    assert ("the report was not written" in caplog.text) == (code != 0)


def test_the_picture_shows_the_organ_that_the_page_names_also_when_it_was_decided_again(tmp_path):
    run = fake_run(tmp_path, cases=CASES[:2], rounds=1, pictured=2)
    select_round(run, run.round(0))
    write_report(run)
    picture = run.paths.report / "pictures" / "r0" / f"{CASES[0]}.jpg"
    before = picture.read_bytes()
    wrong = next(organ for organ in ORGANS if organ not in (gather(run).rows[0].least, ORGANS[0]))
    decide(run, f"{CASES[0]},organ-wrong,{wrong},")
    select_round(run, run.round(0))
    write_report(run)
    assert gather(run).rows[0].least == wrong and picture.read_bytes() != before
