"""Roles and annotated organs of the cases of a dataset: ``flare_cases.json``, read, validated and written.

The table lies at dataset level (``nnUNet_raw/DatasetXXX_Name`` and ``nnUNet_preprocessed/DatasetXXX_Name``), never in a
data folder, because nnU-Net takes every file there for a case. A round's own table is
``flare_cases.<configuration>.json`` beside it and is read first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from nnunet_flare.documents import load_json
from nnunet_flare.errors import InputError
from nnunet_flare.files import write_json
from nnunet_flare.labels import label_ids

Role = Literal["labelled", "pseudo", "partial", "unlabelled"]
ROLES: tuple[str, ...] = get_args(Role)
VERSION = 1
FILE_NAME = "flare_cases.json"
KEYS = {"role", "annotated", "filled", "positive", "round", "weight"}


@dataclass(frozen=True)
class Case:
    """What is known of one case.

    Attributes:
        role: what its labels are.
        annotated: organs whose every voxel its label map names, of ``partial`` cases, and of ``pseudo`` cases that a
            model of some organs labelled; None: all.
        filled: those of ``annotated`` that a model drew; they train, but no validation counts them.
        positive: further organs of which the label map names some voxels, but leaves open where else they are.
        round: the round of a run that made it.
        weight: multiplies its sampling probability.
    """

    role: Role = "labelled"
    annotated: tuple[int, ...] | None = None
    round: int = 0
    weight: float = 1.0
    filled: tuple[int, ...] = ()
    positive: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether its label map speaks about every organ."""
        return self.role == "labelled" or self.annotated is None

    @property
    def validated(self) -> tuple[int, ...] | None:
        """The organs that a validation counts: what a person annotated; None: all."""
        if self.annotated is None:
            return None
        return tuple(organ for organ in self.annotated if organ not in self.filled)

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"role": self.role}
        if self.annotated is not None:
            entry["annotated"] = list(self.annotated)
        for key in ("filled", "positive"):
            if getattr(self, key):
                entry[key] = list(getattr(self, key))
        if self.round:
            entry["round"] = self.round
        if self.weight != 1.0:
            entry["weight"] = self.weight
        return entry


@dataclass(frozen=True)
class CaseTable:
    """The cases of a table by id. ``strict`` tables (those of a round) must name every case."""

    cases: Mapping[str, Case] = field(default_factory=dict)
    source: Path | None = None
    strict: bool = False

    def __getitem__(self, case: str) -> Case:
        if case in self.cases:
            return self.cases[case]
        if self.strict:
            raise InputError(
                f"{self.source}: case '{case}' is in the training data but not in this table; "
                "a round's table must name every case. Build the round again."
            )
        return Case()

    def with_role(self, cases: Iterable[str], *roles: str) -> list[str]:
        """Those of ``cases`` that have one of ``roles``, in their order."""
        return [case for case in cases if self[case].role in roles]

    def counts(self, cases: Iterable[str]) -> dict[str, int]:
        """How many of ``cases`` have each role; roles without a case are left out."""
        found: dict[str, int] = {}
        for case in cases:
            role = self[case].role
            found[role] = found.get(role, 0) + 1
        return {role: found[role] for role in ROLES if role in found}


def table_name(configuration: str | None = None) -> str:
    """File name of the base table, or of a round configuration's own table."""
    return FILE_NAME if configuration is None else f"flare_cases.{configuration}.json"


def read_table(path: Path, *, labels: Mapping[str, Any] | None = None, strict: bool = False) -> CaseTable:
    """Read and validate a table; ``labels`` is dataset.json's entry, against which annotated organs are checked.

    Raises:
        InputError: with the file, the place in it, what was found and what is allowed; all problems at once.
    """
    document = load_json(path)
    problems: list[str] = []
    cases: dict[str, Case] = {}
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected an object with 'version' and 'cases', found {type(document).__name__}")
    if document.get("version") != VERSION:
        problems.append(f"version: found {document.get('version')!r}, expected {VERSION}")
    unknown = sorted(set(document) - {"version", "cases"})
    if unknown:
        problems.append(f"unknown keys {unknown}, allowed are 'version' and 'cases'")
    entries = document.get("cases")
    if not isinstance(entries, dict):
        problems.append(f"cases: expected an object of case ids, found {type(entries).__name__}")
        entries = {}
    known = None if labels is None else set(label_ids(labels))
    for case, entry in entries.items():
        parsed = _parse_case(case, entry, known, problems)
        if parsed is not None:
            cases[case] = parsed
    if problems:
        raise InputError(f"{path}: {len(problems)} problem(s): " + "; ".join(problems))
    return CaseTable(cases, path, strict)


