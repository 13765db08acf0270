"""Pseudo-labels against truths that nobody knew when they were made, as for the phantom's unlabelled scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.images import read_labels
from nnunet_flare.rounds.run.dataset import dataset_json, organ_ids
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.choose import scores
from nnunet_flare.selection.ranking import Ranking, rank_quality
from nnunet_flare.selection.rules import RULES

RANKED = tuple(rule.name for rule in RULES.values() if rule.needs == "members")
"""Rules that judge by the agreement of members, whatever the run's own rule is."""


def true_dice(run: Run, number: int, truth: Path) -> dict[str, float]:
    """Mean Dice of every pseudo-label of a round, by case, over the organs that the round labels.

    Args:
        run: the run.
        number: the round.
        truth: folder of the cases' true label maps.
    """
    ending = dataset_json(run)["file_ending"]
    labels = list(organ_ids(run).values())
    loop = run.round(number).loop
    columns = [organ - 1 for organ in (labels if loop is None else loop.ids(labels))]
    dice = {}
    for entry in read_decisions(run.paths, number):
        if entry.label_sha256:
            label = read_labels(run.paths.label(number, entry.case, ending), entry.case).array
            true = read_labels(truth / f"{entry.case}{ending}", entry.case).array
            dice[entry.case] = float(pairwise_dice([label, true], max(labels) + 1).per_organ[columns].mean())
    return dice


def rule_scores(run: Run, number: int) -> dict[str, dict[str, float]]:
    """Scores of a round's pseudo-labels by rule and case: the run's own rule, and :data:`RANKED` where members agree.

    A round of a single model that takes every case has no score at all.
    """
    count = max(organ_ids(run).values()) + 1
    entries = [entry for entry in read_decisions(run.paths, number) if entry.label_sha256]
    found: dict[str, dict[str, float]] = {}
    members = {entry.case: read_array(run.paths.members(number, entry.case)) for entry in entries}
    if entries and min(len(maps) for maps in members.values()) > 1:
        table = np.array([pairwise_dice(list(members[entry.case]), count).per_organ for entry in entries])
        for rule in RANKED:
            found[rule] = dict(zip(members, scores(table, rule).tolist(), strict=True))
    judge = run.recipe.selection_of(number).rule
    own = judge.name
    if judge.needs != "nothing" and own not in found and all(entry.score is not None for entry in entries):
        found[own] = {entry.case: float(entry.score or 0.0) for entry in entries}
    return found


def ranking(run: Run, number: int, truth: Path) -> dict[str, Ranking]:
    """How well each rule ranks a round's pseudo-labels by their true mean Dice."""
    quality = true_dice(run, number, truth)
    return {
        rule: rank_quality([found[case] for case in quality], list(quality.values()))
        for rule, found in rule_scores(run, number).items()
    }
