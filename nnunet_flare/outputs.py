"""No output onto an input: what a command will write is compared with what it reads, before anything is written.

Files are compared as the system knows them (device and number), so that ``..``, symbolic and hard links and, on file
systems that do not tell them apart, small and capital letters are seen through.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunet_flare.errors import InputError
from nnunet_flare.files import remove_leftovers

SHOWN = 5
"""Files that a message names."""


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path | None], *, option: str = "-o") -> None:
    """Refuse outputs that are inputs, then clean the outputs' folders of what a killed command left half-written.

    Args:
        outputs: every file that will be written; an earlier output of the same name may be there.
        inputs: files, and folders all of whose files are inputs (a DICOM series); None, and what is no file but a
            word of the command line, is left out.
        option: of the command line, for the message.

    Raises:
        InputError: naming the files; nothing is changed then.
    """
    outputs = list(outputs)
    refuse_inputs(outputs, inputs, option=option)
    for folder in dict.fromkeys(path.parent for path in outputs):
        remove_leftovers(folder)


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path | None], *, option: str = "-o") -> None:
    """Refuse outputs that are inputs; see :func:`check_outputs`.

    Raises:
        InputError: naming the files.
    """
    known: dict[object, Path] = {}
    for path in _files(inputs):
        for key in _keys(path):
            known.setdefault(key, path)
    hits = [(path, known[key]) for path in outputs for key in _keys(path) if key in known]
    pairs = dict(hits)
    if pairs:
        told = "; ".join(
            f"{path} is an input" if path == read else f"{path} is the input {read}"
            for path, read in list(pairs.items())[:SHOWN]
        )
        more = f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        raise InputError(
            f"{option}: {told}{more}, which would be overwritten; nothing was written. Choose another name"
        )


def check_document(
    path: Path, endings: Sequence[str], inputs: Iterable[Path | None] = (), *, option: str = "-o"
) -> None:
    """Check a table or document that will be written, as :func:`check_outputs`; other kinds of files are not replaced.

    Args:
        path: the file.
        endings: of such files, for example ``.csv``; a file of another ending that is there already is somebody's data.
        inputs: as for :func:`check_outputs`.
        option: of the command line, for the message.

    Raises:
        InputError: naming the file.
    """
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; expected the name of a {endings[0]} file")
    if os.path.lexists(path) and not path.name.lower().endswith(tuple(endings)):
        raise InputError(
            f"{option} {path}: exists and is not a {endings[0]} file; nothing was written. Choose another name"
        )
    check_outputs([path], inputs, option=option)


def check_new(path: Path, *, option: str = "-o") -> None:
    """Refuse what is there already: a trained model in another form, which is written once. An empty folder is new.

    Raises:
        InputError: naming it.
    """
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        what = "is not empty" if path.is_dir() and any(path.iterdir()) else "is not replaced"
        raise InputError(f"{option} {path}: already exists and {what}; nothing was written. Choose a new name")


def put_new(scratch: Path, target: Path) -> None:
    """Give a finished folder its name, which was new (:func:`check_new`) when the command began.

    Raises:
        InputError: when another command took the name meanwhile.
    """
    try:
        os.replace(scratch, target)
    except OSError as error:
        is_empty = target.is_dir() and not any(target.iterdir())
        if is_empty or not os.path.lexists(target):
            raise
        raise InputError(
            f"{target}: another command wrote it in the meantime; it was left as it is, and nothing of this export "
            "was kept"
        ) from error


def _files(paths: Iterable[Path | None]) -> Iterable[Path]:
    for path in paths:
        if path is None or not os.path.lexists(path):
            continue
        if path.is_dir():
            yield from (Path(entry.path) for entry in os.scandir(path) if not entry.is_dir())
        else:
            yield path


def _keys(path: Path) -> list[object]:
    """What a file is known by: its place without links, and where it exists its device and number."""
    keys: list[object] = [os.path.normcase(os.path.realpath(path))]
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return keys
    if found.st_ino:  # some network file systems have no numbers
        keys.append((found.st_dev, found.st_ino))
    return keys