def _parse_case(case: str, entry: Any, known: set[int] | None, problems: list[str]) -> Case | None:
    where = f"cases.{case}"
    if not isinstance(entry, dict):
        problems.append(f"{where}: expected an object, found {type(entry).__name__}")
        return None
    before = len(problems)
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        problems.append(f"{where}: unknown keys {unknown}, allowed are {', '.join(sorted(KEYS))}")
    role = entry.get("role", "labelled")
    if role not in ROLES:
        problems.append(f"{where}.role: found {role!r}, expected one of {', '.join(ROLES)}")
    annotated = _parse_labels(entry, "annotated", where, known, problems)
    filled, positive = (_parse_labels(entry, key, where, known, problems) or () for key in ("filled", "positive"))
    if set(filled) - set(annotated or ()) or set(positive) & set(annotated or ()):
        problems.append(f"{where}: 'filled' organs must be among 'annotated', 'positive' ones must not")
    if role == "partial" and not annotated:
        problems.append(f"{where}: a partial case needs 'annotated', the list of its annotated label ids")
    number = entry.get("round", 0)
    if not _is_int(number) or number < 0:
        problems.append(f"{where}.round: found {number!r}, expected a whole number >= 0")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        problems.append(f"{where}.weight: found {weight!r}, expected a number >= 0")
    if len(problems) > before:
        return None
    return Case(role, annotated, number, float(weight), filled, positive)


def _parse_labels(
    entry: dict[str, Any], key: str, where: str, known: set[int] | None, problems: list[str]
) -> tuple[int, ...] | None:
    """A list of label ids, sorted; None where it is missing or wrong."""
    labels = entry.get(key)
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(_is_int(a) and a > 0 for a in labels):
        problems.append(f"{where}.{key}: found {labels!r}, expected a list of label ids, each above 0")
        return None
    if known is not None and not set(labels) <= known:
        absent = sorted(set(labels) - known)
        problems.append(f"{where}.{key}: labels {absent} are not in dataset.json, which has {sorted(known)}")
    return tuple(sorted(set(labels)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write_table(path: Path, cases: Mapping[str, Case]) -> None:
    """Write a table by rename."""
    write_json(path, {"version": VERSION, "cases": {case: cases[case].to_json() for case in sorted(cases)}})


def find_table(
    preprocessed: Path, raw: Path | None, configuration: str, *, is_round: bool, labels: Mapping[str, Any] | None = None
) -> CaseTable:
    """The table that training a configuration uses.

    The round's own table comes first; a round's configuration without one is an error. Else the base table of the
    preprocessed folder, else that of the raw folder; where both exist they must be equal. No table: all labelled.

    Args:
        preprocessed: ``nnUNet_preprocessed/DatasetXXX_Name``.
        raw: ``nnUNet_raw/DatasetXXX_Name`` where known.
        configuration: name of the configuration that is trained.
        is_round: whether that configuration belongs to a round of a run.
        labels: dataset.json's ``labels``.
    """
    own = preprocessed / table_name(configuration)
    if own.is_file():
        return read_table(own, labels=labels, strict=True)
    if is_round:
        raise InputError(
            f"{own}: is missing, but configuration '{configuration}' is a round of flare-pseudolabel. "
            "Build the round again with flare-pseudolabel run or retry."
        )
    candidates = [path / FILE_NAME for path in (preprocessed, raw) if path is not None and (path / FILE_NAME).is_file()]
    if not candidates:
        return CaseTable()
    tables = [read_table(path, labels=labels) for path in candidates]
    if len(tables) == 2 and dict(tables[0].cases) != dict(tables[1].cases):
        raise InputError(
            f"{candidates[0]} and {candidates[1]} differ. Keep the right one and delete or update the "
            "other; the training must know which roles to use."
        )
    return tables[0]
