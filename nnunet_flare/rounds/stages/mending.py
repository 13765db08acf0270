"""What a crash, a bad disk or a person damaged in a run: removed with its makers' markers, so that it is made anew.

Done at the start of ``run`` and ``retry``, under the driver's lock. What cannot be made anew (the manifest, the plans,
the list of scans) is refused where it is read, with a remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nnunet_flare.cases import read_table, table_name
from nnunet_flare.errors import InputError
from nnunet_flare.files import holds
from nnunet_flare.rounds.run.configurations import read_plans
from nnunet_flare.rounds.run.dataset import raw_cases
from nnunet_flare.rounds.run.labelled_case import LABELLED
from nnunet_flare.rounds.run.ledger import decisions_shape
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import STOP, Run, load_run_to_write, read_manifest
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import ENDINGS, is_cut
from nnunet_flare.rounds.stages.boxes import BOX
from nnunet_flare.rounds.stages.evaluate import DICE
from nnunet_flare.rounds.stages.preprocess import STATE, state_file

log = logging.getLogger(__name__)


def forget_damaged(run: Run) -> None:
    """Remove damaged documents and arrays of a run whose tasks can make them anew, and those tasks' markers.

    Raises:
        InputError: for damage that no task mends; it names the file and the remedy.
    """
    tasks = graph(run)
    for path, shape, makers in _documents(run, tasks):
        if path.is_file() and not holds(path, shape):
            _forget(run, makers, f"{path} is damaged", path)
    for number in sorted({task.round for task in tasks.values() if task.stage == "train" and task.round is not None}):
        if _is_to_train(run, tasks, number):
            _forget_training_data(run, tasks, number)
    coarse = run.coarse_base
    if coarse is not None and not is_marked(run.paths.done("train-coarse")):
        reason = _configuration_lost(run, coarse, run.coarse_configuration)
        if reason is not None:
            _forget(run, [coarse.task], reason)


def _forget(run: Run, makers: Sequence[str], reason: str, *paths: Path) -> None:
    markers = [run.paths.done(name) for name in makers]
    if paths or any(marker.is_file() for marker in markers):
        log.warning("%s: made again by %s", reason, ", ".join(makers) or "nobody; it is removed")
    for path in (*paths, *markers):
        path.unlink(missing_ok=True)


def load_mended(root: Path) -> Run:
    """The run of a folder for a command that goes on with it.

    Where the note of an early stop is damaged, the select task that wrote it, that of the last round, decides again.

    Raises:
        InputError: as :func:`nnunet_flare.rounds.run.manifest.load_run_to_write`.
        LockedError: when there is something to mend while another driver works on the run.
    """
    run = read_manifest(root)
    path = run.paths.stop
    if path.is_file() and not holds(path, STOP):
        with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
            selected = [n for n in range(run.recipe.final_round) if run.paths.done(f"select-r{n}").is_file()]
            _forget(run, [f"select-r{n}" for n in selected[-1:]], f"{path} is damaged", path)
    return load_run_to_write(root)


def _documents(run: Run, tasks: dict[str, Task]) -> Iterator[tuple[Path, Any, list[str]]]:
    """Every JSON document that a task of the run made, its shape, and the tasks that make it."""

    def of(stage: str, number: int | None = None) -> list[str]:
        return [task.name for task in tasks.values() if task.stage == stage and task.round == number]

    for case in read_list(run.paths.unlabelled) if run.paths.unlabelled.is_file() else []:
        yield state_file(run.unlabelled_data, case.case), STATE, of("unlabelled")
        yield run.paths.box(case.case), BOX, [*of("locate"), *of("unlabelled")]
    for number in (each.number for each in run.rounds if each.labels_cases):
        can_label = not is_marked(run.paths.done(f"select-r{number}")) or any(
            run.round(number).model.glob("fold_*/checkpoint_*.pth")
        )
        for path in sorted((run.paths.round(number) / "cases").glob("*.json")):
            yield path, LABELLED, of("label", number) if can_label else []
    for number in range(len(run.rounds)):
        makers = of("select", number) or of("build", number)  # of loops the build of the final round merges and decides
        yield run.paths.decisions(number), decisions_shape(number), makers
        yield run.paths.evaluation(number) / "dice.json", DICE, of("evaluate", number)


def _is_to_train(run: Run, tasks: dict[str, Task], number: int) -> bool:
    """Whether a round's data was built, and not all its trainings are done."""
    trainings = [task.name for task in tasks.values() if task.stage == "train" and task.round == number]
    return is_marked(run.paths.done(f"build-r{number}")) and not all(is_marked(run.paths.done(t)) for t in trainings)


def _forget_training_data(run: Run, tasks: dict[str, Task], number: int) -> None:
    """Make a round's configuration, table and cut arrays anew, and first what they are linked from."""
    of, build = run.round(number), f"build-r{number}"
    base = of.base
    reason = _configuration_lost(run, base, of.configuration)
    if reason is not None:
        _forget(run, [build], reason)
    cut = _cut(base.data, raw_cases(run))
    if cut is not None:
        _forget(run, [base.task, build], f"{cut} is cut off or missing")
    if of.learns_from is None:
        return
    for case in read_list(run.paths.unlabelled):
        if holds(state_file(run.unlabelled_data, case.case), {"source": str, "failed": str}):
            continue
        cut = _cut(run.unlabelled_data, [case.case])
        if cut is not None:
            state = state_file(run.unlabelled_data, case.case)
            _forget(run, ["unlabelled", build], f"{cut} is cut off or missing", state)
        label = run.paths.training_label(number - 1, case.case)
        if label.is_file() and is_cut(label):
            makers = [t.name for t in tasks.values() if t.stage == "label" and t.round == number - 1]
            _forget(run, [*makers, build], f"{label} is cut off", run.paths.case(number - 1, case.case))
    if not of.data.is_dir():
        _forget(run, [build], f"{of.data} is missing")
    for path in sorted(of.data.glob("*.b2nd")):
        if is_cut(path):
            _forget(run, [build], f"{path} is cut off")


def _cut(folder: Path, cases: Sequence[str]) -> Path | None:
    """The first array of some cases that is missing or cut off; None where no folder is, which its task then makes."""
    paths = (folder / f"{case}{ending}" for case in cases for ending in ENDINGS) if folder.is_dir() else ()
    return next((path for path in paths if not path.is_file() or is_cut(path)), None)


def _configuration_lost(run: Run, base: Base, name: str) -> str | None:
    """Why a configuration cannot be trained, in words: it is not in the plans, or its table of cases is damaged."""
    if not base.plans_file.is_file():
        _forget(run, [base.task], f"{base.plans_file} is missing")
        return f"{base.plans_file} is missing"
    if name not in read_plans(base.plans_file)["configurations"]:
        return f"{base.plans_file} has no configuration {name}"
    table = run.preprocessed / table_name(name)
    try:
        read_table(table)
    except InputError as error:
        return str(error)
    return None
