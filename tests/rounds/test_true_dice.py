"""Pseudo-labels of a finished run against the truth of the phantom's unlabelled scans."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.true_dice import RANKED, organ_ranking, ranking, rule_scores, true_dice
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.rules import RULES


def test_labels_that_are_the_truth_have_dice_1_and_rank_nothing(tiny_loop, tmp_path: Path):
    run = tiny_loop.run()
    shutil.copytree(run.root / "labels" / "r0", tmp_path / "truth")
    found = true_dice(run, 0, tmp_path / "truth")
    assert len(found) == 6 and set(found.values()) == {1.0}
    assert all(np.isnan(rank.spearman) for rank in ranking(run, 0, tmp_path / "truth").values())


def test_dice_with_the_truth_is_the_mean_over_the_organs(tiny_loop):
    import SimpleITK as sitk

    run, truth = tiny_loop.run(), tiny_loop.folder / "unlabelled_truth"
    found = true_dice(run, 0, truth)
    case = sorted(found)[0]
    maps = (run.paths.label(0, case, ".nii.gz"), truth / f"{case}.nii.gz")
    label, true = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in maps)
    values = []
    for organ in range(1, 14):
        a, b = label == organ, true == organ
        values.append(2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0)
    assert found[case] == pytest.approx(np.mean(values))


def test_every_rule_scores_the_members_maps_of_each_case(tiny_loop):
    run = tiny_loop.run()
    found = rule_scores(run, 0)
    judged = {rule for rule in RANKED if not RULES[rule].copies}  # this run made no copies of its scans
    assert set(found) == judged
    assert all(len(scores) == 6 for scores in found.values())
    own = {entry.case: entry.score for entry in read_decisions(run.paths, 0) if entry.label_sha256}
    assert found["mean-organ"] == pytest.approx(own), "the run's own rule, which judged when the round was selected"
    for case in found["min-organ"]:
        one, other = read_array(run.paths.members(0, case))
        assert found["min-organ"][case] == pytest.approx(pairwise_dice([one, other], 14).per_organ.min())
    assert set(ranking(run, 0, tiny_loop.folder / "unlabelled_truth")) == judged
    assert all(-1 <= rank <= 1 for rank in organ_ranking(run, 0, tiny_loop.folder / "unlabelled_truth").values())
