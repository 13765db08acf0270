"""Typing what a page of the documentation shows, as a reader would."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str) -> list[str]:
    """The code blocks of a page that are marked as ``sh``: what a reader types, in order, a command a line."""
    found = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(r"\\\n\s*", "", block) for block in found]


def type_line(line: str, change: Callable[[list[str]], list[str]]) -> None:
    """Run one line as a shell would: variables, our commands in this process, the rest in a real shell.

    ``change`` makes a command's words smaller where it would take long as shown.
    """
    if not re.match(r"flare-|export |\w+=", line):
        subprocess.run(line, shell=True, check=True)
        return
    words = shlex.split(os.path.expandvars(line), comments=True)
    assignments = words[1:] if words[0] == "export" else words
    if all(re.match(r"\w+=", word) for word in assignments):
        os.environ.update(word.split("=", 1) for word in assignments)
        return
    program, *words = words
    main = importlib.import_module(f"nnunet_flare.cli.{program.removeprefix('flare-')}").main
    assert main(change(words)) == 0, line
