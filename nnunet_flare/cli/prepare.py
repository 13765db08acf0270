"""``flare-pseudolabel prepare``: a FLARE download as an nnU-Net dataset and a folder of unlabelled scans."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_flare.cli.common import nnunet_folder, whole

NOTES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flare-pseudolabel prepare``."""
    which = parser.add_mutually_exclusive_group(required=True)
    for name in ("flare22", "flare23"):
        text = f"the unpacked download of {name.upper()}; files are found by their names, in any folders below"
        which.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    parser.add_argument("-d", dest="dataset_id", type=whole(1, 999), metavar="ID", help="dataset id (default 22 or 23)")
    text = "case,annotated: the annotated organs of FLARE23 cases (default: those present in the label map)"
    parser.add_argument("--annotated", type=Path, metavar="CSV", help=text)
    parser.add_argument("--copy", action="store_true", help="copy the files; by default they are linked")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and say what is there, what was set aside, and what to type next."""
    from nnunet_flare.preparation.annotated import summary
    from nnunet_flare.preparation.build import prepare
    from nnunet_flare.preparation.layout import CHALLENGES

    name = "flare22" if arguments.flare22 is not None else "flare23"
    made = prepare(
        name,
        arguments.flare22 if arguments.flare22 is not None else arguments.flare23,
        nnunet_folder("nnUNet_raw"),
        dataset_id=arguments.dataset_id,
        annotated=arguments.annotated,
        copy=arguments.copy,
    )
    print(made.dataset)
    for group, cases in made.cases.items():
        expected = made.expected[group]
        missing = f"   (the whole challenge has {expected})" if len(cases) != expected else ""
        print(f"  {group:<22}{len(cases):>6}{missing}")
    if made.roles:
        print("training cases with each organ annotated:")
        print("\n".join(summary(made.roles, CHALLENGES[name].organs)))
    for note in made.notes[:NOTES_SHOWN]:
        print(f"note: {note}")
    if len(made.notes) > NOTES_SHOWN:
        print(f"note: and {len(made.notes) - NOTES_SHOWN} more")
    for case, reason in sorted(made.set_aside.items()):
        print(f"set aside: {case}: {reason}", file=sys.stderr)
    for path in made.not_recognised:
        print(f"not recognised: {path}: no file name of {name.upper()}", file=sys.stderr)
    if made.cases["training"] and made.cases["unlabelled"]:
        scored = f" --eval {made.dataset / 'imagesVal'} {made.dataset / 'labelsVal'}" if made.scored else ""
        print(f"next: flare-pseudolabel run -d {made.dataset.name} -u {made.unlabelled}{scored} --dry-run")
    return 1 if made.set_aside or made.not_recognised else 0
