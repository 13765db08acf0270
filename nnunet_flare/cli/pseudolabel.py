"""``flare-pseudolabel``: the whole self-training loop as one resumable command, and its parts by hand."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli import merge, prepare
from nnunet_flare.cli.common import HyphenParser, nnunet_folder, parse_settings, run_command, setup_logging

if TYPE_CHECKING:
    from nnunet_flare.rounds.manifest import Run

PROGRAM = "flare-pseudolabel"
SLURM_SHARDS = 4
"""Parts that labelling is split into on a cluster, where the number of GPUs is not known."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 something failed, 2 wrong usage or input)."""
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.verbose)
    command: Callable[[argparse.Namespace], int] = arguments.command
    return run_command(PROGRAM, lambda: command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("-v", "--verbose", action="store_true", help="log more")
        sub.set_defaults(command=function)
        return sub

    run = add("run", _run, "train, predict, select, build and train again; the same command resumes")
    run.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="dataset id or name in nnUNet_raw")
    run.add_argument(
        "-u", dest="unlabelled", required=True, type=Path, metavar="DIR", help="folder of unlabelled scans"
    )
    run.add_argument("-o", dest="run_dir", type=Path, metavar="RUN_DIR", help="default: flare_NAME in nnUNet_results")
    run.add_argument("--name", help="name of the run (default: the recipe's); letters, digits, hyphens")
    run.add_argument("--recipe", default="uncertainty", help="shipped recipe or .yaml file (default: uncertainty)")
    run.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="key=value")
    run.add_argument("--init_model", type=Path, metavar="MODEL_FOLDER", help="trained models as round 0's members")
    run.add_argument("-f", dest="folds", nargs="+", default=[], metavar="FOLD", help="folds of --init_model")
    run.add_argument("--eval", nargs=2, type=Path, metavar=("IMAGES", "LABELS"), help="held-out cases to score on")
    run.add_argument("--decisions", type=Path, metavar="CSV", help="a person's decisions, from the report's download")
    run.add_argument("-num_gpus", type=int, metavar="N", help="GPUs to use, one task on each (default: all visible)")
    run.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    run.add_argument(
        "--executor",
        default="local",
        choices=("local", "slurm", "print"),
        help="slurm: submit all jobs and return; print: write a shell script (with --slurm of sbatch lines) instead",
    )
    run.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,...|FILE.yaml",
        help="partition, time, gres, cpus, mem, extra for every job; the file has a block per stage",
    )
    run.add_argument("--shards", type=int, metavar="N", help="parts of labelling (default: one per GPU; slurm: 4)")
    _add_timeout(run)
    run.add_argument("--dry_run", action="store_true", help="show every task, its command, hours and disk; do nothing")

    demo = add("demo", _demo, "synthetic data, the whole loop and a table of results; minutes, no GPU, no download")
    demo.add_argument("-o", dest="output", type=Path, default=Path("flare_demo"), metavar="DIR")
    demo.add_argument("--seed", type=int, default=0)

    phantom = add(
        "phantom", _phantom, "write synthetic abdominal CTs as a dataset, an unlabelled folder and a test set"
    )
    phantom.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR")
    for name, default in (("labelled", 6), ("partial", 0), ("unlabelled", 12), ("test", 4), ("seed", 0)):
        phantom.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    phantom.add_argument("--lesions", action="store_true", help="with lesions (label 14, as FLARE23)")
    phantom.add_argument("--size", type=int, nargs=3, default=(48, 96, 96), metavar=("Z", "Y", "X"))

    for name, function, text in (
        ("status", _status, "rounds, stages, cases taken, agreement per organ, time used and left"),
        ("retry", _retry, "run again what failed; scans that were set aside are tried again"),
        ("cancel", _cancel, "end the driver on this machine, or take all jobs out of Slurm's queue"),
    ):
        sub = add(name, function, text)
        sub.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR")
        if name == "retry":
            sub.add_argument("-num_gpus", type=int, metavar="N")
            _add_timeout(sub)
            sub.add_argument("--decisions", type=Path, metavar="CSV", help="a person's decisions, as for run")

    report = add("report", _report, "write RUN_DIR/report/index.html: rounds, every case with its reason, pictures")
    report.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR")
    report.add_argument("--pictures", default="24", metavar="N|all", help="pictures per round (default 24)")

    clean = add("clean", _clean, "remove data and checkpoints of old rounds, after showing what and how much")
    clean.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR")
    clean.add_argument("--yes", action="store_true", help="do not ask")

    task = add("task", _task, "run one task of a run by hand or from a job script (status lists them)")
    task.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR")
    task.add_argument("name", help="for example train-r0-f0, label-r0-p0, select-r0, build-r1")

    export = add("export", _export, "write a round as a plain nnU-Net dataset, or the final model for stock nnU-Net")
    export.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR")
    export.add_argument("--round", type=int, metavar="R", help="round whose training data is exported (default: final)")
    export.add_argument("--dataset", type=int, metavar="ID", help="new dataset id (in nnUNet_raw)")
    export.add_argument("--ledger", type=Path, metavar="CSV", help="write the ledger as CSV")
    export.add_argument("--stock_model", type=Path, metavar="DIR", help="write the final model as nnUNetTrainer's")

    add("recipes", _recipes, "list the recipes")

    score = add("score", _score, "agreement of folders of label maps (one folder per member)")
    score.add_argument("-i", dest="inputs", nargs="+", type=Path, required=True, metavar="MEMBER_DIR")
    score.add_argument("-o", dest="output", type=Path, required=True, metavar="scores.csv")

    choose = add("select", _select, "select cases of a scores.csv")
    choose.add_argument("-i", dest="input", type=Path, required=True, metavar="scores.csv")
    choose.add_argument("-o", dest="output", type=Path, required=True, metavar="selection.csv")
    choose.add_argument("--threshold", type=float, default=0.9)
    choose.add_argument("--rule", default="min-organ", choices=("min-organ", "trimmed-min", "mean-organ", "all"))
    choose.add_argument("--top_fraction", type=float)
    text = "make an nnU-Net dataset and a folder of unlabelled scans of a FLARE22 or FLARE23 download"
    prepare.add_arguments(add("prepare", prepare.run, text))
    text = "merge label maps: pseudo-labels, external teachers, partial ground truth"
    merge.add_arguments(add("merge", merge.run, text))
    return parser


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    text = "end a task that takes longer and report it (local executor; Slurm: --slurm time=)"
    parser.add_argument("--task_timeout", type=float, metavar="HOURS", help=text)


