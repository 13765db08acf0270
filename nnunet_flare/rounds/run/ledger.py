"""The ledger: one SQLite table of every case in every round, with the reason for each decision.

It is derived from the ``decisions.json`` of each round and rebuilt from them when it is lost. One writer at a time:
select and build tasks write under the ledger's lock. A rollback journal, because the file may lie on a network file
system.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunet_flare.disks import trouble
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, replacing, write_csv, write_json
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.paths import RunPaths

log = logging.getLogger(__name__)

BUSY_SECONDS = 30.0

DECISIONS = ("taken", "refused", "odd", "failed")
"""What a case can come to: judged, unusual as a scan, or not read or not labelled."""


@dataclass(frozen=True)
class Entry:
    """One case in one round.

    ``decision`` is ``taken``, ``refused``, ``odd`` or ``failed``; ``agreement``, ``ignored`` and ``present`` map organ
    names to what the rule judged by (the mean pairwise Dice, an absence counted as ``selection.absent`` says, None
    where it does not count), to the share of voxels set to *ignore*, and to whether any member found the organ;
    ``label_sha256`` is the hash of the fused label.
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
    present: dict[str, bool] = field(default_factory=dict)


def decisions_shape(number: int) -> Any:
    """What a round's ``decisions.json`` must look like."""
    optional, shares = (float, None), {str: (float, None)}
    text = dict.fromkeys(("case", "role", "reason", "model", "recipe_hash"), str)
    numbers = dict.fromkeys(("score", "mean_organ", "min_organ"), optional)
    entry = {**text, **numbers, "agreement": shares, "ignored": {str: float}, "label_sha256": (str, None)}
    entry["present?"] = {str: bool}
    return {"cases": [{**entry, "round": {number}, "decision": set(DECISIONS)}]}


COLUMNS = tuple(each.name for each in fields(Entry))
JSON_COLUMNS = ("agreement", "ignored", "present")


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        found = {str(row[1]) for row in connection.execute("PRAGMA table_info(cases)")}
        if found and found != set(COLUMNS):  # of another version: it is made anew from the rounds' JSON files
            connection.execute("DROP TABLE cases")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS cases (round INTEGER, 'case' TEXT, role TEXT, decision TEXT, reason TEXT, "
            "score REAL, mean_organ REAL, min_organ REAL, agreement TEXT, ignored TEXT, model TEXT, recipe_hash TEXT, "
            "label_sha256 TEXT, present TEXT, PRIMARY KEY (round, 'case'))"
        )
        yield connection


def write_round(paths: RunPaths, number: int, entries: Sequence[Entry]) -> None:
    """Keep a round's decisions, under the ledger's lock: the JSON file first, then the table, in one transaction."""
    document = {"version": 1, "round": number, "cases": [asdict(entry) for entry in entries]}
    with LockFile(paths.ledger.with_suffix(".lock"), "the ledger", wait=True):
        write_json(paths.decisions(number), document)
        _insert(paths.ledger, number, entries)


def _insert(path: Path, number: int, entries: Sequence[Entry]) -> None:
    rows = [tuple(json.dumps(v) if k in JSON_COLUMNS else v for k, v in asdict(entry).items()) for entry in entries]
    marks = ", ".join("?" * len(COLUMNS))
    try:
        with _open(path) as connection, connection:
            connection.execute("DELETE FROM cases WHERE round = ?", (number,))
            connection.executemany(f"INSERT INTO cases VALUES ({marks})", rows)
    except sqlite3.OperationalError as error:
        if (cause := trouble(path.parent)) is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise InputError(f"{path}: the ledger cannot be written ({error}); is another program using it?") from error


def read_decisions(paths: RunPaths, number: int) -> list[Entry]:
    """A round's decisions from its JSON file; empty when the round was not selected yet."""
    path = paths.decisions(number)
    if not path.is_file():
        return []
    remedy = f"flare-pseudolabel retry -o {paths.root} decides again"
    document = read_json(path, decisions_shape(number), remedy=remedy)
    return [Entry(**{name: entry[name] for name in COLUMNS if name in entry}) for entry in document["cases"]]


def rebuild(paths: RunPaths) -> int:
    """Make the ledger anew from the rounds' JSON files; returns the number of rounds found."""
    found = _decided(paths)
    with replacing(paths.ledger) as temporary:
        with _open(temporary):
            pass
        for number in found:
            _insert(temporary, number, read_decisions(paths, number))
    return len(found)


def _decided(paths: RunPaths) -> list[int]:
    """The rounds that have a file of decisions."""
    names = (path.parent.name[1:] for path in paths.root.glob("rounds/r*/decisions.json"))
    return sorted(int(name) for name in names if name.isdigit())


def read_ledger(paths: RunPaths) -> list[Entry]:
    """Every case in every round, by round and case.

    The rounds' JSON files are believed: a ledger that is lost, damaged, empty or says otherwise is mended.
    """
    decided = {number: sorted(read_decisions(paths, number), key=_by_case) for number in _decided(paths)}
    held: dict[int, list[Entry]] = {}
    try:
        for row in _rows(paths.ledger) if paths.ledger.is_file() else ():
            held.setdefault(row.round, []).append(row)
        wrong = [number for number in decided if decided[number] != sorted(held.get(number, []), key=_by_case)]
        if wrong:
            log.info("%s: rounds %s are written again from their decisions.json", paths.ledger, wrong)
        for number in wrong:
            _insert(paths.ledger, number, decided[number])
    except (
        sqlite3.OperationalError,
        InputError,
        OSError,
    ) as error:  # in use, or for reading only
        log.warning("%s: left as it is (%s)", paths.ledger, error)
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        log.info("%s: made again from the rounds' decisions.json (%s)", paths.ledger, error)
        held = {}
        rebuild(paths)
    together = {**held, **decided}
    return [entry for number in sorted(together) for entry in together[number]]


def _by_case(entry: Entry) -> str:
    return entry.case


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
    rows = ([*(getattr(e, name) for name in plain), *(e.agreement.get(organ) for organ in organs)] for e in entries)
    write_csv(path, [[*plain, *organs], *rows])
