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
from nnunet_flare.rounds.arrays import ENDINGS, is_cut
from nnunet_flare.rounds.boxes import BOX
from nnunet_flare.rounds.held_out import DICE
from nnunet_flare.rounds.labelling import LABELLED
from nnunet_flare.rounds.ledger import decisions_shape
from nnunet_flare.rounds.manifest import STOP, Base, Run
from nnunet_flare.rounds.markers import is_marked
from nnunet_flare.rounds.plans import raw_cases, read_plans
from nnunet_flare.rounds.preprocess import STATE, state_file
from nnunet_flare.rounds.tasks import Task, graph
from nnunet_flare.rounds.unlabelled import read_list

log = logging.getLogger(__name__)


def forget_damaged(run: Run) -> None:
    """Remove damaged documents and arrays of a run whose tasks can make them anew, and those tasks' markers.

    Raises:
        InputError: for damage that no task mends; it names the file and the remedy.
    """
    _forget_stop(run)
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
        log.warning("%s: made anew by %s", reason, ", ".join(makers) or "nobody; it is removed")
    for path in (*paths, *markers):
        path.unlink(missing_ok=True)


def _forget_stop(run: Run) -> None:
    """A damaged note of an early stop: the select task that wrote it, that of the last round, decides again."""
    path = run.paths.stop
    if not path.is_file() or holds(path, STOP):
        return
    selected = [n for n in range(run.recipe.final_round) if run.paths.done(f"select-r{n}").is_file()]
    _forget(run, [f"select-r{n}" for n in selected[-1:]], f"{path} is damaged", path)


def _documents(run: Run, tasks: dict[str, Task]) -> Iterator[tuple[Path, Any, list[str]]]:
    """Every JSON document that a task of the run made, its shape, and the tasks that make it."""

    def of(stage: str, number: int | None = None) -> list[str]:
        return [task.name for task in tasks.values() if task.stage == stage and task.round == number]

    for case in read_list(run.paths.unlabelled) if run.paths.unlabelled.is_file() else []:
        yield state_file(run.unlabelled_data, case.case), STATE, of("unlabelled")
        yield run.paths.box(case.case), BOX, [*of("locate"), *of("unlabelled")]
    for number in range(run.last_round):
        can_label = not is_marked(run.paths.done(f"select-r{number}")) or any(
            run.model(number).glob("fold_*/checkpoint_*.pth")
        )
        for path in sorted((run.paths.round(number) / "cases").glob("*.json")):
            yield path, LABELLED, of("label", number) if can_label else []
    for number in range(run.final_number + 1):
        makers = of("select", number) or of("build", number)  # of loops the build of the final round merges and decides
        yield run.paths.decisions(number), decisions_shape(number), makers
        yield run.paths.evaluation(number) / "dice.json", DICE, of("evaluate", number)


def _is_to_train(run: Run, tasks: dict[str, Task], number: int) -> bool:
    """Whether a round's data was built, and not all its trainings are done."""
    trainings = [task.name for task in tasks.values() if task.stage == "train" and task.round == number]
    return is_marked(run.paths.done(f"build-r{number}")) and not all(is_marked(run.paths.done(t)) for t in trainings)


def _forget_training_data(run: Run, tasks: dict[str, Task], number: int) -> None:
    """Make a round's configuration, table and cut arrays anew, and first what they are linked from."""
    base, build = run.base_of(number), f"build-r{number}"
    reason = _configuration_lost(run, base, run.configuration(number))
    if reason is not None:
        _forget(run, [build], reason)
    cut = _cut(base.data, raw_cases(run))
    if cut is not None:
        _forget(run, [base.task, build], f"{cut} is cut off or missing")
    if not 0 < number <= run.last_round:
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
    if not run.data(number).is_dir():
        _forget(run, [build], f"{run.data(number)} is missing")
    for path in sorted(run.data(number).glob("*.b2nd")):
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
