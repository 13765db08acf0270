"""flare-evaluate: the challenge's measures of predictions, comparisons of two methods, and efficiency of a command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare.cli.common import PROCESSES, HyphenParser, number, open_streams, run_command, setup_logging, whole
from nnunet_flare.errors import InputError

if TYPE_CHECKING:
    from nnunet_flare.evaluation.measures import Missing
    from nnunet_flare.evaluation.structures import Structure
    from nnunet_flare.evaluation.table import ScoreTable

PROGRAM = "flare-evaluate"

OWN_KEYS = ({"rules", "structures"}, {"a", "b"})
"""Of the JSON files that this command writes: of scores, of comparisons."""

OFFICIAL_MISSING: dict[str, Missing] = {"flare22": "skip", "flare23": "stop"}
"""What the official scripts do about references without prediction; everything else scores them 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 all cases scored, 1 some failed, 2 wrong usage or input."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["efficiency"]:
        return run_command(PROGRAM, lambda: _efficiency(words[1:]))
    return run_command(PROGRAM, lambda: _evaluate(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(
        prog=PROGRAM,
        description="DSC and NSD as the official FLARE scripts compute them, tables, comparisons and box plots.",
        epilog="`flare-evaluate efficiency -o OUT.csv -- COMMAND ...` measures time, memory and processor use of a "
        "command instead; see `flare-evaluate efficiency --help`.",
    )
    parser.add_argument("-ref", type=Path, metavar="DIR", help="reference label maps, <case>.nii.gz (or one file)")
    parser.add_argument("-pred", type=Path, metavar="DIR", help="predicted label maps of the same names (or one file)")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="compare two methods case by case: folders of predictions (with -ref), or tables written before",
    )
    parser.add_argument(
        "-o",
        type=Path,
        required=True,
        metavar="OUT.csv",
        help="table in the official layout; beside it OUT_summary.csv, OUT.json and OUT.png (box plots)",
    )
    parser.add_argument(
        "--labels",
        default="flare22",
        metavar="SET",
        help="flare22 (default), flare23 (with lesions), or a dataset.json, whose regions are scored as unions and "
        "whose 'ignore' label counts nowhere",
    )
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="score all labelled slices, compute NSD also under DSC 0.2, and round nothing",
    )
    parser.add_argument(
        "--tolerance_mm",
        type=number(0, 1000, "mm"),
        default=None,
        metavar="MM",
        help="NSD tolerance of structures of a dataset.json that FLARE has no tolerance for (default 2)",
    )
    parser.add_argument(
        "--missing",
        choices=("skip", "stop", "zero"),
        help="a reference without prediction: left out (FLARE22's script), stops everything (FLARE23's), or scores 0 "
        "(default with --corrected or a dataset.json)",
    )
    parser.add_argument(
        "--as_stored",
        action="store_true",
        help="compare voxel by voxel whatever the headers say, as the official script",
    )
    parser.add_argument(
        "-np", type=PROCESSES, default=None, metavar="N", help="worker processes (default: one per core)"
    )
    parser.add_argument("--verbose", action="store_true", help="more detail in the log")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    setup_logging(args.verbose)
    _check(args)
    from nnunet_flare.evaluation.structures import DEFAULT_TOLERANCE_MM, read_structures

    tolerance_mm = DEFAULT_TOLERANCE_MM if args.tolerance_mm is None else args.tolerance_mm
    structures = read_structures(args.labels, tolerance_mm=tolerance_mm)
    if args.compare:
        return _compare(args, structures)
    table = _table(args, args.pred, structures)
    _write(args, table)
    return _report_failures({"": table})


def _check(args: argparse.Namespace) -> None:
    if bool(args.pred) == bool(args.compare):
        raise InputError("give either -pred DIR or --compare A B")
    if args.pred and not args.ref:
        raise InputError("-pred needs -ref DIR, the reference label maps")
    if args.o.suffix != ".csv":
        raise InputError(f"-o {args.o}: expected a name that ends in .csv")
    _check_outputs(args)


