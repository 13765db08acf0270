"""``flare-doctor``: is everything in place, and is a dataset sound."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare.cli.common import nnunet_folder, open_streams, run_command, setup_logging
from nnunet_flare.cli.parser import HyphenParser
from nnunet_flare.cli.terminal import columns, show
from nnunet_flare.tables import table

if TYPE_CHECKING:
    from nnunet_flare.diagnosis import Finding

PROGRAM = "flare-doctor"
PREPROCESSED = "nnUNet_preprocessed"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 when nothing is wrong, 1 when a problem was found, 2 for wrong usage."""
    open_streams()
    arguments = _parser().parse_args(argv)
    setup_logging()
    return run_command(PROGRAM, lambda: _diagnose(arguments.dataset))


def _parser() -> argparse.ArgumentParser:
    parser = HyphenParser(
        prog=PROGRAM,
        description="Check packages, the nnU-Net plugin, hardware and nnU-Net's folders, and say what works here.",
        epilog="Exit code 0: nothing wrong; 1: problems, as listed; 2: wrong usage.",
    )
    parser.add_argument(
        "-d", dest="dataset", metavar="DATASET", help="dataset id or name in nnUNet_raw; also open every file of it"
    )
    return parser


def _diagnose(dataset: str | None) -> int:
    from nnunet_flare import diagnosis
    from nnunet_flare.uses import verdicts

    sections = {
        "packages": diagnosis.check_packages(),
        "plugin": diagnosis.check_plugin(),
        "hardware": diagnosis.check_hardware(),
        "folders": diagnosis.check_folders(),
    }
    if dataset is not None:
        sections["dataset"] = _dataset(dataset)
    for title, findings in sections.items():
        _print(title, findings)
    uses = verdicts(sections)
    print("\nwhat works here")
    for line in table([[f.level, use, f.text] for use, f in uses.items()], width=columns(), indent="  "):
        show(line)
    found = [finding.level for findings in sections.values() for finding in findings]
    in_uses = sum(finding.level == "problem" for finding in uses.values())
    problems, notes = found.count("problem") or in_uses, found.count("note")  # most in uses follow from those above
    print(f"\n{f'{problems} problem(s)' if problems else 'no problem'}, {notes} note(s)")
    return 1 if problems else 0


def _dataset(name: str) -> list[Finding]:
    from nnunet_flare.datasets import check_dataset, resolve_dataset
    from nnunet_flare.diagnosis import Finding, check_rounds

    folder = resolve_dataset(name, nnunet_folder("nnUNet_raw"))
    findings = [Finding("problem", line) for line in check_dataset(folder)]
    if not findings:
        findings.append(Finding("ok", f"{folder}: every image and label map can be used"))
    preprocessed = os.environ.get(PREPROCESSED)
    if preprocessed:
        findings += check_rounds(Path(preprocessed) / folder.name)
    return findings


def _print(title: str, findings: Sequence[Finding]) -> None:
    print(f"\n{title}" if title != "packages" else title)
    for finding in findings:
        show(f"  {finding.level:8s} {finding.text}")
