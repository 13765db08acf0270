"""Labelled scans for a final model whose plans are not those of the rounds (a small student, a larger teacher), or
whose label maps were merged from several rounds.

Scan and label map go once more through stock nnU-Net's preprocessor, several at a time; where the scan's array exists
already, the label map alone does. Finished cases are kept beside
the data folder until it is whole, so that a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.disks import concerns_disk
from nnunet_flare.files import holds, link_or_copy, read_json, write_json
from nnunet_flare.fusion.members import class_locations, training_label
from nnunet_flare.images import read_volume
from nnunet_flare.images.readers import reader_of_plans
from nnunet_flare.labels import organs_of, sampled_groups
from nnunet_flare.parallel import Workers, num_processes
from nnunet_flare.rounds.run.configurations import INPUT_KEYS, base_configuration, read_plans
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.ledger import Entry
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.sources import stamp_of
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import ENDINGS, read_array, read_properties, write_array, write_properties
from nnunet_flare.rounds.stages.label_maps import write_label_map
from nnunet_flare.rounds.stages.preprocess import changed_images

log = logging.getLogger(__name__)

LABEL_KEYS = ("resampling_fn_seg", "resampling_fn_seg_kwargs")
MADE = {"made_from": str, "stamps": [object], "failed?": str}
"""What is kept of a case."""
STOCK_PREPROCESSOR = "DefaultPreprocessor"


def input_of(base: Base) -> dict[str, Any]:
    """What decides how a scan becomes the input of a network with these plans."""
    together = {**read_plans(base.plans_file), **base_configuration(base)}
    return {key: together.get(key) for key in INPUT_KEYS}


def has_same_arrays(one: Base, other: Base) -> bool:
    """Whether both plans preprocess a scan and its labels alike, so that the arrays of one serve the other."""
    if one == other:
        return True
    first, second = input_of(one), input_of(other)
    seg = [{key: base_configuration(base).get(key) for key in LABEL_KEYS} for base in (one, other)]
    return first == second and seg[0] == seg[1] and first["preprocessor_name"] == STOCK_PREPROCESSOR


@dataclass(frozen=True)
class LabelledScan:
    """A scan and its label map, to be preprocessed by other plans.

    Attributes:
        case: id.
        images: the scan's files.
        label: its label map on the scan's grid.
        made_from: what the label map was made from; another value makes the arrays anew.
        arrays: folder whose array of the scan serves these plans too, so that only the label map is resampled; or None.
    """

    case: str
    images: tuple[str, ...]
    label: Path
    made_from: str
    arrays: Path | None = None


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
    ending = dataset_json(run)["file_ending"]
    files = {scan.case: scan.images for scan in read_list(run.paths.unlabelled)}
    scans = []
    for entry in taken:
        made_from = f"{entry.label_sha256} {','.join(sorted(entry.ignored))}"
        scan = LabelledScan(entry.case, tuple(files[entry.case]), folder / f"label_{entry.case}{ending}", made_from)
        if not _is_done(folder, scan):
            write_label_map(run, number, entry, scan.label, ending)
        scans.append(scan)
    failed = preprocess_scans(run, base, data, scans)
    for scan in scans:
        scan.label.unlink(missing_ok=True)
    return failed


def preprocess_scans(run: Run, base: Base, data: Path, scans: Sequence[LabelledScan]) -> dict[str, str]:
    """Preprocess scans with their label maps into :func:`cases_folder`; returns why cases are set aside."""
    folder = cases_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    unlabelled = {scan.case for scan in read_list(run.paths.unlabelled)}
    again = [scan for scan in scans if scan.arrays is None and scan.case in unlabelled]
    changed = {scan.case: names for scan in again if (names := _changed(run, scan))}
    scans = [scan for scan in scans if scan.case not in changed]
    todo = [scan for scan in scans if not _is_done(folder, scan)]
    if todo:
        log.info("preprocessing %d labelled scans for %s", len(todo), base.plans_name)
    work = partial(
        _prepare,
        folder=folder,
        plans_file=str(base.plans_file),
        configuration=base.configuration,
        dataset=dataset_json(run),
    )
    with Workers(num_processes(max(1, len(todo)))) as workers:
        for _ in workers.each_case(work, todo, description="cases for the final model"):
            pass  # what became of a case stands in its state file
    states = {scan.case: read_json(folder / f"{scan.case}.json", MADE) for scan in scans}
    failed = {case: state["failed"] for case, state in states.items() if "failed" in state}
    return failed | {
        case: f"{', '.join(names)} changed since the scan was labelled; restore what was labelled, or start a new run"
        for case, names in changed.items()
    }


def _changed(run: Run, scan: LabelledScan) -> list[str]:
    """Names of an unlabelled scan's files that are not those that were labelled."""
    return changed_images(run.unlabelled_data, scan.case, scan.images)[0]


