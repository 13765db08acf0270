"""Files of a download in a dataset's folders: links or copies, never over another file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.files import link_or_copy, replacing
from nnunet_flare.images import geometry_difference, read_labels, read_volume, write_labels
from nnunet_flare.preparation.case_files import FILE_ENDING, is_same


def place(source: Path, target: Path, case: str, *, copy: bool = False) -> None:
    """Make ``target`` the file ``source`` by a link, or a copy; a link to nothing is replaced, another file never.

    Raises:
        CaseError: when another file is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if is_same(source, target):
            return
        raise CaseError(
            case, f"{target}: exists and differs from {source}; nothing is overwritten. Remove it to use the new file"
        )
    if not copy:
        link_or_copy(source, target)
        return
    target.unlink(missing_ok=True)
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def place_empty(scan: Path, target: Path, case: str, *, reader: str) -> None:
    """Write a label map of background on the grid of a scan, unless the file is there.

    Raises:
        CaseError: when another label map is there, of an earlier scan's grid or with labels.
    """
    volume = read_volume(scan, case, reader=reader)
    if target.exists():
        there = read_labels(target, case, reader=reader)
        if there.array.any() or geometry_difference(volume, there):
            raise CaseError(
                case, f"{target}: is not an empty label map on the grid of {scan}; remove it and prepare writes it"
            )
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_labels(target, np.zeros(volume.array.shape, dtype=np.uint8), volume)


def strangers(folder: Path, cases: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Case and file of every scan or label map in a folder that is of none of ``cases``."""
    known = set(cases)
    for path in sorted(folder.glob(f"*{FILE_ENDING}")) if folder.is_dir() else ():
        case = re.sub(r"_0000$", "", path.name.removesuffix(FILE_ENDING))
        if case not in known:
            yield case, path
