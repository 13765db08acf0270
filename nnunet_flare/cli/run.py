"""``flare-pseudolabel run``, ``retry`` and ``preprocess``: their options, and who does the work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare.cli.common import nnunet_folder, number, parse_settings, quiet_stock, whole
from nnunet_flare.cli.terminal import columns, next_step, show

if TYPE_CHECKING:
    from nnunet_flare.rounds.executors.executor import Executor
    from nnunet_flare.rounds.run.manifest import Run


def add_preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``preprocess``: the data and the recipe."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="dataset id or name in nnUNet_raw")
    parser.add_argument(
        "-u",
        dest="unlabelled",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of unlabelled scans (NIfTI, MHA, NRRD, DICOM series)",
    )
    parser.add_argument("--name", help="name of the run (default: the recipe's); letters, digits, hyphens")
    parser.add_argument("--recipe", default="uncertainty", help="shipped recipe or .yaml file (default: uncertainty)")
    text = "change keys of the recipe, for example training.num_epochs=300 selection.threshold=0.85"
    parser.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="key=value", help=text
    )
    parser.add_argument(
        "--trust-checkpoint",
        "--trust_checkpoint",
        action="store_true",
        help="load given models (--init_model, roi.model, pretrained weights) even if they hold more than weights or "
        "name networks that are not nnU-Net's; both can run any program",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    add_preprocess_arguments(parser)
    parser.add_argument(
        "-o",
        dest="run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="folder of the run (default: flare_NAME in nnUNet_results)",
    )
    parser.add_argument(
        "--init_model",
        type=Path,
        metavar="MODEL_FOLDER",
        help="model folder whose folds label the scans in round 0, instead of new trainings",
    )
    parser.add_argument("-f", dest="folds", nargs="+", default=[], metavar="FOLD", help="folds of --init_model")
    parser.add_argument(
        "--init_map", metavar="NAME|FILE", help="id map of --init_model's labels, if they differ from the dataset's"
    )
    parser.add_argument(
        "--eval",
        nargs=2,
        type=Path,
        metavar=("IMAGES", "LABELS"),
        help="two folders: labelled held-out cases, to measure Dice on",
    )
    parser.add_argument("--decisions", type=Path, metavar="CSV", help="decisions downloaded from the report")
    add_num_gpus(parser)
    text = "device for training and prediction (default cuda)"
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help=text)
    parser.add_argument(
        "--executor",
        default="local",
        choices=("local", "slurm", "print"),
        help="local (default): run here; slurm: submit all jobs and return; print: only write a shell script (with "
        "--slurm: of sbatch lines)",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE|FILE",
        help="partition=, time=, gres=, cpus=, mem=, extra= of every job, or a file with a block per stage",
    )
    parser.add_argument(
        "--shards",
        type=whole(1, 10_000),
        metavar="N",
        help="tasks that labelling is split into (default: one per GPU; slurm: 4)",
    )
    add_timeout(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show every task, its command, hours and disk space; do nothing"
    )


def add_num_gpus(parser: argparse.ArgumentParser) -> None:
    """Add ``-num_gpus``."""
    text = "number of GPUs to use, one task on each (default: all visible; local executor only)"
    parser.add_argument("-num_gpus", type=whole(0, 1024), metavar="N", help=text)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add ``--task_timeout``."""
    text = "end a task that takes longer, as failed (local executor only; for Slurm give --slurm time=)"
    parser.add_argument("--task_timeout", type=number(0, 100_000, "hours", above=True), metavar="HOURS", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Start a run, or go on with one; returns the exit code."""
    from nnunet_flare.recipes.load import load_recipe
    from nnunet_flare.rounds.check_input import Request
    from nnunet_flare.rounds.executors.executor import Options, executor_class
    from nnunet_flare.rounds.run.dataset import organ_ids
    from nnunet_flare.rounds.run.decisions import read_reviews
    from nnunet_flare.rounds.start import plan_run, start_run, unlabelled_ids

    recipe = load_recipe(arguments.recipe, parse_settings(arguments.settings))
    executor = executor_class(arguments.executor)(
        Options(
            device=arguments.device,
            num_gpus=arguments.num_gpus,
            gpus_each=recipe.num_gpus,
            task_hours=arguments.task_timeout,
            slurm=arguments.slurm,
            is_dry=arguments.dry_run,
        )
    )
    images, labels = arguments.eval or (None, None)
    request = Request(
        dataset=arguments.dataset,
        unlabelled=arguments.unlabelled,
        run_dir=arguments.run_dir,
        name=arguments.name,
        device=arguments.device,
        shards=executor.shards if arguments.shards is None else arguments.shards,
        init_model=arguments.init_model,
        init_folds=arguments.folds,
        init_map=arguments.init_map,
        eval_images=images,
        eval_labels=labels,
        trust_checkpoint=arguments.trust_checkpoint,
    )
    plan = plan_run(request, recipe, _folders())
    if arguments.decisions is not None:  # refused before anything is written
        read_reviews(arguments.decisions, unlabelled_ids(plan), organ_ids(plan.run))
    if arguments.dry_run:
        from nnunet_flare.rounds.preview import preview

        show(preview(plan, width=columns()))
        print("\nnothing was written; without --dry-run the same command starts the run")
        return 0
    run = start_run(plan)
    _keep_decisions(run, arguments.decisions)
    return _go_on(executor, run.root)


def preprocess(arguments: argparse.Namespace) -> int:
    """Plan and preprocess ahead of a run; returns the exit code."""
    from nnunet_flare.recipes.load import load_recipe
    from nnunet_flare.rounds.preprocess_only import preprocess_ahead

    recipe = load_recipe(arguments.recipe, parse_settings(arguments.settings))
    with quiet_stock():
        done = preprocess_ahead(
            arguments.dataset,
            arguments.unlabelled,
            recipe,
            arguments.name,
            _folders(),
            trust_checkpoint=arguments.trust_checkpoint,
        )
    print(f"{done.folder}: {done.ready} unlabelled scans")
    for case, reason in done.failed.items():
        print(f"set aside: {case}: {reason}")
    show("next: flare-pseudolabel run with the same options, first with --dry-run")
    return 1 if done.failed else 0


def retry(arguments: argparse.Namespace) -> int:
    """Do again what failed; returns the exit code."""
    from nnunet_flare.rounds.executors.executor import Options, executor_of
    from nnunet_flare.rounds.retry import forget_failures
    from nnunet_flare.rounds.stages.mending import load_mended

    run = load_mended(arguments.run_dir)
    options = Options(
        device=run.settings.device,
        num_gpus=arguments.num_gpus,
        gpus_each=run.recipe.num_gpus,
        task_hours=arguments.task_timeout,
        slurm=None,
    )
    executor = executor_of(run)(options)
    _keep_decisions(run, arguments.decisions)
    forget_failures(run)
    return _go_on(executor, run.root)


def _folders() -> dict[str, Path]:
    return {name: nnunet_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def _go_on(executor: Executor, root: Path) -> int:
    """Bring a run's tasks to where they are done, and show its state; returns the exit code."""
    from nnunet_flare.rounds.executors.executor import executor_of
    from nnunet_flare.rounds.stages.mending import load_mended
    from nnunet_flare.rounds.status import failed_cases, status

    run = load_mended(root)
    former = executor_of(run)
    if not isinstance(executor, former) and not executor.needs_a_person:
        former.leave(run)
    told = executor.submit(run)
    is_finished = executor.wait(run)
    if not executor.needs_a_person:
        show(status(run.current()))
    if not is_finished:
        print(told)
        return 0
    failed = failed_cases(run)
    for case, reason in failed.items():
        print(f"set aside: {case}: {reason}")
    if (page := run.paths.report / "index.html").is_file():
        print(f"report: {page}")
    model = run.current().rounds[-1].model
    show(f"final model: {model}")
    next_step(f"flare-predict -m {model} -i SCANS -o OUT")
    next_step(f"flare-pseudolabel export -o {run.root} --stock_model DIR", "for stock nnU-Net")
    return 1 if failed else 0


def _keep_decisions(run: Run, path: Path | None) -> None:
    from nnunet_flare.rounds.run.decisions import keep_reviews

    if path is not None:
        keep_reviews(run, path)
