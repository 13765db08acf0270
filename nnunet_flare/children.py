"""Python processes that we start import nothing from the current folder.

``python -m`` and ``python -c`` put the current folder in front of the import path, so that a ``tqdm.py`` lying there
runs in place of the installed one. From Python 3.11 on ``-P`` and ``PYTHONSAFEPATH`` turn that off, the latter also for
what our children start (nnU-Net's worker processes). For 3.10 the path is mended before anything is imported, and our
plugin reads the variable (:mod:`nnunet_flare.plugin`). Folders on PYTHONPATH stay where the user put them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SAFE_PATH = "PYTHONSAFEPATH"

RUN_MODULE = (
    "import sys; sys.path.pop(0); import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
"""``python -m`` without the current folder, for Python 3.10."""

_ours: list[bool] = []


def python_module(module: str, *arguments: str, has_flag: bool = sys.version_info >= (3, 11)) -> list[str]:
    """The command that runs a module with this Python, as ``python -m`` does, but not from the current folder."""
    how = ["-P", "-m"] if has_flag else ["-c", RUN_MODULE]
    return [sys.executable, *how, module, *arguments]


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment (None: ours) whose Python processes import nothing from the current folder.

    Empty entries of PYTHONPATH mean the current folder too; most come from ``PYTHONPATH=$PYTHONPATH:more``.
    """
    safe = {**(os.environ if environment is None else environment), SAFE_PATH: "1"}
    if "PYTHONPATH" in safe:
        safe["PYTHONPATH"] = os.pathsep.join(entry for entry in safe["PYTHONPATH"].split(os.pathsep) if entry)
    return safe


def users_environment() -> dict[str, str]:
    """Our environment as the user gave it, for commands that are the user's own."""
    return {name: value for name, value in os.environ.items() if not (name == SAFE_PATH and _ours)}


@contextmanager
def safe_children() -> Iterator[None]:
    """Inside, every Python process that this one starts is safe: our workers, nnU-Net's, and what they start."""
    before = {name: os.environ.get(name) for name in (SAFE_PATH, "PYTHONPATH")}
    if not before[SAFE_PATH]:
        _ours.append(True)
    os.environ.update(safe_environment())
    try:
        yield
    finally:
        if not before[SAFE_PATH]:
            _ours.pop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
