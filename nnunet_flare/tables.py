"""The one writer of tables for people: columns that line up, cells that break at words and never within one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

GAP = "  "
NARROWEST = 24
"""A column of text is never made narrower than this, whatever the width of the terminal."""


def table(
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] | None = None,
    align: str = "",
    width: int | None = None,
    indent: str = "",
) -> list[str]:
    """A table as lines without trailing blanks.

    Args:
        rows: cells; a row may be shorter than the others.
        header: names of the columns.
        align: ``l`` or ``r`` for each column; columns that are not named are left-aligned.
        width: columns of the terminal, into which the last column is wrapped at words; None: lines may be long.
        indent: put before every line.
    """
    every = [list(row) for row in ([header] if header else []) + list(rows)]
    if not every:
        return []
    count = max(map(len, every))
    every = [row + [""] * (count - len(row)) for row in every]
    sizes = [max(len(row[column]) for row in every) for column in range(count)]
    before = len(indent) + sum(size + len(GAP) for size in sizes[:-1])
    room = None if width is None else max(NARROWEST, width - before)
    lines = []
    for row in every:
        cells = [
            cell.rjust(size) if align[column : column + 1] == "r" else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ]
        parts = [cells[-1]] if room is None or len(row[-1]) <= room else broken(row[-1], room)
        lines.append((indent + GAP.join([*cells[:-1], parts[0]])).rstrip())
        lines += [" " * before + part for part in parts[1:]]
    return lines


def broken(text: str, width: int) -> list[str]:
    """A text in parts of at most ``width`` columns; a word (a path) that is longer stays whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def command_lines(command: str, width: int | None, indent: str) -> list[str]:
    r"""A shell command in lines that can be copied: broken at words, with ``\`` at the ends."""
    if width is None or len(indent) + len(command) <= width:
        return [indent + command]
    parts = broken(command, max(NARROWEST, width - len(indent) - 4))
    ends = [" \\"] * (len(parts) - 1) + [""]
    return [
        f"{indent}{'  ' if index else ''}{part}{end}" for index, (part, end) in enumerate(zip(parts, ends, strict=True))
    ]
