"""``--dry-run``: every task with its command, the hours, and the disk. Nothing is written.

Hours come from one timed iteration where the data set is planned and the device is here, else from arithmetic.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_flare.errors import FlareError
from nnunet_flare.parallel import num_processes
from nnunet_flare.recipes.load import load_recipe, shipped_recipes
from nnunet_flare.rounds.arithmetic import GPU, expected_seconds
from nnunet_flare.rounds.disk import check_disk, disk_needed, prepares_again
from nnunet_flare.rounds.iteration_time import VALIDATION_COST, has_device, iteration_seconds
from nnunet_flare.rounds.run.configurations import base_configuration
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.run.unlabelled import find_sources, size_of
from nnunet_flare.rounds.stages.epoch_lengths import STOCK_ITERATIONS, iterations_of_pass, pass_of_round, stock_epochs
from nnunet_flare.rounds.start import Plan
from nnunet_flare.selection.choose import room_for
from nnunet_flare.tables import command_lines, table
from nnunet_flare.trainers.settings import TrainingSettings
from nnunet_flare.wording import duration, roughly


def preview(plan: Plan, *, width: int | None = None) -> str:
    """What a run would do, in words, of which commands are broken where a shell takes them on; None: long lines.

    Raises:
        FlareError: when the run does not fit the disk.
    """
    run = plan.run
    sources = find_sources(Path(run.settings.unlabelled_dir), plan.channels)
    lengths = {
        task.name: _length(run, task, len(plan.labelled), len(sources))
        for task in graph(run).values()
        if task.stage == "train"
    }
    bases = {base.task: base for base, _, _ in lengths.values()}
    timed = {task: iteration_seconds(run, base) for task, base in bases.items()}
    is_timed = None not in timed.values()
    seconds = timed if is_timed else {task: expected_seconds(run, base) for task, base in bases.items()}
    tell = (lambda cost: f"about {duration(cost)}") if is_timed else roughly
    lines = [
        f"{run.settings.dataset}: {len(plan.labelled)} labelled and {len(sources)} unlabelled cases, "
        f"recipe {run.recipe.name}, run folder {run.root}",
        "",
    ]
    total = 0.0
    for task in graph(run).values():
        cost = ""
        if task.name in lengths:
            base, settings, length = lengths[task.name]
            each = seconds[base.task]
            cost = length
            if each is not None:
                hours = training_seconds(settings, each)
                total += hours
                cost += f", {tell(hours)}"
        lines.append(f"{task.name}{': ' if cost else ''}{cost}")
        lines += command_lines(task.shown(run), width, "    ")
    lines.append("")
    if is_timed:
        measured = ", ".join(f"{each:.3f} s" for each in timed.values())
        lines.append(
            f"training: about {duration(total)} on one device, from one timed iteration of {measured} on "
            f"{run.settings.device} (loading and augmentation not included)"
        )
    else:
        lines += _by_arithmetic(run, seconds, total)
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


def _by_arithmetic(run: Run, seconds: Mapping[str, float | None], total: float) -> list[str]:
    """Hours where no iteration was timed, why it was not, and how to get there."""
    unknown = [task for task, each in seconds.items() if each is None]
    lines = [
        f"training: {roughly(total) if total else 'unknown time'} on {GPU}. This is an estimate: nnU-Net's own hours "
        "on it, scaled to this network. Other GPUs differ by a factor of two or more"
    ]
    if unknown:
        lines.append(f"not counted: trainings whose plans depend on the data (task {', '.join(unknown)})")
    if not has_device(run.settings.device):
        lines.append(f"device: no {run.settings.device} device here; the dry run needs none, the run does")
    recipe, bases = run.recipe, [base for base in (run.base, run.final_base, run.coarse_base) if base is not None]
    if all(base.plans_file.is_file() for base in bases):
        return lines
    if recipe.roi is not None and recipe.roi.model is None:
        lines.append("after the run has planned the dataset, this dry run times an iteration on its device")
    else:
        is_shipped = recipe.name in shipped_recipes() and load_recipe(recipe.name).hash == recipe.hash
        same = "" if is_shipped else "with the same --recipe and --set; "
        lines.append(f"next: {_preprocess_command(run)}")
        lines.append(f"      ({same}it needs no GPU; then this dry run times an iteration on the device)")
    return lines


def _preprocess_command(run: Run) -> str:
    """The command that plans and preprocesses for this run, as far as its settings were not given by ``--set``."""
    settings, recipe = run.settings, run.recipe
    words = ["flare-pseudolabel", "preprocess", "-d", settings.dataset, "-u", settings.unlabelled_dir]
    words += ["--recipe", recipe.name]
    if settings.name != recipe.name.replace("_", "-"):
        words += ["--name", settings.name]
    return shlex.join(words)


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
            taken = unlabelled if share is None else room_for(share, unlabelled)
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
    start = f"the final model's plans ({base.plans_name}) preprocess every taken scan again"
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
