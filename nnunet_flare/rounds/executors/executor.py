"""What an executor is: it brings the tasks of a run to where they are done. One class of this protocol adds one.

An executor is entered in :data:`EXECUTORS` under the name that ``--executor`` has for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from nnunet_flare.errors import InputError
from nnunet_flare.rounds.run.manifest import Run

EXECUTORS = {
    "local": "nnunet_flare.rounds.executors.local:LocalExecutor",
    "slurm": "nnunet_flare.rounds.executors.slurm:SlurmExecutor",
    "print": "nnunet_flare.rounds.executors.script:ScriptExecutor",
}


@dataclass(frozen=True)
class Options:
    """What the user said about the machine.

    Attributes:
        device: ``cuda``, ``cpu`` or ``mps``.
        num_gpus: GPUs to use; None: all that are visible.
        gpus_each: GPUs of one training.
        task_hours: a task that takes longer is ended; None: no limit.
        slurm: the words of ``--slurm``; None: those of the last submission.
        is_dry: nothing will be started, so that the machine at hand need not have the device.
    """

    device: str = "cuda"
    num_gpus: int | None = None
    gpus_each: int = 1
    task_hours: float | None = None
    slurm: Sequence[str] | None = ()
    is_dry: bool = False

    def refuse_local(self) -> None:
        """For executors that start no tasks themselves.

        Raises:
            InputError: where GPUs of this machine or a time limit were given.
        """
        if self.num_gpus is not None:
            raise InputError(
                f"-num_gpus {self.num_gpus}: needs --executor local; elsewhere each task asks for the GPUs that it "
                "uses, and --shards sets how many tasks label"
            )
        if self.task_hours is not None:
            raise InputError(f"--task_timeout {self.task_hours:g}: needs --executor local (Slurm: --slurm time=)")


class Executor(Protocol):
    """Brings the tasks of a run to where they are done.

    It is made from :class:`Options`, which it checks before anything of a run is written. ``shards`` is the number of
    parts that labelling is split into where the user gives none; ``needs_a_person`` says that nothing starts before
    somebody does more.
    """

    shards: int
    needs_a_person: bool

    def __init__(self, options: Options) -> None: ...

    def submit(self, run: Run) -> str:
        """Hand over every task that is neither done nor under way; returns what to tell the user."""
        ...

    def wait(self, run: Run) -> bool:
        """Work until nothing is left to do; False at once where others do the work.

        Raises:
            TaskError: naming each failed task.
        """
        ...

    @staticmethod
    def owns(run: Run) -> bool:
        """Whether the run is in this executor's hands."""
        ...

    @staticmethod
    def leave(run: Run) -> None:
        """Give the run to another executor.

        Raises:
            InputError: while tasks of it are under way here.
        """
        ...

    @staticmethod
    def cancel(run: Run) -> str:
        """End what is under way; returns what was done."""
        ...

    @staticmethod
    def status(run: Run) -> list[str]:
        """Lines for ``status`` about what is under way and what will not start any more."""
        ...


def executor_class(name: str) -> type[Executor]:
    """The executor of a name of :data:`EXECUTORS`."""
    module, _, found = EXECUTORS[name].partition(":")
    executor: type[Executor] = getattr(import_module(module), found)
    return executor


def executor_of(run: Run) -> type[Executor]:
    """The executor that has the run in hand; the local one where no other says so."""
    others = (executor_class(name) for name in EXECUTORS if name != "local")
    return next((executor for executor in others if executor.owns(run)), executor_class("local"))
