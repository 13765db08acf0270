"""``flare-pseudolabel``: the whole self-training loop as one resumable command, and its parts by hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nnunet_flare.cli import merge, prepare, run
from nnunet_flare.cli.common import GOES_ON, SEED, STARTS_ANEW, number, open_streams, run_command, setup_logging, whole
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import columns, next_step, show, show_again
from nnunet_flare.selection.rules import RULES
from nnunet_flare.tables import table

PROGRAM = "flare-pseudolabel"

RESUMED = ("run", "retry", "preprocess", "demo", "task")
"""Subcommands that go on where they were interrupted."""

RUN_DIR_HELP = "the run's folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 something failed, 2 wrong usage or input)."""
    open_streams()
    arguments = _parser().parse_args(argv)
    setup_logging(arguments.verbose)
    command: Callable[[argparse.Namespace], int] = arguments.command
    interrupted = GOES_ON if arguments.name_of_command in RESUMED else STARTS_ANEW
    return run_command(PROGRAM, lambda: command(arguments), interrupted=interrupted)


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(
        prog=PROGRAM,
        description="The whole self-training loop as one resumable command, and its parts by hand.",
        epilog="Exit code 0: all done; 1: some cases or tasks failed, as listed; 2: wrong usage or input.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("-v", "--verbose", action="store_true", help="log more")
        sub.set_defaults(command=function, name_of_command=name)
        return sub

    text = "train, label, select and train again; the same command resumes an interrupted run"
    run.add_arguments(add("run", run.run, text))
    text = "plan the dataset and preprocess all scans; a later run starts from there"
    run.add_preprocess_arguments(add("preprocess", run.preprocess, text))

    demo = add("demo", _demo, "run the whole loop on synthetic scans and print a table; minutes, no GPU, no download")
    text = "folder to write into (default: flare_demo)"
    demo.add_argument("-o", dest="output", type=Path, default=Path("flare_demo"), metavar="DIR", help=text)
    text = "seed of the synthetic scans and of the trainings (default 0)"
    demo.add_argument("--seed", type=SEED, default=0, metavar="N", help=text)

    phantom = add(
        "phantom", _phantom, "write synthetic abdominal CTs as a dataset, an unlabelled folder and a test set"
    )
    phantom.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR", help="folder to write into")
    for name, default in (("labelled", 6), ("partial", 0), ("unlabelled", 12), ("test", 4), ("seed", 0)):
        phantom.add_argument(
            f"--{name}",
            type=SEED if name == "seed" else whole(0, 100_000),
            default=default,
            metavar="N",
            help=f"seed of the scans (default {default})"
            if name == "seed"
            else f"number of {name} scans (default {default})",
        )
    phantom.add_argument("--lesions", action="store_true", help="paint lesions too (label 14, as in FLARE23)")
    text = "domains of the unlabelled and test scans, in turn: wide (default), between, mr, pet"
    phantom.add_argument("--domain", nargs="+", default=["wide"], metavar="NAME", help=text)
    phantom.add_argument(
        "--size",
        type=whole(1, 4096),
        nargs=3,
        default=(48, 96, 96),
        metavar=("Z", "Y", "X"),
        help="size of a scan in voxels (default 48 96 96)",
    )

    for name, function, text in (
        ("status", _status, "show rounds, stages, cases taken, agreement per organ, time used and time left"),
        ("retry", run.retry, "run failed tasks again, and try scans again that were set aside"),
        ("cancel", _cancel, "stop a run: end its driver on this machine, or take its jobs out of Slurm's queue"),
    ):
        sub = add(name, function, text)
        sub.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help=RUN_DIR_HELP)
        if name == "status":
            text = "repeat every S seconds (default 10) until the run is over"
            sub.add_argument("--watch", nargs="?", const=10.0, type=number(0.1, 86_400, "s"), metavar="S", help=text)
        if name == "retry":
            run.add_num_gpus(sub)
            run.add_timeout(sub)
            sub.add_argument("--decisions", type=Path, metavar="CSV", help="decisions downloaded from the report")

    report = add("report", _report, "write the HTML report of a run, RUN_DIR/report/index.html")
    report.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help=RUN_DIR_HELP)
    report.add_argument("--pictures", default="24", metavar="N|all", help="pictures per round (default 24)")
    text = "add 3-D views of these cases (about half a megabyte each)"
    report.add_argument("--view3d", action="store_true", help=text)
    text = "also compare the run with another run on the same dataset"
    report.add_argument("--compare", type=Path, metavar="OTHER_RUN_DIR", help=text)

    clean = add("clean", _clean, "remove data and checkpoints of old rounds; lists them and asks first")
    clean.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help=RUN_DIR_HELP)
    clean.add_argument("--yes", action="store_true", help="remove without asking")

    task = add("task", _task, "run one task of a run by hand or from a job script (status lists them)")
    task.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help=RUN_DIR_HELP)
    task.add_argument(
        "name", metavar="TASK", help="name of the task, for example train-r0-f0, label-r0-p0, select-r0, build-r1"
    )

    export = add("export", _export, "write a round as an nnU-Net dataset, or the final model for stock nnU-Net")
    export.add_argument("-o", dest="run_dir", type=Path, required=True, metavar="RUN_DIR", help=RUN_DIR_HELP)
    export.add_argument(
        "--round", type=whole(0, 100_000), metavar="R", help="round whose training data is exported (default: final)"
    )
    export.add_argument(
        "--dataset",
        type=whole(1, 999),
        metavar="ID",
        help="write the round's training data as a new dataset with this id in nnUNet_raw",
    )
    export.add_argument(
        "--ledger", type=Path, metavar="CSV", help="write the ledger (every case in every round) as CSV"
    )
    export.add_argument("--stock_model", type=Path, metavar="DIR", help="write the final model as one of nnUNetTrainer")
    text = "write the final model with a model card for nnUNetv2_install_pretrained_model_from_zip"
    export.add_argument("--zip", type=Path, metavar="FILE.zip", help=text)
    export.add_argument("--license", type=Path, metavar="FILE", help="licence of the weights, put into the zip file")

    add("recipes", _recipes, "list the recipes")

    score = add("score", _score, "measure how far label maps agree (one folder per member)")
    score.add_argument(
        "-i",
        dest="inputs",
        nargs="+",
        type=Path,
        required=True,
        metavar="MEMBER_DIR",
        help="folders of label maps, two or more",
    )
    score.add_argument("-o", dest="output", type=Path, required=True, metavar="scores.csv", help="table to write")

    score.add_argument(
        "--compare",
        choices=("pairs", "last", "rounds"),
        default="pairs",
        help="pairs: every two folders (default); last: each folder with the last one (checkpoints of a training, for "
        "--rule stability); rounds: changed voxels from each folder to the next (for --rule round-change)",
    )

    score.add_argument(
        "--absent",
        choices=("one", "skip", "zero"),
        default="one",
        help="agreement on an organ that both folders lack: one as in the papers (default), skip it, or zero",
    )

    choose = add("select", _select, "select cases by the scores that score wrote")
    choose.add_argument(
        "-i", dest="input", type=Path, required=True, metavar="scores.csv", help="table that score wrote"
    )
    choose.add_argument("-o", dest="output", type=Path, required=True, metavar="selection.csv", help="table to write")
    text = "lowest score of a selected case (default 0.9)"
    choose.add_argument("--threshold", type=number(0, 1), default=0.9, help=text)
    text = "; ".join(f"{rule.name}: {rule.summary}" for rule in RULES.values())
    choose.add_argument(
        "--rule",
        default="min-organ",
        choices=tuple(RULES),
        metavar="RULE",
        help=f"how a case is scored (default min-organ). {text}",
    )
    choose.add_argument(
        "--top_fraction",
        type=number(0, 1, above=True),
        metavar="F",
        help="select at most this share of the cases, the best first",
    )
    text = "lowest agreement of single organs, for example pancreas=0.7"
    choose.add_argument("--per_organ", nargs="+", default=[], metavar="ORGAN=T", help=text)
    text = "make an nnU-Net dataset and a folder of unlabelled scans from a FLARE download (2022 to 2026)"
    prepare.add_arguments(add("prepare", prepare.run, text))
    text = "merge label maps: pseudo-labels, external teachers, partial ground truth"
    merge.add_arguments(add("merge", merge.run, text))
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from nnunet_flare.evaluation.plots import draw
    from nnunet_flare.report.pictures import compare
    from nnunet_flare.rounds.demo import run_demo

    output = arguments.output.absolute()
    demo = run_demo(output, seed=arguments.seed)
    picture = output / "demo.png"
    drawn = "demo.png (a test case), " if draw(lambda: compare(demo.scan, demo.maps, picture), picture) else ""
    print(f"{demo.text}\n\nin {output}: demo.txt, demo.json, {drawn}run")
    show(f"report: {output / 'run' / 'report' / 'index.html'}, for a browser")
    next_step(f"flare-pseudolabel status -o {output / 'run'}", "the state of the run")
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
        domain=arguments.domain[0] if len(arguments.domain) == 1 else arguments.domain,
    )
    print(f"{arguments.output}: nnUNet_raw/Dataset022_FLAREPhantom, unlabelled, test/images, test/labels")
    print(f"next: export nnUNet_raw={arguments.output.absolute() / 'nnUNet_raw'}")
    next_step(f"flare-pseudolabel run -d 22 -u {arguments.output / 'unlabelled'} --recipe demo --dry-run")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.run.manifest import load_run
    from nnunet_flare.rounds.status import is_over, status

    if arguments.watch is None:
        show(status(load_run(arguments.run_dir)))
        return 0
    with suppress(KeyboardInterrupt):  # the usual end of looking
        while True:
            run = load_run(arguments.run_dir)
            show_again(
                f"{status(run)}\n\n{time.strftime('%H:%M:%S')}, every {arguments.watch:g} s; Ctrl-C ends this view only"
            )
            over = is_over(run)
            if over is not False:
                return 0 if over else 1
            time.sleep(arguments.watch)
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.executors.executor import executor_of
    from nnunet_flare.rounds.run.manifest import load_run_to_write

    run = load_run_to_write(arguments.run_dir)
    print(executor_of(run).cancel(run))
    next_step(f"flare-pseudolabel retry -o {arguments.run_dir}", "to go on")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from nnunet_flare.report.page import parse_pictures, write_report
    from nnunet_flare.report.versus import check_comparable, write_comparison
    from nnunet_flare.rounds.run.manifest import load_run, load_run_to_write

    pictures = parse_pictures(arguments.pictures)
    run = load_run_to_write(arguments.run_dir)
    other = None if arguments.compare is None else load_run(arguments.compare)
    if other is not None:
        check_comparable(run, other)
    print(write_report(run, pictures=pictures, view3d=arguments.view3d))
    if other is not None:
        print(write_comparison(run, other))
    show(
        "next: open it in a browser; give decisions that you download there with flare-pseudolabel run ... "
        "--decisions CSV"
    )
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.clean import clean, cleanable
    from nnunet_flare.rounds.run.manifest import load_run_to_write

    run = load_run_to_write(arguments.run_dir)
    items = cleanable(run)
    if not items:
        print("nothing to remove: no round before the final training is finished")
        return 0
    for item in items:
        print(f"{item.size_bytes / 1e6:>10.1f} MB  {item.what}")
        for path in item.paths[:3]:
            print(f"{'':>15}{path}")
        if len(item.paths) > 3:
            print(f"{'':>15}and {len(item.paths) - 3} more")
    print(f"{sum(item.size_bytes for item in items) / 1e6:>10.1f} MB  in all")
    if not arguments.yes:
        print("Remove these? Only training again brings them back. [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    print(f"{clean(run, items) / 1e6:.1f} MB removed")
    return 0


def _task(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.do_task import do_task
    from nnunet_flare.rounds.run.manifest import load_run_to_write
    from nnunet_flare.rounds.run.tasks import stand_in
    from nnunet_flare.signals import unwinding_on_sigterm

    run = load_run_to_write(arguments.run_dir)
    task = stand_in(run, arguments.name)
    if task is None:
        print(f"{arguments.name}: not needed, the run ended early")
        return 0
    os.environ.update(run.environment())  # a person or another scheduler gives less than our executors do
    with unwinding_on_sigterm():
        do_task(run, task)
    print(f"{task.name}: done; flare-pseudolabel status -o {arguments.run_dir} shows what comes next")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nnunet_flare.errors import InputError
    from nnunet_flare.outputs import check_new
    from nnunet_flare.rounds import export, share
    from nnunet_flare.rounds.run.manifest import load_run_to_write

    run = load_run_to_write(arguments.run_dir)
    if all(given is None for given in (arguments.dataset, arguments.ledger, arguments.stock_model, arguments.zip)):
        raise InputError("export: give --dataset ID, --ledger CSV, --stock_model DIR or --zip FILE.zip")
    if arguments.round is not None and arguments.dataset is None:
        raise InputError(f"export --round {arguments.round}: needs --dataset ID, the dataset to write")
    if arguments.license is not None and arguments.zip is None:
        raise InputError(f"export --license {arguments.license}: needs --zip FILE.zip, the file to put it into")
    if arguments.ledger is not None:  # nothing is written where one of several wishes cannot be met
        export.check_ledger(run, arguments.ledger)
    if arguments.dataset is not None:
        export.check_dataset(run, arguments.round, arguments.dataset)
    if arguments.stock_model is not None:
        check_new(arguments.stock_model, option="export --stock_model")
    if arguments.zip is not None:
        share.check_zip(arguments.zip, licence=arguments.license)
    if arguments.stock_model is not None or arguments.zip is not None:
        share.final_checkpoint(run)
    if arguments.ledger is not None:
        print(export.export_ledger(run, arguments.ledger))
    if arguments.dataset is not None:
        print(export.export_dataset(run, arguments.round, arguments.dataset))
        next_step(f"nnUNetv2_plan_and_preprocess -d {arguments.dataset}")
    if arguments.stock_model is not None:
        print(share.export_stock_model(run, arguments.stock_model))
        next_step(f"flare-predict -m {arguments.stock_model} -i SCANS -o OUT", "or nnUNetv2_predict_from_modelfolder")
    if arguments.zip is not None:
        print(share.export_zip(run, arguments.zip, licence=arguments.license))
        next_step(f"nnUNetv2_install_pretrained_model_from_zip {arguments.zip}", "its README.md is the model card")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from nnunet_flare.recipes.load import load_recipe, shipped_recipes

    recipes = [load_recipe(name) for name in shipped_recipes()]
    rows = [row for recipe in recipes for row in ((recipe.name, recipe.summary), ("", recipe.paper))]
    print("\n".join(table(rows, width=columns())))
    print()
    next_step("flare-pseudolabel run -d DATASET -u UNLABELLED --recipe NAME --dry-run")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from nnunet_flare.rounds.by_hand import score_folders

    scored, failed = score_folders(
        arguments.inputs, arguments.output, compare=arguments.compare, absent=arguments.absent
    )
    print(f"{arguments.output}: {scored} cases")
    next_step(f"flare-pseudolabel select -i {arguments.output} -o selection.csv --rule RULE")
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
        per_organ=_thresholds(arguments.per_organ),
    )
    print(f"{arguments.output}: {taken} of {total} cases selected; the table has a reason for each")
    return 0


def _thresholds(words: list[str]) -> dict[str, float]:
    from nnunet_flare.errors import InputError

    found: dict[str, float] = {}
    for word in words:
        organ, _, value = word.rpartition("=")
        try:
            threshold = float(value)
        except ValueError:
            threshold = -1.0
        if not organ or not 0 <= threshold <= 1:
            raise InputError(f"--per_organ {word}: expected ORGAN=T with a number from 0 to 1")
        if organ in found:
            raise InputError(f"--per_organ {organ}: given twice ({found[organ]:g} and {threshold:g})")
        found[organ] = threshold
    return found


if __name__ == "__main__":
    sys.exit(main())
