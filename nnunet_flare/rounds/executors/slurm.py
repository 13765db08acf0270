"""The Slurm executor: the whole run becomes a graph of jobs at once, and nothing of ours has to stay alive.

Tasks of one stage and round are one job array; each array waits for what it needs (``afterok``), and Slurm cancels it
when that fails (``--kill-on-invalid-dep``). What was submitted stands in ``RUN_DIR/slurm.json``: written before
``sbatch`` is called under a job name that is used only once, so that a submission that was killed half-way is found
again in the queue. ``sbatch``, ``squeue``, ``scontrol`` and ``scancel`` are needed; ``sacct`` is asked where it works.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunet_flare.children import python_module
from nnunet_flare.errors import FlareError, InputError, TaskError
from nnunet_flare.files import read_json, write_json, write_text
from nnunet_flare.rounds.executors.executor import Options
from nnunet_flare.rounds.executors.slurm_options import parse_options, resources
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.tasks import Task, graph, is_done, stand_in
from nnunet_flare.rounds.stages.mending import forget_damaged

log = logging.getLogger(__name__)

SIGNAL_SECONDS = 120
"""How long before the walltime a job is told: ending a trainer's processes takes up to 20 s, and Slurm may be late."""

COMMAND_SECONDS = 60.0

SHARDS = 4
"""Parts that labelling is split into on a cluster, where the number of GPUs is not known."""

SBATCH_OPTIONS = (
    "--output=logs/slurm/%j.out",  # below --chdir: Slurm reads % and \ of a folder's name as a pattern
    "--open-mode=append",
    "--requeue",
    f"--signal=B:USR1@{SIGNAL_SECONDS}",
)
"""What every job is submitted with."""

TEMPLATE = """\
#!/bin/bash
# Run {run}, written by flare-pseudolabel. Element k of the array does the k-th task.
tasks=({tasks})
{exports}
export PYTHONSAFEPATH=1
exec {python} {root} "${{tasks[${{SLURM_ARRAY_TASK_ID:-0}}]}}"
"""


@dataclass(frozen=True)
class Submission:
    """One call of ``sbatch``: its tasks by array index, and the job's number (None: not known to have arrived)."""

    token: str
    tasks: tuple[str, ...]
    job: str | None = None


@dataclass(frozen=True)
class Queued:
    """A task's job in the queue: its id (``12`` or ``12_3``), its state and why it waits, in Slurm's words."""

    job: str
    state: str
    reason: str


STATE = {"options": {str: dict}, "submissions": [{"token": str, "tasks": [str], "job": (str, None)}]}
REMEDY = (
    "remove the run's jobs from the queue with scancel, remove the file, and run flare-pseudolabel run with --executor "
    "slurm again"
)


class SlurmExecutor:
    """A cluster with Slurm: everything is submitted at once."""

    needs_a_person = False
    shards = SHARDS

    def __init__(self, options: Options) -> None:
        options.refuse_local()
        self._options = None if options.slurm is None else parse_options(options.slurm)

    def submit(self, run: Run) -> str:
        """Submit what is neither done nor in the queue, as :func:`submit` does."""
        jobs = submit(run, stored_options(run) if self._options is None else self._options)
        again = f"flare-pseudolabel status -o {shlex.quote(str(run.root))}"
        return f"{len(jobs)} jobs submitted; no process has to stay alive here. {again}"

    def wait(self, run: Run) -> bool:
        """No: Slurm does the work."""
        return False

    @staticmethod
    def owns(run: Run) -> bool:
        """Whether jobs of the run were submitted."""
        return state_file(run).is_file()

    @staticmethod
    def leave(run: Run) -> None:
        """Forget the submissions, unless jobs are in the queue; see :func:`leave`."""
        leave(run)

    @staticmethod
    def cancel(run: Run) -> str:
        """Take every job out of the queue."""
        return f"{cancel(run)} tasks were removed from Slurm's queue"

    @staticmethod
    def status(run: Run) -> list[str]:
        """What is in the queue, what ended without a result, what will not start any more."""
        return queue_rows(run)


def state_file(run: Run) -> Path:
    """Where the run keeps its submissions; its presence says that the run's executor is Slurm."""
    return run.root / "slurm.json"


def stored_options(run: Run) -> dict[str, dict[str, Any]]:
    """The ``--slurm`` options of the last submission."""
    options: dict[str, dict[str, Any]] = read_json(state_file(run), STATE, remedy=REMEDY)["options"]
    return options


