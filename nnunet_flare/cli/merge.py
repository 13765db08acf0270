"""``flare-pseudolabel merge``: its options and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_flare.cli.common import PROCESSES, whole
from nnunet_flare.organs import LABEL_SETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of the command."""
    parser.add_argument(
        "-o", dest="output", type=Path, required=True, metavar="OUT", help="folder to write into, none of the inputs"
    )
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="label maps to complete, one per case")
    parser.add_argument("--partial", type=Path, metavar="DIR", help="ground truth of some organs; always wins")
    parser.add_argument(
        "--annotated",
        nargs="+",
        default=[],
        metavar="ID",
        help="label ids that --partial annotates, or a flare_cases.json",
    )
    parser.add_argument(
        "--teacher", nargs="+", type=Path, default=[], metavar="DIR", help="label maps that must agree with the base"
    )
    parser.add_argument(
        "--id_map",
        nargs="+",
        default=[],
        metavar="NAME|FILE",
        help="translate the teachers' label ids: btcv, amos, totalsegmentator, none or a YAML file; one for all or "
        "one each",
    )
    parser.add_argument(
        "--on_disagree",
        choices=("ignore", "zero", "first"),
        help="label of voxels where base and teachers differ: ignore (default), zero: background, first: the base's",
    )
    parser.add_argument(
        "--union",
        nargs="+",
        type=whole(1, 255),
        default=[],
        metavar="ID",
        help="label ids that teachers add to the base, without a vote",
    )
    parser.add_argument(
        "--protect",
        nargs="+",
        type=whole(1, 255),
        default=[],
        metavar="ID",
        help="label ids that win wherever one source has them",
    )
    text = f"label set of the result: {', '.join(LABEL_SETS)} (default flare23)"
    parser.add_argument("--labels", choices=tuple(LABEL_SETS), default="flare23", metavar="SET", help=text)
    parser.add_argument(
        "-np", dest="processes", type=PROCESSES, metavar="N", help="worker processes (default: one per core)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, print what was written, dropped and set aside; 1 when a case was set aside."""
    from nnunet_flare.organs import dataset_labels
    from nnunet_flare.rounds.merge import MergeRequest, merge_folders

    request = MergeRequest(
        arguments.output,
        arguments.base,
        sorted(dataset_labels(LABEL_SETS[arguments.labels]).values()),
        partial=arguments.partial,
        annotated=arguments.annotated,
        teachers=arguments.teacher,
        id_maps=arguments.id_map,
        union_of=arguments.union,
        on_disagree=arguments.on_disagree,
        protect=arguments.protect,
    )
    result = merge_folders(request, processes=arguments.processes)
    print(
        f"{arguments.output}: {len(result.outcomes) - len(result.constant)} cases written; merge.csv has one line per "
        "case"
    )
    if result.has_ignore:
        print(f'ignored voxels have the value {request.ignore_label}: declare "ignore" in dataset.json')
    for case in result.constant:
        print(f"dropped: {case}: its merged label map has one value only")
    for case, reason in result.failed.items():
        print(f"set aside: {case}: {reason}", file=sys.stderr)
    return 1 if result.failed else 0
