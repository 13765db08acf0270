"""Every recipe on synthetic abdomens whose truth is known: does self-training learn, and what helps?

    python benchmarks/recipes.py [--systems NAME ...] [--seeds 1 2 3 4 5] [--jobs N] [--quick] [-o WORK_DIR]

Labelled scans come from a narrow domain, unlabelled and test scans from a wide one. Every arm (``recipe_systems.py``)
is a run of the package as a user would start it, and each of its networks has the same optimiser steps. Arms of a seed
share their first teachers: the control, or three folds. Two supervised arms with twice and four times the steps stand
for the arms' steps in all. An arm and seed that has its result file is skipped, and a killed one goes on where it
stopped. Writes benchmarks/results/recipes/<system>_seed<k>.json; ``recipe_evidence.py`` makes tables, picture and page
of them. ``--jobs 2`` runs two arms at a time, each in a process of its own, which on two cores is faster than two
threads. ``--quick`` trains a few steps to show that all arms run, and leaves its results in WORK_DIR.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from label_maps import ROOT, environment
from recipe_systems import FULL, QUICK, SEEDS, Budget, System, find_systems

from nnunet_flare.errors import FlareError
from nnunet_flare.files import link_or_copy, read_json, write_json
from nnunet_flare.inference.devices import computes_bf16
from nnunet_flare.phantom import write_phantom
from nnunet_flare.recipes.recipe import Recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.do_task import do_task
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import Task, graph
from nnunet_flare.rounds.stages.evaluate import held_out_dice
from nnunet_flare.rounds.start import plan_run, start_run
from nnunet_flare.rounds.true_dice import organ_ranking, ranking, true_dice
from nnunet_flare.trainers.adversarial_steps import is_adversarial

RESULTS = ROOT / "benchmarks" / "results" / "recipes"
THREADS = {"OMP_NUM_THREADS": "1", "NNUNET_FLARE_THREADS": "1", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
"""One thread a training and one process that augments for it: so small a network gains nothing from more."""

log = logging.getLogger("nnunet_flare.benchmark")


def make_data(folder: Path, seed: int, budget: Budget, *, domain: str | Sequence[str] = "wide") -> None:
    """A seed's scans; the oracle's data set is the same with the unlabelled scans labelled by their truth."""
    write_phantom(
        folder,
        labelled=budget.labelled,
        unlabelled=budget.unlabelled,
        test=budget.test,
        size=budget.size,
        seed=seed,
        domain=domain,
    )
    raw = folder / "nnUNet_raw"
    source, target = raw / "Dataset022_FLAREPhantom", raw / "Dataset023_FLAREPhantomOracle"
    if (target / "dataset.json").is_file():
        return
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dataset.json"))
    for label in sorted((folder / "unlabelled_truth").glob("*.nii.gz")):
        case = label.name.removesuffix(".nii.gz")
        true = case.replace("_Un_", "_True_")  # the run still lists the unlabelled scans, under their own ids
        link_or_copy(folder / "unlabelled" / f"{case}_0000.nii.gz", target / "imagesTr" / f"{true}_0000.nii.gz")
        link_or_copy(label, target / "labelsTr" / f"{true}.nii.gz")
    document = read_json(source / "dataset.json")
    write_json(target / "dataset.json", {**document, "numTraining": budget.labelled + budget.unlabelled})


def start(folder: Path, system: System, seed: int, budget: Budget, teachers: Run | None) -> Run:
    """The arm's run, started or as it was left; ``teachers`` is the run of the arm that makes its first labels."""
    folders = {name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    request = Request(
        dataset="23" if system.labels == "true" else "22",
        unlabelled=folder / "unlabelled",
        run_dir=folder / "runs" / system.name,
        name=system.name.replace("_", "-"),
        device="cpu",
        init_model=None if teachers is None else teachers.round(0).model,
        init_folds=() if teachers is None else teachers.round(0).folds,
        eval_images=folder / "test" / "images",
        eval_labels=folder / "test" / "labels",
    )
    return start_run(plan_run(request, system.load(seed, budget), folders))


def needed_tasks(run: Run, *, is_supervised: bool) -> list[Task]:
    """What an arm does of its run: all but the reports; a supervised one only trains and measures round 0."""
    tasks = [task for task in graph(run).values() if task.stage != "report"]
    if is_supervised:
        tasks = [
            task for task in tasks if task.round in (None, 0) and task.stage not in ("unlabelled", "label", "select")
        ]
    return tasks


def work(run: Run, *, is_supervised: bool) -> float:
    """Do the tasks that are not done; the seconds of all of them, by their markers."""
    tasks = needed_tasks(run, is_supervised=is_supervised)
    for task in tasks:
        do_task(run, task)
    return sum(float(read_json(run.paths.done(task.name))["seconds"]) for task in tasks)


def steps_of_arm(system: System, seed: int, budget: Budget) -> list[int]:
    """Optimiser steps of every network that segments and that an arm is taught by or trains, in order."""
    steps = steps_of_networks(system.load(seed, budget), is_supervised=system.is_supervised)
    if system.teacher is None:
        return steps
    (teacher,) = find_systems([system.teacher])
    given = steps_of_networks(teacher.load(seed, budget), is_supervised=True)
    return given + steps[len(given) :]


def steps_of_networks(recipe: Recipe, *, is_supervised: bool) -> list[int]:
    """Optimiser steps of the networks of a recipe's rounds.

    An iteration of adversarial training with all three steps has two of the generator's; the third is the
    discriminator's.
    """
    steps = []
    for number in range(1 if is_supervised else recipe.final_round + 1):
        settings = recipe.settings(number, run=None)
        epochs = settings.num_epochs
        if (course := settings.adversarial) is not None:
            every = range(settings.num_epochs)
            epochs += sum(is_adversarial(e, len(every), warmup=course.warmup, finish=course.finish) for e in every)
        steps += [epochs * settings.iterations_per_epoch] * len(recipe.member_folds(number))
    return steps


def round_result(run: Run, number: int, truth: Path) -> dict[str, Any]:
    """A round's pseudo-labels against the truth: their Dice, which were taken, and how well the rules rank them."""
    entries = read_decisions(run.paths, number)
    quality = true_dice(run, number, truth)
    taken = [quality[entry.case] for entry in entries if entry.decision == "taken"]
    return {
        "taken": len(taken),
        "pseudo_labels": len(quality),
        "true_dice": sum(quality.values()) / len(quality),
        "true_dice_of_taken": sum(taken) / len(taken),
        "test_dice": held_out_dice(run, number),
        "ranking": {rule: known(vars(found)) for rule, found in ranking(run, number, truth).items()},
        "organ_ranking": known(organ_ranking(run, number, truth)),
    }


def known(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values with None for what is not known: JSON has no NaN, and three equal labels have no rank."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def result(run: Run, system: System, seed: int, budget: Budget, truth: Path, seconds: float) -> dict[str, Any]:
    """What stands in the arm's result file."""
    rounds = [] if system.is_supervised else [round_result(run, number, truth) for number in range(run.final.number)]
    final = read_json(run.paths.evaluation(0 if system.is_supervised else run.final.number) / "dice.json")
    steps = steps_of_arm(system, seed, budget)
    return {
        "system": system.name,
        "title": system.title,
        "seed": seed,
        "augmentation": system.augmentation,
        "networks": len(steps),
        "steps": steps,
        "cases": {"labelled": budget.labelled, "unlabelled": budget.unlabelled, "test": budget.test},
        "size": list(budget.size),
        "dice": {"mean": final["mean"], "organs": final["organs"], "cases": final["cases"]},
        "rounds": rounds,
        "seconds": round(seconds, 1),
        "teachers": system.teacher,
        "recipe": system.recipe,
        "set": system.set_values(seed, budget),
        "environment": {
            **environment("nnunet-flare", "nnunetv2", "torch"),
            "threads": THREADS,
            "has_bf16": computes_bf16(torch.device("cpu")),
        },
    }


def run_arm(folder: Path, system: System, seed: int, budget: Budget) -> dict[str, Any]:
    """Run one arm of one seed to its end and measure it; its seconds are those of its own tasks."""
    teachers = None
    if system.teacher is not None:
        (arm,) = find_systems([system.teacher])
        teachers = start(folder, arm, seed, budget, None)
        work(teachers, is_supervised=True)
    run = start(folder, system, seed, budget, teachers)
    seconds = work(run, is_supervised=system.is_supervised)
    return result(run, system, seed, budget, folder / "unlabelled_truth", seconds)


def run_and_keep(work_dir: Path, system: System, seed: int, budget: Budget, results: Path) -> bool:
    """Run one arm of one seed and write its result file; False, with the reason logged, where it failed."""
    try:
        found = run_arm(work_dir / f"seed{seed}", system, seed, budget)
    except FlareError as error:
        log.error("%s, seed %d: %s", system.name, seed, error)
        return False
    write_json(result_file(results, system, seed), found)
    dice, seconds = found["dice"]["mean"], found["seconds"]
    log.info("%s, seed %d: mean Dice %.3f in %.0f s", system.name, seed, dice, seconds)
    return True


def result_file(folder: Path, system: System, seed: int) -> Path:
    """Where the result of an arm and seed is written."""
    return folder / f"{system.name}_seed{seed}.json"


def in_processes(words: list[str], wanted: list[tuple[int, System]], jobs: int) -> list[bool]:
    """Run each (seed, arm) by this command with ``words`` in a process of its own, some at a time; which succeeded."""

    def one(seed: int, system: System) -> bool:
        command = [sys.executable, __file__, *words, "--seeds", str(seed), "--systems", system.name]
        return subprocess.run(command, check=False).returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, *zip(*wanted, strict=True)))


