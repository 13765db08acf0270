"""The local executor: one child process per task, one task per GPU at a time, CPU tasks one after another.

Each GPU is guarded by a lock file of the machine, so that two drivers never put two tasks on one GPU. A child runs in
its own session and dies with the driver.
"""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nnunet_flare.errors import FlareError, InputError, TaskError
from nnunet_flare.files import last_lines, write_json
from nnunet_flare.rounds.executors.child import end_group, start_child
from nnunet_flare.rounds.executors.driver_end import cancel_driver
from nnunet_flare.rounds.executors.executor import Options
from nnunet_flare.rounds.executors.telling import Teller
from nnunet_flare.rounds.run.locks import LockedError, LockFile, living_owner
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import Task, graph, is_done, ready_tasks
from nnunet_flare.rounds.stages.mending import forget_damaged
from nnunet_flare.wording import duration

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05

BAR = "{desc}: {n:.1f}/{total} |{bar}| {elapsed}{postfix}"
"""Without tqdm's guess of the time that is left, which takes every task for as long as the others."""


class LocalExecutor:
    """This machine: one task on each GPU at a time."""

    needs_a_person = False

    def __init__(self, options: Options) -> None:
        if options.slurm:
            raise InputError("--slurm needs --executor slurm or print, not local")
        hours = options.task_hours
        if hours is not None and not 0 < hours < float("inf"):
            raise InputError(f"--task_timeout {hours:g}: expected hours above 0")
        self._gpus = usable_gpus(options)
        self._timeout_s = None if hours is None else hours * 3600
        self.shards = max(1, len(self._gpus))

    def submit(self, run: Run) -> str:
        """Nothing: :meth:`wait` starts the tasks."""
        return ""

    def wait(self, run: Run) -> bool:
        """Run every task; see :func:`run_local`."""
        run_local(run, self._gpus, timeout_s=self._timeout_s)
        return True

    @staticmethod
    def owns(run: Run) -> bool:
        """Whether a driver works on the run."""
        return living_owner(run.paths.driver_lock) is not None

    @staticmethod
    def leave(run: Run) -> None:
        """Nothing: the driver's lock keeps others out."""

    @staticmethod
    def cancel(run: Run) -> str:
        """End the driver on this machine and its tasks."""
        return cancel_driver(run)

    @staticmethod
    def status(run: Run) -> list[str]:
        """Nothing besides the tasks' own states."""
        return []


def run_local(run: Run, gpus: Sequence[str] = (), *, cpu_tasks: int = 1, timeout_s: float | None = None) -> None:
    """Run every task that is not done, except tasks that need a failed one.

    Args:
        run: the run.
        gpus: the GPUs to use, named as in CUDA_VISIBLE_DEVICES; empty on a machine without a GPU.
        cpu_tasks: how many tasks without a GPU run at once.
        timeout_s: a task that takes longer is ended and counts as failed; None: no limit.

    Raises:
        LockedError: when another driver works on this run.
        TaskError: names each failed task with its last lines, after all tasks that do not need it are done.
    """
    with LockFile(run.paths.driver_lock, f"the run in {run.root}"):
        for marker in run.root.glob("tasks/*.failed.json"):
            marker.unlink()
        forget_damaged(run)
        executor = _Driver(run, gpus, cpu_tasks, timeout_s)
        try:
            executor.work()
        finally:
            executor.end()
        if executor.failed:
            raise TaskError("; ".join(executor.failed.values()))


