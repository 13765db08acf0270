"""The tables of a selection as CSV: scores of every case and organ, changes from round to round, decisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_flare.files import write_csv
from nnunet_flare.rounds.run.ledger import Entry, write_round
from nnunet_flare.rounds.run.paths import RunPaths

ABSENT = "absent"
"""In ``scores.csv``: an organ that no two compared members have, and that does not count."""


def write_scores(
    path: Path,
    cases: Sequence[str],
    table: np.ndarray,
    organs: Sequence[str],
    members: Sequence[int],
    *,
    skipped: np.ndarray | None = None,
) -> None:
    """Write ``scores.csv``: case, one column per organ, mean_organ, min_organ, members; of one member no numbers.

    An organ that does not count in a case is :data:`ABSENT` there, and in neither of mean and minimum.
    """
    rows = []
    left_out = np.zeros(np.shape(table), dtype=bool) if skipped is None else skipped
    for case, row, without, count in zip(cases, np.nan_to_num(table), left_out, members, strict=True):
        counted = row[~without]
        numbers = [
            *np.where(without, np.nan, row),
            *((counted.mean(), counted.min()) if counted.size else (np.nan,) * 2),
        ]
        words = [f"{v:.6f}" if not np.isnan(v) else ABSENT for v in numbers] if count > 1 else [""] * len(numbers)
        rows.append([case, *words, count])
    write_csv(path, [["case", *organs, "mean_organ", "min_organ", "members"], *rows])


def write_changes(path: Path, cases: Sequence[str], table: np.ndarray) -> None:
    """Write changes (cases, rounds - 1) as ``scores.csv``: case, ``1 to 2`` ..., mean_change, members; NaN empty."""
    rows = []
    for case, row in zip(cases, table, strict=True):
        rows.append([case, *("" if np.isnan(v) else f"{v:.6f}" for v in (*row, row.mean())), len(row) + 1])
    steps = [f"{number} to {number + 1}" for number in range(1, table.shape[1] + 1)]
    write_csv(path, [["case", *steps, "mean_change", "members"], *rows])


def write_decisions(paths: RunPaths, number: int, entries: Sequence[Entry]) -> None:
    """Keep a round's decisions: ``tables/selection_r<number>.csv`` for people, then the ledger."""
    rows = [(entry.case, entry.decision == "taken", entry.score, entry.reason) for entry in entries]
    write_selection(paths.selection(number), rows)
    write_round(paths, number, entries)


def write_selection(path: Path, decisions: Sequence[tuple[str, bool, float | None, str]]) -> None:
    """Write ``selection.csv``: case, taken (1 or 0), score (empty where it was not judged), reason."""
    rows = [
        [case, int(taken), "" if score is None else f"{score:.6f}", reason] for case, taken, score, reason in decisions
    ]
    write_csv(path, [["case", "taken", "score", "reason"], *rows])
