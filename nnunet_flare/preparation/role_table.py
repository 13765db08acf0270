"""The case table of a prepared dataset: written anew by every call, unless a person has changed it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nnunet_flare.cases import FILE_NAME, read_table, write_table
from nnunet_flare.files import write_json
from nnunet_flare.preparation.examine import RECORD, read_record
from nnunet_flare.preparation.prepared import PreparedDataset

TABLE_KEY = "table_sha256"
"""In the record: the case table as it was written, so that one changed by hand is known."""


def write_roles(prepared: PreparedDataset) -> None:
    """Write the case table, unless a person has changed the one that an earlier call wrote.

    A case with partial labels that the kept table does not name would train as if its labels were complete, so it is
    set aside.
    """
    path, record = prepared.dataset / FILE_NAME, prepared.dataset / RECORD
    known = read_record(record)
    there = read_table(path).cases if path.is_file() else prepared.roles
    if there != prepared.roles and _sha256(path) != known.get(TABLE_KEY):
        prepared.notes.append(f"{path} was changed by hand and is kept; remove it and prepare writes it again")
        for case in sorted(prepared.roles.keys() - there.keys()):
            prepared.set_aside[case] = (
                f"{path}, which was changed by hand, does not name it; add it, or remove the table"
            )
        return
    write_table(path, prepared.roles)
    write_json(record, {**known, TABLE_KEY: _sha256(path)})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
