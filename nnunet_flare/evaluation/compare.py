"""Paired comparison of two sets of predictions: Wilcoxon signed-rank test, bootstrap interval of the difference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.documents import csv_text
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.table import MEASURES, ScoreTable
from nnunet_flare.files import write_text

RESAMPLES = 10_000
"""Bootstrap resamples of the cases; the interval's ends then move by about 1 % of its length between seeds."""

CONFIDENCE = 0.95

SAME = 1e-9
"""Smaller differences are rounding of the tables and count as none."""

MEAN_ROW = "Organ_mean"
"""Name of the row that compares the mean over organs (lesions left out) of each case."""


@dataclass(frozen=True)
class ComparisonRow:
    """B minus A of one structure and measure: means, mean difference with interval, two-sided p, and p by Holm."""

    structure: str
    measure: str
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """Two tables over their common cases; ``only_a`` and ``only_b`` are the cases left out."""

    cases: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def csv_text(self) -> str:
        """One line per structure and measure, the organ mean first."""
        columns = ["Mean_A", "Mean_B", "Difference", "CI95_Low", "CI95_High", "Wilcoxon_P", "Holm_P"]
        lines: list[list[Any]] = [["Structure", "Measure", "Cases", *columns]]
        for row in self.rows:
            figures = [row.mean_a, row.mean_b, row.difference, row.low, row.high]
            chances = [f"{p:.4g}" for p in (row.p, row.p_holm)]
            lines.append([row.structure, row.measure, len(self.cases), *(f"{v:.4f}" for v in figures), *chances])
        return csv_text(lines)

    def write_csv(self, path: Path) -> None:
        """Write :meth:`csv_text` by rename."""
        write_text(path, self.csv_text())

    def to_json(self) -> dict[str, Any]:
        """Everything in the comparison as JSON values."""
        return {
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "cases": list(self.cases),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "rows": [row.__dict__ for row in self.rows],
        }


def compare(a: ScoreTable, b: ScoreTable, *, seed: int = 0) -> Comparison:
    """Compare two tables case by case; cases that only one of them has are left out and listed.

    A case is the same in files of another ending.

    The interval is the percentile bootstrap over cases; p-values are two-sided, differences of 0 dropped (Wilcoxon's
    way), and 1 where nothing differs. Holm's correction runs over the structures of one measure.

    Raises:
        InputError: when the tables score other structures or share no case.
    """
    if [s.id for s in a.structures] != [s.id for s in b.structures]:
        raise InputError("the two tables score different structures; score both with the same --labels")
    places_a, places_b = ({row.case: place for place, row in enumerate(t.rows)} for t in (a, b))
    common = sorted(places_a.keys() & places_b.keys())
    if not common:
        raise InputError("the two tables have no case in common; expected the same file names in their Name columns")
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(common), np.full(len(common), 1 / len(common)), size=RESAMPLES) / len(common)
    rows: list[ComparisonRow] = []
    for measure in MEASURES:
        values_a = a.values(measure)[[places_a[name] for name in common]]
        values_b = b.values(measure)[[places_b[name] for name in common]]
        organs = [i for i, s in enumerate(a.structures) if not s.is_lesion] or slice(None)
        mean_row = _row(MEAN_ROW, measure, values_a[:, organs].mean(axis=1), values_b[:, organs].mean(axis=1), drawn)
        single = [
            _row(structure.short, measure, values_a[:, i], values_b[:, i], drawn)
            for i, structure in enumerate(a.structures)
        ]
        rows += [mean_row, *_with_holm(single)]
    return Comparison(
        tuple(a.rows[places_a[case]].name for case in common),
        tuple(rows),
        tuple(a.rows[places_a[case]].name for case in sorted(places_a.keys() - places_b.keys())),
        tuple(b.rows[places_b[case]].name for case in sorted(places_b.keys() - places_a.keys())),
    )


def _row(structure: str, measure: str, a: np.ndarray, b: np.ndarray, drawn: np.ndarray) -> ComparisonRow:
    difference = b - a
    means = drawn @ difference
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    p = _wilcoxon(difference)
    mean_a, mean_b = float(a.mean()), float(b.mean())
    return ComparisonRow(structure, measure, mean_a, mean_b, float(difference.mean()), float(low), float(high), p, p)


def _wilcoxon(difference: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    ranked = np.round(difference[np.abs(difference) > SAME], 9)
    return float(wilcoxon(ranked).pvalue) if ranked.size else 1.0


def _with_holm(rows: list[ComparisonRow]) -> list[ComparisonRow]:
    order = sorted(range(len(rows)), key=lambda i: rows[i].p)
    corrected = list(rows)
    smallest = 0.0
    for rank, place in enumerate(order):
        smallest = max(smallest, min(1.0, rows[place].p * (len(rows) - rank)))
        corrected[place] = replace(rows[place], p_holm=smallest)
    return corrected
