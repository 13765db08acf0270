"""The loop's scoring and selection on plain folders and CSV files, for people who bring their own predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.documents import load_json, load_rows
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import geometry_difference, read_labels
from nnunet_flare.labels import organs_of
from nnunet_flare.listing import list_label_maps, told
from nnunet_flare.organs import FLARE22
from nnunet_flare.outputs import check_document
from nnunet_flare.rounds.stages.score_tables import ABSENT, write_changes, write_scores, write_selection
from nnunet_flare.selection.absence import with_absence
from nnunet_flare.selection.agreement import pairwise_dice
from nnunet_flare.selection.change import label_change
from nnunet_flare.selection.choose import select
from nnunet_flare.selection.rule import Absent
from nnunet_flare.selection.rules import RULES

COMPARISONS = ("pairs", "last", "rounds")
"""What :func:`score_folders` compares: every two folders, each with the last one, or each with the next one."""

MEAN_CHANGE = "mean_change"
TABLES = (".csv", ".tsv", ".txt")
"""Endings of tables that may be replaced."""

FIXED_COLUMNS = ("mean_organ", "min_organ", MEAN_CHANGE, "members")


def score_folders(
    folders: Sequence[Path], output: Path, *, compare: str = "pairs", absent: Absent = "one"
) -> tuple[int, dict[str, str]]:
    """Agreement of the label maps that several members wrote for the same cases, as ``scores.csv``.

    The organs, or regions, are those of the ``dataset.json`` in the first folder that has one, else FLARE22's.

    Args:
        folders: of label maps; for ``last`` a training's checkpoints, the last of them last; for ``rounds`` one per
            round, in their order.
        output: the table.
        compare: ``pairs``: the organs' mean Dice over all pairs, for the rules on organs; ``last``: over the pairs with
            the last folder, for ``stability``; ``rounds``: the share of changed voxels from each folder to the next
            (:func:`nnunet_flare.selection.change.label_change`), for ``round-change``.
        absent: what two folders count that both lack an organ: ``one``, ``skip`` or ``zero`` (there are no labelled
            cases here to say what is ``expected``).

    Returns:
        The number of scored cases, and why each other case was set aside.

    Raises:
        InputError: for fewer than two folders, a missing folder or no case at all.
    """
    if compare not in COMPARISONS:
        raise InputError(f"--compare {compare}: expected one of {', '.join(COMPARISONS)}")
    if compare == "rounds" and absent != "one":
        raise InputError(f"--absent {absent}: --compare rounds counts changed voxels over all organs; leave it out")
    if len(folders) < 2:
        raise InputError(f"score: found {len(folders)} folder, expected at least two to compare")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"score: {folder}: no such folder")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(
            f"score: a folder of {', '.join(map(str, folders))} is given twice, and agrees with itself; give each once"
        )
    organs = _organs(folders)
    allowed = [0, *sorted({label for ids in organs.values() for label in ids})]
    listings = [list_label_maps(folder, besides=[other for other in folders if other != folder]) for folder in folders]
    found = [{case: files[0] for case, files in listing.cases.items()} for listing in listings]
    failed = {name: reason for listing in listings for name, reason in listing.not_taken.items()}
    cases = sorted(set().union(*found) - set(failed))
    if not cases:
        raise InputError(f"score: no label map in {folders[0]}{told(failed)}")
    check_document(
        output, TABLES, [*(p for maps in found for p in maps.values()), *(f / "dataset.json" for f in folders)]
    )
    rows, scored = [], []
    for case in cases:
        try:
            missing = [str(f) for f, files in zip(folders, found, strict=True) if case not in files]
            if missing:
                raise CaseError(case, f"no label map in {', '.join(missing)}")
            volumes = [read_labels(files[case], case, allowed=allowed) for files in found]
            for folder, volume in zip(folders[1:], volumes[1:], strict=True):
                difference = geometry_difference(volumes[0], volume)
                if difference:
                    raise CaseError(case, f"{folders[0]} and {folder} differ in {difference}")
        except CaseError as error:
            failed[case] = error.reason
            continue
        arrays = [volume.array for volume in volumes]
        scored.append(case)
        if compare == "rounds":
            rows.append([label_change(before, after) for before, after in pairwise(arrays)])
            continue
        agreement = pairwise_dice(arrays, max(max(ids) for ids in organs.values()) + 1, list(organs.values()))
        values = agreement.with_last if compare == "last" else agreement.per_organ
        lacking = agreement.absent_with_last if compare == "last" else agreement.absent
        rows.append(with_absence(values, lacking, absent).tolist())
    if compare == "rounds":
        write_changes(output, scored, np.array(rows).reshape(-1, len(folders) - 1))
    else:
        table = np.array(rows).reshape(-1, len(organs))
        write_scores(output, scored, table, list(organs), [len(folders)] * len(scored), skipped=np.isnan(table))
    return len(scored), failed


def _organs(folders: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    for folder in folders:
        path = folder / "dataset.json"
        if path.is_file():
            document = load_json(path)
            labels = document.get("labels") if isinstance(document, dict) else None
            if not isinstance(labels, dict):
                raise InputError(f"{path}: no usable 'labels'; expected nnU-Net's dataset.json")
            wrong = {name: value for name, value in labels.items() if not _is_organ(value)}
            if wrong:
                raise InputError(
                    f"{path}: labels {wrong}; score needs one whole number from 0 to 255 per organ, several per region"
                )
            return organs_of(labels)
    return {organ.name: (organ.id,) for organ in FLARE22}


def _is_organ(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(label) is int and 0 <= label < 256 for label in ids)


def select_from_scores(
    scores: Path,
    output: Path,
    *,
    rule: str,
    threshold: float,
    top_fraction: float | None,
    per_organ: Mapping[str, float] | None = None,
) -> tuple[int, int]:
    """Select cases of a ``scores.csv`` and write ``selection.csv``; returns taken and all.

    Args:
        scores: as :func:`score_folders` wrote it: agreements, or for ``round-change`` changes.
        output: the decisions and their reasons.
        rule: one of :data:`nnunet_flare.selection.rules.RULES`.
        threshold: smallest score that is taken.
        top_fraction: largest share of the cases that is taken.
        per_organ: smallest agreement by organ.

    Raises:
        InputError: with the line and column of what cannot be read, or when the table is not what the rule judges.
    """
    if rule not in RULES:
        raise InputError(f"--rule {rule}: expected one of {', '.join(RULES)}")
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold:g}: expected a number from 0 to 1")
    if top_fraction is not None and not 0 < top_fraction <= 1:
        raise InputError(f"--top_fraction {top_fraction:g}: expected a number above 0 and at most 1")
    if not scores.is_file():
        raise InputError(f"{scores}: no such file; flare-pseudolabel score writes one")
    check_document(output, TABLES, [scores])
    (_, columns), *rows = load_rows(scores) or [(1, [])]
    organs = [column for column in columns if column not in ("case", *FIXED_COLUMNS)]
    if "case" not in columns or not organs or len(set(columns)) < len(columns):
        raise InputError(f"{scores}: columns {columns}, expected case, one per organ, {', '.join(FIXED_COLUMNS)}")
    if RULES[rule].copies:
        raise InputError(f"--rule {rule}: labels changed copies of each scan and needs a run; choose another rule")
    holds_changes = MEAN_CHANGE in columns
    if RULES[rule].needs != "nothing" and holds_changes != (RULES[rule].table == "rounds"):
        held, wanted = ("changes between rounds", "agreements") if holds_changes else ("agreements", "changes")
        how = "score" if holds_changes else "score --compare rounds"
        raise InputError(f"{scores}: holds {held}, --rule {rule} judges {wanted}, which flare-pseudolabel {how} writes")
    unknown = sorted(set(per_organ or ()) - set(organs))
    if unknown or (per_organ and holds_changes):
        raise InputError(f"--per_organ {', '.join(unknown or per_organ or ())}: {scores} has the columns {organs}")
    cases: dict[str, int] = {}
    table, skipped = [], []
    for line, cells in rows:
        if len(cells) != len(columns):
            raise InputError(f"{scores}, line {line}: {len(cells)} cells, expected {len(columns)} as in the first line")
        row = dict(zip(columns, cells, strict=True))
        without = [row[organ].strip() == ABSENT for organ in organs]
        try:
            values = [
                float(row[organ]) if row[organ].strip() and not lacks else float("nan")
                for organ, lacks in zip(organs, without, strict=True)
            ]
        except ValueError as error:
            raise InputError(f"{scores}, line {line}: {error}; expected one number per organ") from error
        if not row["case"] or row["case"] in cases:
            first = f" (first in line {cases[row['case']]})" if row["case"] in cases else ""
            raise InputError(f"{scores}, line {line}: case '{row['case']}' is empty or listed twice{first}")
        if any(value < 0 or (value > 1 and not holds_changes) for value in values):
            expected = "a change below 0" if holds_changes else "agreement outside 0 to 1"
            raise InputError(f"{scores}, line {line}: {expected}")
        cases[row["case"]] = line
        table.append(values)
        skipped.append(without)
    chosen = select(
        list(cases),
        np.array(table).reshape(-1, len(organs)),
        organs=organs,
        rule=rule,
        threshold=threshold,
        top_fraction=top_fraction,
        per_organ=per_organ,
        skipped=np.array(skipped, dtype=bool).reshape(-1, len(organs)),
    )
    write_selection(output, [(d.case, d.taken, d.score, d.reason) for d in chosen])
    return sum(decision.taken for decision in chosen), len(chosen)
