"""Opening every scan and label map of a download once, and remembering what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.datasets import READERS
from nnunet_flare.errors import CaseError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import (
    Volume,
    check_values,
    geometry_difference,
    oddities,
    read_labels,
    read_volume,
    rounding_difference,
)
from nnunet_flare.images.readers import doubtful
from nnunet_flare.preparation.case_files import DownloadedScan

RECORD = "flare_prepare.json"
"""In the dataset's folder: what was found out about each case, so that a second call opens only what changed."""
VERSION = 3
SAVE_EVERY = 50


@dataclass(frozen=True)
class CaseFinding:
    """What a case's files hold: problems that keep it out, oddities that do not, and the ids in its label map.

    ``pseudo`` says why a published pseudo-label is not used, by team.
    """

    stamp: tuple[str, ...]
    problems: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    present: tuple[int, ...] = ()
    pseudo: dict[str, str] = field(default_factory=dict)


def examine_all(
    scans: Sequence[DownloadedScan], allowed: Sequence[int], record: Path, origin: str, *, reader: str
) -> dict[str, CaseFinding]:
    """Open the files of every case that is new, changed or was bad at the last time; returns all cases' findings.

    Args:
        scans: the cases.
        allowed: ids that a label map may hold.
        record: file to remember the findings in.
        origin: the challenge and the download's folder, kept in the record.
        reader: the one that dataset.json will name.
    """
    known = _read(record)
    findings = {scan.case: known[scan.case] for scan in scans if _is_current(scan, known.get(scan.case))}
    left = [scan for scan in scans if scan.case not in findings]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(partial(examine, allowed=allowed, reader=reader), left)
        progress = tqdm(found, desc="opening every file", total=len(left), unit="case", disable=None)
        for number, (scan, finding) in enumerate(zip(left, progress, strict=True), start=1):
            findings[scan.case] = finding
            if number % SAVE_EVERY == 0:
                _write(record, origin, findings)
    _write(record, origin, findings)
    return findings


def examine(scan: DownloadedScan, *, allowed: Sequence[int], reader: str) -> CaseFinding:
    """Open a case's scan and label map; all its problems at once."""
    problems: list[str] = []
    image: Volume | None = None
    try:
        image = read_volume(scan.image, scan.case, reader=reader)
        check_values(image, scan.case, scan.image)
        if image.doubt:
            problems.append(f"{scan.image}: {image.doubt}; {doubtful(reader)}")
    except CaseError as error:
        problems.append(error.reason)
    present: tuple[int, ...] = ()
    nearly: str | None = None
    if scan.label is not None:
        try:
            label = read_labels(scan.label, scan.case, allowed=allowed, reader=reader)
            present = tuple(int(value) for value in np.flatnonzero(np.bincount(label.array.ravel())) if value)
            difference = None if image is None else geometry_difference(image, label)
            if difference:
                problems.append(f"{scan.label}: not on the grid of its scan: {difference}")
            elif image is not None:
                nearly = rounding_difference(image, label)
        except CaseError as error:
            problems.append(error.reason)
    odd = tuple(oddities(image, is_ct=scan.domain == "CT")) if image is not None and not problems else ()
    if nearly and not problems:
        odd = (*odd, f"its label map is only nearly on its grid: {nearly}")
    pseudo = {} if image is None else _unusable(scan, image, allowed=allowed, reader=reader)
    return CaseFinding(stamp(scan), tuple(problems), odd, present, pseudo)


def _unusable(scan: DownloadedScan, image: Volume, *, allowed: Sequence[int], reader: str) -> dict[str, str]:
    """Why published pseudo-labels of a scan cannot be used, by team."""
    found = {}
    for team, path in scan.pseudo.items():
        try:
            labels = read_labels(path, scan.case, allowed=allowed, reader=reader)
        except CaseError as error:
            found[team] = error.reason
            continue
        difference = geometry_difference(image, labels)
        if difference:
            found[team] = f"{path}: not on the grid of its scan: {difference}"
    return found


def stamp(scan: DownloadedScan) -> tuple[str, ...]:
    """Changes when one of the files of a case does."""
    files = (scan.image, scan.label, *scan.pseudo.values())
    return tuple(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files if p and p.exists())


def _is_current(scan: DownloadedScan, finding: CaseFinding | None) -> bool:
    return finding is not None and not finding.problems and not finding.pseudo and finding.stamp == stamp(scan)


def read_record(path: Path) -> dict[str, Any]:
    """What an earlier call found out; nothing where there was none."""
    finding = {"stamp": [str], "problems": [str], "odd": [str], "present": [int], "pseudo?": {str: str}}
    shape = {"origin": str, "cases": {str: finding}}
    return read_json(path, shape, remedy="restore it, or remove the dataset's folder") if path.is_file() else {}


def _read(record: Path) -> Mapping[str, CaseFinding]:
    document = read_record(record)
    if document.get("version") != VERSION:  # looked at by other rules
        return {}
    cases: dict[str, dict[str, Any]] = document.get("cases", {})
    return {case: _finding(entry) for case, entry in cases.items()}


def _finding(entry: Mapping[str, Any]) -> CaseFinding:
    lists = {key: tuple(value) for key, value in entry.items() if key != "pseudo"}
    return CaseFinding(**lists, pseudo=entry.get("pseudo", {}))


def _write(record: Path, origin: str, findings: Mapping[str, CaseFinding]) -> None:
    cases = {case: asdict(findings[case]) for case in sorted(findings)}
    write_json(record, {**read_record(record), "version": VERSION, "origin": origin, "cases": cases})
