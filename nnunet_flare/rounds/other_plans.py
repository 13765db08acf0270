"""Pseudo-labelled cases for a final model whose plans are not those of the rounds (a small student, a larger teacher).

Scan and label map go once more through stock nnU-Net's preprocessor, several at a time. Finished cases are kept beside
the data folder until it is whole, so that a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.files import read_json, write_json
from nnunet_flare.rounds.arrays import ENDINGS, write_array, write_properties
from nnunet_flare.rounds.label_maps import write_label_map
from nnunet_flare.rounds.ledger import Entry
from nnunet_flare.rounds.manifest import Base, Run
from nnunet_flare.rounds.plans import INPUT_KEYS, base_configuration, dataset_json, num_processes
from nnunet_flare.rounds.unlabelled import read_list

log = logging.getLogger(__name__)

LABEL_KEYS = ("resampling_fn_seg", "resampling_fn_seg_kwargs")
STOCK_PREPROCESSOR = "DefaultPreprocessor"


def input_of(base: Base) -> dict[str, Any]:
    """What decides how a scan becomes the input of a network with these plans."""
    together = {**read_json(base.plans_file), **base_configuration(base)}
    return {key: together.get(key) for key in INPUT_KEYS}


def has_same_arrays(one: Base, other: Base) -> bool:
    """Whether both plans preprocess a scan and its labels alike, so that the arrays of one serve the other."""
    if one == other:
        return True
    first, second = input_of(one), input_of(other)
    seg = [{key: base_configuration(base).get(key) for key in LABEL_KEYS} for base in (one, other)]
    return first == second and seg[0] == seg[1] and first["preprocessor_name"] == STOCK_PREPROCESSOR


@dataclass(frozen=True)
class _Job:
    """One case: its scan's files, its label map, and where its arrays go."""

    case: str
    images: tuple[str, ...]
    label: Path
    token: str
    folder: Path


def cases_folder(data: Path) -> Path:
    """Where finished cases of a data folder are kept until it is whole."""
    return data.with_name(f"{data.name}_cases")


def prepare_cases(run: Run, base: Base, data: Path, number: int, taken: Sequence[Entry]) -> dict[str, str]:
    """Preprocess scans and label maps of a round's taken cases by other plans, as far as that was not done before.

    Args:
        run: the run.
        base: the plans.
        data: the data folder that is being built; finished cases lie in :func:`cases_folder`.
        number: the round that labelled them.
        taken: the cases.

    Returns:
        Why each case that could not be preprocessed is set aside.
    """
    folder = cases_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    document = dataset_json(run)
    scans = {scan.case: scan.images for scan in read_list(run.paths.unlabelled)}
    jobs = []
    for entry in taken:
        token = f"{entry.label_sha256} {','.join(sorted(entry.ignored))}"
        if not _is_done(folder, entry.case, token):
            label = folder / f"label_{entry.case}{document['file_ending']}"
            write_label_map(run, number, entry, label, document["file_ending"])
            jobs.append(_Job(entry.case, tuple(scans[entry.case]), label, token, folder))
    if jobs:
        log.info("preprocessing %d pseudo-labelled cases for %s", len(jobs), base.plans_name)
    arguments = (str(base.plans_file), base.configuration, document)
    bar = tqdm(total=len(jobs), desc="cases for the final model", disable=None, unit="case")
    workers = num_processes(max(1, len(jobs)))
    if workers == 1:
        for job in jobs:
            _prepare(job, *arguments)
            bar.update()
    elif jobs:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(_prepare, job, *arguments) for job in jobs]:
                future.result()
                bar.update()
    bar.close()
    states = {entry.case: read_json(folder / f"{entry.case}.json") for entry in taken}
    return {case: state["failed"] for case, state in states.items() if "failed" in state}


def _is_done(folder: Path, case: str, token: str) -> bool:
    state = folder / f"{case}.json"
    if not state.is_file() or not all((folder / f"{case}{ending}").is_file() for ending in ENDINGS):
        return False
    return bool(read_json(state).get("made_from") == token)


def _prepare(job: _Job, plans_file: str, configuration: str, dataset: dict[str, Any]) -> None:
    """Preprocess one case; whatever its files do to the readers ends this case, not the build."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    state = {"made_from": job.token}
    try:
        plans = PlansManager(plans_file)
        manager = plans.get_configuration(configuration)
        preprocessor = manager.preprocessor_class(verbose=False)
        data, seg, properties = preprocessor.run_case(list(job.images), str(job.label), plans, manager, dataset)
        write_array(job.folder / f"{job.case}.b2nd", data.astype(np.float32, copy=False), manager.patch_size)
        write_array(job.folder / f"{job.case}_seg.b2nd", seg.astype(np.int16, copy=False), manager.patch_size)
        write_properties(job.folder / f"{job.case}.pkl", properties)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (28, 30, 122, 13):  # full or read-only disk, quota, permission
            raise
        state["failed"] = f"preprocessing for the final model failed ({type(error).__name__}: {error})"
        log.warning("%s: %s", job.case, state["failed"])
    job.label.unlink(missing_ok=True)
    write_json(job.folder / f"{job.case}.json", state)
