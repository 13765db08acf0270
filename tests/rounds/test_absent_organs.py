"""Organs that no member found, in a run: what they count, what the ledger keeps, and what the labelled cases say."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.by_hand import score_folders, select_from_scores
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.ledger import read_decisions, read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.label import label_shard, open_members, read_labelled
from nnunet_flare.rounds.stages.labelled_anatomy import labelled_anatomy, sizes_and_slices
from nnunet_flare.rounds.stages.select import select_round


@pytest.fixture
def run(tiny_environment, tmp_path) -> Run:
    """The tiny run, in a folder that may be changed: of one case nobody found spleen and pancreas."""
    import shutil

    finished = tiny_environment.run()
    shutil.copytree(finished.root, tmp_path / "run")
    run = Run(tmp_path / "run", finished.settings, finished.recipe)
    path = run.paths.case(0, CASE)
    document = read_json(path)
    organs = document["agreement"]
    missed = {organ: organ in MISSED for organ in organs}
    document |= {
        "agreement": {organ: 1.0 if missed[organ] else 0.6 for organ in organs},
        "present": {organ: not missed[organ] for organ in organs},
        "absent_pairs": {organ: float(missed[organ]) for organ in organs},
    }
    write_json(path, document)
    return run


CASE = "FLAREPhantom_Un_0001"
MISSED = ("spleen", "pancreas")


def selected(run: Run, how: str | None):
    selection = run.recipe.selection.model_copy(update={"absent": how, "top_fraction": None})
    changed = replace(run, recipe=run.recipe.model_copy(update={"selection": selection}))
    select_round(changed, changed.round(0))
    return {entry.case: entry for entry in read_decisions(run.paths, 0)}[CASE]


def row_of_scores(run: Run) -> dict[str, str]:
    columns, *rows = (line.split(",") for line in run.paths.scores(0).read_text().splitlines())
    return next(dict(zip(columns, row, strict=True)) for row in rows if row[0] == CASE)


@pytest.mark.parametrize(("how", "score"), [("one", (11 * 0.6 + 2) / 13), ("zero", 11 * 0.6 / 13), ("skip", 0.6)])
def test_an_organ_that_nobody_found_counts_as_the_recipe_says(run, how, score):
    entry = selected(run, how)
    assert entry.score == entry.mean_organ == pytest.approx(score)
    assert [organ for organ, is_there in entry.present.items() if not is_there] == list(MISSED)
    assert entry.agreement["spleen"] == {"one": 1.0, "zero": 0.0, "skip": None}[how]
    row = row_of_scores(run)
    assert row["spleen"] == {"one": "1.000000", "zero": "0.000000", "skip": "absent"}[how]
    assert float(row["mean_organ"]) == pytest.approx(score, abs=1e-6)
    assert entry in read_ledger(run.paths)


def test_by_default_the_demo_asks_what_the_labelled_cases_make_likely(run):
    """All four labelled phantoms have both organs: 5/6 by Laplace's rule, times the share of neighbours found."""
    entry = selected(run, None)
    ids = organ_ids(run)
    overlap = labelled_anatomy(run, list(ids.values())).overlap
    found = np.array([organ not in MISSED for organ in ids])
    for organ in MISSED:
        weights = overlap[list(ids).index(organ)]
        there = 5 / 6 * weights[found].sum() / weights.sum()
        assert entry.agreement[organ] == pytest.approx(1 - there)
        assert entry.agreement[organ] < 0.5, "most of what lies beside it was found"
    assert entry.score == pytest.approx((11 * 0.6 + sum(entry.agreement[organ] for organ in MISSED)) / 13)


def test_the_anatomy_is_that_of_the_labelled_arrays(run):
    ids = organ_ids(run)
    found = labelled_anatomy(run, list(ids.values()))
    arrays = [read_array(path)[0] for path in sorted(run.base_data.glob("*_seg.b2nd"))]
    liver, kidney = (
        [np.flatnonzero((labels == ids[organ]).any(axis=(1, 2))) for labels in arrays]
        for organ in ("liver", "right_kidney")
    )
    shares = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(liver, kidney, strict=True)]
    columns = [list(ids).index(organ) for organ in ("liver", "right_kidney")]
    # organs without gaps between their slices share what lies between the later start and the earlier end
    assert found.overlap[columns[0], columns[1]] == pytest.approx(np.mean(shares), abs=0.02)
    assert found.prevalence == pytest.approx([5 / 6] * 13)


def test_sizes_and_slices_along_the_body_axis():
    labels = np.zeros((3, 5, 2), np.int16)
    labels[:, 1:4, 0], labels[0, 4, 1], labels[2, 0, 0] = 1, 3, -1
    sizes, slices = sizes_and_slices(labels, [(1,), (2,), (3,), (1, 3)], axis=1)
    assert sizes.tolist() == [9, 0, 1, 10] and slices.tolist() == [[1, 4], [0, 0], [4, 5], [1, 5]]


