"""The tasks of a run: what must be done, in which order, by which command.

A task is a command line with a done marker. The graph follows from the manifest alone, so the driver, a Slurm job and a
person who types the command all mean the same by ``train-r1-f0``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nnunet_flare import plugin
from nnunet_flare.children import python_module
from nnunet_flare.errors import InputError
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.markers import is_marked
from nnunet_flare.rounds.run.round import Round

Stage = Literal["plan", "locate", "unlabelled", "build", "train", "label", "select", "report", "evaluate"]


@dataclass(frozen=True)
class Task:
    """One task. ``gpus`` is how many GPUs it holds (0: a CPU task); ``part`` the fold of a training or the shard."""

    name: str
    stage: Stage
    needs: tuple[str, ...]
    round: int | None = None
    fold: str | None = None
    part: int = 0
    gpus: int = 0

    def command(self, run: Run) -> list[str]:
        """The command that runs the task."""
        return python_module("nnunet_flare.cli.pseudolabel", "task", "-o", str(run.root), self.name)

    def shown(self, run: Run) -> str:
        """The command as a person would type it; for a training the stock command behind it."""
        if self.stage == "train":
            return shlex.join(["nnUNetv2_train", *train_arguments(run, self)])
        return shlex.join(["flare-pseudolabel", "task", "-o", str(run.root), self.name])


def train_arguments(run: Run, task: Task, *, resume: bool = False) -> list[str]:
    """Arguments of ``nnUNetv2_train`` for a training task; ``resume``: go on from the checkpoint that is there."""
    recipe = run.recipe
    if task.stage != "train" or task.fold is None:
        raise ValueError(f"{task.name} is not a training")
    dataset = str(int(run.settings.dataset[len("Dataset") :][:3]))
    device = ["-device", run.settings.device]
    if task.round is None:
        trainer, plans, configuration = run.coarse_model.name.split("__")
        words = [dataset, configuration, task.fold, "-tr", trainer, "-p", plans, *device]
        return [*words, "--c"] if resume else words
    trained = run.round(task.round)
    arguments = [
        dataset,
        trained.configuration,
        task.fold,
        "-tr",
        trained.trainer,
        "-p",
        trained.base.plans_name,
        *device,
    ]
    if recipe.num_gpus > 1:
        arguments += ["-num_gpus", str(recipe.num_gpus)]
    if resume:
        arguments.append("--c")
    elif plugin.learns_from(trained.trainer) is None and takes_pretrained(run, trained):
        arguments += ["-pretrained_weights", str(recipe.training["pretrained_weights"])]
    return arguments


def takes_pretrained(run: Run, trained: Round) -> bool:
    """Whether a round starts from given weights: not one with another network, nor one that goes on from a model.

    Our trainers are told so by their settings, stock's by ``-pretrained_weights``.
    """
    if not run.recipe.training.get("pretrained_weights"):
        return False
    start = {"final": run.recipe.final.start, "self-training": run.recipe.members.start}.get(trained.kind)
    goes_on = trained.kind == "fine-tuning" or start == "member"
    return trained.base == run.base and not goes_on


def graph(run: Run) -> dict[str, Task]:
    """Every task of the run by name, in an order that respects what each needs."""
    gpus = 0 if run.settings.device == "cpu" else 1
    tasks: list[Task] = [Task("plan", "plan", ()), *_locating(run, gpus)]
    tasks.append(Task("unlabelled", "unlabelled", tuple(t.name for t in tasks if t.stage in ("plan", "locate"))))
    train_gpus = 0 if gpus == 0 else run.recipe.num_gpus
    coarse = tuple(task.name for task in tasks if task.name == "train-coarse")  # held-out scans want it too
    trained: tuple[str, ...] = ()
    before_final: tuple[str, ...] = ()
    if run.final_base != run.base:
        tasks.append(Task(run.final_base.task, "plan", ("plan",), run.final.number))
        before_final = (run.final_base.task,)
    for each in run.rounds:
        number = each.number
        if each.kind == "fine-tuning":
            tasks += _fine_tuning(run, number, trained, gpus, train_gpus)
            continue
        trained = ()
        if number > 0 or run.settings.init_model is None:
            before: tuple[str, ...] = ("plan",) if each.learns_from is None else (f"select-r{each.learns_from}",)
            if each.kind == "final":
                before += tuple(f"select-r{earlier}" for earlier in run.recipe.last_rounds()[:-1]) + before_final
            wants_scans = run.recipe.is_online or run.recipe.matches_histograms(each.planned)
            before += ("unlabelled",) if wants_scans else ()
            tasks.append(Task(f"build-r{number}", "build", before, number))
            for fold in each.folds:
                name = f"train-r{number}-f{fold}"
                tasks.append(Task(name, "train", (f"build-r{number}",), number, fold, gpus=train_gpus))
                trained += (name,)
        measured: tuple[str, ...] = ()
        if run.settings.eval_images is not None and each.loop is None:
            tasks.append(Task(f"evaluate-r{number}", "evaluate", (*trained, *coarse, "plan"), number, gpus=gpus))
            measured = (f"evaluate-r{number}",)
        if each.labels_cases:
            shards = []
            for part in range(run.settings.shards):
                name = f"label-r{number}-p{part}"
                tasks.append(Task(name, "label", (*trained, "unlabelled"), number, part=part, gpus=gpus))
                shards.append(name)
            tasks.append(Task(f"select-r{number}", "select", tuple(shards), number))
            tasks.append(Task(f"report-r{number}", "report", (f"select-r{number}", *measured), number))
        else:
            tasks.append(Task(f"report-r{number}", "report", (*trained, *measured), number))
    return {task.name: task for task in tasks}


def _locating(run: Run, gpus: int) -> list[Task]:
    """The tasks that find the organs' boxes: the coarse model's training, unless it is given, and its passes."""
    if run.recipe.roi is None:
        return []
    tasks, base = [], run.coarse_base
    if base is not None:
        tasks = [Task(base.task, "plan", ("plan",)), Task("train-coarse", "train", (base.task,), fold="all", gpus=gpus)]
    before = (tasks[-1].name if tasks else "plan",)
    parts = range(run.settings.shards)
    return tasks + [Task(f"locate-p{part}", "locate", before, part=part, gpus=gpus) for part in parts]


def _fine_tuning(run: Run, number: int, after: tuple[str, ...], gpus: int, train_gpus: int) -> list[Task]:
    """The tasks of the fine-tuning, which counts as the round after the final one."""
    train, evaluate = f"train-r{number}-fall", f"evaluate-r{number}"
    tasks = [
        Task(f"build-r{number}", "build", after, number),
        Task(train, "train", (f"build-r{number}",), number, "all", gpus=train_gpus),
    ]
    if run.settings.eval_images is not None:
        tasks.append(Task(evaluate, "evaluate", (train,), number, gpus=gpus))
    return [*tasks, Task(f"report-r{number}", "report", (tasks[-1].name,), number)]


def find_task(run: Run, name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: when the run has none.
    """
    tasks = graph(run)
    if name not in tasks:
        raise InputError(f"the run in {run.root} has no task '{name}'; it has {', '.join(tasks)}")
    return tasks[name]


def stand_in(run: Run, name: str) -> Task | None:
    """The task that a job does which was submitted as ``name`` before an early stop was known.

    After an early stop the first fold of the round that became the last does the final training in its place, and what
    belongs to later rounds or to its other folds is not needed any more (None).

    Raises:
        InputError: when the run never had a task of that name.
    """
    tasks, planned = graph(run), graph(run.as_planned())
    if name in tasks:
        return tasks[name]
    if name not in planned:
        return find_task(run, name)
    task = planned[name]
    trainings = [t for t in planned.values() if t.stage == "train" and t.round == task.round]
    if trainings and name == trainings[0].name:
        return next((t for t in tasks.values() if t.stage == "train" and t.round == task.round), None)
    return None


def is_done(run: Run, task: Task) -> bool:
    """Whether a task's marker is there and whole."""
    return is_marked(run.paths.done(task.name))


def ready_tasks(run: Run, tasks: Mapping[str, Task]) -> list[Task]:
    """Tasks that are not done, but all that they need is."""
    return [
        task
        for task in tasks.values()
        if not is_done(run, task) and all(is_marked(run.paths.done(need)) for need in task.needs)
    ]
