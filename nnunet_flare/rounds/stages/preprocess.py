"""The unlabelled scans as nnU-Net arrays, made once per plans: ``<data identifier>_un``.

The format is that of a training folder; ``_seg`` holds 0 and -1 (outside the non-zero crop) and ``class_locations`` is
empty. A scan that cannot be read is set aside with a JSON file that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.disks import concerns_disk
from nnunet_flare.errors import CaseError
from nnunet_flare.files import holds, read_json, remove_leftovers, write_json
from nnunet_flare.images import Volume, check_values, oddities
from nnunet_flare.images.readers import reader_of_plans
from nnunet_flare.inference.normalisation import ANY_MODALITY
from nnunet_flare.labels import channel_names
from nnunet_flare.parallel import Workers, num_processes
from nnunet_flare.rounds.run.configurations import read_plans, resolve
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.sources import Source, changed_files, sources_of
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list, read_scans
from nnunet_flare.rounds.stages.arrays import ENDINGS, write_array, write_properties
from nnunet_flare.rounds.stages.boxes import Box, preprocess_box, read_box

log = logging.getLogger(__name__)

CT = "ct"
"""Name of a channel, in small letters, that nnU-Net takes for CT numbers."""

MADE_FROM = "flare_made_from"
"""In a case's pickle, and in those of its pseudo-labels: digests of the scan's files."""

NOTHING_FOUND = "the coarse model found no organ; the whole scan is used"


def state_file(folder: Path, case: str) -> Path:
    """What preprocessing found out about a case. It lies beside the data folder, where nnU-Net allows other files."""
    return folder.with_name(f"{folder.name}_state") / f"{case}.json"


STATE = {"source": str, "odd?": [str], "failed?": str}


def read_state(folder: Path, case: str) -> dict[str, Any]:
    """What is known of a case; nothing where it was not preprocessed."""
    path = state_file(folder, case)
    remedy = "flare-pseudolabel retry preprocesses the scan again"
    return read_json(path, STATE, remedy=remedy) if path.is_file() else {}


def is_ready(folder: Path, case: str) -> bool:
    """Whether a case's three arrays and its state are there."""
    return holds(state_file(folder, case), STATE) and all((folder / f"{case}{e}").is_file() for e in ENDINGS)


def failure(folder: Path, case: str) -> str | None:
    """Why a case was set aside, or None."""
    return read_state(folder, case).get("failed")


def odd(folder: Path, case: str) -> list[str]:
    """What is odd about a case's scan."""
    return list(read_state(folder, case).get("odd", []))


def preprocess_unlabelled(run: Run) -> dict[str, int]:
    """Preprocess the run's unlabelled scans that are not there yet; returns how many are ready and how many failed."""
    lock = run.unlabelled_data.with_suffix(".lock")
    with LockFile(lock, f"the unlabelled cases of {run.settings.dataset}", wait=True):
        return _preprocess_missing(run)


def _preprocess_missing(run: Run) -> dict[str, int]:
    folder = run.unlabelled_data
    folder.mkdir(parents=True, exist_ok=True)
    cases = read_list(run.paths.unlabelled)
    remove_leftovers(folder)
    boxes = {} if run.recipe.roi is None else {case.case: read_box(run, case.case) for case in cases}
    changed = {case.case: names for case in cases if (names := _changed(case, folder, boxes.get(case.case)))}
    if changed:
        shown = "; ".join(f"{case} ({', '.join(names)})" for case, names in changed.items())
        log.warning("unlabelled scans changed since they were preprocessed, so preprocessed again: %s", shown)
    todo = [
        case
        for case in cases
        if case.case in changed or (not is_ready(folder, case.case) and failure(folder, case.case) is None)
    ]
    if todo:
        log.info("preprocessing %d unlabelled scans", len(todo))
        work = partial(_preprocess_case, folder=folder, documents=_documents(run), boxes=boxes)
        with Workers(num_processes(len(todo))) as workers:
            for _ in workers.each_case(work, todo, description="unlabelled scans"):
                pass  # what became of a scan stands in its state file
    failed = [case.case for case in cases if failure(folder, case.case) is not None]
    for name in failed:
        log.warning("set aside: %s: %s", name, failure(folder, name))
    return {"ready": len(cases) - len(failed), "failed": len(failed)}


def _changed(case: UnlabelledCase, folder: Path, located: dict[str, Any] | None) -> list[str]:
    """What a case's arrays, or the reason why it was set aside, were made from and is another thing now; by name.

    What was not noted yet, or only looks different, is noted.
    """
    path = state_file(folder, case.case)
    if not path.is_file():
        return []
    state = read_state(folder, case.case)
    before = state.get("sources")
    names, now = changed_images(folder, case.case, case.images)
    if located is not None and "located" in state and state["located"] != located.get("box"):
        names.append("the coarse model's box")
    if not names and before != now:
        write_json(path, {**state, "sources": now})
    return names


