"""The arrays of a scan that is to be labelled, read while another scan is labelled."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError
from nnunet_flare.rounds.run.loops import TrainingScan, arrays_of
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase
from nnunet_flare.rounds.stages.arrays import ENDINGS, read_array, read_properties
from nnunet_flare.rounds.stages.preprocess import failure, preprocess_again

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray, dict[str, Any]]
"""A preprocessed scan (C, Z, Y, X), its mask of what was not cropped away (Z, Y, X) and its properties."""


def read_unless_failed(run: Run, case: UnlabelledCase) -> Arrays:
    """The arrays of a case; they are read as bytes first, since blosc2 keeps all other threads from Python meanwhile.

    An unlabelled scan whose files are damaged (by a crash, a bad disk) is preprocessed again first.

    Raises:
        CaseError: when the scan was, or is now, set aside in preprocessing.
    """
    folder = arrays_of(run, case)
    reason = failure(folder, case.case)
    if reason is not None:
        raise CaseError(case.case, reason)
    for ending in ENDINGS:
        with suppress(OSError):  # said, or mended, by the reading itself
            (folder / f"{case.case}{ending}").read_bytes()
    try:
        return _read(folder, case.case)
    except OSError as error:
        if isinstance(case, TrainingScan):
            raise
        log.warning("%s: %s; it is preprocessed again", case.case, error)
        preprocess_again(run, case)
        return _read(folder, case.case)


def _read(folder: Path, case: str) -> Arrays:
    labels = read_array(folder / f"{case}_seg.b2nd")[0]
    return read_array(folder / f"{case}.b2nd"), labels, read_properties(folder / f"{case}.pkl")
