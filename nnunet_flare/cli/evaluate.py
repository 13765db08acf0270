"""flare-evaluate: the challenge's measures of predictions, comparisons of two methods, and efficiency of a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_flare import tables
from nnunet_flare.cli.common import PROCESSES, number, open_streams, run_command, setup_logging
from nnunet_flare.cli.efficiency import efficiency
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import columns, next_step, show
from nnunet_flare.errors import InputError
from nnunet_flare.organs import LABEL_SETS

if TYPE_CHECKING:
    from nnunet_flare.evaluation.measures import Missing
    from nnunet_flare.evaluation.structures import Structure
    from nnunet_flare.evaluation.table import ScoreTable

PROGRAM = "flare-evaluate"

OWN_KEYS = ({"rules", "structures"}, {"a", "b"})
"""Of the JSON files that this command writes: of scores, of comparisons."""

OFFICIAL_MISSING: dict[str, Missing] = {name: "stop" if name == "flare23" else "skip" for name in LABEL_SETS}
"""What the official scripts do about references without prediction; everything else scores them 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 all cases scored, 1 some failed, 2 wrong usage or input."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["efficiency"]:
        return run_command(PROGRAM, lambda: efficiency(words[1:]))
    return run_command(PROGRAM, lambda: _evaluate(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(
        prog=PROGRAM,
        description="Score predictions as the official FLARE scripts do (DSC and NSD): tables, comparisons, box plots.",
        epilog="Exit code 0: all cases scored; 1: some were not, as listed; 2: wrong usage or input. flare-evaluate "
        "efficiency measures time, memory and processor use of a command or of a container; see flare-evaluate "
        "efficiency --help.",
    )
    parser.add_argument("-ref", type=Path, metavar="DIR", help="reference label maps <case>.nii.gz (or one file)")
    parser.add_argument(
        "-pred", type=Path, metavar="DIR", help="predicted label maps with the same names (or one file)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="compare two methods case by case: folders of predictions (with -ref), or tables that this command wrote",
    )
    parser.add_argument(
        "-o",
        type=Path,
        required=True,
        metavar="OUT.csv",
        help="table in the official layout; next to it OUT_summary.csv, OUT.json, OUT.png (box plots) and, for "
        "lesions, OUT_healthy.csv: false positives (ml) in scans without a lesion",
    )
    parser.add_argument(
        "--labels",
        default="flare22",
        metavar="SET",
        help="flare22 (default), flare23 (with lesions), flare24-lesion (task 1), flare24-organs (tasks 2 and 3), the "
        "same for flare25 and flare26, or a dataset.json; its regions are scored as unions, its 'ignore' label "
        "is left out",
    )
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="score all labelled slices, compute NSD below DSC 0.2 too, and do not round",
    )
    parser.add_argument(
        "--tolerance_mm",
        type=number(0, 1000, "mm"),
        default=None,
        metavar="MM",
        help="NSD tolerance of structures that FLARE has no tolerance for (default 2)",
    )
    parser.add_argument(
        "--missing",
        choices=("skip", "stop", "zero"),
        help="for references without a prediction: stop (as FLARE23's script), skip them (as those of other years), "
        "or score zero (default with --corrected or a dataset.json)",
    )
    parser.add_argument(
        "--as_stored",
        action="store_true",
        help="compare voxel by voxel and ignore the headers, as the official script does",
    )
    parser.add_argument(
        "-np", type=PROCESSES, default=None, metavar="N", help="worker processes (default: one per core)"
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    setup_logging(args.verbose)
    _check(args)
    from nnunet_flare.evaluation.structures import DEFAULT_TOLERANCE_MM, read_structures

    tolerance_mm = DEFAULT_TOLERANCE_MM if args.tolerance_mm is None else args.tolerance_mm
    structures = read_structures(args.labels, tolerance_mm=tolerance_mm)
    if args.compare:
        return _compare(args, structures)
    _check_tables(args, structures)
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
    check_outputs([document, args.o.with_suffix(".png"), _summary_file(args), _healthy_file(args)], inputs)
    if document.exists():
        content = load_json(document)
        if not isinstance(content, dict) or not any(keys <= content.keys() for keys in OWN_KEYS):
            raise _taken(args, document)


def _check_tables(args: argparse.Namespace, structures: Sequence[Structure]) -> None:
    """Nor is a table of that name, such as the scores of healthy scans."""
    from nnunet_flare.evaluation.table import is_healthy, is_summary

    summary, healthy = _summary_file(args), _healthy_file(args)
    if summary.exists() and not is_summary(summary):
        raise _taken(args, summary)
    if healthy.exists() and any(structure.is_lesion for structure in structures) and not is_healthy(healthy):
        raise _taken(args, healthy)


def _taken(args: argparse.Namespace, path: Path) -> InputError:
    return InputError(f"-o {args.o}: {path}, which belongs to it, exists and holds something else; choose another name")


def _summary_file(args: argparse.Namespace) -> Path:
    path: Path = args.o.with_name(f"{args.o.stem}_summary.csv")
    return path


def _healthy_file(args: argparse.Namespace) -> Path:
    path: Path = args.o.with_name(f"{args.o.stem}_healthy.csv")
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
    from nnunet_flare.evaluation.table import is_healthy

    if not table.rows:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in table.failed)
        raise InputError(f"no case could be scored{': ' + reasons if reasons else ''}")
    table.write_csv(args.o)
    table.write_summary_csv(_summary_file(args))
    healthy = [_healthy_file(args)] if any(structure.is_lesion for structure in table.structures) else []
    for path in healthy:
        table.write_healthy_csv(path)
    if not healthy:
        _remove_old(_healthy_file(args), is_healthy)
    table.write_json(args.o.with_suffix(".json"))
    picture = args.o.with_suffix(".png")
    drawn = draw(lambda: box_plots({args.o.stem: table}, picture), picture)
    _print_summary(table)
    written = [args.o, _summary_file(args), args.o.with_suffix(".json"), *healthy, *([picture] if drawn else [])]
    show(f"\nwritten: {', '.join(map(str, written))}")
    next_step(f"{PROGRAM} --compare {args.o} OTHER.csv -o compared.csv", "to compare with another table")


def _remove_old(path: Path, is_own: Callable[[Path], bool]) -> None:
    """A further table of an earlier call of this name says nothing of what is written now."""
    if is_own(path):
        path.unlink()


def _print_summary(table: ScoreTable) -> None:
    rules = "corrected" if table.corrected else "official"
    print(f"{len(table.rows)} cases, {rules} rules")
    found = {(row.structure, row.measure): row for row in table.summary()}
    rows = []
    for structure in table.structures:
        of = [found[structure.short, measure] for measure in ("DSC", "NSD")]
        rows.append([structure.short, *(f"{value:.4f}" for row in of for value in (row.mean, row.sd, row.median))])
    rows.append(["mean", f"{table.mean('DSC'):.4f}", "", "", f"{table.mean('NSD'):.4f}"])
    header = ["", "DSC mean", "sd", "median", "NSD mean", "sd", "median"]
    worst = [
        [
            s.short,
            ", ".join(f"{name.removesuffix('.nii.gz')} {value:.4f}" for name, value in found[s.short, "DSC"].worst),
        ]
        for s in table.structures
    ]
    lines = [*tables.table(rows, header=header, align="lrrrrrr"), ""]
    print("\n".join([*lines, *tables.table(worst, header=["worst DSC"], width=columns())]))
    for row in table.healthy():
        at_most = f", at most {row.largest_ml:.4f} ml ({row.largest_case})" if row.with_any else ""
        show(f"{row.structure}: {row.with_any} of {row.scans} scans without it in the reference have false positives "
             f"({row.share:.1%}), {row.mean_ml:.4f} ml on average{at_most}")  # fmt: skip


def _compare(args: argparse.Namespace, structures: Sequence[Structure]) -> int:
    from nnunet_flare.evaluation.compare import compare
    from nnunet_flare.evaluation.plots import box_plots, draw
    from nnunet_flare.evaluation.table import is_healthy, is_summary, read_csv
    from nnunet_flare.files import write_json

    names = _distinct_names(args.compare)
    _check_rules(args, structures)
    scored = {}
    for name, source in zip(names, args.compare, strict=True):
        if source.is_dir() and not args.ref:
            raise InputError(f"--compare {source}: is a folder; give -ref DIR too, or a table that this command wrote")
        scored[name] = _table(args, source, structures) if source.is_dir() else read_csv(source, structures)
    comparison = compare(*scored.values())
    comparison.write_csv(args.o)
    _remove_old(_summary_file(args), is_summary)
    _remove_old(_healthy_file(args), is_healthy)
    write_json(args.o.with_suffix(".json"), {"a": names[0], "b": names[1], **comparison.to_json()})
    picture = args.o.with_suffix(".png")
    drawn = draw(lambda: box_plots(scored, picture), picture)
    for name, only in zip(names, (comparison.only_a, comparison.only_b), strict=True):
        if only:
            print(f"only in {name}, left out: {', '.join(only)}")
    print(f"{len(comparison.cases)} cases; A = {names[0]}, B = {names[1]}")
    header = ["", "", "mean A", "mean B", "B - A", "95 % interval", "p", "p (Holm)"]
    rows = [
        [
            row.structure,
            row.measure,
            f"{row.mean_a:.4f}",
            f"{row.mean_b:.4f}",
            f"{row.difference:+.4f}",
            f"{row.low:+.4f} to {row.high:+.4f}",
            f"{row.p:.2g}",
            f"{row.p_holm:.2g}",
        ]
        for row in comparison.rows
    ]
    print("\n".join(tables.table(rows, header=header, align="llrrrrrr")))
    written = [args.o, args.o.with_suffix(".json"), *([picture] if drawn else [])]
    show(f"\nwritten: {', '.join(map(str, written))}")
    return _report_failures(scored)


def _check_rules(args: argparse.Namespace, structures: Sequence[Structure]) -> None:
    """A difference between two methods must not come from rules that only one of them was scored by."""
    given = {
        "--corrected": args.corrected,
        "--missing": args.missing,
        "--as_stored": args.as_stored,
        "--tolerance_mm": args.tolerance_mm is not None,
    }
    options = [option for option, is_given in given.items() if is_given]
    if options and not any(source.is_dir() for source in args.compare):
        raise InputError(
            f"--compare {args.compare[0]} {args.compare[1]}: tables are compared as they were scored; leave out "
            f"{' '.join(options)}, or give folders with -ref DIR"
        )
    a, b = (_rules(args, source, structures) for source in args.compare)
    for what in a.keys() & b.keys():
        if a[what] != b[what]:
            raise InputError(
                f"--compare {args.compare[0]} {args.compare[1]}: their {what} differ, {a[what]} and {b[what]}; score "
                "both alike"
            )


def _rules(args: argparse.Namespace, source: Path, structures: Sequence[Structure]) -> dict[str, Any]:
    """How a method is or was scored; nothing for a table without the JSON file that is written beside it."""
    from nnunet_flare.documents import load_json
    from nnunet_flare.shapes import mismatch

    if source.is_dir():
        tolerances = [structure.nsd_tolerance_mm for structure in structures]
        return {"rules": "corrected" if args.corrected else "official", "NSD tolerances (mm)": tolerances}
    document = source.with_suffix(".json")
    content: Any = load_json(document) if document.is_file() else None
    if mismatch(content, {"rules": str, "structures": [{"nsd_tolerance_mm": float}]}) is not None:
        return {}
    tolerances = [structure["nsd_tolerance_mm"] for structure in content["structures"]]
    return {"rules": content["rules"], "NSD tolerances (mm)": tolerances}


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    if paths[0].resolve() == paths[1].resolve():
        raise InputError(f"--compare {paths[0]} {paths[1]}: the same path twice; give two methods")
    names = [path.stem if path.suffix == ".csv" else path.resolve().name for path in paths]
    return names if names[0] != names[1] else [str(path) for path in paths]


def _report_failures(tables: dict[str, Any]) -> int:
    failed = [(name, *failure) for name, table in tables.items() for failure in table.failed]
    for name, case, reason in failed:
        sys.stderr.write(f"{PROGRAM}: not scored: {name + ' ' if name else ''}{case}: {reason}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
