"""A round's training data: hard links to arrays that exist already, and the new labels of the pseudo cases.

Nothing is preprocessed again. The folder is built under another name beside its place and renamed whole, because
nnU-Net takes every file in a data folder for a case and a half-built folder for a data set.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from nnunet_flare.cases import Case, table_name, write_table
from nnunet_flare.errors import TaskError
from nnunet_flare.files import link_or_copy
from nnunet_flare.fusion.members import class_locations, ignore_uncertain
from nnunet_flare.rounds.arrays import ENDINGS, label_hash, read_array, read_properties, write_array, write_properties
from nnunet_flare.rounds.labelling import organ_ids
from nnunet_flare.rounds.ledger import Entry, read_decisions, write_round
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.plans import base_configuration, base_table, raw_cases, write_configuration
from nnunet_flare.rounds.preprocess import remove_scratch

log = logging.getLogger(__name__)


def build_round(run: Run, number: int) -> dict[str, Any]:
    """Make everything that trains round ``number``: its data, its table of cases and its configuration.

    Round 0 trains on the labelled cases as they are. Round ``n`` adds the cases that round ``n`` - 1 took.
    """
    if number == 0:
        return build_training(run, run.configuration(0), 0, [])
    entries = read_decisions(run.paths, number - 1)
    taken = [entry for entry in entries if entry.decision == "taken"]
    result = build_training(run, run.configuration(number), number, taken)
    shares = result.pop("ignored")
    if shares:
        known = [replace(entry, ignored=shares.get(entry.case, entry.ignored)) for entry in entries]
        write_round(run.paths, number - 1, known)
    return result


def build_training(run: Run, name: str, number: int, taken: Sequence[Entry]) -> dict[str, Any]:
    """Make a configuration that trains on the labelled cases and the pseudo-labels ``taken`` in round ``number`` - 1.

    Args:
        run: the run.
        name: name of the configuration; its data folder is ``<plans>_<name>``, or the base's without pseudo-labels.
        number: the round whose training settings it gets.
        taken: the pseudo-labelled cases.

    Returns:
        Numbers of cases and of files by how they were made, and under ``ignored`` the shares of ignored voxels.
    """
    table = base_table(run)
    cases = {case: table[case] for case in raw_cases(run)}
    if not any(case.role in ("labelled", "partial") for case in cases.values()):
        raise TaskError(f"{run.settings.dataset}: no labelled case; at least one labelled or partial case is needed")
    links: Counter[str] = Counter()
    shares: dict[str, dict[str, float]] = {}
    identifier = None
    if taken:
        _check_labels(run, number - 1, taken)
        identifier = f"{run.settings.plans_name}_{name}"
        shares = _build_folder(run, run.preprocessed / identifier, list(cases), number - 1, taken, links)
        cases |= {entry.case: Case("pseudo", round=number) for entry in taken}
    write_table(run.preprocessed / table_name(name), cases)
    ignored = ignore_label(run) if any(entry.ignored for entry in taken) else None
    settings = run.recipe.settings(number, run=run.settings.name, ignore_label=ignored)
    write_configuration(run, name, number, data_identifier=identifier, training=settings.to_json())
    return {"cases": len(cases), "pseudo": len(taken), **links, "ignored": shares}


def ignore_label(run: Run) -> int:
    """The value of *ignore*: one above the highest label."""
    return max(organ_ids(run).values()) + 1


def _check_labels(run: Run, number: int, taken: Sequence[Entry]) -> None:
    """Every taken label must be the one that was judged; a damaged one is removed and made anew by the next try."""
    damaged = []
    for entry in taken:
        try:
            label = read_array(run.paths.training_label(number, entry.case))[0]
            read_properties(run.paths.properties(number, entry.case))
            intact = label_hash(np.maximum(label, 0)) == entry.label_sha256
        except OSError:
            intact = False
        if not intact:
            damaged.append(entry.case)
    if damaged:
        for case in damaged:
            run.paths.case(number, case).unlink(missing_ok=True)
        for path in run.paths.root.glob(f"tasks/label-r{number}-*.done.json"):
            path.unlink()
        run.paths.done(f"select-r{number}").unlink(missing_ok=True)
        raise TaskError(
            f"round {number}: the labels of {len(damaged)} cases are damaged or not the ones that were judged "
            f"({', '.join(damaged[:5])}). They were removed; run the same command again to label them anew"
        )


def _build_folder(
    run: Run, target: Path, base_cases: Sequence[str], number: int, taken: Sequence[Entry], links: Counter[str]
) -> dict[str, dict[str, float]]:
    """Build ``target`` whole; returns the shares of ignored voxels by case and organ, where there are any."""
    scratch = target.with_name(f".tmp-{uuid4().hex[:12]}-{target.name}")
    for left in target.parent.glob(f".tmp-*-{target.name}"):
        remove_scratch(left)
    scratch.mkdir(parents=True)
    shares: dict[str, dict[str, float]] = {}
    for case in base_cases:
        for ending in ENDINGS:
            links[link_or_copy(run.base_data / f"{case}{ending}", scratch / f"{case}{ending}")] += 1
    for entry in taken:
        case = entry.case
        links[link_or_copy(run.unlabelled_data / f"{case}.b2nd", scratch / f"{case}.b2nd")] += 1
        if entry.ignored:
            shares[case] = _write_with_ignore(run, number, entry, scratch)
        else:
            links[link_or_copy(run.paths.training_label(number, case), scratch / f"{case}_seg.b2nd")] += 1
            links[link_or_copy(run.paths.properties(number, case), scratch / f"{case}.pkl")] += 1
    remove_scratch(target)
    os.replace(scratch, target)
    return shares


def _write_with_ignore(run: Run, number: int, entry: Entry, folder: Path) -> dict[str, float]:
    organs = organ_ids(run)
    label = read_array(run.paths.training_label(number, entry.case))[0]
    members = read_array(run.paths.members(number, entry.case))
    uncertain = [organs[name] for name in entry.ignored]
    label, shares = ignore_uncertain(label, list(members), uncertain, ignore_label(run))
    properties = read_properties(run.paths.properties(number, entry.case))
    located = class_locations(label, list(organs.values()))
    write_array(folder / f"{entry.case}_seg.b2nd", label[None], base_configuration(run)["patch_size"])
    write_properties(folder / f"{entry.case}.pkl", {**properties, "class_locations": located})
    names = {number: name for name, number in organs.items()}
    return {names[organ]: share for organ, share in shares.items()}