def test_files_of_older_versions_say_by_presence_alone_what_is_absent(run):
    path = run.paths.case(0, CASE)
    document = read_json(path)
    del document["absent_pairs"]
    write_json(path, document)
    assert selected(run, "zero").score == pytest.approx(11 * 0.6 / 13)


def test_a_ledger_and_decisions_of_an_older_version_are_read(run):
    selected(run, "one")
    path = run.paths.decisions(0)
    document = read_json(path)
    for entry in document["cases"]:
        del entry["present"]
    write_json(path, document)
    with closing(sqlite3.connect(run.paths.ledger)) as connection, connection:
        connection.execute("ALTER TABLE cases DROP COLUMN present")
    before = read_ledger(run.paths)
    assert len(before) == len(document["cases"]) and all(entry.present == {} for entry in before)
    assert selected(run, "one") in read_ledger(run.paths)


def test_the_rule_steady_compares_with_the_labels_of_changed_copies(run):
    selection = run.recipe.selection.model_copy(update={"rule": "steady", "top_fraction": None})
    changed = replace(run, recipe=run.recipe.model_copy(update={"selection": selection}))
    of, ids = changed.round(0), organ_ids(run)
    run.paths.case(0, CASE).unlink()
    label_shard(changed, of, 0, 1)
    found = read_labelled(changed, 0, CASE)
    scan = read_array(run.unlabelled_data / f"{CASE}.b2nd")
    segmenter = open_members(changed, of.model, of.members)

    def label(copy):
        return segmenter.predict_members(copy).mean_softmax.argmax(0)

    maps = [label(scan), label(1.15 * scan + np.float32(0.1)), label(0.85 * scan - np.float32(0.1))]
    liver = [labels == ids["liver"] for labels in maps]
    moved_there = np.pad(scan, [(0, 0), (2, 0), (2, 0), (2, 0)], mode="edge")[:, :-2, :-2, :-2]
    back = np.pad(label(moved_there), [(0, 2)] * 3, mode="edge")[2:, 2:, 2:] == ids["liver"]
    dice = [2 * (liver[0] & other).sum() / max(1, liver[0].sum() + other.sum()) for other in (back, *liver[1:])]
    assert liver[0].any() and found.steady["liver"] == pytest.approx(np.mean(dice))
    select_round(changed, of)
    entry = {entry.case: entry for entry in read_decisions(run.paths, 0)}[CASE]
    assert entry.agreement["liver"] == pytest.approx((found.agreement["liver"] + found.steady["liver"]) / 2)
    assert entry.score == pytest.approx(np.mean(list(entry.agreement.values())))


def test_what_no_round_could_use_is_refused():
    with pytest.raises(InputError, match=r"selection\.absent: found 'zero', but no round compares members"):
        load_recipe("noisy_student", {"selection.absent": "zero"})
    for rule, how in (("min-organ", "one"), ("mean-organ", "expected"), ("trimmed-min", "expected")):
        assert load_recipe("demo", {"selection.rule": rule}).selection_of(0).absent == how
    assert load_recipe("selective").selection_of(0).absent == "skip"
    assert load_recipe("uncertainty").selection_of(0).absent == "one"
    assert load_recipe("uncertainty", {"selection.absent": "skip"}).selection_of(3).absent == "skip"


def label_maps(folder: Path, names: list[str], spleens: list[bool]) -> list[Path]:
    import SimpleITK as sitk

    folders = []
    for member, has_spleen in enumerate(spleens):
        for name in names:
            labels = np.zeros((4, 6, 6), np.uint8)
            labels[1:3, 1:3] = 1
            if has_spleen:
                labels[3, 4:] = 3
            path = folder / str(member) / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
        folders.append(folder / str(member))
    return folders


@pytest.mark.parametrize(("how", "mean"), [("one", 1.0), ("zero", 1 / 13), ("skip", 1.0)])
def test_by_hand_an_absence_counts_as_asked(tmp_path, how, mean):
    folders = label_maps(tmp_path, ["a"], [False, False])
    score_folders(folders, tmp_path / "scores.csv", absent=how)
    select_from_scores(
        tmp_path / "scores.csv", tmp_path / "out.csv", rule="mean-organ", threshold=0.0, top_fraction=None
    )
    row = (tmp_path / "out.csv").read_text().splitlines()[1].split(",")
    assert row[:2] == ["a", "1"] and float(row[2]) == pytest.approx(mean)
    assert ("absent" in (tmp_path / "scores.csv").read_text()) == (how == "skip")


def test_changes_between_rounds_have_no_absent_organ(tmp_path):
    folders = label_maps(tmp_path, ["a"], [False, True])
    with pytest.raises(InputError, match="--absent skip"):
        score_folders(folders, tmp_path / "scores.csv", compare="rounds", absent="skip")
