"""Files of a download in a dataset's folders: links or copies, never over another file."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.files import link_or_copy, replacing
from nnunet_flare.images import read_volume, write_labels
from nnunet_flare.preparation.case_files import FILE_ENDING


def place(source: Path, target: Path, case: str, *, copy: bool = False) -> None:
    """Make ``target`` the file ``source`` by a link, or a copy; a link to nothing is replaced, another file never.

    Raises:
        CaseError: when another file is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if os.path.samefile(source, target) or filecmp.cmp(source, target):
            return
        raise CaseError(
            case, f"{target}: is another file than {source}; nothing is overwritten, remove it to take that"
        )
    if not copy:
        link_or_copy(source, target)
        return
    target.unlink(missing_ok=True)
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def place_empty(scan: Path, target: Path, *, reader: str) -> None:
    """Write a label map of background on the grid of a scan, unless the file is there."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    volume = read_volume(scan, reader=reader)
    write_labels(target, np.zeros(volume.array.shape, dtype=np.uint8), volume)


def strangers(folder: Path, cases: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Case and file of every scan or label map in a folder that is of none of ``cases``."""
    known = set(cases)
    for path in sorted(folder.glob(f"*{FILE_ENDING}")) if folder.is_dir() else ():
        case = re.sub(r"_0000$", "", path.name.removesuffix(FILE_ENDING))
        if case not in known:
            yield case, path