class _Driver:
    """Starts ready tasks on free slots until nothing is left to start."""

    def __init__(self, run: Run, gpus: Sequence[str], cpu_tasks: int, timeout_s: float | None) -> None:
        self.run = run
        self.timeout_s = timeout_s
        self.gpus = list(gpus)
        self.free_gpus = list(gpus)
        self.free_cpu = cpu_tasks
        self.children: dict[str, tuple[subprocess.Popen[bytes], ExitStack, list[str], float]] = {}
        self.failed: dict[str, str] = {}

    def work(self) -> None:
        redirected = logging_redirect_tqdm([logging.getLogger("nnunet_flare")])
        teller = Teller()
        with tqdm(total=len(graph(self.run)), desc="tasks", disable=None, bar_format=BAR) as bar, redirected:
            while True:
                started = self._start_ready()
                finished = self._collect()
                if finished:
                    self.run = self.run.current()  # the selection of a round may end the labelling
                if teller.look(self.run, self.children, at_once=started or finished):
                    tasks = graph(self.run)
                    done = sum(is_done(self.run, task) for task in tasks.values())
                    bar.total, bar.n = len(tasks), done + teller.part_done
                    bar.set_postfix_str(teller.words)
                elif not self.children and not self._waiting():
                    return
                time.sleep(POLL_SECONDS)

    def _waiting(self) -> list[Task]:
        """Tasks that could start; they wait for a GPU that another driver of this machine holds."""
        return [task for task in ready_tasks(self.run, graph(self.run)) if task.name not in self.failed]

    def _start_ready(self) -> bool:
        started = False
        for task in ready_tasks(self.run, graph(self.run)):
            if task.name in self.children or task.name in self.failed:
                continue
            if task.gpus:
                stack, chosen = self._take_gpus(task.gpus)
                if stack is None:
                    continue
            elif self.free_cpu:
                stack, chosen = ExitStack(), []
                self.free_cpu -= 1
            else:
                continue
            self._start(task, stack, chosen)
            started = True
        return started

    def _take_gpus(self, count: int) -> tuple[ExitStack | None, list[str]]:
        """Lock ``count`` free GPUs, or none."""
        stack = ExitStack()
        chosen: list[str] = []
        for gpu in list(self.free_gpus):
            if len(chosen) == count:
                break
            try:
                stack.enter_context(LockFile(gpu_lock(gpu), f"GPU {gpu}"))
            except LockedError:
                continue
            chosen.append(gpu)
        if len(chosen) < count:
            stack.close()
            return None, []
        for gpu in chosen:
            self.free_gpus.remove(gpu)
        return stack, chosen

    def _start(self, task: Task, stack: ExitStack, gpus: list[str]) -> None:
        path = self.run.paths.log(task.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = self.run.environment()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        log.info("%s: started%s", task.name, f" on GPU {', '.join(gpus)}" if gpus else "")
        with open(path, "ab") as stream:
            child = start_child(task.command(self.run), environment=environment, output=stream)
        self.children[task.name] = (child, stack, gpus, time.monotonic())

    def _collect(self) -> bool:
        finished = False
        tasks = graph(self.run)
        for name, (child, stack, gpus, started) in list(self.children.items()):
            if child.poll() is None:
                if self.timeout_s is None or time.monotonic() - started < self.timeout_s:
                    continue
                self._end_hanging(name, child)
            finished = True
            del self.children[name]
            stack.close()
            if gpus:
                self.free_gpus = [gpu for gpu in self.gpus if gpu in self.free_gpus or gpu in gpus]
            else:
                self.free_cpu += 1
            seconds = time.monotonic() - started
            if child.returncode == 0 and name in tasks and is_done(self.run, tasks[name]):
                log.info("%s: done in %s", name, duration(seconds))
            else:
                self._fail(name, child.returncode)
        return finished

    def _end_hanging(self, name: str, child: subprocess.Popen[bytes]) -> None:
        """End a task that takes too long, and say so where its log ends."""
        end_group(child.pid)
        child.wait()
        with open(self.run.paths.log(name), "a", encoding="utf-8") as stream:
            stream.write(f"\nended by the driver: not done after {duration(self.timeout_s or 0.0)} (--task_timeout)\n")

    def _fail(self, name: str, code: int) -> None:
        path = self.run.paths.log(name)
        tail = last_lines(path)
        message = f"task {name} failed with exit code {code}. The end of {path}:\n{tail}"
        self.failed[name] = message
        write_json(self.run.paths.failed(name), {"task": name, "exit_code": code, "last_lines": tail})
        log.error("%s: failed with exit code %d", name, code)

    def end(self) -> None:
        """End what still runs (Ctrl-C, an error of ours)."""
        for child, _, _, _ in self.children.values():
            end_group(child.pid)
        for child, stack, _, _ in self.children.values():
            child.wait()
            stack.close()
        self.children.clear()


def gpu_lock(gpu: str) -> Path:
    """The machine's lock file of a GPU, shared by all drivers of this user that call it by the same name."""
    name = gpu.replace("/", "_")  # older MIG names have slashes
    return Path(tempfile.gettempdir()) / f"nnunet-flare-{os.getuid()}" / f"gpu-{name}.lock"


def usable_gpus(options: Options) -> list[str]:
    """The GPUs of this machine that tasks may use; none for other devices.

    Raises:
        InputError: when there are fewer than a training needs.
    """
    if options.device != "cuda":
        if options.num_gpus not in (None, 0):
            raise InputError(f"-num_gpus {options.num_gpus} needs -device cuda, not {options.device}")
        return []
    if options.is_dry:  # for the machine that the run is meant for, which may be another one
        asked = options.num_gpus if options.num_gpus is not None else len(visible_gpus(None))
        return [str(number) for number in range(max(asked, options.gpus_each))]
    gpus = visible_gpus(options.num_gpus)
    if len(gpus) < options.gpus_each:
        raise InputError(
            f"-device cuda: this machine has {len(gpus)} GPU(s), a training needs {options.gpus_each} "
            "(training.num_gpus). Without a GPU use -device cpu"
        )
    return gpus


def visible_gpus(wanted: int | None) -> list[str]:
    """The GPUs that tasks may use, at most ``wanted``: those of CUDA_VISIBLE_DEVICES as they stand there, else all.

    CUDA takes numbers, ``GPU-...`` and ``MIG-...``, and nothing that comes after a word that is none of them.

    Raises:
        FlareError: when fewer than ``wanted`` are there.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        words = [word.strip() for word in listed.split(",")]
        gpus = list(dict.fromkeys(itertools.takewhile(_names_gpu, words)))
    else:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    if wanted is not None and wanted > len(gpus):
        raise FlareError(f"-num_gpus {wanted}: this machine has {len(gpus)} GPU(s)")
    return gpus[:wanted]


def _names_gpu(word: str) -> bool:
    return word.isdigit() or word.startswith(("GPU-", "MIG-"))
