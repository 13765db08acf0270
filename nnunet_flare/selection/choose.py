"""Which pseudo-labelled cases are taken: pure functions of a table and a rule of :mod:`nnunet_flare.selection.rules`.

A table is an array (cases, organs) of agreements in 0 .. 1, or (cases, pairs of rounds) of changes. NaN means that a
value could not be computed; an agreement counts as 0 then. A case of which nothing is known is never taken, whatever
the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_flare.selection.rule import Rule
from nnunet_flare.selection.rules import RULES


@dataclass(frozen=True)
class Decision:
    """Whether a case is taken, its score under the rule, and why in words."""

    case: str
    taken: bool
    score: float
    reason: str


def scores(table: np.ndarray, rule: str, *, skipped: np.ndarray | None = None) -> np.ndarray:
    """(cases,) score of each row of a table (cases, columns) under a rule.

    Args:
        table: the values; an agreement that is NaN counts as 0.
        rule: name of the rule.
        skipped: (cases, columns) bool, values that do not count at all; a row without another one scores 0.
    """
    given = np.asarray(table, dtype=float)
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"expected a table (cases, organs), got shape {given.shape}")
    found = find(rule)
    values = given if found.table == "rounds" else np.nan_to_num(given, nan=0.0)
    if skipped is None or not skipped.any() or found.needs == "nothing":
        return found.score(values)
    score = np.zeros(len(values))
    for pattern in np.unique(skipped, axis=0):
        rows = (skipped == pattern).all(axis=1)
        if not pattern.all():
            score[rows] = found.score(values[rows][:, ~pattern])
    return score


def find(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: when there is none.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule '{name}', expected one of {', '.join(RULES)}")
    return RULES[name]


def select(
    cases: Sequence[str],
    table: np.ndarray,
    *,
    organs: Sequence[str],
    rule: str = "min-organ",
    threshold: float = 0.9,
    top_fraction: float | None = None,
    per_organ: Mapping[str, float] | None = None,
    missing: Mapping[str, Sequence[str]] | None = None,
    skipped: np.ndarray | None = None,
    domains: Mapping[str, str] | None = None,
) -> list[Decision]:
    """Decide on every case: score >= ``threshold`` (inclusive), every organ of ``per_organ`` at least its own
    threshold, and of those only the best ``top_fraction`` of *all* cases. The order of the cases does not matter; ties
    at the cut are broken by case id. With domains the best ``top_fraction`` of each domain's cases are taken.

    Args:
        cases: ids, one per row.
        table: (cases, organs) agreement; for ``round-change`` (cases, pairs of rounds) changes.
        organs: names of the columns.
        rule: name of one of :data:`nnunet_flare.selection.rules.RULES`.
        threshold: smallest score that is taken.
        top_fraction: largest share of the cases that is taken, rounded to the nearest whole case, at least one.
        per_organ: smallest agreement by organ name.
        missing: organs that a case's label lacks, by case; such a case is not taken (Fosun's ``label_complete``). None:
            nobody asks for complete labels.
        skipped: (cases, organs) bool, organs that do not count in a case, neither in its score nor alone.
        domains: the domain of every case; None: all are of one.
    """
    values = np.asarray(table, dtype=float).reshape(len(cases), len(organs))
    strange = sorted(set(per_organ or {}) - set(organs))
    if strange:
        raise ValueError(f"thresholds for unknown organs {strange}, the organs are {list(organs)}")
    if not len(cases):
        return []
    left_out = np.zeros(values.shape, dtype=bool) if skipped is None else np.asarray(skipped, dtype=bool)
    score, unknown = scores(values, rule, skipped=left_out), find(rule).unknown(values)
    reasons: list[str | None] = [None] * len(cases)
    for row in range(len(cases)):
        if unknown[row]:
            reasons[row] = f"{rule} could not be computed"
        elif score[row] < threshold:
            reasons[row] = (
                f"{rule} {score[row]:.3f} < {threshold:g}{_weakest(values[row], left_out[row], organs, rule)}"
            )
        for organ, least in (per_organ or {}).items():
            column = list(organs).index(organ)
            value = np.nan_to_num(values[row, column], nan=0.0)
            if reasons[row] is None and value < least and not left_out[row, column]:
                reasons[row] = f"{organ} {value:.3f} < {least:g}"
        lacking = (missing or {}).get(cases[row])
        if reasons[row] is None and lacking:
            reasons[row] = f"not complete: no {', '.join(lacking)}"
    of_domain = [None if domains is None else domains[case] for case in cases]
    for domain in dict.fromkeys(of_domain):
        if top_fraction is None:
            break
        mine = [row for row in range(len(cases)) if of_domain[row] == domain]
        room = room_for(top_fraction, len(mine))
        ranking = sorted((row for row in mine if reasons[row] is None), key=lambda r: (-score[r], cases[r]))
        for rank, row in enumerate(ranking[room:], start=room + 1):
            reasons[row] = (
                f"{rule} {score[row]:.3f} is rank {rank} of {len(mine)}{_among(domain)}, below the best "
                f"{100 * top_fraction:.4g} %"
            )
    return [
        Decision(case, why is None, float(value), why or _taken(rule, value, threshold, top_fraction, domain))
        for case, value, why, domain in zip(cases, score, reasons, of_domain, strict=True)
    ]


def room_for(top_fraction: float, cases: int) -> int:
    """How many of the cases a largest share is: the nearest whole number, at least one."""
    return max(1, math.floor(top_fraction * cases + 0.5))


def _among(domain: str | None) -> str:
    return "" if domain is None else f" of domain {domain}"


def _weakest(row: np.ndarray, skipped: np.ndarray, names: Sequence[str], rule: str) -> str:
    """The column that speaks most against a case, in words."""
    judged = find(rule)
    if judged.needs == "nothing" or skipped.all():
        return ""
    if judged.table == "rounds":
        worst = int(row.argmax())
        return f"; largest change {names[worst]} {row[worst]:.3f}"
    values = np.where(skipped, np.inf, np.nan_to_num(row, nan=0.0))
    worst = int(values.argmin())
    return f"; lowest organ {names[worst]} {values[worst]:.3f}"


def _taken(rule: str, score: float, threshold: float, top_fraction: float | None, domain: str | None) -> str:
    if find(rule).needs == "nothing":
        return "all labelled cases are taken"
    within = "" if top_fraction is None else f", among the best {100 * top_fraction:.4g} %{_among(domain)}"
    return f"{rule} {score:.3f} >= {threshold:g}{within}"


def accepted_organs(table: np.ndarray, threshold: float, per_organ: Mapping[int, float] | None = None) -> np.ndarray:
    """(cases, organs) which organs of each case are certain enough on their own (organ-wise acceptance).

    ``per_organ`` maps a column to its own threshold. NaN is never accepted.
    """
    values = np.asarray(table, dtype=float)
    least = np.full(values.shape[1], threshold)
    for column, value in (per_organ or {}).items():
        least[column] = value
    return values >= least
