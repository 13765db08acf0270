"""Doing one task: under its lock, with its marker written only after the output was checked."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from nnunet_flare.disks import trouble
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import write_json
from nnunet_flare.rounds.locks import LockFile
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.markers import is_marked
from nnunet_flare.rounds.tasks import Task, is_done, train_arguments
from nnunet_flare.signals import handling

log = logging.getLogger(__name__)

TASK_VARIABLE = "NNUNET_FLARE_TASK"
"""Environment variable that marks every process of a task, so that orphans of a killed one are found and ended."""

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
END_SECONDS = 10.0


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
        os.environ[TASK_VARIABLE] = _mark(run, task)
        missing = [need for need in task.needs if not is_marked(run.paths.done(need))]
        if missing:
            raise InputError(
                f"task {task.name} needs {', '.join(missing)} first; flare-pseudolabel status shows the order"
            )
        started = time.time()
        result = STAGES[task.stage](run, task)
        run.paths.failed(task.name).unlink(missing_ok=True)
        marker = {"task": task.name, "started": started, "seconds": round(time.time() - started, 2), "result": result}
        write_json(run.paths.done(task.name), marker)


def _plan(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.plans import plan_and_preprocess

    coarse = run.coarse_base
    if coarse is not None and task.name == coarse.task:
        from nnunet_flare.rounds.coarse import plan_coarse

        return {"base_hash": plan_coarse(run, coarse)}
    final = task.name == run.final_base.task
    found = plan_and_preprocess(run, run.final_base if final else run.base)
    if final:
        from nnunet_flare.rounds.given_plans import check_soft_teacher, check_start_model

        check_soft_teacher(run)
        check_start_model(run)
    return {"base_hash": found}


def _locate(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.coarse import locate_shard

    return locate_shard(run, task.part, run.settings.shards)


def _unlabelled(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.preprocess import preprocess_unlabelled

    return preprocess_unlabelled(run)


def _build(run: Run, task: Task) -> dict[str, Any]:
    if run.recipe.loops:
        from nnunet_flare.rounds.loop_data import build_loop_round

        return build_loop_round(run, _number(task))
    from nnunet_flare.rounds.data import build_round

    return build_round(run, _number(task))


def _label(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.labelling import label_shard

    return label_shard(run, _number(task), task.part, run.settings.shards)


def _select(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.choose import select_round

    with LockFile(run.paths.ledger.with_suffix(".lock"), "the ledger", wait=True):
        return select_round(run, _number(task))


def _report(run: Run, task: Task) -> dict[str, Any]:
    """The HTML report, by our own command; a run never fails for its report."""
    code = run_child([sys.executable, "-m", "nnunet_flare.cli.pseudolabel", "report", "-o", str(run.root)])
    if code != 0:
        log.warning(
            "the report was not written (exit code %d, see %s); the run goes on", code, run.paths.log(task.name)
        )
    return {"exit_code": code}


def _evaluate(run: Run, task: Task) -> dict[str, Any]:
    from nnunet_flare.rounds.held_out import evaluate_round

    return evaluate_round(run, _number(task))


def _train(run: Run, task: Task) -> dict[str, Any]:
    """``nnUNetv2_train`` in a process group of its own, continued with ``--c`` where a checkpoint is left."""
    model = run.coarse_model if task.round is None else run.model(task.round)
    folder = model / f"fold_{task.fold}"
    final = folder / CHECKPOINTS[0]
    resume = any((folder / name).is_file() for name in CHECKPOINTS)
    arguments = train_arguments(run, task, resume=resume)
    log.info("nnUNetv2_train %s", " ".join(arguments))
    code = run_child([sys.executable, "-m", "nnunetv2.run.run_training", *arguments])
    if code != 0:
        path = run.paths.log(task.name)
        raise TaskError(
            f"nnUNetv2_train {' '.join(arguments)} ended with exit code {code}; see {path}{_memory_advice(path)}"
            f"{_disk_advice(folder)}"
        )
    from nnunet_flare.checkpoints import load_checkpoint

    members = [] if task.round is None else run.recipe.member_checkpoints(run.recipe_number(task.round))
    for checkpoint in ("checkpoint_final.pth", *members):
        load_checkpoint(folder / checkpoint)
    return {"checkpoint": str(final)}


def _memory_advice(log_file: Path) -> str:
    """What helps a training whose log ends for lack of GPU memory."""
    if "CUDA out of memory" not in last_lines(log_file, 30):
        return ""
    return (
        ". It ran out of GPU memory: end what else uses the GPU, then run the same command again; or start a run under "
        "another --name with a smaller plan.patch_size, or plan.batch_size=1"
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


def _number(task: Task) -> int:
    if task.round is None:
        raise ValueError(f"{task.name} belongs to no round")
    return task.round


def _mark(run: Run, task: Task) -> str:
    return f"{run.root.resolve()}:{task.name}"


def run_child(command: list[str], *, environment: dict[str, str] | None = None, output: IO[bytes] | None = None) -> int:
    """Run a command whose whole process group ends when we are asked to end, and which dies with us.

    Args:
        command: the command.
        environment: its environment; None: ours.
        output: where its output goes; None: where ours goes.
    """
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )

    def forward(number: int, frame: FrameType | None) -> None:
        end_group(child.pid)
        raise SystemExit(128 + number)

    try:
        with handling(forward, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return child.wait()
    finally:
        end_group(child.pid)  # data loader processes that outlive a trainer that crashed


def die_with_parent() -> None:
    """In a child before exec: ask Linux to end it when its parent dies, however that happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def end_group(group: int) -> None:
    """End every process of a group: asked first, killed after :data:`END_SECONDS`."""
    if not _group_lives(group):
        return
    for number, patience in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return
        waited = 0.0
        while waited < patience and _group_lives(group):
            time.sleep(0.05)
            waited += 0.05
        if not _group_lives(group):
            return


def _group_lives(group: int) -> bool:
    import psutil

    for process in psutil.process_iter(["pid", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            with suppress(OSError):
                if os.getpgid(process.info["pid"]) == group:
                    return True
    return False


def _end_orphans(run: Run, task: Task) -> None:
    """End processes of this task that outlived a killed one, so that no two ever write the same files."""
    import psutil

    mark, found = _mark(run, task), []
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter(["pid"]):
        with suppress(psutil.Error):
            if process.pid not in mine and process.environ().get(TASK_VARIABLE) == mark:
                found.append(process)
    for process in found:
        log.warning("ending process %d, left over from an earlier try of task %s", process.pid, task.name)
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=END_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=END_SECONDS)


def last_lines(path: Path, count: int = 8) -> str:
    """The last lines of a log, for an error message."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 8192))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(lines[-count:])