def submit(run: Run, options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Submit every task that is neither done nor in the queue; returns the ids of the new jobs.

    Raises:
        LockedError: while a local driver or another submission works on this run.
        TaskError: when Slurm refuses a job; what was submitted before stays in the queue.
    """
    with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
        forget_damaged(run)
        submissions = _load(run)
        _store(run, options, submissions)
        tasks = graph(run)
        kept, stale = _keep(run, tasks, _queue(run, submissions))
        _scancel(stale)
        missing = [task for task in tasks.values() if not is_done(run, task) and task.name not in kept]
        placed = {name: (job, 1) for name, job in kept.items()}
        jobs: list[str] = []
        for group in groups(missing):
            submission = Submission(uuid4().hex[:12], tuple(task.name for task in group))
            submissions.append(submission)
            _store(run, options, submissions)
            for task in group:
                run.paths.failed(task.name).unlink(missing_ok=True)
            job = _sbatch(run, group, submission, options, _dependencies(run, group, placed), len(jobs))
            submissions[-1] = replace(submission, job=job)
            _store(run, options, submissions)
            jobs.append(job)
            for index, task in enumerate(group):
                placed[task.name] = (f"{job}_{index}" if len(group) > 1 else job, len(group))
            log.info("job %s: %s", job, ", ".join(task.name for task in group))
        return jobs


def queue(run: Run) -> dict[str, Queued]:
    """The run's tasks that are in the queue (waiting or running).

    Raises:
        TaskError: when Slurm cannot be asked.
    """
    return _queue(run, _load(run))


def cancel(run: Run) -> int:
    """Take every job of the run out of the queue; returns how many tasks those were."""
    with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
        jobs = [queued.job for queued in queue(run).values()]
        _scancel(jobs)
        return len(jobs)


def leave(run: Run) -> None:
    """Give the run to another executor.

    Raises:
        InputError: while jobs of it are in the queue.
    """
    if not state_file(run).is_file():
        return
    jobs = queue(run)
    if jobs:
        raise InputError(
            f"{len(jobs)} tasks of the run in {run.root} are in Slurm's queue. Let them end, or cancel "
            f"them: flare-pseudolabel cancel -o {shlex.quote(str(run.root))}"
        )
    state_file(run).unlink()


def queue_rows(run: Run) -> list[str]:
    """Lines for ``status``: what is in the queue, what ended without a result, what will not start any more."""
    try:
        jobs = queue(run)
    except FlareError as error:
        return [f"Slurm cannot be asked here: {error}"]
    tasks = graph(run)
    running = sum(job.state != "PENDING" for job in jobs.values())
    lines = [f"Slurm: {running} tasks running, {len(jobs) - running} waiting"]
    gone = [task for task in tasks.values() if not is_done(run, task) and task.name not in jobs]
    last = {name: job for s in _load(run) for name, job in _ids(s).items()}
    for task in gone:
        if all(is_marked(run.paths.done(need)) for need in task.needs) and not run.paths.failed(task.name).is_file():
            ended = _how_ended(last[task.name]) if task.name in last else "was never submitted"
            lines.append(f"ENDED {task.name} without a result: {ended}")
    if gone:
        lines.append(f"{len(gone)} tasks are neither done nor in the queue. Fix the cause, then:")
        lines.append(f"  flare-pseudolabel retry -o {shlex.quote(str(run.root))}")
    return lines


def _load(run: Run) -> list[Submission]:
    path = state_file(run)
    if not path.is_file():
        return []
    known = read_json(path, STATE, remedy=REMEDY)["submissions"]
    return [Submission(s["token"], tuple(s["tasks"]), s["job"]) for s in known]


def _store(run: Run, options: Mapping[str, Mapping[str, Any]], submissions: Iterable[Submission]) -> None:
    write_json(state_file(run), {"options": options, "submissions": [asdict(s) for s in submissions]})


def _job_name(run: Run, submission: Submission) -> str:
    return f"flare-{run.settings.name}-{submission.token}"


def _ids(submission: Submission) -> dict[str, str]:
    """Slurm's id of each task of a submission that arrived."""
    if submission.job is None:
        return {}
    if len(submission.tasks) == 1:
        return {submission.tasks[0]: submission.job}
    return {name: f"{submission.job}_{index}" for index, name in enumerate(submission.tasks)}


def _queue(run: Run, submissions: Sequence[Submission]) -> dict[str, Queued]:
    if not submissions:
        return {}
    by_name = {_job_name(run, submission): submission for submission in submissions}
    printed = _call(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%j|%T|%r"])
    found: dict[str, Queued] = {}
    for line in printed.splitlines():
        job, name, state, reason = [*line.split("|"), "", "", ""][:4]
        submission = by_name.get(name)
        if submission is None:
            continue
        index = int(job.partition("_")[2] or 0)
        task = stand_in(run, submission.tasks[index])
        if task is None or is_done(run, task):
            continue
        if state == "COMPLETING" and run.paths.failed(task.name).is_file():
            continue
        found[task.name] = Queued(job, state, reason)
    return found


def _keep(run: Run, tasks: Mapping[str, Task], jobs: Mapping[str, Queued]) -> tuple[dict[str, str], list[str]]:
    """Jobs that stay, by task, and those to cancel: waiting ones whose needs will be met by a job they do not know."""
    kept: dict[str, str] = {}
    stale = []
    for task in tasks.values():
        if task.name not in jobs:
            continue
        job = jobs[task.name]
        met = all(need in kept or is_marked(run.paths.done(need)) for need in task.needs)
        if met or job.state != "PENDING":
            kept[task.name] = job.job
        else:
            stale.append(job.job)
    return kept, stale


def groups(tasks: Iterable[Task]) -> list[list[Task]]:
    """The tasks of a stage and round that need the same together, in the graph's order."""
    found: dict[tuple[str, int | None, tuple[str, ...]], list[Task]] = {}
    for task in tasks:
        found.setdefault((task.stage, task.round, task.needs), []).append(task)
    return list(found.values())


def _dependencies(run: Run, group: Sequence[Task], placed: Mapping[str, tuple[str, int]]) -> list[str]:
    """Ids that a group waits for; an array whose every element is needed is named as a whole."""
    needed = dict.fromkeys(n for task in group for n in task.needs if not is_marked(run.paths.done(n)))
    elements: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for need in needed:
        job, size = placed[need]
        whole = job.partition("_")[0]
        elements.setdefault(whole, []).append(job)
        sizes[whole] = size
    ids = []
    for whole, jobs in elements.items():
        ids += [whole] if len(jobs) == sizes[whole] and sizes[whole] > 1 else jobs
    return ids


def _sbatch(
    run: Run,
    group: Sequence[Task],
    submission: Submission,
    options: Mapping[str, Mapping[str, Any]],
    needed: Sequence[str],
    earlier: int,
) -> str:
    script = run.root / "slurm" / f"{group[0].name}-{submission.token}.sh"
    write_text(script, batch_script(run, submission.tasks))
    (run.paths.log("slurm").parent / "slurm").mkdir(parents=True, exist_ok=True)
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={_job_name(run, submission)}",
        f"--chdir={run.root}",
        *SBATCH_OPTIONS,
        *resources(options, group[0]).arguments(group[0].gpus),
    ]
    if len(group) > 1:
        command.append(f"--array=0-{len(group) - 1}")
    if needed:
        command += [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"]
    try:
        printed = _call([*command, str(script)])
    except TaskError as error:
        raise TaskError(
            f"Slurm refused the job of {', '.join(submission.tasks)}: {error}. {earlier} jobs were submitted before "
            "it and stay in the queue; correct --slurm and run the same command again, or use flare-pseudolabel cancel"
        ) from error
    job = printed.strip().partition(";")[0]  # 12;cluster where there are several
    if not job.isdigit():
        raise TaskError(f"sbatch printed {printed.strip()!r}, expected a job number")
    return job


def batch_script(run: Run, tasks: Sequence[str]) -> str:
    """The script of a job (array) that does ``tasks``; every name is quoted."""
    return TEMPLATE.format(
        run=run.settings.name,
        tasks=" ".join(map(shlex.quote, tasks)),
        exports="\n".join(f"export {name}={shlex.quote(folder)}" for name, folder in run.settings.folders.items()),
        python=shlex.join(python_module("nnunet_flare.rounds.executors.slurm_job")),
        root=shlex.quote(str(run.root)),
    )


def _scancel(jobs: Sequence[str]) -> None:
    if jobs:
        _call(["scancel", *jobs])


def _how_ended(job: str) -> str:
    """State and exit code of a job that left the queue, as far as Slurm still knows."""
    for command, pattern in (
        (["scontrol", "--oneliner", "show", "job", job], r"JobState=(\S+).*?ExitCode=(\S+)"),
        (
            ["sacct", "--noheader", "--allocations", "--parsable2", "--jobs", job, "--format=State,ExitCode"],
            r"(.+)\|(.+)",
        ),
    ):
        try:
            found = re.search(pattern, _call(command))
        except FlareError:
            continue
        if found:
            return f"job {job} {found[1]}, exit code {found[2]}"
    return f"job {job} is no longer known to Slurm"


def _call(command: Sequence[str]) -> str:
    """Run one of Slurm's commands and return what it prints.

    Raises:
        InputError: when it is not installed.
        TaskError: when it fails, with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]} was not found; use a machine with Slurm's commands (a login node)") from error
    except subprocess.TimeoutExpired as error:
        raise TaskError(f"{command[0]} did not answer within {COMMAND_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise TaskError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
