"""Labelled cases whose scan or label map was corrected since they were preprocessed: made anew, and named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import TaskError
from nnunet_flare.parallel import Workers
from nnunet_flare.rounds.run.sources import Source, changed_files, read_table, refresh_copy, sources_of, table_path
from nnunet_flare.rounds.stages.arrays import write_array, write_properties

log = logging.getLogger(__name__)

Files = Mapping[str, Mapping[str, Any]]
"""By case: ``images`` and ``label``."""


def present_sources(data: Path, files: Files) -> dict[str, list[Source]]:
    """The files of every case as they are now; to be taken before anything is read from them."""
    known = read_table(table_path(data))
    if not known:
        log.info("noting the files of %d labelled cases", len(files))
    return {case: sources_of([*its["images"], its["label"]], known.get(case, ())) for case, its in files.items()}


def changed_cases(data: Path, now: Mapping[str, list[Source]]) -> dict[str, list[str]]:
    """By case, the files that are not those that its arrays were made from."""
    known = read_table(table_path(data))
    changed = {case: changed_files(data, case, known.get(case), its) for case, its in now.items()}
    return {case: names for case, names in changed.items() if names}


def preprocess_cases(
    cases: Sequence[str],
    files: Files,
    data: Path,
    plans_file: Path,
    configuration: str,
    dataset: dict[str, Any],
    *,
    workers: int,
) -> None:
    """Make the arrays of some labelled cases anew, as stock nnU-Net's preprocessing makes them.

    Arrays are replaced and not written into: earlier rounds may hold links to them.

    Raises:
        TaskError: naming the case that cannot be preprocessed.
    """
    make = partial(_make, data=data, plans_file=str(plans_file), configuration=configuration, dataset=dataset)
    jobs = [(case, [str(image) for image in files[case]["images"]], str(files[case]["label"])) for case in cases]
    with Workers(workers) as pool:
        for _ in pool.each_case(make, jobs, description="changed cases"):
            pass


def refresh_ground_truth(folder: Path, files: Files, ending: str) -> list[str]:
    """Copy label maps again that differ from nnU-Net's copies for validation; returns the cases."""
    return [case for case, its in files.items() if refresh_copy(Path(its["label"]), folder / f"{case}{ending}")]


def _make(
    job: tuple[str, list[str], str], *, data: Path, plans_file: str, configuration: str, dataset: dict[str, Any]
) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    case, images, label = job
    plans = PlansManager(plans_file)
    manager = plans.get_configuration(configuration)
    try:
        preprocessor = manager.preprocessor_class(verbose=False)
        array, seg, properties = preprocessor.run_case(images, label, plans, manager, dataset)
    except Exception as error:  # what a file does to the readers has nothing in common
        raise TaskError(
            f"{case}: changed since it was preprocessed and cannot be preprocessed again ({type(error).__name__}: "
            f"{error}); fix {', '.join([*images, label])}"
        ) from error
    (data / f"{case}.pkl").unlink(missing_ok=True)  # a case that is half made anew is not whole
    write_array(data / f"{case}.b2nd", array.astype(np.float32, copy=False), manager.patch_size)
    write_array(data / f"{case}_seg.b2nd", seg.astype(np.int16, copy=False), manager.patch_size)
    write_properties(data / f"{case}.pkl", properties)
