"""``flare-pseudolabel prepare``: a FLARE download as an nnU-Net dataset and a folder of unlabelled scans."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare.cli.common import nnunet_folder, whole
from nnunet_flare.preparation.layouts import YEARS, layout_of

if TYPE_CHECKING:
    from nnunet_flare.preparation.prepared import PreparedDataset

SHOWN = 20
"""Notes and files of unknown names that are listed one by one; of the others there is a count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flare-pseudolabel prepare``."""
    parser.usage = (
        f"{parser.prog} [-h] [--version] [-v] --flareYY DIR [--task N]\n"
        "           [-d ID] [--annotated CSV] [--copy], with YY from 22 to 26"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    for year in YEARS:
        text = f"the unpacked {year.upper()} download; files are found by name in any subfolder"
        which.add_argument(f"--{year}", type=Path, metavar="DIR", help=text)
    text = "task of FLARE24 and later: 1 pan-cancer lesions, 2 organs on a laptop, 3 organs in MR and PET"
    parser.add_argument("--task", type=whole(1, 3), metavar="N", help=text)
    text = "dataset id (default: the year; from FLARE24 on the year and the task: 22, 23, 241, 242, ...)"
    parser.add_argument("-d", dest="dataset_id", type=whole(1, 999), metavar="ID", help=text)
    text = "table case,annotated: the organs annotated in each partial case (default: those in its label map)"
    parser.add_argument("--annotated", type=Path, metavar="CSV", help=text)
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking them")


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and say what is there, what was set aside, and what to type next."""
    year = next(year for year in YEARS if getattr(arguments, year) is not None)
    layout = layout_of(year, arguments.task)
    from nnunet_flare.preparation.annotated import summary
    from nnunet_flare.preparation.build import prepare

    made = prepare(
        layout,
        getattr(arguments, year),
        nnunet_folder("nnUNet_raw"),
        dataset_id=arguments.dataset_id,
        annotated=arguments.annotated,
        copy=arguments.copy,
    )
    _say_counts(made)
    if made.roles:
        print("training cases with each organ annotated:")
        print("\n".join(summary(made.roles, layout.organs)))
    for note in made.notes[:SHOWN]:
        print(f"note: {note}")
    if len(made.notes) > SHOWN:
        print(f"note: and {len(made.notes) - SHOWN} more")
    for case, reason in sorted(made.set_aside.items()):
        print(f"set aside: {case}: {reason}", file=sys.stderr)
    _say_unknown(made)
    if made.cases["training"] and made.cases["unlabelled"]:
        first = next(iter(sorted(made.scored)), "")
        scored = f" --eval {made.dataset / f'imagesVal{first}'} {made.dataset / f'labelsVal{first}'}"
        print(
            f"next: flare-pseudolabel run -d {made.dataset.name} -u {made.unlabelled}{scored if made.scored else ''} "
            "--dry-run"
        )
        _say_recipes(made, layout.targets)
    return 1 if made.set_aside or made.not_recognised else 0


def _say_counts(made: PreparedDataset) -> None:
    print(made.dataset)
    for group, cases in made.cases.items():
        expected = made.expected.get(group, len(cases))
        missing = f"   (the full challenge has {expected})" if len(cases) != expected else ""
        print(f"  {group:<22}{len(cases):>6}{missing}")
    domains = Counter(made.domains.values())
    if len(domains) > 1:
        print(f"  unlabelled by domain: {', '.join(f'{count} {domain}' for domain, count in sorted(domains.items()))}")
    for team, cases in sorted(made.pseudo.items()):
        print(f"  pseudo-labels {team:<8}{len(cases):>6}   {made.dataset / 'pseudo' / team}")


def _say_recipes(made: PreparedDataset, targets: Sequence[str]) -> None:
    """How a run learns from what was found beside the scans: their modalities, and published labels of them."""
    from nnunet_flare.preparation.prepared import DOMAINS

    if len(targets) > 1:
        table = made.dataset / DOMAINS
        print(f"  to adapt to {' and '.join(targets)}, add: --recipe adaptation --set domains.table={table}")
    unlabelled = set(made.cases["unlabelled"])
    teams = [team for team, cases in sorted(made.pseudo.items()) if unlabelled & set(cases)]
    if teams:
        folders = ", ".join(str(made.dataset / "pseudo" / team) for team in teams)
        print(f'  with published labels as teachers, add: --recipe laptop --set "fusion.teachers=[{folders}]"')


def _say_unknown(made: PreparedDataset) -> None:
    unknown = list(made.not_recognised.items())
    for path, reason in unknown[:SHOWN]:
        print(f"not recognised: {path}: {reason}", file=sys.stderr)
    folders = Counter(path.parent for path, _ in unknown[SHOWN:])
    for folder, count in folders.most_common(SHOWN):
        example = next(path.name for path, _ in unknown[SHOWN:] if path.parent == folder)
        print(f"not recognised: and {count} more in {folder}, such as {example}", file=sys.stderr)
    if len(folders) > SHOWN:
        count = sum(folders.values()) - sum(n for _, n in folders.most_common(SHOWN))
        print(f"not recognised: and {count} more in {len(folders) - SHOWN} other folders", file=sys.stderr)
