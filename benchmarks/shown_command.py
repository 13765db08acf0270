"""The command that stands beside a benchmark's figures: as it was typed, without the folders of the machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shown_command(argv: Sequence[str] | None = None) -> str:
    """The command of this process, or of ``argv``, as one types it in the repository's own folder.

    Of an absolute path the part below the repository stays, of one elsewhere its last name.
    """
    script, *words = sys.argv if argv is None else argv
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name or value
    return f"{option}{equals}{value}"
