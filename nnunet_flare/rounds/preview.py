"""``--dry-run``: every task with its command, the hours from one timed iteration, and the disk. Nothing is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_flare.errors import FlareError
from nnunet_flare.files import read_json
from nnunet_flare.rounds.local import duration
from nnunet_flare.rounds.manifest import Base, Run
from nnunet_flare.rounds.plans import base_configuration, dataset_json, num_processes
from nnunet_flare.rounds.start import Plan, check_disk, disk_needed, prepares_again
from nnunet_flare.rounds.tasks import graph
from nnunet_flare.rounds.unlabelled import find_sources, size_of
from nnunet_flare.trainers.settings import TrainingSettings

VALIDATION_COST = 1 / 3
"""A validation iteration is a forward pass alone, about a third of a training iteration."""


def preview(plan: Plan) -> str:
    """What a run would do, in words.

    Raises:
        FlareError: when the run does not fit the disk.
    """
    run = plan.run
    sources = find_sources(Path(run.settings.unlabelled_dir), plan.channels)
    bases = {base.task: base for base in (run.base, run.final_base)}
    timed = {task: _iteration_seconds(run, base) for task, base in bases.items()}
    lines = [
        f"{run.settings.dataset}: {len(plan.labelled)} labelled and {len(sources)} unlabelled cases, "
        f"recipe {run.recipe.name}, into {run.root}",
        "",
    ]
    total = 0.0
    for task in graph(run).values():
        cost = ""
        if task.stage == "train" and task.round is not None:
            settings = run.recipe.settings(run.recipe_number(task.round), run=run.settings.name)
            seconds = timed[run.base_of(task.round).task]
            if seconds is not None:
                hours = training_seconds(settings, seconds)
                total += hours
                cost = f"  # {settings.num_epochs} epochs, about {duration(hours)}"
            else:
                cost = f"  # {settings.num_epochs} epochs of {settings.iterations_per_epoch} iterations"
        lines.append(f"{task.name:<16} {task.shown(run)}{cost}")
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
    lines.append("disk: " + ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in needed.items()))
    lines.append(f"      {sum(needed.values()) / 1e9:.2f} GB in all, {free / 1e9:.1f} GB free")
    try:
        check_disk(run, sources)
    except FlareError as error:
        raise FlareError("\n".join([*lines, "", str(error)])) from error
    return "\n".join(lines)


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


def _iteration_seconds(run: Run, base: Base) -> float | None:
    """Seconds of one training iteration of the planned network on random input; None before planning."""
    if not base.plans_file.is_file():
        return None
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    configuration = base_configuration(base)
    dataset = read_json(run.preprocessed / "dataset.json")
    architecture = configuration["architecture"]
    device = torch.device(run.settings.device)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        len(dataset["channel_names"]),
        len(dataset["labels"]),
        deep_supervision=True,
    ).to(device)
    shape = (configuration["batch_size"], len(dataset["channel_names"]), *configuration["patch_size"])
    image = torch.randn(shape, device=device)
    best = float("inf")
    for _ in range(2):  # the first iteration pays for set-up
        started = time.perf_counter()
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            loss = sum(output.float().square().mean() for output in network(image))
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
