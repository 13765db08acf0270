"""``flare-pseudolabel run``, ``retry`` and ``preprocess``: their options, and who does the work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli.common import nnunet_folder, parse_settings
from nnunet_flare.cli.terminal import show

if TYPE_CHECKING:
    from nnunet_flare.rounds.manifest import Run

SLURM_SHARDS = 4
"""Parts that labelling is split into on a cluster, where the number of GPUs is not known."""


def add_preprocess_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``preprocess``: the data and the recipe."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="dataset id or name in nnUNet_raw")
    parser.add_argument(
        "-u", dest="unlabelled", required=True, type=Path, metavar="DIR", help="folder of unlabelled scans"
    )
    parser.add_argument("--name", help="name of the run (default: the recipe's); letters, digits, hyphens")
    parser.add_argument("--recipe", default="uncertainty", help="shipped recipe or .yaml file (default: uncertainty)")
    parser.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="key=value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    add_preprocess_arguments(parser)
    parser.add_argument(
        "-o", dest="run_dir", type=Path, metavar="RUN_DIR", help="default: flare_NAME in nnUNet_results"
    )
    parser.add_argument("--init_model", type=Path, metavar="MODEL_FOLDER", help="trained models as round 0's members")
    parser.add_argument("-f", dest="folds", nargs="+", default=[], metavar="FOLD", help="folds of --init_model")
    parser.add_argument("--eval", nargs=2, type=Path, metavar=("IMAGES", "LABELS"), help="held-out cases to score on")
    parser.add_argument(
        "--decisions", type=Path, metavar="CSV", help="a person's decisions, from the report's download"
    )
    parser.add_argument("-num_gpus", type=int, metavar="N", help="GPUs to use, one task on each (default: all visible)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument(
        "--executor",
        default="local",
        choices=("local", "slurm", "print"),
        help="slurm: submit all jobs and return; print: write a shell script (with --slurm of sbatch lines) instead",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,...|FILE.yaml",
        help="partition, time, gres, cpus, mem, extra for every job; the file has a block per stage",
    )
    parser.add_argument("--shards", type=int, metavar="N", help="parts of labelling (default: one per GPU; slurm: 4)")
    add_timeout(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="show every task, its command, hours and disk; do nothing"
    )


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add ``--task_timeout``."""
    text = "end a task that takes longer and report it (local executor; Slurm: --slurm time=)"
    parser.add_argument("--task_timeout", type=float, metavar="HOURS", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Start a run, or go on with one; returns the exit code."""
    from nnunet_flare.rounds.recipe import load_recipe
    from nnunet_flare.rounds.start import Request, plan_run, start_run

    recipe = load_recipe(arguments.recipe, parse_settings(arguments.settings))
    options = _slurm_options(arguments)
    gpus = _gpus(arguments.device, arguments.num_gpus, recipe.num_gpus) if arguments.executor == "local" else []
    shards = SLURM_SHARDS if arguments.executor == "slurm" or arguments.slurm else max(1, len(gpus))
    images, labels = arguments.eval or (None, None)
    request = Request(
        dataset=arguments.dataset,
        unlabelled=arguments.unlabelled,
        run_dir=arguments.run_dir,
        name=arguments.name,
        device=arguments.device,
        shards=shards if arguments.shards is None else arguments.shards,
        init_model=arguments.init_model,
        init_folds=arguments.folds,
        eval_images=images,
        eval_labels=labels,
    )
    plan = plan_run(request, recipe, _folders())
    if arguments.dry_run:
        from nnunet_flare.rounds.preview import preview

        print(preview(plan))
        return 0
    run = start_run(plan)
    _keep_decisions(run, arguments.decisions)
    if arguments.executor == "print":
        from nnunet_flare.rounds.script import write_script, write_submission

        if arguments.slurm:
            print(f"{write_submission(run, options)}\nRun it with bash where sbatch works; it submits every job.")
        else:
            print(f"{write_script(run)}\nRun it with sh; every task can be run again.")
        return 0
    if arguments.executor == "slurm":
        return _submit(run.root, options)
    return _work(run.root, gpus, arguments.task_timeout)


def preprocess(arguments: argparse.Namespace) -> int:
    """Plan and preprocess ahead of a run; returns the exit code."""
    from nnunet_flare.rounds.ahead import preprocess_ahead
    from nnunet_flare.rounds.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, parse_settings(arguments.settings))
    done = preprocess_ahead(arguments.dataset, arguments.unlabelled, recipe, arguments.name, _folders())
    print(f"{done.folder}: {done.ready} unlabelled scans")
    for case, reason in done.failed.items():
        print(f"set aside: {case}: {reason}")
    return 1 if done.failed else 0


def retry(arguments: argparse.Namespace) -> int:
    """Do again what failed; returns the exit code."""
    from nnunet_flare.rounds.local import forget_failures
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.slurm import state_file, stored_options

    run = load_run(arguments.run_dir)
    _keep_decisions(run, arguments.decisions)
    forget_failures(run)
    if state_file(run).is_file():
        return _submit(run.root, stored_options(run))
    return _work(run.root, _gpus(run.settings.device, arguments.num_gpus, run.recipe.num_gpus), arguments.task_timeout)


def _folders() -> dict[str, Path]:
    return {name: nnunet_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def _slurm_options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The validated ``--slurm`` options; a mistake in them is said before anything is started."""
    from nnunet_flare.errors import InputError
    from nnunet_flare.rounds.slurm_options import parse_options

    if arguments.slurm and arguments.executor == "local":
        raise InputError("--slurm needs --executor slurm or print, not local")
    if arguments.task_timeout is not None and (arguments.task_timeout <= 0 or arguments.executor != "local"):
        raise InputError(f"--task_timeout {arguments.task_timeout:g}: expected hours above 0, with --executor local")
    if arguments.shards is not None and arguments.shards < 1:
        raise InputError(f"--shards {arguments.shards}: expected 1 or more")
    return parse_options(arguments.slurm)


def _submit(root: Path, options: dict[str, dict[str, Any]]) -> int:
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.slurm import submit
    from nnunet_flare.rounds.status import status

    run = load_run(root)
    jobs = submit(run, options)
    show(status(run))
    print(f"{len(jobs)} jobs submitted; nothing of ours has to stay alive. flare-pseudolabel status -o {root}")
    return 0


def _gpus(device: str, wanted: int | None, needed: int) -> list[str]:
    """The GPUs of this machine that tasks may use; none for other devices."""
    from nnunet_flare.errors import InputError
    from nnunet_flare.rounds.local import visible_gpus

    if device != "cuda":
        if wanted not in (None, 0):
            raise InputError(f"-num_gpus {wanted} needs -device cuda, not {device}")
        return []
    gpus = visible_gpus(wanted)
    if len(gpus) < needed:
        raise InputError(
            f"-device cuda: this machine shows {len(gpus)} GPU(s), a training needs {needed} "
            "(training.num_gpus). Use -device cpu on a machine without"
        )
    return gpus


def _work(root: Path, gpus: Sequence[str], timeout_hours: float | None) -> int:
    from nnunet_flare.rounds.local import run_local
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.slurm import leave
    from nnunet_flare.rounds.status import failed_cases, status

    run = load_run(root)
    leave(run)
    run_local(run, gpus, timeout_s=None if timeout_hours is None else timeout_hours * 3600)
    show(status(run))
    failed = failed_cases(run)
    for case, reason in failed.items():
        print(f"set aside: {case}: {reason}")
    if (page := run.paths.report / "index.html").is_file():
        print(f"report: {page}")
    print(f"final model: {run.model(run.final_number)}")
    return 1 if failed else 0


def _keep_decisions(run: Run, path: Path | None) -> None:
    from nnunet_flare.rounds.decisions import keep_reviews

    if path is not None:
        keep_reviews(run, path)
