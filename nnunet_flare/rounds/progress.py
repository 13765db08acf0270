"""How far a run is: states of its tasks, epochs of its trainings, and the time that is left by what was measured."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_flare import plugin
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json
from nnunet_flare.rounds.run.configurations import read_plans
from nnunet_flare.rounds.run.locks import living_owner
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import MARKER, is_marked
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.tasks import Task
from nnunet_flare.rounds.run.training_log import Epoch, epoch_seconds, read_epochs
from nnunet_flare.wording import duration

State = Literal["done", "failed", "running", "stopped", "waiting"]
"""Of a task; ``stopped``: it was begun, and who did it is gone."""

STOCK_EPOCHS = 1000


@dataclass(frozen=True)
class Training:
    """A training: how many epochs it shall have, and those that are over."""

    task: Task
    epochs: int
    over: Sequence[Epoch]

    @property
    def each_s(self) -> float | None:
        """Seconds of an epoch; None before the first is over."""
        return epoch_seconds(self.over)

    @property
    def done(self) -> int:
        """Epochs that are over."""
        return self.over[-1].number + 1 if self.over else 0

    def row(self) -> list[str]:
        """Cells for people, under :data:`TRAINING_HEADER`."""
        if not self.over:
            return [self.task.name, f"{self.done}/{self.epochs}", *["-"] * 4, "known after the first epoch"]
        last, each = self.over[-1], self.each_s or 0.0
        values = [_shown(value) for value in (last.train_loss, last.val_loss, last.moving_dice)]
        left = duration(max(0, self.epochs - self.done) * each)
        return [self.task.name, f"{self.done}/{self.epochs}", duration(each), *values, left]

    def line(self) -> str:
        """The same as a line of a log."""
        name, epochs, each, loss, validation, dice, left = self.row()
        if not self.over:
            return f"{name}: epoch {epochs}"
        return (
            f"{name}: epoch {epochs}, {each} each, loss {loss} (validation {validation}), moving Dice {dice}, "
            f"{left} left"
        )


TRAINING_HEADER = ("in training", "epoch", "each", "loss", "validation", "moving Dice", "left")


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def task_state(run: Run, task: Task) -> State:
    """The state of a task."""
    if is_marked(run.paths.done(task.name)):
        return "done"
    if run.paths.failed(task.name).is_file():
        return "failed"
    lock = run.paths.task_lock(task.name)
    if lock.is_file():
        return "running" if living_owner(lock) is not None else "stopped"
    return "waiting"


def training(run: Run, task: Task) -> Training:
    """A training and the epochs that its log tells of."""
    base, trainer, model = _built_of(run, task)
    return Training(task, planned_epochs(run, task, trainer), read_epochs(model / f"fold_{task.fold}"))


def planned_epochs(run: Run, task: Task, trainer: str) -> int:
    """Epochs that a training shall have, by the trainer's name, or the recipe."""
    named = re.search(r"_(\d+)epochs?$", trainer)
    if named:
        return int(named[1])
    if plugin.learns_from(trainer) is None:
        return STOCK_EPOCHS
    if task.round is None:
        return int(run.recipe.coarse_settings(run=None).num_epochs)
    return run.recipe.num_epochs(run.round(task.round).planned)


def _built_of(run: Run, task: Task) -> tuple[Base, str, Path]:
    """Base, trainer and model folder of a training."""
    if task.round is None:
        return run.coarse_base or run.base, run.coarse_model.name.partition("__")[0], run.coarse_model
    of = run.round(task.round)
    return of.base, of.trainer, of.model


def _iterations(run: Run, task: Task) -> int | None:
    """Iterations of an epoch: of a configuration that is written, else of the recipe; None where passes are counted."""
    recipe = run.recipe
    base = _built_of(run, task)[0]
    name = run.coarse_configuration if task.round is None else run.round(task.round).configuration
    if base.plans_file.is_file():
        from nnunet_flare.trainers.settings import KEY

        written = read_plans(base.plans_file)["configurations"].get(name, {}).get(KEY, {})
        if isinstance(found := written.get("iterations_per_epoch"), int):
            return found
    if recipe.coarse_counts_passes if task.round is None else recipe.counts_passes:
        return None
    settings = (
        recipe.coarse_settings(run=None)
        if task.round is None
        else recipe.settings(run.round(task.round).planned, run=None)
    )
    return int(settings.iterations_per_epoch)


