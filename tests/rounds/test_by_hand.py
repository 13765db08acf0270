"""Scores and selections of folders of label maps by hand, against values worked out here."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.images import Volume, read_labels, write_labels
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.selection.rules import RULES


def test_score_and_select_work_on_plain_folders(tiny_loop, tmp_path, capsys):
    run = tiny_loop.run()
    labels = run.root / "labels" / "r0"
    members = [tmp_path / "a", tmp_path / "b"]
    for member in members:
        shutil.copytree(labels, member)
    case = sorted(members[1].iterdir())[0]
    volume = read_labels(case)
    write_labels(case, np.where(volume.array == 1, 0, volume.array), volume)
    sorted(members[1].iterdir())[1].unlink()
    scores, selection = tmp_path / "scores.csv", tmp_path / "selection.csv"
    assert main(["score", "-i", *map(str, members), "-o", str(scores)]) == 1
    assert "no label map in" in capsys.readouterr().err
    rows = scores.read_text().splitlines()
    assert rows[0] == f"case,{','.join(organ_ids(run))},mean_organ,min_organ,members" and len(rows) == 6
    assert main(["select", "-i", str(scores), "-o", str(selection), "--threshold", "0.5"]) == 0
    chosen = selection.read_text().splitlines()
    assert chosen[0] == "case,taken,score,reason"
    had_liver = bool((volume.array == 1).any())
    assert sum(line.split(",")[1] == "1" for line in chosen[1:]) == (4 if had_liver else 5)


def test_a_folder_that_is_given_twice_is_not_scored_against_itself(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    write_labels(folder / "x.nii.gz", np.ones((2, 3, 4), np.uint8), Volume(np.ones((2, 3, 4), np.uint8), (1.0,) * 3))
    again = tmp_path / "a" / ".." / "a"
    assert main(["score", "-i", str(folder), str(again), "-o", str(tmp_path / "scores.csv")]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,liver\na,0.5\na,0.6\n", "line 3: case 'a' is empty or listed twice"),
        ("case,liver\na,many\n", "line 2"),
        ("case,liver\na,1.5\n", "outside 0 to 1"),
        ("name,liver\na,1\n", "expected case"),
        ("case,mean_organ\na,1\n", "expected case, one per organ"),
    ],
)
def test_a_wrong_scores_file_is_refused_with_its_line(tmp_path, capsys, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    assert main(["select", "-i", str(path), "-o", str(tmp_path / "out.csv")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_nan_in_scores_is_not_selected(tmp_path, capsys):
    path = tmp_path / "scores.csv"
    path.write_text("case,liver,spleen\na,1.0,\nb,0.95,0.9\n")
    assert main(["select", "-i", str(path), "-o", str(tmp_path / "out.csv")]) == 0
    assert [line.split(",")[:2] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]] == [
        ["a", "0"],
        ["b", "1"],
    ]


def organ_boxes(*edges: int) -> np.ndarray:
    """A label map whose organ k, from 1, fills ``edges[k - 1]`` voxels of a row of its own."""
    array = np.zeros((2, 14, 20), np.uint8)
    for organ, edge in enumerate(edges, start=1):
        array[0, organ, :edge] = organ
    return array


@pytest.fixture
def three_folders(tmp_path) -> list[Path]:
    """Label maps of two cases as three checkpoints, or three rounds, draw them."""
    drawn = {"a": [(5, 4, 2), (10, 4, 4), (10, 8, 4)], "b": [(9, 9), (9, 9), (9, 9)], "empty": [(), (), ()]}
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for case, versions in drawn.items():
        for folder, edges in zip(folders, versions, strict=True):
            write_labels(folder / f"{case}.nii.gz", (array := organ_boxes(*edges)), Volume(array, (1.0, 1.0, 1.0)))
    return folders


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def test_checkpoints_are_compared_with_the_last_one_by_hand(three_folders, tmp_path):
    scores, selection = tmp_path / "scores.csv", tmp_path / "selection.csv"
    words = ["score", "-i", *map(str, three_folders), "-o", str(scores), "--compare", "last"]
    assert main(words) == 0
    row = read_table(scores)["a"]
    liver, kidney = (2 * 5 / 15 + 1) / 2, (2 * 4 / 12 + 2 * 4 / 12) / 2  # mean over the two earlier ones
    assert float(row["liver"]) == pytest.approx(liver, abs=1e-6)
    assert float(row["right_kidney"]) == pytest.approx(kidney, abs=1e-6)
    assert main(["select", "-i", str(scores), "-o", str(selection), "--rule", "stability", "--threshold", "0.95"]) == 0
    spleen = (2 * 2 / 6 + 1) / 2
    score = (liver + kidney + spleen + 10) / 13  # organs that nobody sees agree
    assert float(read_table(selection)["a"]["score"]) == pytest.approx(score, abs=1e-5)
    assert {case: row["taken"] for case, row in read_table(selection).items()} == {"a": "0", "b": "1", "empty": "1"}


def test_rounds_are_compared_with_the_next_one_by_hand(three_folders, tmp_path):
    scores, selection = tmp_path / "scores.csv", tmp_path / "selection.csv"
    assert main(["score", "-i", *map(str, three_folders), "-o", str(scores), "--compare", "rounds"]) == 0
    rows = read_table(scores)
    assert list(rows["a"]) == ["case", "1 to 2", "2 to 3", "mean_change", "members"]
    assert [float(rows["a"][step]) for step in ("1 to 2", "2 to 3")] == pytest.approx([7 / 18, 4 / 22], abs=1e-6)
    assert rows["empty"]["1 to 2"] == ""
    words = ["select", "-i", str(scores), "-o", str(selection), "--rule", "round-change", "--threshold", "0"]
    assert main([*words, "--top_fraction", "0.33"]) == 0
    chosen = read_table(selection)
    assert {case: row["taken"] for case, row in chosen.items()} == {"a": "0", "b": "1", "empty": "0"}
    assert float(chosen["a"]["score"]) == pytest.approx(1 / (1 + (7 / 18 + 4 / 22) / 2), abs=1e-5)
    assert "could not be computed" in chosen["empty"]["reason"]


@pytest.mark.parametrize(
    ("compare", "more", "message"),
    [
        ("pairs", ["--rule", "round-change"], "score --compare rounds writes"),
        ("rounds", ["--rule", "min-organ"], "holds changes between rounds"),
        ("rounds", ["--rule", "all", "--per_organ", "liver=0.5"], "--per_organ liver"),
        ("pairs", ["--per_organ", "livre=0.5"], "--per_organ livre"),
        ("pairs", ["--per_organ", "liver=2"], "a number from 0 to 1"),
        ("pairs", ["--per_organ", "liver"], "expected ORGAN=T"),
        ("pairs", ["--per_organ", "liver=0.5", "liver=0.6"], "--per_organ liver: given twice (0.5 and 0.6)"),
    ],
)
def test_a_rule_that_does_not_fit_the_table_is_refused(three_folders, tmp_path, capsys, compare, more, message):
    scores = tmp_path / "scores.csv"
    assert main(["score", "-i", *map(str, three_folders), "-o", str(scores), "--compare", compare]) == 0
    assert main(["select", "-i", str(scores), "-o", str(tmp_path / "out.csv"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_single_organs_have_their_own_threshold_by_hand(three_folders, tmp_path):
    scores, selection = tmp_path / "scores.csv", tmp_path / "selection.csv"
    assert main(["score", "-i", *map(str, three_folders), "-o", str(scores)]) == 0
    words = ["select", "-i", str(scores), "-o", str(selection), "--threshold", "0", "--per_organ"]
    assert main([*words, "liver=0.7", "pancreas=0.9"]) == 0
    assert {case: row["taken"] for case, row in read_table(selection).items()} == {"a": "1", "b": "1", "empty": "1"}
    assert main([*words, "liver=0.9"]) == 0
    chosen = read_table(selection)
    assert chosen["a"]["taken"] == "0" and chosen["a"]["reason"].startswith("liver 0.778 < 0.9")


def test_a_rule_that_labels_copies_of_the_scans_needs_a_run(three_folders, tmp_path, capsys):
    scores = tmp_path / "scores.csv"
    assert main(["score", "-i", *map(str, three_folders), "-o", str(scores)]) == 0
    assert main(["select", "-i", str(scores), "-o", str(tmp_path / "selection.csv"), "--rule", "steady"]) == 2
    assert "needs a run" in capsys.readouterr().err


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.copies])
def test_every_rule_of_the_loop_works_by_hand(three_folders, tmp_path, rule):
    scores, selection = tmp_path / "scores.csv", tmp_path / "selection.csv"
    compare = {"stability": "last", "round-change": "rounds"}.get(rule, "pairs")
    assert main(["score", "-i", *map(str, three_folders), "-o", str(scores), "--compare", compare]) == 0
    assert main(["select", "-i", str(scores), "-o", str(selection), "--rule", rule, "--threshold", "0.99"]) == 0
    chosen = read_table(selection)
    assert chosen["b"]["taken"] == "1" and chosen["a"]["taken"] == ("1" if rule == "all" else "0")
