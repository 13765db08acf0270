"""Which organs a FLARE23 label map has annotated.

The challenge says that its 2200 label maps are partial, not which organs each of them covers. An organ that is in the
map is annotated; of one that is not, the map cannot tell "not annotated" from "not in this patient" (a removed
gallbladder, no tumour). Taken for annotated, it would teach that every organ which nobody drew is background; so only
what is present counts as annotated, and the price is that a truly missing organ is left open. Who knows better says so
in a CSV ``case,annotated``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from nnunet_flare.cases import Case
from nnunet_flare.documents import load_rows
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.organs import Organ

COLUMNS = ("case", "annotated")


def read_annotated(path: Path, cases: Collection[str], organs: Collection[Organ]) -> dict[str, tuple[int, ...]]:
    """Read the annotated organs of cases: ids or names of ``organs``, separated by spaces or semicolons.

    Raises:
        InputError: all problems at once, each with its line.
    """
    by_word = {word: organ.id for organ in organs for word in (organ.name, organ.short.lower(), str(organ.id))}
    head, *rows = load_rows(path) or [(1, [])]
    columns = [name.strip() for name in head[1]]
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise InputError(f"--annotated {path}, line 1: no column {', '.join(missing)}; expected {','.join(COLUMNS)}")
    problems: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    for line, cells in rows:
        row = dict(zip(columns, cells, strict=False))
        case, text = row.get("case", "").strip(), row.get("annotated", "")
        words = [word for word in re.split(r"[\s;]+", text.strip().lower()) if word]
        unknown = [word for word in words if word not in by_word]
        if len(cells) > len(columns):
            problems.append(f"line {line}: {len(cells)} cells, expected {len(columns)}; separate organs by spaces")
        elif case not in cases:
            problems.append(f"line {line}: '{case}' is not a training case of this download")
        elif case in found:
            problems.append(f"line {line}: {case} is listed twice")
        elif unknown or not words:
            names = ", ".join(organ.name for organ in organs)
            problems.append(f"line {line}: {case}: found {unknown or 'nothing'}, expected ids or names of {names}")
        else:
            found[case] = tuple(sorted({by_word[word] for word in words}))
    if problems:
        raise InputError(f"--annotated {path}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return found


def role_of(case: str, present: Collection[int], stated: tuple[int, ...] | None, all_ids: Collection[int]) -> Case:
    """The role of a training case from the ids in its map and, where somebody stated them, its annotated organs.

    Raises:
        CaseError: when the map holds an organ that is stated as not annotated.
    """
    annotated = tuple(sorted(present)) if stated is None else stated
    unstated = sorted(set(present) - set(annotated))
    if unstated:
        raise CaseError(case, f"its label map holds {unstated}, but only {list(annotated)} are given as annotated")
    return Case() if set(annotated) == set(all_ids) else Case("partial", annotated)


def summary(table: Mapping[str, Case], organs: Collection[Organ]) -> list[str]:
    """How many cases have each organ annotated, one line per organ."""
    return [
        f"  {organ.name:<22}{sum(c.annotated is None or organ.id in c.annotated for c in table.values()):>6}"
        for organ in organs
    ]
