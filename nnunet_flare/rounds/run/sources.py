"""What preprocessed arrays were made from: size, times and a digest of every file, so that a corrected one is seen.

The table of a data folder lies beside it (``<folder>_sources.json``): nnU-Net takes every file inside for a case.
Arrays that nnU-Net made itself have none; on first contact a source that is newer than they are counts as changed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunet_flare.dicom.files import dicom_files
from nnunet_flare.digests import digest_of, file_digest
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, replacing, write_json
from nnunet_flare.rounds.stages.arrays import ENDINGS

log = logging.getLogger(__name__)

Source = dict[str, Any]
"""``file``, ``stamp`` (size, times of change of content and of the entry, in ns) and ``digest``."""


TABLE = {"cases": {str: [dict]}, "labels?": dict}
"""What a table of sources looks like."""


def table_path(data: Path) -> Path:
    """Where the sources of a data folder are noted."""
    return data.with_name(f"{data.name}_sources.json")


def read_table(path: Path) -> dict[str, list[Source]]:
    """Sources by case; none where nothing was noted, or the table is damaged, which is said."""
    cases: dict[str, list[Source]] = _read(path).get("cases", {})
    return cases


def labels_of(path: Path) -> dict[str, Any] | None:
    """The labels of dataset.json that the arrays were made for; None where they were not noted."""
    return _read(path).get("labels")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document: dict[str, Any] = read_json(path, TABLE, remedy="the times of the arrays are compared instead")
    except InputError as error:
        log.warning("%s", error)
        return {}
    return document


def write_table(path: Path, cases: Mapping[str, list[Source]], *, labels: Mapping[str, Any]) -> None:
    """Note the sources of every case, and the labels that its places for sampling are listed by."""
    write_json(path, {"version": 1, "labels": dict(labels), "cases": dict(sorted(cases.items()))})


def stamp_of(path: Path) -> list[int] | None:
    """Size and times of a file or a DICOM series; None where there is nothing.

    The time of the entry itself changes with every replacement, also with one that keeps size and time of the content.
    """
    try:
        found = [one.stat() for one in (dicom_files(path) if path.is_dir() else [path])]
    except OSError:
        return None
    if not found:
        return None
    sizes = sum(one.st_size for one in found)
    return [len(found), sizes, max(one.st_mtime_ns for one in found), max(one.st_ctime_ns for one in found)]


def sources_of(files: Iterable[Path], known: Iterable[Source] = ()) -> list[Source]:
    """The files as they are now; a digest is computed where a file does not look as it did when it was noted.

    A file that is missing or cannot be read has neither stamp nor digest.
    """
    noted = {source.get("file"): source for source in known}
    found = []
    for path in files:
        stamp, before = stamp_of(path), noted.get(str(path))
        if stamp is not None and before is not None and before.get("stamp") == stamp:
            found.append(before)
            continue
        try:
            digest = None if stamp is None else _digest(path)
        except OSError:
            digest = None
        found.append({"file": str(path), "stamp": stamp, "digest": digest})
    return found


def differences(before: Iterable[Source], now: Iterable[Source]) -> list[str]:
    """Names of the files whose content is another one; a file that is gone leaves arrays as they are."""
    old, new = list(before), list(now)
    if len(old) != len(new):
        return [Path(source["file"]).name for source in new]
    return [
        Path(there["file"]).name
        for here, there in zip(old, new, strict=True)
        if there["digest"] is not None and there["digest"] != here.get("digest")
    ]


def newer_than_arrays(folder: Path, case: str, now: Iterable[Source]) -> list[str]:
    """Names of the files that were changed after a case's arrays were made, where nothing was noted."""
    try:
        made = min((folder / f"{case}{ending}").stat().st_mtime_ns for ending in ENDINGS)
    except OSError:
        return []
    return [Path(source["file"]).name for source in now if source["stamp"] is not None and source["stamp"][2] > made]


def changed_files(folder: Path, case: str, before: list[Source] | None, now: list[Source]) -> list[str]:
    """Names of a case's files that are not those that its arrays were made from."""
    return newer_than_arrays(folder, case, now) if before is None else differences(before, now)


def refresh_copy(source: Path, copy: Path) -> bool:
    """Copy a file again where the copy, if there is one, holds something else; returns whether it did."""
    if not copy.is_file() or not source.is_file() or file_digest(source) == file_digest(copy):
        return False
    with replacing(copy) as temporary:
        shutil.copyfile(source, temporary)
    return True


def _digest(path: Path) -> str:
    if not path.is_dir():
        return file_digest(path)
    return digest_of(file_digest(file).encode() for file in sorted(dicom_files(path)))
