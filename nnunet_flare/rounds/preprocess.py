"""The unlabelled scans as nnU-Net arrays, made once per plans: ``<data identifier>_un``.

The format is that of a training folder; ``_seg`` holds 0 and -1 (outside the non-zero crop) and ``class_locations`` is
empty. A scan that cannot be read is set aside with a JSON file that says why.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from nnunet_flare.errors import CaseError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import check_values, oddities
from nnunet_flare.readers import reader_of_plans
from nnunet_flare.rounds.arrays import ENDINGS, write_array, write_properties
from nnunet_flare.rounds.boxes import Box, preprocess_box
from nnunet_flare.rounds.locks import LockFile
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.plans import dataset_json, num_processes
from nnunet_flare.rounds.unlabelled import UnlabelledCase, read_list, read_scans

log = logging.getLogger(__name__)

NOTHING_FOUND = "the coarse model found no organ; the whole scan is taken"


def state_file(folder: Path, case: str) -> Path:
    """What preprocessing found out about a case. It lies beside the data folder, where nnU-Net allows other files."""
    return folder.with_name(f"{folder.name}_state") / f"{case}.json"


def is_ready(folder: Path, case: str) -> bool:
    """Whether a case's three arrays and its state are there."""
    return state_file(folder, case).is_file() and all((folder / f"{case}{e}").is_file() for e in ENDINGS)


def failure(folder: Path, case: str) -> str | None:
    """Why a case was set aside, or None."""
    path = state_file(folder, case)
    return read_json(path).get("failed") if path.is_file() else None


def odd(folder: Path, case: str) -> list[str]:
    """What is odd about a case's scan."""
    path = state_file(folder, case)
    return list(read_json(path).get("odd", [])) if path.is_file() else []


def preprocess_unlabelled(run: Run, *, retry_failed: bool = False) -> dict[str, int]:
    """Preprocess the run's unlabelled scans that are not there yet; returns how many are ready and how many failed."""
    lock = run.unlabelled_data.with_suffix(".lock")
    with LockFile(lock, f"the unlabelled cases of {run.settings.dataset}", wait=True):
        return _preprocess_missing(run, retry_failed)


def _preprocess_missing(run: Run, retry_failed: bool) -> dict[str, int]:
    folder = run.unlabelled_data
    folder.mkdir(parents=True, exist_ok=True)
    cases = read_list(run.paths.unlabelled)
    for stray in folder.glob(".tmp-*"):
        stray.unlink(missing_ok=True)
    todo = [
        case
        for case in cases
        if not is_ready(folder, case.case) and (retry_failed or failure(folder, case.case) is None)
    ]
    if todo:
        documents = _documents(run)
        boxes = {} if run.recipe.roi is None else {case.case: read_json(run.paths.box(case.case)) for case in todo}
        workers = num_processes(len(todo))
        log.info("preprocessing %d unlabelled scans", len(todo))
        bar = tqdm(total=len(todo), desc="unlabelled scans", disable=None, unit="scan")
        if workers == 1:
            for case in todo:
                _preprocess_case(case, folder, *documents, boxes.get(case.case))
                bar.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                futures = [
                    pool.submit(_preprocess_case, case, folder, *documents, boxes.get(case.case)) for case in todo
                ]
                for future in futures:
                    future.result()
                    bar.update()
        bar.close()
    failed = [case.case for case in cases if failure(folder, case.case) is not None]
    for name in failed:
        log.warning("set aside: %s: %s", name, failure(folder, name))
    return {"ready": len(cases) - len(failed), "failed": len(failed)}


def _documents(run: Run) -> tuple[str, str, dict[str, Any]]:
    return str(run.plans_file), run.recipe.configuration, dataset_json(run)


def preprocess_again(run: Run, case: UnlabelledCase) -> None:
    """Make a scan's arrays anew, whatever is there.

    Raises:
        CaseError: when the scan cannot be preprocessed any more.
    """
    located = None if run.recipe.roi is None else read_json(run.paths.box(case.case))
    _preprocess_case(case, run.unlabelled_data, *_documents(run), located)
    reason = failure(run.unlabelled_data, case.case)
    if reason is not None:
        raise CaseError(case.case, reason)


def _preprocess_case(
    case: UnlabelledCase,
    folder: Path,
    plans_file: str,
    configuration: str,
    dataset: dict[str, Any],
    located: dict[str, Any] | None,
) -> None:
    """Write a case's arrays and state; ``located`` is what its coarse pass found, where there was one."""
    state: dict[str, Any] = {"source": case.source}
    try:
        reader = reader_of_plans(read_json(Path(plans_file)))
        state["odd"] = _check(case, len(dataset.get("channel_names", dataset.get("modality", {}))), reader)
        if located is not None and "failed" in located:
            raise CaseError(case.case, located["failed"])
        box = None if located is None else located["box"]
        if located is not None and box is None:
            state["odd"].append(NOTHING_FOUND)
        _write_arrays(case, folder, plans_file, configuration, dataset, box)
    except CaseError as error:
        state["failed"] = error.reason
    except Exception as error:  # whatever one scan does to the readers must not end a run over thousands
        if isinstance(error, OSError) and error.errno in (28, 30, 122, 13):  # full or read-only disk, quota, permission
            raise
        state["failed"] = f"{case.source}: preprocessing failed ({type(error).__name__}: {error})"
    write_json(state_file(folder, case.case), state)


def _check(case: UnlabelledCase, channels: int, reader: str) -> list[str]:
    """Read and check every channel; returns what is odd."""
    if len(case.images) != channels:
        raise CaseError(case.case, f"{case.source}: {len(case.images)} channel(s), the dataset has {channels}")
    found: list[str] = []
    for image, volume in zip(case.images, read_scans(case, reader), strict=True):
        check_values(volume, case.case, Path(image))
        found += oddities(volume)
    return found


def _write_arrays(
    case: UnlabelledCase,
    folder: Path,
    plans_file: str,
    configuration: str,
    dataset: dict[str, Any],
    box: Box | None,
) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(plans_file)
    manager = plans.get_configuration(configuration)
    preprocessor = manager.preprocessor_class(verbose=False)
    if hasattr(preprocessor, "makes_training_cases"):
        preprocessor.makes_training_cases = True  # of another size than what is only predicted
    if box is None:
        data, seg, properties = preprocessor.run_case(list(case.images), None, plans, manager, dataset)
    else:
        data, seg, properties = preprocess_box(preprocessor, case.images, box, plans, manager, dataset)
    properties["class_locations"] = {}
    write_array(folder / f"{case.case}.b2nd", data.astype(np.float32, copy=False), manager.patch_size)
    write_array(folder / f"{case.case}_seg.b2nd", seg.astype(np.int16, copy=False), manager.patch_size)
    write_properties(folder / f"{case.case}.pkl", properties)


def remove_scratch(folder: Path) -> None:
    """Remove a folder through a rename, so that a killed removal leaves no half folder under the name."""
    if folder.exists():
        grave = folder.with_name(f".tmp-{uuid4().hex[:12]}-{folder.name}")
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