def changed_images(folder: Path, case: str, images: Sequence[str]) -> tuple[list[str], list[Source]]:
    """Names of a scan's files that are not those that its arrays were made from, and all of them as they are now."""
    before = read_state(folder, case).get("sources")
    now = sources_of([Path(image) for image in images], before or ())
    return changed_files(folder, case, before, now), now


def _documents(run: Run) -> tuple[str, str, dict[str, Any]]:
    return str(run.plans_file), run.recipe.configuration, dataset_json(run)


def preprocess_again(run: Run, case: UnlabelledCase) -> None:
    """Make a scan's arrays anew, whatever is there.

    Raises:
        CaseError: when the scan cannot be preprocessed any more.
    """
    located = None if run.recipe.roi is None else read_box(run, case.case)
    _preprocess_case(case, folder=run.unlabelled_data, documents=_documents(run), boxes={case.case: located})
    reason = failure(run.unlabelled_data, case.case)
    if reason is not None:
        raise CaseError(case.case, reason)


def _preprocess_case(
    case: UnlabelledCase, *, folder: Path, documents: tuple[str, str, dict[str, Any]], boxes: Mapping[str, Any]
) -> None:
    """Write a case's arrays and state; ``boxes`` are what the coarse pass found, where there was one."""
    plans_file, configuration, dataset = documents
    located: dict[str, Any] | None = boxes.get(case.case)
    state: dict[str, Any] = {"source": case.source, "sources": sources_of([Path(image) for image in case.images])}
    if located is not None:
        state["located"] = located.get("box")
    try:
        plans = read_plans(Path(plans_file))
        schemes = resolve(plans, configuration, Path(plans_file))["normalization_schemes"]
        state["odd"], scan = _check(case, dataset, reader_of_plans(plans), schemes)
        if located is not None and "failed" in located:
            raise CaseError(case.case, located["failed"])
        box = None if located is None else located["box"]
        if located is not None and box is None:
            state["odd"].append(NOTHING_FOUND)
        made_from = [source["digest"] for source in state["sources"]]
        _write_arrays(case, scan, folder, plans_file, configuration, dataset, box, made_from)
    except CaseError as error:
        state["failed"] = error.reason
    except Exception as error:  # whatever one scan does to the readers must not end a run over thousands
        if concerns_disk(error):  # the next case would meet it too
            raise
        state["failed"] = f"{case.source}: preprocessing failed ({type(error).__name__}: {error})"
    write_json(state_file(folder, case.case), state)


def _check(
    case: UnlabelledCase, dataset: dict[str, Any], reader: str, schemes: Sequence[str]
) -> tuple[list[str], Volume]:
    """Read and check every channel; returns what is odd in channels that must be CT, and the first channel."""
    names = list(channel_names(dataset).values())
    if len(case.images) != len(names):
        raise CaseError(case.case, f"{case.source}: {len(case.images)} channel(s), the dataset has {len(names)}")
    found: list[str] = []
    volumes = read_scans(case, reader)
    for image, volume, name, scheme in zip(case.images, volumes, names, schemes, strict=True):
        check_values(volume, case.case, Path(image))
        if name.casefold() == CT and scheme != ANY_MODALITY:
            found += oddities(volume)
    return found, volumes[0]


def _write_arrays(
    case: UnlabelledCase,
    scan: Volume,
    folder: Path,
    plans_file: str,
    configuration: str,
    dataset: dict[str, Any],
    box: Box | None,
    made_from: list[str | None],
) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_flare.inference.preprocessing import STOCK_PREPROCESSOR, network_shape, target_spacing

    plans = PlansManager(plans_file)
    manager = plans.get_configuration(configuration)
    preprocessor = manager.preprocessor_class(verbose=False)
    if hasattr(preprocessor, "makes_training_cases"):
        preprocessor.makes_training_cases = True  # of another size than what is only predicted
    if box is None:
        if manager.preprocessor_name == STOCK_PREPROCESSOR:
            spacing = [scan.spacing_mm[axis] for axis in plans.transpose_forward]
            shape = [scan.array.shape[axis] for axis in plans.transpose_forward]
            try:
                network_shape(shape, spacing, target_spacing(spacing, manager.spacing))
            except ValueError as error:
                raise CaseError(case.case, f"{case.source}: {error}") from error
        data, seg, properties = preprocessor.run_case(list(case.images), None, plans, manager, dataset)
    else:
        data, seg, properties = preprocess_box(preprocessor, case.images, box, plans, manager, dataset)
    properties |= {"class_locations": {}, MADE_FROM: made_from}
    write_array(folder / f"{case.case}.b2nd", data.astype(np.float32, copy=False), manager.patch_size)
    write_array(folder / f"{case.case}_seg.b2nd", seg.astype(np.int16, copy=False), manager.patch_size)
    write_properties(folder / f"{case.case}.pkl", properties)
