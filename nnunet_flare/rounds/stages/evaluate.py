"""Each round's ensemble, and the final model, on held-out cases with known labels (``--eval IMAGES LABELS``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_flare.datasets import TrainingCase, check_cases
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.evaluation.overlap import annotated_alone
from nnunet_flare.files import read_json, remove_leftovers, write_json
from nnunet_flare.fusion.ids import load_id_map
from nnunet_flare.images import find_cases, read_labels, write_labels
from nnunet_flare.images.readers import SITK
from nnunet_flare.kept import is_kept
from nnunet_flare.labels import ignore_id, label_ids, organs_of
from nnunet_flare.listing import list_scans
from nnunet_flare.rounds.run.configurations import image_reader
from nnunet_flare.rounds.run.dataset import dataset_json
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.stages.label import open_members
from nnunet_flare.rounds.stages.locate import whole_scan_labels
from nnunet_flare.selection.agreement import pairwise_dice

log = logging.getLogger(__name__)

DICE = {"mean": float, "organs": {str: float}, "cases": {str: dict}}
"""What ``dice.json`` looks like."""


def check_held_out(
    images: Path,
    labels: Path,
    file_ending: str,
    channels: int,
    training: set[str],
    *,
    allowed: set[int] | None = None,
    reader: str = SITK,
) -> list[str]:
    """The held-out case ids.

    Args:
        images: folder of ``<case>_0000<file_ending>``.
        labels: folder of ``<case><file_ending>``.
        file_ending: of the data set.
        channels: of the data set.
        training: case ids that must not be among them.
        allowed: ids that the label maps may hold; every file is opened then. None: only the names are checked.
        reader: of the data set.

    Raises:
        InputError: for missing folders or files, files that cannot be used (all of them listed), and training cases.
    """
    cases = find_cases(images, file_ending, channels)
    if not labels.is_dir():
        raise InputError(f"--eval {labels}: no such folder; expected label maps <case>{file_ending}")
    listed = list_scans(images, channels)
    used = {file for found in cases.values() for file in found}
    left = [*(str(path) for path in listed.images if path not in used), *listed.left]
    if left:
        names = "\n  ".join(sorted({*left}))
        raise InputError(
            f"--eval {images}: expected only <case>_0000{file_ending}; move, rename or remove these:\n  {names}"
        )
    files = {case: TrainingCase(tuple(found), labels / f"{case}{file_ending}") for case, found in cases.items()}
    if allowed is None:
        problems = [f"{case}: {f.label}: no such file" for case, f in files.items() if not f.label.is_file()]
    else:
        problems = check_cases(files, allowed, reader=reader)
    if problems:
        raise InputError(f"--eval {images}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    shared = sorted(training & set(cases))
    if shared:
        raise InputError(f"--eval {images}: {', '.join(shared[:5])} are training or unlabelled cases of this run")
    return list(cases)


def evaluate_round(run: Run, of: Round) -> dict[str, Any]:
    """Predict the held-out cases with a round's members and keep their Dice; returns the means by organ."""
    folder = run.paths.evaluation(of.number)
    cases = predict_held_out(
        run, of.model, of.members, folder, id_map=run.settings.init_map if of.number == 0 else None
    )
    labels, document = Path(str(run.settings.eval_labels)), dataset_json(run)
    return score_folder(folder, labels, cases, document["file_ending"], document["labels"])


def predict_held_out(
    run: Run, model: Path, members: Sequence[tuple[str, str]], folder: Path, *, id_map: str | None = None
) -> list[str]:
    """Label maps of the held-out cases by the members of a model, as far as they are not there yet; the case ids.

    ``id_map`` says what the model's labels are where they are not the dataset's.
    """
    images, labels = Path(str(run.settings.eval_images)), Path(str(run.settings.eval_labels))
    document = dataset_json(run)
    ending = document["file_ending"]
    cases = find_cases(images, ending, len(document["channel_names"]))
    remove_leftovers(folder)
    reader = image_reader(run)
    todo = [case for case, files in cases.items() if not is_kept(folder / f"{case}{ending}", files[0], reader=reader)]
    if todo:
        predict = whole_scan_labels(run, open_members(run, model, members))
        for case in tqdm(todo, desc="held-out cases", disable=None, unit="case"):
            reference = read_labels(labels / f"{case}{ending}", case, reader=reader)
            labelled = predict(cases[case])
            if id_map is not None:
                labelled = load_id_map(id_map).apply(labelled)
            write_labels(folder / f"{case}{ending}", labelled, reference)
    return list(cases)


def score_folder(
    predictions: Path, references: Path, cases: list[str], file_ending: str, labels: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain Dice over whole volumes (absent in both: 1, in one: 0) by case and organ or region, with the means.

    ``labels`` are those of dataset.json; voxels that the reference ignores count nowhere. Writes ``dice.json``
    into ``predictions``. The official measures are those of ``flare-evaluate``.

    Raises:
        CaseError: when a prediction and its reference differ in shape.
    """
    organs, table = organs_of(labels), {}
    for case in cases:
        prediction = read_labels(predictions / f"{case}{file_ending}", case).array
        reference = read_labels(references / f"{case}{file_ending}", case).array
        if prediction.shape != reference.shape:
            raise CaseError(case, f"the prediction has shape {prediction.shape}, the label map {reference.shape}")
        maps = annotated_alone(reference, prediction, ignore_id(labels))
        count = max(int(maps[0].max()), int(maps[1].max()), *label_ids(labels)) + 1
        dice = pairwise_dice(maps, count, list(organs.values())).per_organ
        table[case] = dict(zip(organs, dice.tolist(), strict=True))
    means = {name: float(np.mean([row[name] for row in table.values()])) for name in organs}
    result = {"mean": float(np.mean(list(means.values()))), "organs": means, "cases": table}
    write_json(predictions / "dice.json", result)
    return {"mean": result["mean"], "organs": means}


def held_out_dice(run: Run, number: int) -> float | None:
    """Mean Dice of a round on the held-out cases, where it was measured."""
    found = _held_out(run, number)
    return None if found is None else float(found["mean"])


def held_out_organs(run: Run, number: int) -> dict[str, float]:
    """The same by organ; empty where it was not measured."""
    found = _held_out(run, number)
    return {} if found is None else {organ: float(value) for organ, value in found["organs"].items()}


def _held_out(run: Run, number: int) -> dict[str, Any] | None:
    path = run.paths.evaluation(number) / "dice.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path, DICE, remedy=f"flare-pseudolabel retry -o {run.root} measures again")
    return found
