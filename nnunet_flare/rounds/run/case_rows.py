"""Every case in every round as rows of plain values, for tables and notebooks."""

from __future__ import annotations

from typing import Any

from nnunet_flare.rounds.run.labelled_case import LabelledCase, read_labelled_case
from nnunet_flare.rounds.run.ledger import Entry, read_ledger
from nnunet_flare.rounds.run.paths import RunPaths

PLAIN = ("round", "case", "role", "decision", "reason", "score", "mean_organ", "min_organ")


def case_rows(paths: RunPaths) -> list[dict[str, Any]]:
    """One flat dictionary per case and round, by round and case; all have the same keys.

    ``round``, ``case``, ``role``, ``decision`` (``taken``, ``refused``, ``odd``, ``failed``), ``reason``, ``score``,
    ``mean_organ`` and ``min_organ`` as in the ledger; ``members``, how many label maps were compared; then for every
    organ ``agreement_<organ>`` (0 to 1) and ``volume_ml_<organ>`` of the fused label. None: not known.
    """
    entries = read_ledger(paths)
    labelled = [_labelled(paths, entry) for entry in entries]
    # a single member has volumes, but no agreement
    known = [*(entry.agreement for entry in entries), *(each.volume_mm3 for each in labelled)]
    organs = list(dict.fromkeys(organ for by_organ in known for organ in by_organ))
    return [_row(entry, its, organs) for entry, its in zip(entries, labelled, strict=True)]


def _labelled(paths: RunPaths, entry: Entry) -> LabelledCase:
    path = paths.case(entry.round, entry.case)
    remedy = f"remove it to leave its volumes out; flare-pseudolabel retry -o {paths.root} labels the case again"
    return read_labelled_case(path, remedy=remedy) if path.is_file() else LabelledCase()


def _row(entry: Entry, labelled: LabelledCase, organs: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry, name) for name in PLAIN}
    row["members"] = labelled.members or None
    row |= {f"agreement_{organ}": entry.agreement.get(organ) for organ in organs}
    for organ in organs:
        volume = labelled.volume_mm3.get(organ)
        row[f"volume_ml_{organ}"] = None if volume is None else volume / 1000
    return row