def _check_outputs(args: argparse.Namespace) -> None:
    """Neither an input nor another program's file of that name (a dataset.json beside the predictions) is replaced."""
    from nnunet_flare.documents import load_json
    from nnunet_flare.listing import images_in
    from nnunet_flare.outputs import check_document, check_outputs

    folders = [path for path in (args.ref, args.pred, *(args.compare or ())) if path is not None]
    inputs = [Path(args.labels), *(file for path in folders for file in images_in(path))]
    check_document(args.o, (".csv",), inputs)
    document = args.o.with_suffix(".json")
    check_outputs([document, args.o.with_suffix(".png"), _summary_file(args)], inputs)
    if document.exists():
        content = load_json(document)
        if not isinstance(content, dict) or not any(keys <= content.keys() for keys in OWN_KEYS):
            raise InputError(
                f"-o {args.o}: {document}, which goes with it, is there already and was not written by this command; "
                "choose another name"
            )


def _summary_file(args: argparse.Namespace) -> Path:
    path: Path = args.o.with_name(f"{args.o.stem}_summary.csv")
    return path


def _table(args: argparse.Namespace, predictions: Path, structures: Sequence[Structure]) -> ScoreTable:
    from nnunet_flare.evaluation.measures import evaluate_folders
    from nnunet_flare.evaluation.structures import read_ignored

    official: Missing = "zero" if args.corrected else OFFICIAL_MISSING.get(args.labels, "zero")
    return evaluate_folders(
        args.ref,
        predictions,
        structures,
        corrected=args.corrected,
        missing=args.missing or official,
        as_stored=args.as_stored,
        ignored=read_ignored(args.labels),
        processes=args.np,
    )


def _write(args: argparse.Namespace, table: ScoreTable) -> None:
    from nnunet_flare.evaluation.plots import box_plots, draw

    if not table.rows:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in table.failed)
        raise InputError(f"no case could be scored{': ' + reasons if reasons else ''}")
    table.write_csv(args.o)
    table.write_summary_csv(_summary_file(args))
    table.write_json(args.o.with_suffix(".json"))
    picture = args.o.with_suffix(".png")
    draw(lambda: box_plots({args.o.stem: table}, picture), picture)
    _print_summary(table)


def _print_summary(table: ScoreTable) -> None:
    rules = "corrected" if table.corrected else "official"
    print(f"{len(table.rows)} cases, {rules} rules")
    rows = {(row.structure, row.measure): row for row in table.summary()}
    width = max(len(s.short) for s in table.structures)
    print(f"{'':{width}}  {'DSC mean':>8} {'sd':>6} {'median':>6}  {'NSD mean':>8} {'sd':>6} {'median':>6}  worst DSC")
    for structure in table.structures:
        dsc, nsd = rows[structure.short, "DSC"], rows[structure.short, "NSD"]
        figures = "  ".join(f"{row.mean:8.4f} {row.sd:6.4f} {row.median:6.4f}" for row in (dsc, nsd))
        worst = ", ".join(f"{name} {value:.4f}" for name, value in dsc.worst)
        print(f"{structure.short:{width}}  {figures}  {worst}")
    print(f"{'mean':{width}}  {table.mean('DSC'):8.4f} {'':13}  {table.mean('NSD'):8.4f}")


