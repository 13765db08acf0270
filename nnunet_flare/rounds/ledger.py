"""The ledger: one SQLite table of every case in every round, with the reason for each decision.

It is derived from the ``decisions.json`` of each round and rebuilt from them when it is lost. One writer at a time (the
select task that holds the run); a rollback journal, because the file may lie on a network file system.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, replacing, write_json
from nnunet_flare.rounds.paths import RunPaths

BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Entry:
    """One case in one round.

    ``decision`` is ``taken``, ``refused``, ``odd`` or ``failed``; ``agreement`` and ``ignored`` map organ names to the
    mean pairwise Dice and to the share of voxels set to *ignore*; ``label_sha256`` is the hash of the fused label.
    """

    round: int
    case: str
    role: str
    decision: str
    reason: str
    score: float | None
    mean_organ: float | None
    min_organ: float | None
    agreement: dict[str, float | None]
    ignored: dict[str, float]
    model: str
    recipe_hash: str
    label_sha256: str | None


COLUMNS = tuple(field.name for field in fields(Entry))
JSON_COLUMNS = ("agreement", "ignored")


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS cases (round INTEGER, 'case' TEXT, role TEXT, decision TEXT, reason TEXT, "
            "score REAL, mean_organ REAL, min_organ REAL, agreement TEXT, ignored TEXT, model TEXT, recipe_hash TEXT, "
            "label_sha256 TEXT, PRIMARY KEY (round, 'case'))"
        )
        yield connection


def write_round(paths: RunPaths, number: int, entries: Sequence[Entry]) -> None:
    """Keep a round's decisions: the JSON file first, then the ledger, in one transaction."""
    write_json(paths.decisions(number), {"version": 1, "round": number, "cases": [asdict(entry) for entry in entries]})
    _insert(paths.ledger, number, entries)


def _insert(path: Path, number: int, entries: Sequence[Entry]) -> None:
    rows = [tuple(json.dumps(v) if k in JSON_COLUMNS else v for k, v in asdict(entry).items()) for entry in entries]
    marks = ", ".join("?" * len(COLUMNS))
    try:
        with _open(path) as connection, connection:
            connection.execute("DELETE FROM cases WHERE round = ?", (number,))
            connection.executemany(f"INSERT INTO cases VALUES ({marks})", rows)
    except sqlite3.OperationalError as error:
        raise InputError(f"{path}: the ledger cannot be written ({error}); is another program using it?") from error


def read_decisions(paths: RunPaths, number: int) -> list[Entry]:
    """A round's decisions from its JSON file; empty when the round was not selected yet."""
    path = paths.decisions(number)
    return [Entry(**entry) for entry in read_json(path)["cases"]] if path.is_file() else []


def rebuild(paths: RunPaths) -> int:
    """Make the ledger anew from the rounds' JSON files; returns the number of rounds found."""
    found = sorted(paths.root.glob("rounds/r*/decisions.json"))
    with replacing(paths.ledger) as temporary:
        with _open(temporary):
            pass
        for path in found:
            number = int(path.parent.name[1:])
            _insert(temporary, number, read_decisions(paths, number))
    return len(found)


def read_ledger(paths: RunPaths) -> list[Entry]:
    """Every row of the ledger by round and case; a lost or damaged one is rebuilt first."""
    try:
        if not paths.ledger.is_file():
            rebuild(paths)
        return list(_rows(paths.ledger))
    except sqlite3.DatabaseError:
        rebuild(paths)
        return list(_rows(paths.ledger))


def _rows(path: Path) -> Iterator[Entry]:
    with _open(path) as connection:
        for row in connection.execute('SELECT * FROM cases ORDER BY round, "case"'):
            values: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
            for key in JSON_COLUMNS:
                values[key] = json.loads(values[key])
            yield Entry(**values)


def export_csv(entries: Sequence[Entry], organs: Sequence[str], path: Path) -> None:
    """The ledger as CSV: one row per case and round, one agreement column per organ."""
    plain = [name for name in COLUMNS if name not in JSON_COLUMNS]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow([*plain, *organs])
        for entry in entries:
            row = asdict(entry)
            writer.writerow([*(row[name] for name in plain), *(entry.agreement.get(organ) for organ in organs)])
