"""``--executor print``: the run as a shell script for people and other schedulers.

Plain: loops over the tasks of each stage and round, in an order that works. With ``--slurm``: the ``sbatch`` lines of
the same graph, which a person may change before running them. Names are quoted, also within comments, where only a
line break could end one.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_flare.children import SAFE_PATH
from nnunet_flare.files import write_text
from nnunet_flare.rounds.executors.executor import Options
from nnunet_flare.rounds.executors.slurm import SBATCH_OPTIONS, SHARDS, batch_script, groups
from nnunet_flare.rounds.executors.slurm_options import parse_options, resources
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import Task, graph

SUBMIT = """\
# Prints the number of the job that it submits.
submit() {
  sbatch --parsable --chdir="$RUN_DIR" "$@" | cut -d ';' -f 1
}
mkdir -p "$RUN_DIR"/logs/slurm
"""


class ScriptExecutor:
    """A person, or another scheduler: the tasks are written down."""

    needs_a_person = True

    def __init__(self, options: Options) -> None:
        options.refuse_local()
        self._options = parse_options(options.slurm) if options.slurm else None
        self.shards = 1 if self._options is None else SHARDS

    def submit(self, run: Run) -> str:
        """Write the script; see :func:`write_script` and :func:`write_submission`."""
        if self._options is not None:
            path = write_submission(run, self._options)
            return f"{path}\nRun it with bash where sbatch works; it submits every job."
        return f"{write_script(run)}\nRun it with sh; every task can be run again."

    def wait(self, run: Run) -> bool:
        """No: a person does the work."""
        return False

    @staticmethod
    def owns(run: Run) -> bool:
        """Never: a script that was written says nothing about who runs it."""
        return False

    @staticmethod
    def leave(run: Run) -> None:
        """Nothing: the script stays where it is."""

    @staticmethod
    def cancel(run: Run) -> str:
        """Nothing can be ended from here."""
        return "nothing to cancel: end what runs the script"

    @staticmethod
    def status(run: Run) -> list[str]:
        """Nothing besides the tasks' own states."""
        return []


def write_script(run: Run) -> Path:
    """Write ``RUN_DIR/run.sh``: nnU-Net's folders, then one loop per stage and round.

    A task that is done returns at once, so the script can be run again after a failure; it stops at the first.
    """
    lines = ["#!/bin/sh", *_head(run, "Every task can be run again; one that is done returns at once."), "set -e"]
    lines += _variables(run)
    for group in groups(graph(run).values()):
        lines += ["", *_comments(run, group)]
        if len(group) == 1:
            lines.append(f'flare-pseudolabel task -o "$RUN_DIR" {group[0].name}')
        else:
            lines.append(f"for task in {' '.join(task.name for task in group)}; do")
            lines += ['  flare-pseudolabel task -o "$RUN_DIR" "$task"', "done"]
    path = run.root / "run.sh"
    write_text(path, "\n".join(lines) + "\n")
    return path


def write_submission(run: Run, options: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``RUN_DIR/submit.sh``: one ``sbatch`` line per stage and round, and the job scripts that they name.

    Args:
        run: the run.
        options: the ``--slurm`` options by stage.

    Raises:
        InputError: for an option that is none.
    """
    lines = ["#!/bin/bash", *_head(run, "Submits every job of the run."), "set -euo pipefail"]
    lines += [*_variables(run), SUBMIT.rstrip()]
    place: dict[str, str] = {}
    for group in groups(graph(run).values()):
        name = group_name(group)
        job = name.replace("-", "_")
        script = run.root / "slurm" / f"{name}.sh"
        write_text(script, batch_script(run, [task.name for task in group]))
        words = [f"--job-name=flare-{run.settings.name}-{name}", *SBATCH_OPTIONS]
        words += resources(options, group[0]).arguments(group[0].gpus)
        if len(group) > 1:
            words.append(f"--array=0-{len(group) - 1}")
        before = list(dict.fromkeys(place[need] for task in group for need in task.needs))
        ids = ":".join(f"${{{variable}}}" for variable in before)
        waits = f" --dependency=afterok:{ids} --kill-on-invalid-dep=yes" if before else ""
        lines += ["", *_comments(run, group)]
        lines.append(f'{job}=$(submit {shlex.join(words)}{waits} "$RUN_DIR"/slurm/{name}.sh)')
        lines.append(f'echo "{name}: job ${job}"')
        place |= {task.name: job for task in group}
    path = run.root / "submit.sh"
    write_text(path, "\n".join(lines) + "\n")
    return path


def group_name(group: Sequence[Task]) -> str:
    """What the tasks of a group share in their names: ``train-r0`` of ``train-r0-f0`` and ``train-r0-f1``."""
    return group[0].name if len(group) == 1 else group[0].name.rpartition("-")[0]


def _head(run: Run, text: str) -> list[str]:
    return [f"# Run {run.settings.name}, recipe {run.recipe.name}. {text}"]


def _variables(run: Run) -> list[str]:
    lines = [f"export {name}={shlex.quote(folder)}" for name, folder in run.settings.folders.items()]
    lines.append(f"export {SAFE_PATH}=1")
    return [*lines, f"RUN_DIR={shlex.quote(str(run.root))}"]


def _comments(run: Run, group: Sequence[Task]) -> list[str]:
    """What a group does and after what; of trainings, the stock commands behind them."""
    needs = list(dict.fromkeys(need for task in group for need in task.needs))
    after = f" (after {', '.join(needs)})" if needs else ""
    texts = [group_name(group) + after]
    texts += [f"  {task.shown(run)}" for task in group if task.stage == "train"]
    return [f"# {' '.join(text.splitlines())}" for text in texts]