def _compare(args: argparse.Namespace, structures: Sequence[Structure]) -> int:
    from nnunet_flare.evaluation.compare import compare
    from nnunet_flare.evaluation.plots import box_plots, draw
    from nnunet_flare.evaluation.table import read_csv
    from nnunet_flare.files import write_json

    names = _distinct_names(args.compare)
    tables = {}
    for name, source in zip(names, args.compare, strict=True):
        if source.is_dir() and not args.ref:
            raise InputError(f"--compare {source}: is a folder; give -ref DIR too, or a table that was written before")
        tables[name] = _table(args, source, structures) if source.is_dir() else read_csv(source, structures)
    comparison = compare(*tables.values())
    comparison.write_csv(args.o)
    write_json(args.o.with_suffix(".json"), {"a": names[0], "b": names[1], **comparison.to_json()})
    picture = args.o.with_suffix(".png")
    draw(lambda: box_plots(tables, picture), picture)
    for name, only in zip(names, (comparison.only_a, comparison.only_b), strict=True):
        if only:
            print(f"only in {name}, left out: {', '.join(only)}")
    print(f"{len(comparison.cases)} cases; A = {names[0]}, B = {names[1]}")
    width = max(len(row.structure) for row in comparison.rows)
    print(
        f"{'':{width}}      {'mean A':>7} {'mean B':>7} {'B - A':>8}  {'95 % interval':>18}  {'p':>8} {'p (Holm)':>8}"
    )
    for row in comparison.rows:
        interval = f"{row.low:+.4f} to {row.high:+.4f}"
        print(
            f"{row.structure:{width}} {row.measure} {row.mean_a:7.4f} {row.mean_b:7.4f} {row.difference:+8.4f}  "
            f"{interval:>18}  {row.p:8.3g} {row.p_holm:8.3g}"
        )
    return _report_failures(tables)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    if paths[0].resolve() == paths[1].resolve():
        raise InputError(f"--compare {paths[0]} {paths[1]}: the same twice; give two methods")
    names = [path.stem if path.suffix == ".csv" else path.resolve().name for path in paths]
    return names if names[0] != names[1] else [str(path) for path in paths]


def _report_failures(tables: dict[str, Any]) -> int:
    failed = [(name, *failure) for name, table in tables.items() for failure in table.failed]
    for name, case, reason in failed:
        sys.stderr.write(f"{PROGRAM}: not scored: {name + ' ' if name else ''}{case}: {reason}\n")
    return 1 if failed else 0


def _efficiency(words: list[str]) -> int:
    parser = HyphenParser(
        prog=f"{PROGRAM} efficiency",
        usage=f"{PROGRAM} efficiency -o OUT.csv [--name NAME] [--gpu N] [--interval S] -- COMMAND ...",
        description="Run a command and record wall time, GPU memory, processor use and RAM of its process tree and of "
        "the machine. The row goes to OUT.csv (a row of the same name is replaced), the samples to OUT_NAME.json and "
        "the curves to OUT_NAME.png. Columns and sums are the official ones; true integrals, the challenges' "
        "tolerances and the process tree's own figures follow. Without a GPU its columns stay empty.",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="OUT.csv", help="table of efficiency figures")
    parser.add_argument("--name", help="name of the row, such as the case's file name (default: the command's)")
    parser.add_argument(
        "--gpu", type=whole(0, 1023), default=0, metavar="N", help="index of the GPU to watch (default 0)"
    )
    parser.add_argument(
        "--interval", type=number(0.01, 60, "seconds"), default=0.1, metavar="S", help="seconds between samples (0.1)"
    )
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    command = words[split + 1 :]
    setup_logging()
    if not command:
        raise InputError("no command; write it after two hyphens: flare-evaluate efficiency -o OUT.csv -- COMMAND ...")
    return _measure(args, command)


def _measure(args: argparse.Namespace, command: list[str]) -> int:
    from nnunet_flare.evaluation.efficiency import add_row, check_table, figures, write_curves
    from nnunet_flare.evaluation.gpu import open_gpu
    from nnunet_flare.evaluation.sampling import record
    from nnunet_flare.outputs import check_outputs
    from nnunet_flare.signals import handling

    name = args.name or Path(command[0]).name
    curves = args.o.with_name(f"{args.o.stem}_{name.replace('/', '_')}")
    written = [args.o, *(curves.with_name(curves.name + ending) for ending in (".json", ".png"))]
    check_outputs(written, [Path(word) for word in command if Path(word).is_file()])
    check_table(args.o)
    with handling(signal.default_int_handler, signal.SIGTERM):  # so that the command ends with us
        recording = record(command, gpu=open_gpu(args.gpu), interval_s=args.interval)
    row = figures(name, recording)
    add_row(args.o, row)
    write_curves(recording, curves, name=name, command=command)
    for column, value in row.items():
        print(f"{column:24} {'-' if value is None else value}")
    if recording.exit_code != 0:
        sys.stderr.write(f"{PROGRAM}: the command ended with exit code {recording.exit_code}; the row says so\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