def teachers_first(wanted: list[tuple[int, System]]) -> list[tuple[int, System]]:
    """Seed by seed, the arms that teach others before those: two that run at a time then wait for nobody's teacher."""
    return sorted(wanted, key=lambda arm: (arm[0], arm[1].teachers is not None))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 1 to 5; with --quick 1")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm, less than 5 minutes")
    parser.add_argument("-o", dest="work_dir", type=Path, default=Path(tempfile.gettempdir()) / "flare_recipes")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    os.environ.update(THREADS)
    budget, work_dir, results = FULL, args.work_dir, RESULTS
    if args.quick:
        budget, work_dir, results = QUICK, args.work_dir / "quick", args.work_dir / "quick" / "results"
    wanted = []
    for seed in args.seeds or ([1] if args.quick else SEEDS):
        make_data(work_dir / f"seed{seed}", seed, budget)
        arms = find_systems(args.systems)
        wanted += [(seed, system) for system in arms if not result_file(results, system, seed).is_file()]
    if args.jobs > 1 and wanted:
        wanted = teachers_first(wanted)
        words = ["-o", str(args.work_dir), *(["--quick"] if args.quick else [])]
        done = in_processes(words, wanted, args.jobs)
    else:
        done = [run_and_keep(work_dir, system, seed, budget, results) for seed, system in wanted]
    failed = [
        f"{system.name}, seed {seed}" for (seed, system), is_done in zip(wanted, done, strict=True) if not is_done
    ]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
