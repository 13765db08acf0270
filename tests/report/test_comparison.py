"""What the report shows beside the cases: held-out Dice by organ, learning curves, and a page of two runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import ORGANS, fake_run
from test_training_log import write as write_log

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError
from nnunet_flare.files import write_json
from nnunet_flare.report.curves import HEIGHT, WIDTH, learning_curves
from nnunet_flare.report.gather import gather
from nnunet_flare.report.page import write_report
from nnunet_flare.report.versus import decided_otherwise, write_comparison
from nnunet_flare.rounds.run.ledger import read_ledger, write_round
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.selection.choose import select

CASES = [f"case_{number:02d}" for number in range(12)]


def dice(run: Run, number: int, mean: float, **organs: float) -> None:
    write_json(run.paths.evaluation(number) / "dice.json", {"mean": mean, "organs": organs, "cases": {}})


def text_of(page: Path, start: str, end: str) -> str:
    """The words between two marks, without markup."""
    part = page.read_text().partition(start)[2].partition(end)[0]
    return " ".join(re.sub(r"<[^>]*>", " ", part).split())


def test_held_out_dice_stands_by_organ_and_round_with_its_gain(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=2, pictured=0)
    dice(run, 0, 0.8, liver=0.9, spleen=0.7)
    dice(run, 1, 0.81, liver=0.92, spleen=0.65)
    page = write_report(run, pictures=0)
    shown = text_of(page, 'id="held-out"', "</table>")
    assert "liver 0.900 0.920 (+0.020)" in shown and "spleen 0.700 0.650 (-0.050)" in shown
    assert "pancreas – –" in shown  # measured without it


def test_odd_and_failed_cases_are_both_set_aside(tmp_path):
    page = write_report(fake_run(tmp_path, cases=CASES, pictured=0), pictures=0)
    assert text_of(page, 'id="rounds"', "</thead>").count("set aside") == 1
    assert "<th>odd</th>" not in page.read_text()


def test_learning_curves_come_from_the_trainings_logs(tmp_path):
    run = fake_run(tmp_path, cases=CASES, rounds=1, pictured=0)
    assert learning_curves(run) == []
    for fold in ("0", "1"):
        epochs = ((n, 2.0 - n / 300, 0.5, 3.0) for n in range(301))
        write_log(run.round(0).model / f"fold_{fold}", "1", *epochs)
    (curves,) = learning_curves(run)
    assert curves.name == "r0" and [fold for fold, _ in curves.folds] == ["fold 0", "fold 1"]
    loss, moving = curves.panels
    assert (loss.title, moving.title, loss.epochs) == ("loss", "moving Dice", 301)
    points = [tuple(map(float, point.split(","))) for point in loss.lines[0].points.split()]
    assert points[0][0] == 0.0 and points[-1] == (WIDTH, HEIGHT) and len(points) <= 201  # the last is the lowest
    assert {y for _, y in (tuple(map(float, p.split(","))) for p in moving.lines[0].points.split())} == {HEIGHT / 2}
    page = write_report(run, pictures=0).read_text()
    assert page.count("<polyline") == 6 and "fold 1, validation loss" in page


def test_two_runs_are_compared_on_one_page(tmp_path, capsys):
    one = fake_run(tmp_path / "a", cases=CASES, rounds=1, pictured=0, seed=1)
    other = fake_run(tmp_path / "b", cases=CASES[:8], rounds=1, pictured=0, seed=2)
    dice(one, 0, 0.8, liver=0.9)
    dice(other, 0, 0.7, liver=0.95)
    assert main(["report", "-o", str(one.root), "--pictures", "0", "--compare", str(other.root)]) == 0
    page = one.paths.report / "compared_with_run.html"
    assert str(page) in capsys.readouterr().out
    assert "mean 0.800 0.700 -0.100 liver 0.900 0.950 +0.050" in text_of(page, 'id="held-out"', "</table>")
    differing = decided_otherwise(gather(one), gather(other))
    decisions = [{row.entry.case: row.entry.decision for row in gather(run).rows} for run in (one, other)]
    assert [case for case, *_ in differing] == [c for c in CASES[:8] if decisions[0][c] != decisions[1][c]] != []
    assert f"{len(differing)} of 8 cases that both runs judged" in page.read_text()


def test_settings_that_differ_are_listed(tmp_path):
    one = fake_run(tmp_path / "a", cases=CASES, rounds=1, pictured=0)
    other = fake_run(tmp_path / "b", cases=CASES, rounds=2, pictured=0)
    assert "rounds 1 2" in text_of(write_comparison(one, other), 'id="settings"', "</table>")


def test_runs_that_cannot_be_compared_are_refused_before_a_page_is_written(tmp_path, capsys):
    run = fake_run(tmp_path, cases=CASES, rounds=1, pictured=0)
    with pytest.raises(InputError, match="is the run itself"):
        write_comparison(run, run)
    for other, said in ((run.root, "is the run itself"), (tmp_path, "is not a run folder")):
        assert main(["report", "-o", str(run.root), "--pictures", "0", "--compare", str(other)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.out == ""
    assert not run.paths.report.exists()


def test_rounds_of_two_runs_stand_by_number_with_the_final_models_last(tmp_path):
    one = fake_run(tmp_path / "a", cases=CASES[:2], rounds=2, pictured=0)
    other = fake_run(tmp_path / "b", cases=CASES[:2], rounds=11, pictured=0)
    page = write_comparison(one, other).read_text()
    names = re.findall(r'<th scope="row">(.*?)</th>', page.partition('id="rounds"')[2].partition("</table>")[0])
    assert names == [*(f"r{number}" for number in range(11)), "final"]


def test_a_comparison_names_the_other_runs_folder_and_says_set_aside_of_odd_and_failed(tmp_path, monkeypatch):
    one = fake_run(tmp_path / "a", cases=CASES, rounds=1, pictured=0)
    other = fake_run(tmp_path / "b", cases=CASES, rounds=1, pictured=0)
    found = [replace(entry, decision="odd") for entry in read_ledger(other.paths)]
    write_round(other.paths, 0, found)
    monkeypatch.chdir(other.root)
    page = write_comparison(one, replace(other, root=Path(".")))
    assert page.name == "compared_with_run.html"
    words = text_of(page, 'id="decided"', "</table>")
    assert "taken : mean-organ" in words and "set aside : mean-organ" in words and "odd" not in words


def test_a_case_outside_of_the_best_share_is_below_it():
    found = select(["a", "b"], [[0.9], [0.8]], organs=["liver"], threshold=0.0, top_fraction=0.5)
    assert found[1].reason == "min-organ 0.800 is rank 2 of 2, below the best 50 %"
    assert found[0].reason.endswith("among the best 50 %") and len(ORGANS) == 13
