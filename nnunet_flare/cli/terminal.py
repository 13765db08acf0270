"""Text for people: a terminal gets coloured words and lines that fit; a file or a pipe gets it plain."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

from nnunet_flare.tables import command_lines

COLOURS = {
    "done": "32",
    "ok": "32",
    "running": "36",
    "note": "33",
    "failed": "31",
    "problem": "31",
    "FAILED": "1;31",
    "ENDED": "1;31",
}
"""SGR codes of words that stand alone. Each word says the same without its colour."""

_WORDS = re.compile(rf"(?<!\S)({'|'.join(COLOURS)})(?!\S)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def show(text: str) -> None:
    """Print text to stdout, without control characters that a log's last lines may have brought along."""
    text = _CONTROL.sub("", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    if (width := columns()) is not None:
        text = "\n".join(part for line in text.split("\n") for part in wrapped(line, width))
        if os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR"):
            text = _WORDS.sub(lambda match: f"\x1b[{COLOURS[match.group(1)]}m{match.group(1)}\x1b[0m", text)
    print(text)


def show_again(text: str) -> None:
    """:func:`show` in place of what a terminal shows; in a file one after the other."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        print("\x1b[H\x1b[2J", end="")
    show(text)
    sys.stdout.flush()


def next_step(command: str, note: str = "") -> None:
    """Print a command that makes sense now; one that is too long for the terminal in lines that can be copied."""
    width, added = columns(), f"  ({note})" if note else ""
    line = f"next: {command}{added}"
    if width is None or len(line) <= width:
        print(line)
    else:
        print("\n".join([f"next{f', {note}' if note else ''}:", *command_lines(command, width, "  ")]))


def columns() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe, whose lines may be long."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(line: str, columns: int) -> list[str]:
    """A line in parts of at most ``columns``, indented to the first one's text; words (paths) are never cut."""
    if len(line) <= columns:
        return [line]
    label = re.match(r"\s*\S+ {2,}|\s*", line)
    indent = " " * (label.end() if label and label.end() else 2)
    return textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