def _is_done(folder: Path, scan: LabelledScan) -> bool:
    state = folder / f"{scan.case}.json"
    if not state.is_file() or not all((folder / f"{scan.case}{ending}").is_file() for ending in ENDINGS):
        return False
    return holds(state, {**MADE, "made_from": {scan.made_from}}) and read_json(state, MADE)["stamps"] == _stamps(scan)


def _stamps(scan: LabelledScan) -> list[Any]:
    """What tells that the scan's files are still the same."""
    return [stamp_of(Path(image)) for image in scan.images]


def _prepare(scan: LabelledScan, folder: Path, plans_file: str, configuration: str, dataset: dict[str, Any]) -> None:
    """Preprocess one case; whatever its files do to the readers ends this case, not the build."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    state: dict[str, Any] = {"made_from": scan.made_from, "stamps": _stamps(scan)}
    plans = PlansManager(plans_file)
    manager = plans.get_configuration(configuration)
    try:
        if scan.arrays is None:
            for image in scan.images:  # stock's reader takes half a file for a whole one
                read_volume(Path(image), scan.case, reader=reader_of_plans(plans.plans))
            preprocessor = manager.preprocessor_class(verbose=False)
            data, seg, properties = preprocessor.run_case(list(scan.images), str(scan.label), plans, manager, dataset)
            write_array(folder / f"{scan.case}.b2nd", data.astype(np.float32, copy=False), manager.patch_size)
        else:
            seg, properties = _label_arrays(scan.case, scan.label, scan.arrays, plans, manager, dataset)
            link_or_copy(scan.arrays / f"{scan.case}.b2nd", folder / f"{scan.case}.b2nd")
        write_array(folder / f"{scan.case}_seg.b2nd", seg.astype(np.int16, copy=False), manager.patch_size)
        write_properties(folder / f"{scan.case}.pkl", properties)
    except Exception as error:
        if concerns_disk(error):  # the next case would meet it too
            raise
        state["failed"] = f"preprocessing for the final model failed ({type(error).__name__}: {error})"
        log.warning("%s: %s", scan.case, state["failed"])
    write_json(folder / f"{scan.case}.json", state)


def _label_arrays(
    case: str, label: Path, arrays: Path, plans: Any, manager: Any, dataset: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """A label map as stock's preprocessor turns, crops and resamples it beside a scan whose arrays exist already."""
    properties = read_properties(arrays / f"{case}.pkl")
    crop_mask_seg = read_array(arrays / f"{case}_seg.b2nd")
    given, _ = plans.image_reader_writer_class().read_seg(str(label))
    turned = given.transpose([0, *(axis + 1 for axis in plans.transpose_forward)])
    inside = tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])
    cropped = np.stack([channel[inside] for channel in turned])
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    target = list(manager.spacing)
    if len(target) < len(spacing):
        target = [spacing[0], *target]
    resampled = manager.resampling_fn_seg(cropped, crop_mask_seg.shape[1:], spacing, target)
    labels = training_label(np.asarray(resampled[0]), crop_mask_seg[0])
    groups = sampled_groups(dataset["labels"], organs_of(dataset["labels"]))
    return labels[None], {**properties, "class_locations": class_locations(labels, groups)}