def _folders() -> dict[str, Path]:
    return {name: nnunet_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}


def _run(arguments: argparse.Namespace) -> int:
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
    print(status(run))
    print(f"{len(jobs)} jobs submitted; nothing of ours has to stay alive. flare-pseudolabel status -o {root}")
    return 0


def _gpus(device: str, wanted: int | None, needed: int) -> list[int]:
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


def _work(root: Path, gpus: Sequence[int], timeout_hours: float | None) -> int:
    from nnunet_flare.rounds.local import run_local
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.slurm import leave
    from nnunet_flare.rounds.status import failed_cases, status

    run = load_run(root)
    leave(run)
    run_local(run, gpus, timeout_s=None if timeout_hours is None else timeout_hours * 3600)
    print(status(run))
    failed = failed_cases(run)
    for case, reason in failed.items():
        print(f"set aside: {case}: {reason}")
    if (page := run.paths.report / "index.html").is_file():
        print(f"report: {page}")
    print(f"final model: {run.model(run.last_round)}")
    return 1 if failed else 0


def _demo(arguments: argparse.Namespace) -> int:
    from nnunet_flare.report.pictures import compare
    from nnunet_flare.rounds.demo import run_demo

    output = arguments.output.absolute()
    demo = run_demo(output, seed=arguments.seed)
    compare(demo.scan, demo.maps, output / "demo.png")
    print(f"{demo.text}\n\nin {output}: demo.txt, demo.json, demo.png (a test case), run (flare-pseudolabel status -o)")
    return 0


