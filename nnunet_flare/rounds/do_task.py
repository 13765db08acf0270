"""Doing one task: under its lock, with its marker written only after the output was checked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_flare.children import python_module
from nnunet_flare.disks import trouble
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import last_lines, write_json
from nnunet_flare.processes import UNKNOWN, namespace, namespace_of, still_running
from nnunet_flare.rounds.executors.child import END_SECONDS, run_child
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.run.tasks import Task, is_done, train_arguments

log = logging.getLogger(__name__)

TASK_VARIABLE = "NNUNET_FLARE_TASK"
"""Environment variable that marks every process of a task, so that orphans of a killed one are found and ended."""

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")


def do_task(run: Run, task: Task) -> None:
    """Run a task to its end; one that is done already, or that another process finishes meanwhile, returns at once.

    Raises:
        FlareError: whatever stopped the task.
    """
    os.environ.update(run.settings.folders)
    with LockFile(run.paths.task_lock(task.name), f"task {task.name}", wait=True):
        if is_done(run, task):
            return
        _end_orphans(run, task)
        missing = [need for need in task.needs if not is_marked(run.paths.done(need))]
        if missing:
            raise InputError(
                f"task {task.name} needs {', '.join(missing)} first; flare-pseudolabel status shows the order of tasks"
            )
        started = time.time()
        with _marked(run, task):
            result = STAGES[task.stage](run, task)
        run.paths.failed(task.name).unlink(missing_ok=True)
        marker = {"task": task.name, "started": started, "seconds": round(time.time() - started, 2), "result": result}
        write_json(run.paths.done(task.name), marker)


def _plan(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.plan import plan_and_preprocess

    coarse = run.coarse_base
    if coarse is not None and task.name == coarse.task:
        from nnunet_flare.rounds.stages.locate import plan_coarse

        return {"base_hash": plan_coarse(run, coarse)}
    final = task.name == run.final_base.task
    found = plan_and_preprocess(run, run.final_base if final else run.base)
    if final:
        from nnunet_flare.rounds.stages.given_plans import check_soft_teacher, check_start_model

        check_soft_teacher(run)
        check_start_model(run)
    return {"base_hash": found}


def _locate(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.locate import locate_shard

    return locate_shard(run, task.part, run.settings.shards)


def _unlabelled(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.preprocess import preprocess_unlabelled

    return preprocess_unlabelled(run)


def _build(run: Run, task: Task) -> dict[str, Any]:
    if run.recipe.loops:
        from nnunet_flare.rounds.stages.build_loops import build_loop_round

        return build_loop_round(run, _round(run, task))
    from nnunet_flare.rounds.stages.build import build_round

    return build_round(run, _round(run, task))


def _label(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.label import label_shard

    return label_shard(run, _round(run, task), task.part, run.settings.shards)


def _select(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.select import select_round

    return select_round(run, _round(run, task))


def _report(run: Run, task: Task) -> dict[str, Any]:
    """The HTML report, by our own command; a run never fails for its report."""
    code = run_child(python_module("nnunet_flare.cli.pseudolabel", "report", "-o", str(run.root)))
    if code != 0:
        log.warning(
            "the report was not written (exit code %d, see %s); the run goes on", code, run.paths.log(task.name)
        )
    return {"exit_code": code}


def _evaluate(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.stages.evaluate import evaluate_round

    return evaluate_round(run, _round(run, task))


def _train(run: Run, task: Task) -> dict[str, Any]:
    """``nnUNetv2_train`` in a process group of its own, continued with ``--c`` where a checkpoint is left."""
    model = run.coarse_model if task.round is None else run.round(task.round).model
    folder = model / f"fold_{task.fold}"
    final = folder / CHECKPOINTS[0]
    resume = any((folder / name).is_file() for name in CHECKPOINTS)
    arguments = train_arguments(run, task, resume=resume)
    _check_given(run, task, arguments)
    log.info("nnUNetv2_train %s", " ".join(arguments))
    code = run_child(python_module("nnunetv2.run.run_training", *arguments))
    if code != 0:
        path = run.paths.log(task.name)
        raise TaskError(
            f"nnUNetv2_train {' '.join(arguments)} ended with exit code {code}; see {path}{_memory_advice(path)}"
            f"{_disk_advice(folder)}"
        )
    from nnunet_flare.checkpoints import load_checkpoint

    members = [] if task.round is None else [name for _, name in run.round(task.round).members]
    for checkpoint in ("checkpoint_final.pth", *members):
        load_checkpoint(folder / checkpoint)
    return {"checkpoint": str(final)}


def _check_given(run: Run, task: Task, arguments: list[str]) -> None:
    """What comes from outside is read as data before a stock command opens it as code: plans and first weights."""
    from nnunet_flare.checkpoints import read_weights
    from nnunet_flare.rounds.run.configurations import check_names

    base = run.coarse_base if task.round is None else run.round(task.round).base
    if base is not None:
        check_names(run, base)
    if "-pretrained_weights" in arguments:
        path = Path(arguments[arguments.index("-pretrained_weights") + 1])
        read_weights(path, trust=run.settings.trust_checkpoint)


def _memory_advice(log_file: Path) -> str:
    """What helps a training whose log ends for lack of GPU memory."""
    if "CUDA out of memory" not in last_lines(log_file, 30):
        return ""
    return (
        ". It ran out of GPU memory. End other programs on the GPU and run the same command again, or start a run with "
        "another --name and a smaller plan.patch_size, or plan.batch_size=1"
    )


def _disk_advice(folder: Path) -> str:
    """What helps a training whose folder cannot be written any more."""
    found = trouble(folder) if folder.is_dir() else None
    return "" if found is None else f". {folder}: {found.strerror}; make room, then run the same command again"


STAGES: dict[str, Callable[[Run, Task], dict[str, Any]]] = {
    "plan": _plan,
    "locate": _locate,
    "unlabelled": _unlabelled,
    "build": _build,
    "train": _train,
    "label": _label,
    "select": _select,
    "report": _report,
    "evaluate": _evaluate,
}


def _round(run: Run, task: Task) -> Round:
    if task.round is None:
        raise ValueError(f"{task.name} does not belong to a round")
    return run.round(task.round)


@contextmanager
def _marked(run: Run, task: Task) -> Iterator[None]:
    """Mark the processes that are started inside; those that a program starts after its task are none of it."""
    before = os.environ.get(TASK_VARIABLE)
    os.environ[TASK_VARIABLE] = _mark(run, task)
    try:
        yield
    finally:
        if before is None:
            del os.environ[TASK_VARIABLE]
        else:
            os.environ[TASK_VARIABLE] = before


def _mark(run: Run, task: Task) -> str:
    return f"{run.root.resolve()}:{task.name}"


def _end_orphans(run: Run, task: Task) -> None:
    """End processes of this task that outlived a killed one, so that no two ever write the same files.

    Raises:
        TaskError: while processes of another PID namespace (a container) do this task; their numbers are not ours.
    """
    import psutil

    here = namespace()
    mark = _mark(run, task)
    found: list[psutil.Process] = []
    elsewhere: list[psutil.Process] = []
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter(["pid"]):
        with suppress(psutil.Error):
            if process.pid not in mine and process.environ().get(TASK_VARIABLE) == mark:
                same = here != UNKNOWN and namespace_of(process.pid) == here
                (found if same else elsewhere).append(process)
    if elsewhere:
        raise TaskError(
            f"task {task.name} still runs in another container (process {elsewhere[0].pid} as seen from here); "
            "end it there, then run the same command again"
        )
    for process in found:
        log.warning("ending process %d, left over from an earlier try of task %s", process.pid, task.name)
        with suppress(psutil.Error):
            process.terminate()
    alive = still_running(found, patience_s=END_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    still_running(alive, patience_s=END_SECONDS)
