"""Coarse to fine within the rounds: a coarse model finds the organs' box in every unlabelled scan, once for all rounds.

The coarse model is trained on the labelled scans beside the rounds' own plans (or given: ``roi.model``). Its box with a
margin is kept per case; the unlabelled arrays are made of that part of the scan, so that labelling, label maps and the
rounds' data need to know nothing of it: what preprocessing notes in a case's properties leads back to the whole scan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.ahead import each_ahead
from nnunet_flare.cases import table_name, write_table
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import holds, write_json
from nnunet_flare.images import Volume, check_values
from nnunet_flare.recipes.parts import Roi
from nnunet_flare.rounds.run.configurations import add_configuration, base_configuration, image_reader
from nnunet_flare.rounds.run.dataset import base_table, raw_cases
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Base
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, read_list, read_scans, shard
from nnunet_flare.rounds.stages.boxes import BOX, read_box, turned
from nnunet_flare.rounds.stages.epoch_lengths import iterations_of_pass, samples_of_pass
from nnunet_flare.rounds.stages.plan import plan_and_preprocess

if TYPE_CHECKING:
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.folder import PredictsScans

log = logging.getLogger(__name__)

MARGIN_MM = 40.0
"""Around the box of an unlabelled scan (S1), where neither recipe nor plans say otherwise."""


def plan_coarse(run: Run, base: Base) -> str:
    """Plan and preprocess for the coarse model, and add the configuration that trains it; the hash of its base."""
    found = plan_and_preprocess(run, base)
    table = base_table(run)
    cases = {case: table[case] for case in raw_cases(run)}
    name = run.coarse_configuration
    write_table(run.preprocessed / table_name(name), cases)
    true_cases = sum(case.role in ("labelled", "partial") for case in cases.values())
    samples = samples_of_pass(true_cases, 0, None)
    settings = run.recipe.coarse_settings(
        run=run.settings.name, iterations=iterations_of_pass(samples, base_configuration(base)["batch_size"])
    )
    add_configuration(run, base, name, data_identifier=None, training=settings.to_json())
    return found


def wanted(run: Run) -> Roi:
    """The recipe's words on coarse to fine.

    Raises:
        InputError: where it has none.
    """
    if run.recipe.roi is None:
        raise InputError(f"{run.root}: recipe {run.recipe.name} has no 'roi', so there is nothing to locate")
    return run.recipe.roi


def locate_shard(run: Run, part: int, parts: int) -> dict[str, int]:
    """Find the box of the organs in one part of the unlabelled scans; those that are done already are kept.

    Returns how many were located, in how many the coarse model saw nothing, and how many could not be read.
    """
    cases = shard(read_list(run.paths.unlabelled), part, parts)
    todo = [case for case in cases if not holds(run.paths.box(case.case), BOX)]
    if todo:
        loader = ThreadPoolExecutor(1, "flare-read")
        try:
            ahead = each_ahead(todo, partial(_read, image_reader(run)), loader)
            coarse = open_coarse(run)  # while the first scan is being read
            for case, reading in tqdm(ahead, total=len(todo), desc="locating the organs", disable=None, unit="scan"):
                try:
                    document = _locate(run, coarse, case.case, reading.result())
                except CaseError as error:
                    document = {"failed": error.reason}
                write_json(run.paths.box(case.case), {"case": case.case, **document})
        finally:
            loader.shutdown(cancel_futures=True)
    documents = [read_box(run, case.case) for case in cases]
    failed = sum("failed" in document for document in documents)
    nothing = sum(document.get("box", ...) is None for document in documents)
    return {"located": len(cases) - failed - nothing, "nothing found": nothing, "failed": failed}


def open_coarse(run: Run) -> Segmenter:
    """The coarse model, with all its folds."""
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.settings import PredictionSettings

    predict = run.recipe.predict
    settings = PredictionSettings(
        device=run.settings.device,
        precision=predict.precision,
        backend=predict.backend,
        trust_checkpoint=run.settings.trust_checkpoint,
    )
    return Segmenter.from_model_folder(run.coarse_model, settings)


def _read(reader: str, case: UnlabelledCase) -> list[Volume]:
    volumes = read_scans(case, reader)
    for volume in volumes:
        check_values(volume, case.case)
    return volumes


def _locate(run: Run, coarse: Segmenter, case: str, volumes: Sequence[Volume]) -> dict[str, Any]:
    from nnunet_flare.images.orientation import turn_for_reader
    from nnunet_flare.inference.coarse_to_fine import organs_box

    scan = coarse.prepare(volumes, case)
    found = organs_box(coarse, scan, rule=wanted(run).rule, margin_mm=margin_mm(run))
    if found is None:
        log.warning("%s: the coarse model found nothing; the whole scan is used", case)
        return {"box": None}
    turn = turn_for_reader(image_reader(run), volumes[0])
    return {"box": turned(found, volumes[0].array.shape, turn)}


def margin_mm(run: Run) -> float:
    """What is left around the organs of unlabelled scans: as of labelled ones in the plans, unless the recipe says."""
    from nnunet_flare.planners.fixed_size import MARGIN_KEY

    own = wanted(run).margin_mm
    return float(base_configuration(run.base).get(MARGIN_KEY, MARGIN_MM)) if own is None else own


def whole_scan_labels(run: Run, segmenter: Segmenter) -> Callable[[Sequence[Path]], np.ndarray]:
    """A function from a scan's files to its label map (Z, Y, X), coarse to fine where the recipe has it."""
    from nnunet_flare.images import read_volume
    from nnunet_flare.inference.coarse_to_fine import RoiSegmenter

    used: PredictsScans = segmenter
    if run.recipe.roi is not None:
        roi = wanted(run)
        used = RoiSegmenter(open_coarse(run), segmenter, rule=roi.rule, margin_mm=roi.test_margin_mm)

    def predict(files: Sequence[Path]) -> np.ndarray:
        case = Path(files[0]).name
        volumes = [read_volume(Path(file), reader=image_reader(run)) for file in files]
        labels, _ = used.segment(used.prepare(volumes, case))
        return labels

    return predict