def _phantom(arguments: argparse.Namespace) -> int:
    from nnunet_flare.phantom import write_phantom

    write_phantom(
        arguments.output,
        labelled=arguments.labelled,
        partial=arguments.partial,
        lesions=arguments.lesions,
        unlabelled=arguments.unlabelled,
        test=arguments.test,
        size=tuple(arguments.size),
        seed=arguments.seed,
    )
    print(f"{arguments.output}: nnUNet_raw/Dataset022_FLAREPhantom, unlabelled, test/images, test/labels")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.status import status

    print(status(load_run(arguments.run_dir)))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.local import forget_failures
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.slurm import state_file, stored_options

    run = load_run(arguments.run_dir)
    _keep_decisions(run, arguments.decisions)
    forget_failures(run)
    if state_file(run).is_file():
        return _submit(run.root, stored_options(run))
    return _work(run.root, _gpus(run.settings.device, arguments.num_gpus, run.recipe.num_gpus), arguments.task_timeout)


def _cancel(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.cancel import cancel
    from nnunet_flare.rounds.manifest import load_run

    print(cancel(load_run(arguments.run_dir)))
    return 0


def _keep_decisions(run: Run, path: Path | None) -> None:
    from nnunet_flare.rounds.decisions import keep_reviews

    if path is not None:
        keep_reviews(run, path)


def _report(arguments: argparse.Namespace) -> int:
    from nnunet_flare.report.page import parse_pictures, write_report
    from nnunet_flare.rounds.manifest import load_run

    print(write_report(load_run(arguments.run_dir), pictures=parse_pictures(arguments.pictures)))
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.clean import clean, cleanable
    from nnunet_flare.rounds.manifest import load_run

    run = load_run(arguments.run_dir)
    items = cleanable(run)
    if not items:
        print("nothing to remove: no round before the final one is over")
        return 0
    for item in items:
        print(f"{item.size_bytes / 1e6:>10.1f} MB  {item.what}")
        for path in item.paths[:3]:
            print(f"{'':>15}{path}")
        if len(item.paths) > 3:
            print(f"{'':>15}and {len(item.paths) - 3} more")
    print(f"{sum(item.size_bytes for item in items) / 1e6:>10.1f} MB  in all")
    if not arguments.yes:
        print("Remove these? They cannot be brought back without training again. [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    print(f"{clean(run, items) / 1e6:.1f} MB removed")
    return 0


def _task(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.manifest import load_run
    from nnunet_flare.rounds.tasks import stand_in
    from nnunet_flare.rounds.work import do_task

    run = load_run(arguments.run_dir)
    task = stand_in(run, arguments.name)
    if task is None:
        print(f"{arguments.name}: not needed any more, the run ended early")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # locks are given back on the way out
    # nnU-Net ends forked pool workers with SIGTERM; with our handler they could miss it while they wait for a lock.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    do_task(run, task)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nnunet_flare.errors import InputError
    from nnunet_flare.rounds import export
    from nnunet_flare.rounds.manifest import load_run

    run = load_run(arguments.run_dir)
    if arguments.dataset is None and arguments.ledger is None and arguments.stock_model is None:
        raise InputError("export: give --dataset ID, --ledger CSV or --stock_model DIR")
    if arguments.ledger is not None:
        print(export.export_ledger(run, arguments.ledger))
    if arguments.dataset is not None:
        print(export.export_dataset(run, arguments.round, arguments.dataset))
    if arguments.stock_model is not None:
        print(export.export_stock_model(run, arguments.stock_model))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.recipe import load_recipe, shipped_recipes

    for name in shipped_recipes():
        recipe = load_recipe(name)
        print(f"{name:<14}{recipe.summary}\n{'':<14}{recipe.paper}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.by_hand import score_folders

    scored, failed = score_folders(arguments.inputs, arguments.output)
    print(f"{arguments.output}: {scored} cases")
    for case, reason in failed.items():
        print(f"set aside: {case}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _select(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.by_hand import select_from_scores

    taken, total = select_from_scores(
        arguments.input,
        arguments.output,
        rule=arguments.rule,
        threshold=arguments.threshold,
        top_fraction=arguments.top_fraction,
    )
    print(f"{arguments.output}: {taken} of {total} cases taken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
