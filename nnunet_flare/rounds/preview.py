"""``--dry-run``: every task with its command, the hours from one timed iteration, and the disk. Nothing is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_flare.errors import FlareError
from nnunet_flare.parallel import num_processes
from nnunet_flare.rounds.disk import check_disk, disk_needed, prepares_again
from nnunet_flare.rounds.iteration_time import iteration_seconds
from nnunet_flare.rounds.run.configurations import base_configuration
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.run.unlabelled import find_sources, size_of
from nnunet_flare.rounds.stages.epoch_lengths import STOCK_ITERATIONS, iterations_of_pass, pass_of_round, stock_epochs
from nnunet_flare.rounds.start import Plan
from nnunet_flare.tables import command_lines, table
from nnunet_flare.trainers.settings import TrainingSettings
from nnunet_flare.wording import duration

VALIDATION_COST = 1 / 3
"""A validation iteration is a forward pass alone, about a third of a training iteration."""


def preview(plan: Plan, *, width: int | None = None) -> str:
    """What a run would do, in words, of which commands are broken where a shell takes them on; None: long lines.

    Raises:
        FlareError: when the run does not fit the disk.
    """
    run = plan.run
    sources = find_sources(Path(run.settings.unlabelled_dir), plan.channels)
    bases = {base.task: base for base in (run.base, run.final_base, run.coarse_base) if base is not None}
    timed = {task: iteration_seconds(run, base) for task, base in bases.items()}
    lines = [
        f"{run.settings.dataset}: {len(plan.labelled)} labelled and {len(sources)} unlabelled cases, "
        f"recipe {run.recipe.name}, into {run.root}",
        "",
    ]
    total = 0.0
    for task in graph(run).values():
        cost = ""
        if task.stage == "train":
            base, settings, length = _length(run, task, len(plan.labelled), len(sources))
            seconds = timed[base.task]
            cost = length
            if seconds is not None:
                hours = training_seconds(settings, seconds)
                total += hours
                cost += f", about {duration(hours)}"
        lines.append(f"{task.name}{': ' if cost else ''}{cost}")
        lines += command_lines(task.shown(run), width, "    ")
    lines.append("")
    if None in timed.values():
        unplanned = ", ".join(task for task, seconds in timed.items() if seconds is None)
        lines.append(f"hours: not known before the data set is planned (task {unplanned}); run that, then look again")
    else:
        each = ", ".join(f"{seconds:.3f} s" for seconds in timed.values())
        lines.append(
            f"training: about {duration(total)} on one device, from one timed iteration of {each} on "
            f"{run.settings.device} (loading and augmentation not included)"
        )
    if prepares_again(run):
        lines.append(_preparation(run, sources))
    needed = disk_needed(run, sources)
    free = shutil.disk_usage(next(p for p in (run.results, *run.results.parents) if p.exists())).free
    total_disk = [("in all", sum(needed.values())), ("free", free)]
    rows = [[f"{size / 1e9:.2f} GB", what] for what, size in [*needed.items(), *total_disk]]
    lines += ["disk:", *table(rows, align="rl", indent="  ")]
    try:
        check_disk(run, sources)
    except FlareError as error:
        raise FlareError("\n".join([*lines, "", str(error)])) from error
    return "\n".join(lines)


def _length(run: Run, task: Task, labelled: int, unlabelled: int) -> tuple[Base, TrainingSettings, str]:
    """What a training builds on, its settings, and its length in words. A pass is counted as if every case were
    taken that may be.
    """
    recipe, number = run.recipe, task.round
    taken = 0
    if number is None:
        base, samples, passes = run.coarse_base or run.base, labelled, recipe.coarse_counts_passes
    else:
        of = run.round(number)
        base, passes = of.base, recipe.counts_passes
        if of.learns_from is not None:
            share = recipe.selection_of(of.learns_from).top_fraction
            taken = unlabelled if share is None else max(1, round(share * unlabelled))
        samples = pass_of_round(run, of, labelled, taken)
    is_planned = base.plans_file.is_file()
    batch = int(base_configuration(base)["batch_size"]) if is_planned else 1
    iterations = iterations_of_pass(samples, batch) if passes else None
    settings = (
        recipe.coarse_settings(run=None, iterations=iterations)
        if number is None
        else recipe.settings(of.planned, run=None, iterations=iterations)
    )
    if not passes:
        return base, settings, f"{settings.num_epochs} epochs of {settings.iterations_per_epoch} iterations"
    epochs = stock_epochs(settings.num_epochs, settings.iterations_per_epoch)
    length = f"{settings.num_epochs} passes over {'at most ' if taken else ''}{samples} samples = {epochs:.4g} epochs"
    return base, settings, f"{length} of {STOCK_ITERATIONS} iterations{'' if is_planned else ' at a batch of 1'}"


def training_seconds(settings: TrainingSettings, iteration_seconds: float) -> float:
    """Time of a training from the time of one iteration."""
    per_epoch = settings.iterations_per_epoch + VALIDATION_COST * settings.num_validation_iterations
    return settings.num_epochs * per_epoch * iteration_seconds


def _preparation(run: Run, sources: Mapping[str, Sequence[Path]]) -> str:
    """Time in which the final model's own plans preprocess the scans, from one timed scan of middle size."""
    base = run.final_base
    start = f"the final model's plans ({base.plans_name}) preprocess every taken scan once more"
    if not base.plans_file.is_file():
        return f"{start}; its time is not known before task {base.task} is done"
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    ordered = sorted(sources.values(), key=lambda files: sum(size_of(file) for file in files))
    files = ordered[len(ordered) // 2]
    plans = PlansManager(str(base.plans_file))
    manager = plans.get_configuration(base.configuration)
    began = time.perf_counter()
    try:
        manager.preprocessor_class(verbose=False).run_case(
            list(map(str, files)), None, plans, manager, dataset_json(run)
        )
    except Exception as error:  # whatever is wrong with this scan, the run will set it aside
        return f"{start}; {files[0].name} could not be timed ({type(error).__name__})"
    seconds = (time.perf_counter() - began) * len(sources) / num_processes(len(sources))
    return f"{start}: about {duration(seconds)} if all are taken, from one timed scan"
