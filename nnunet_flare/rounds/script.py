"""``--executor print``: the run as a shell script for people and other schedulers."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunet_flare.files import write_text
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.tasks import graph


def write_script(run: Run) -> Path:
    """Write ``RUN_DIR/run.sh``: nnU-Net's folders, then one line per task in an order that works.

    A line that is done returns at once, so the script can be run again after a failure; it stops at the first.
    """
    lines = ["#!/bin/sh", f"# Run {run.settings.name}, recipe {run.recipe.name}. Every line is one task.", "set -e"]
    lines += [f"export {name}={shlex.quote(folder)}" for name, folder in run.settings.folders.items()]
    lines.append(f"RUN_DIR={shlex.quote(str(run.root))}")
    for task in graph(run).values():
        lines.append("")
        needs = f" (after {', '.join(task.needs)})" if task.needs else ""
        lines.append(f"# {task.shown(run) if task.stage == 'train' else task.stage}{needs}")
        lines.append(f'flare-pseudolabel task -o "$RUN_DIR" {task.name}')
    path = run.root / "run.sh"
    write_text(path, "\n".join(lines) + "\n")
    return path
