"""By which model and settings a label map was made: a mark in its header that ``--continue_prediction`` knows again.

The mark changes with what changes label maps: weights, plans and data set of every stage and fold, windows,
augmentation, region of interest and post-processing. Device, backend, precision and limits of memory do not count.
After it stand the further outputs that were written with the label map: others are of an earlier prediction.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nnunet_flare.digests import file_digest
from nnunet_flare.inference.cache import key_of
from nnunet_flare.inference.opened import Opened
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.kept import header_of

PROGRAM = "flare-predict"
"""What a mark begins with."""

KEY_DIGITS = 16
"""A header has 79 characters for a mark and all further outputs."""


@dataclass(frozen=True)
class Mark:
    """By what a label map was made, and the names of the further outputs that were written with it."""

    made_with: str
    outputs: frozenset[str]

    def __str__(self) -> str:
        return " ".join((self.made_with, *sorted(self.outputs)))


class HasOrigin(Protocol):
    """Whatever segments, and says by which files and settings."""

    @property
    def origin(self) -> list[Any]:
        """JSON values, equal for equal label maps."""
        ...


def mark_of(segmenter: HasOrigin, postprocessing: Mapping[str, Any] | None = None) -> str:
    """The mark of label maps by a segmenter and the content of a pipeline after it.

    Raises:
        OSError: when a file of the model cannot be read any more.
    """
    return f"{PROGRAM} {key_of(segmenter.origin, postprocessing)[:KEY_DIGITS]}"


def mark_in(label_map: Path) -> Mark | None:
    """The mark in a label map's header; None where it has none (another program, an older version, not NIfTI)."""
    header = header_of(label_map)
    words = [] if header is None else header.description.split()
    if len(words) < 2 or words[0] != PROGRAM:
        return None
    return Mark(" ".join(words[:2]), frozenset(words[2:]))


def origin_of(models: Sequence[Opened], settings: PredictionSettings) -> list[Any]:
    """The files and settings of the members of one stage."""
    files = [[identity(file) for file in model.files] for model in models]
    return [files, settings.step_size, settings.tta, settings.gaussian, settings.windows]


def identity(file: Path) -> str:
    """What changes with a file's content; of a checkpoint, a zip file, what its directory says without reading it all.

    Raises:
        OSError: when it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except zipfile.BadZipFile:
        return file_digest(file)
    if any(size and not checksum for _, checksum, size in entries):  # PyTorch can save without checksums
        return file_digest(file)
    return key_of(sorted(entries))
