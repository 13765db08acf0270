"""Pseudo-labels against truths that nobody knew when they were made, as for the phantom's unlabelled scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunet_flare.evaluation.overlap import annotated_alone
from nnunet_flare.images import read_labels
from nnunet_flare.labels import ignore_id
from nnunet_flare.rounds.run.dataset import dataset_json, foreground_ids
from nnunet_flare.rounds.run.labelled_case import LabelledCase
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.loops import round_organs
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.judge import Judgement, judge
from nnunet_flare.rounds.stages.label import read_labelled
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.choose import scores
from nnunet_flare.selection.ranking import Ranking, rank_quality
from nnunet_flare.selection.rules import RULES

RANKED = tuple(rule.name for rule in RULES.values() if rule.needs == "members")
"""Rules that judge by the agreement of members, whatever the run's own rule is; those that need changed copies of the
scans only where the run's own rule does, too."""


def true_dice(run: Run, number: int, truth: Path) -> dict[str, float]:
    """Mean Dice of every pseudo-label of a round, by case, over the organs that the round labels.

    Args:
        run: the run.
        number: the round.
        truth: folder of the cases' true label maps.
    """
    return {case: float(np.mean(list(row.values()))) for case, row in true_organ_dice(run, number, truth).items()}


def true_organ_dice(run: Run, number: int, truth: Path) -> dict[str, dict[str, float]]:
    """Dice of every pseudo-label of a round by case and organ; arguments as for :func:`true_dice`."""
    ending = dataset_json(run)["file_ending"]
    organs = round_organs(run, run.round(number))
    labels, ignored = max(foreground_ids(run)) + 1, ignore_id(dataset_json(run)["labels"])
    dice = {}
    for entry in read_decisions(run.paths, number):
        if entry.label_sha256:
            label = read_labels(run.paths.label(number, entry.case, ending), entry.case).array
            true = read_labels(truth / f"{entry.case}{ending}", entry.case).array
            found = pairwise_dice(annotated_alone(true, label, ignored), labels, list(organs.values())).per_organ
            dice[entry.case] = dict(zip(organs, map(float, found), strict=True))
    return dice


def rule_scores(run: Run, number: int) -> dict[str, dict[str, float]]:
    """Scores of a round's pseudo-labels by rule and case: the run's own rule, and :data:`RANKED` where members agree.

    The latter judge all pairs of members, an absence as each rule does by default. A round of a single model that takes
    every case has no score at all.
    """
    found: dict[str, dict[str, float]] = {}
    for rule, (cases, judgement) in _judgements(run, number).items():
        score = scores(judgement.values, rule, skipped=judgement.skipped)
        found[rule] = dict(zip(cases, score.tolist(), strict=True))
    entries = [entry for entry in read_decisions(run.paths, number) if entry.label_sha256]
    own = run.recipe.selection_of(number).rule
    if own.needs != "nothing" and own.name not in found and all(entry.score is not None for entry in entries):
        found[own.name] = {entry.case: float(entry.score or 0.0) for entry in entries}
    return found


def _judgements(run: Run, number: int) -> dict[str, tuple[list[str], Judgement]]:
    """By rule of :data:`RANKED`, the labelled cases of a round and what it judges their organs by."""
    organs = round_organs(run, run.round(number))
    names = [entry.case for entry in read_decisions(run.paths, number) if entry.label_sha256]
    members = [read_array(run.paths.members(number, name)) for name in names]
    if not names or min(len(maps) for maps in members) < 2:
        return {}
    cases = [_compared(run, number, name, maps, organs) for name, maps in zip(names, members, strict=True)]
    selection = run.recipe.selection_of(number)
    has_copies = all(case.steady for case in cases)
    return {
        rule: (names, judge(run, cases, organs, replace(selection, rule=RULES[rule], absent=RULES[rule].absent)))
        for rule in RANKED
        if has_copies or not RULES[rule].copies
    }


def _compared(run: Run, number: int, case: str, maps: np.ndarray, organs: Mapping[str, Sequence[int]]) -> LabelledCase:
    """A labelled case with the agreement of all pairs of its members, whatever pairs the round judges by."""
    agreement = pairwise_dice(list(maps), max(foreground_ids(run)) + 1, list(organs.values()))
    return replace(
        read_labelled(run, number, case),
        agreement=dict(zip(organs, agreement.per_organ.tolist(), strict=True)),
        absent_pairs=dict(zip(organs, agreement.absent.tolist(), strict=True)),
        present=dict(zip(organs, agreement.present.tolist(), strict=True)),
    )


def ranking(run: Run, number: int, truth: Path) -> dict[str, Ranking]:
    """How well each rule ranks a round's pseudo-labels by their true mean Dice."""
    quality = true_dice(run, number, truth)
    return {
        rule: rank_quality([found[case] for case in quality], list(quality.values()))
        for rule, found in rule_scores(run, number).items()
    }


def organ_ranking(run: Run, number: int, truth: Path) -> dict[str, float]:
    """How well what a rule judges single organs by ranks these: by rule, the mean over the organs of Spearman's
    correlation with the organ's true Dice over the cases. Organs of which either never varies are left out.
    """
    quality = true_organ_dice(run, number, truth)
    found = {}
    for rule, (cases, judgement) in _judgements(run, number).items():
        true = np.array([list(quality[case].values()) for case in cases])
        ranks = [rank_quality(v, q).spearman for v, q in zip(np.nan_to_num(judgement.values).T, true.T, strict=True)]
        known = [rank for rank in ranks if not np.isnan(rank)]
        found[rule] = float(np.mean(known)) if known else float("nan")
    return found