@dataclass(frozen=True)
class TimeLeft:
    """Seconds of computing that are left, as far as they are known, and how many tasks of each stage are not.

    ``at_once`` is how many tasks run now.
    """

    seconds: float
    unknown: Mapping[str, int]
    at_once: int

    def words(self) -> str:
        """For people."""
        if self.unknown.get("train"):
            return "time left: known after the first epoch of a training; run with --dry-run estimates it before"
        more = ", ".join(f"{count} x {stage}" if count > 1 else stage for stage, count in self.unknown.items())
        if not self.seconds:
            return (
                f"time left: not known yet ({more})" if more else "time left: the running tasks take longer than usual"
            )
        finish = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + self.seconds / max(1, self.at_once)))
        tasks = "one task" if self.at_once < 2 else f"{self.at_once} tasks"
        note = f" (without {more}: not measured yet)" if more else ""
        return f"time left: about {duration(self.seconds)} of computing, {tasks} at a time, until {finish}{note}"


def time_left(run: Run, tasks: Mapping[str, Task], states: Mapping[str, State]) -> TimeLeft:
    """What is left, from epochs that are over and from finished tasks of the same stage."""
    used: dict[str, list[float]] = {}
    for name, task in tasks.items():
        if states[name] == "done":
            used.setdefault(task.stage, []).append(_seconds(run, name))
    trainings = {name: training(run, task) for name, task in tasks.items() if task.stage == "train"}
    pace = _Pace(run, trainings, states)
    seconds, unknown = 0.0, Counter[str]()
    for name, task in tasks.items():
        if states[name] == "done":
            continue
        if task.stage == "train":
            left = pace.left(trainings[name])
        elif task.stage in used:
            left = max(0.0, _mean(used[task.stage]) - (_since(run, name) if states[name] == "running" else 0.0))
        else:
            left = None
        if left is None:
            unknown[task.stage] += 1
        else:
            seconds += left
    return TimeLeft(seconds, unknown, sum(state == "running" for state in states.values()))


class _Pace:
    """What trainings of the same network say of one that has not begun."""

    def __init__(self, run: Run, trainings: Mapping[str, Training], states: Mapping[str, State]) -> None:
        self._run = run
        self._measured: dict[str, list[tuple[float, int | None]]] = {}
        self._after: dict[str, list[float]] = {}
        for name, each in trainings.items():
            base, length = _built_of(run, each.task)[0].task, self._length(each.task)
            seconds = _seconds(run, name) if states[name] == "done" else None
            if each.each_s is not None:
                self._measured.setdefault(base, []).append((each.each_s, length))
                if seconds is not None:  # the final validation follows the last epoch
                    over = sum(epoch.seconds for epoch in each.over)
                    self._after.setdefault(base, []).append(max(0.0, seconds - over))
            elif seconds is not None:  # its log is gone
                self._measured.setdefault(base, []).append((seconds / each.epochs, length))

    def _length(self, task: Task) -> int | None:
        try:
            return _iterations(self._run, task)
        except InputError:  # damaged plans, which the run itself says
            return None

    def left(self, of: Training) -> float | None:
        """Seconds that a training still takes; None where nothing was measured."""
        base = _built_of(self._run, of.task)[0].task
        each = of.each_s
        if each is None:
            known = self._measured.get(base)
            if not known:
                return None
            own = self._length(of.task)
            each = _mean([seconds * own / length if own and length else seconds for seconds, length in known])
        after = self._after.get(base)
        return max(0, of.epochs - of.done) * each + (_mean(after) if after else 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _seconds(run: Run, name: str) -> float:
    return float(read_json(run.paths.done(name), MARKER)["seconds"])


def _since(run: Run, name: str) -> float:
    """Seconds since a running task was begun."""
    owner = living_owner(run.paths.task_lock(name)) or {}
    try:
        return max(0.0, time.time() - time.mktime(time.strptime(str(owner.get("since")), "%Y-%m-%dT%H:%M:%S")))
    except (ValueError, OverflowError):
        return 0.0
