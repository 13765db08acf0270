"""Which domain (a modality, a site) every unlabelled scan belongs to: by a table, or by a pattern of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunet_flare.documents import load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.recipes.parts import Domains

COLUMNS = ("case", "domain")
SHOWN = 10
"""Cases that an error names."""


def read_domains(path: Path) -> dict[str, str]:
    """The domain of each case of a CSV table with the columns ``case`` and ``domain``; others are left alone.

    Raises:
        InputError: all problems at once, each with its line.
    """
    rows = load_rows(path)
    head = [cell.strip() for cell in rows[0][1]] if rows else []
    if not set(COLUMNS) <= set(head):
        raise InputError(f"{path}: found the columns {', '.join(head) or '(none)'}, expected {', '.join(COLUMNS)}")
    places = [head.index(column) for column in COLUMNS]
    found: dict[str, str] = {}
    problems = []
    for line, row in rows[1:]:
        case, domain = (row[place].strip() if place < len(row) else "" for place in places)
        if not case or not domain:
            problems.append(f"line {line}: expected a case and its domain, found {row}")
        elif found.setdefault(case, domain) != domain:
            problems.append(f"line {line}: {case} is {domain} here and {found[case]} before")
    if problems:
        raise InputError(f"{path}: {len(problems)} problem(s):\n  " + "\n  ".join(problems[:SHOWN]))
    return found


def domains_of(cases: Iterable[str], given: Domains) -> dict[str, str]:
    """The domain of each unlabelled case: what the table says, else the domain whose pattern its name has.

    Args:
        cases: ids of the unlabelled cases.
        given: the recipe's ``domains``.

    Returns:
        Nothing where the recipe asks for no domains.

    Raises:
        InputError: for cases of which neither says a domain, or patterns of two domains do; all at once.
    """
    if not given:
        return {}
    table = read_domains(Path(given.table)) if given.table is not None else {}
    found: dict[str, str] = {}
    unknown, doubtful = [], []
    for case in cases:
        fitting = [table[case]] if case in table else _by_name(case, given.names)
        if len(fitting) == 1:
            found[case] = fitting[0]
        elif fitting:
            doubtful.append(f"{case} ({' and '.join(fitting)})")
        else:
            unknown.append(case)
    problems = [f"patterns of two domains fit {_told(doubtful)}; change domains.names"] if doubtful else []
    if unknown:
        asked = [f"domains.table {given.table}"] if given.table is not None else []
        asked += [f"{name}: {pattern}" for name, pattern in given.names.items()]
        problems.append(
            f"no domain is known for {_told(unknown)}. Searched: {'; '.join(asked)}. Add them to the table or to "
            "domains.names, or take them out of the folder"
        )
    if problems:
        raise InputError("unlabelled scans: " + "; ".join(problems))
    return found


def _by_name(case: str, patterns: Mapping[str, str]) -> list[str]:
    return [domain for domain, pattern in patterns.items() if re.search(pattern, case)]


def _told(cases: list[str]) -> str:
    more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
    return f"{len(cases)} scan(s): {', '.join(cases[:SHOWN])}{more}"
