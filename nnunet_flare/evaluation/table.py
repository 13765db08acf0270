"""The table of scores: the official CSV layout, its summary, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.documents import csv_text, load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.structures import Structure
from nnunet_flare.files import write_csv, write_json, write_text
from nnunet_flare.images import suffix_of

MEASURES: tuple[str, ...] = ("DSC", "NSD")

OFFICIAL_DECIMALS = 4
"""The official FLARE23 script rounds means to four decimals, before averaging them over the organs and after."""

WORST_CASES = 3
"""Cases that the summary names for each structure."""

SUMMARY_COLUMNS = ("Structure", "Measure", "Cases", "Mean", "SD", "Median", "Worst_Cases")

FALSE_POSITIVE = "_FP_ml"
"""End of the columns of a table of healthy scans."""


@dataclass(frozen=True)
class CaseRow:
    """One case: its file ``name`` and DSC and NSD by structure id.

    ``false_positive_ml`` has the predicted volume of every lesion that the reference has none of.
    """

    name: str
    dsc: dict[int, float]
    nsd: dict[int, float]
    false_positive_ml: dict[int, float] = field(default_factory=dict)

    @property
    def case(self) -> str:
        """The name without the ending of an image."""
        return self.name[: len(self.name) - len(suffix_of(Path(self.name)) or "")]


@dataclass(frozen=True)
class SummaryRow:
    """One measure of one structure over the cases; ``sd`` with n - 1; ``worst`` are (file name, value), worst first."""

    structure: str
    measure: str
    cases: int
    mean: float
    sd: float
    median: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class HealthyRow:
    """What was predicted of one kind of lesion on the ``scans`` whose reference has none.

    ``share`` are the scans with any false positive, from 0 to 1; ``mean_ml`` is over all the scans.
    """

    structure: str
    scans: int
    with_any: int
    share: float
    mean_ml: float
    largest_ml: float
    largest_case: str


@dataclass(frozen=True)
class ScoreTable:
    """Scores of a folder.

    ``failed`` holds (case, reason) of cases that could not be scored, ``notes`` what a reader must know besides.
    """

    structures: tuple[Structure, ...]
    rows: tuple[CaseRow, ...]
    corrected: bool = False
    failed: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def values(self, measure: str) -> np.ndarray:
        """The scores (cases, structures) of ``DSC`` or ``NSD``."""
        columns = [[_of(row, measure)[s.id] for s in self.structures] for row in self.rows]
        return np.array(columns, dtype=float).reshape(len(self.rows), len(self.structures))

    def mean(self, measure: str) -> float:
        """Mean over organs (lesions left out) of the mean over cases; NaN without cases.

        Official tables round as the official script does, corrected ones do not.
        """
        organs = [i for i, s in enumerate(self.structures) if not s.is_lesion]
        if not self.rows:
            return float("nan")
        means = self.values(measure).mean(axis=0)[organs or slice(None)]
        if self.corrected:
            return float(means.mean())
        return float(np.round(np.round(means, OFFICIAL_DECIMALS).mean(), OFFICIAL_DECIMALS))

    def summary(self) -> list[SummaryRow]:
        """Mean, sd, median and worst cases of every structure and measure; empty without cases."""
        rows = []
        for measure in MEASURES:
            for structure, values in zip(self.structures, self.values(measure).T, strict=True):
                if not values.size:
                    continue
                order = np.argsort(values, kind="stable")[:WORST_CASES]
                rows.append(
                    SummaryRow(
                        structure.short,
                        measure,
                        values.size,
                        float(values.mean()),
                        float(values.std(ddof=1)) if values.size > 1 else 0.0,
                        float(np.median(values)),
                        tuple((self.rows[i].name, float(values[i])) for i in order),
                    )
                )
        return rows

    def healthy(self) -> list[HealthyRow]:
        """The false positives on healthy scans, one row per lesion; none where every reference shows the lesion."""
        rows = []
        for structure in self.structures:
            found = [(row.false_positive_ml[structure.id], row.name) for row in self._without(structure)]
            if found:
                with_any = sum(ml > 0 for ml, _ in found)
                mean_ml = sum(ml for ml, _ in found) / len(found)
                share = with_any / len(found)
                rows.append(HealthyRow(structure.short, len(found), with_any, share, mean_ml, *max(found)))
        return rows

    def _without(self, structure: Structure) -> list[CaseRow]:
        return [row for row in self.rows if structure.id in row.false_positive_ml]

    def write_healthy_csv(self, path: Path) -> None:
        """Write the falsely predicted volume of every healthy scan by rename, in ml."""
        lesions = [s for s in self.structures if s.is_lesion]
        lines: list[list[Any]] = [["Name", *(f"{s.short}{FALSE_POSITIVE}" for s in lesions)]]
        for row in self.rows:
            cells = [row.false_positive_ml.get(s.id) for s in lesions]
            if any(ml is not None for ml in cells):
                lines.append([row.name, *("" if ml is None else f"{ml:.4f}" for ml in cells)])
        write_csv(path, lines)

    def csv_text(self) -> str:
        """The official layout: Name, every structure's DSC, every structure's NSD."""
        header = ["Name", *(f"{s.short}_{measure}" for measure in MEASURES for s in self.structures)]
        rows = ([row.name, *(_of(row, m)[s.id] for m in MEASURES for s in self.structures)] for row in self.rows)
        return csv_text([header, *rows])

    def write_csv(self, path: Path) -> None:
        """Write the official layout by rename."""
        write_text(path, self.csv_text())

    def write_summary_csv(self, path: Path) -> None:
        """Write the summary by rename, one line per structure and measure."""
        lines: list[list[Any]] = [[*SUMMARY_COLUMNS]]
        for row in self.summary():
            worst = " ".join(f"{name}={value:.4f}" for name, value in row.worst)
            figures = [f"{value:.4f}" for value in (row.mean, row.sd, row.median)]
            lines.append([row.structure, row.measure, row.cases, *figures, worst])
        write_csv(path, lines)

    def to_json(self) -> dict[str, Any]:
        """Everything in the table as JSON values."""
        return {
            "rules": "corrected" if self.corrected else "official",
            "structures": [
                {"id": s.id, "name": s.name, "labels": list(s.labels), "nsd_tolerance_mm": s.nsd_tolerance_mm}
                for s in self.structures
            ],
            "mean": {measure: self.mean(measure) if self.rows else None for measure in MEASURES},
            "summary": [
                {**row.__dict__, "worst": [{"name": name, "value": value} for name, value in row.worst]}
                for row in self.summary()
            ],
            "healthy": [row.__dict__ for row in self.healthy()],
            "cases": [
                {"name": row.name, **{m: {s.name: _of(row, m)[s.id] for s in self.structures} for m in MEASURES}}
                for row in self.rows
            ],
            "failed": [{"case": case, "reason": reason} for case, reason in self.failed],
            "notes": list(self.notes),
        }

    def write_json(self, path: Path) -> None:
        """Write :meth:`to_json` by rename."""
        write_json(path, self.to_json())


def _of(row: CaseRow, measure: str) -> dict[int, float]:
    return row.dsc if measure == "DSC" else row.nsd


def is_summary(path: Path) -> bool:
    """Whether a file is a summary that was written here."""
    return _header(path) == [*SUMMARY_COLUMNS]


def is_healthy(path: Path) -> bool:
    """Whether a file is a table of healthy scans that was written here."""
    name, *columns = _header(path) or [""]
    return name == "Name" and bool(columns) and all(column.endswith(FALSE_POSITIVE) for column in columns)


def _header(path: Path) -> list[str]:
    try:
        return load_rows(path)[0][1]
    except (InputError, IndexError):
        return []


def read_csv(path: Path, structures: Sequence[Structure]) -> ScoreTable:
    """Read a table in the official layout.

    Raises:
        InputError: for a missing file, other columns than those of ``structures``, cells that are no numbers, or a case
            that is there twice.
    """
    expected = ["Name", *(f"{s.short}_{measure}" for measure in MEASURES for s in structures)]
    lines = load_rows(path)
    if not lines or lines[0][1] != expected:
        found = ", ".join(lines[0][1][:4]) if lines else "nothing"
        raise InputError(
            f"{path}: columns {found}, ..., expected {', '.join(expected[:4])}, ... ({len(expected)} columns); "
            "give the --labels that it was written with"
        )
    rows: list[CaseRow] = []
    cases: set[str] = set()
    for number, line in lines[1:]:
        try:
            values = [float(cell) for cell in line[1:]]
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; expected numbers after the name") from error
        if len(line) != len(expected) or not np.isfinite(values).all():
            raise InputError(f"{path}, line {number}: expected {len(expected) - 1} finite numbers after the name")
        ids = [s.id for s in structures]
        dsc, nsd = values[: len(ids)], values[len(ids) :]
        rows.append(CaseRow(line[0], dict(zip(ids, dsc, strict=True)), dict(zip(ids, nsd, strict=True))))
        if rows[-1].case in cases:
            raise InputError(f"{path}, line {number}: {line[0]} is there twice; expected one row for each case")
        cases.add(rows[-1].case)
    return ScoreTable(tuple(structures), tuple(rows))
