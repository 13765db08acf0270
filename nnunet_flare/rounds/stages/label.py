"""Labelling the unlabelled cases of a round: one pass per case gives every member's label map and their agreement.

A case is read once from its preprocessed array, while the one before it is labelled. The members' label maps and the
mean of their softmax exist only in memory, and no probabilities are written. What is kept per case: the members' label
maps on the network grid (small, for the report and for *ignore* labels), the training label and its pickle, the fused
map on the image's grid, and last a JSON file with the agreement, whose presence says that the case is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm import tqdm

from nnunet_flare.ahead import each_ahead
from nnunet_flare.digests import file_digest
from nnunet_flare.disks import concerns_disk
from nnunet_flare.errors import DeviceError, TaskError
from nnunet_flare.files import holds, remove_leftovers, replacing
from nnunet_flare.fusion.ids import load_id_map
from nnunet_flare.fusion.members import class_locations, training_label
from nnunet_flare.images import read_labels
from nnunet_flare.inference.arrays import fetched
from nnunet_flare.inference.devices import lost_gpu
from nnunet_flare.inference.labels import Labels
from nnunet_flare.inference.memory import there_or_on_cpu
from nnunet_flare.kept import is_kept
from nnunet_flare.labels import sampled_groups
from nnunet_flare.rounds.run.configurations import INPUT_KEYS, base_configuration, read_plans
from nnunet_flare.rounds.run.dataset import dataset_json, foreground_ids, organ_ids
from nnunet_flare.rounds.run.labelled_case import LABELLED, LabelledCase, read_labelled_case, write_labelled_case
from nnunet_flare.rounds.run.loops import arrays_of, round_labels, round_organs, round_scans
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.round import Round
from nnunet_flare.rounds.run.unlabelled import UnlabelledCase, shard
from nnunet_flare.rounds.stages.arrays import (
    label_hash,
    network_spacing_mm,
    write_array,
    write_properties,
)
from nnunet_flare.rounds.stages.case_arrays import Arrays, read_unless_failed
from nnunet_flare.rounds.stages.preprocess import failure, odd
from nnunet_flare.selection.agreement import Agreement, membership, pairwise_dice
from nnunet_flare.selection.change import label_change
from nnunet_flare.selection.perturb import labels_of_copies, steadiness
from nnunet_flare.selection.rule import Rule

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    from nnunet_flare.inference.core import MembersPrediction, Segmenter

log = logging.getLogger(__name__)


def read_labelled(run: Run, number: int, case: str) -> LabelledCase:
    """What the labelling of a round says of a case."""
    remedy = f"flare-pseudolabel retry -o {run.root} labels the case again"
    return read_labelled_case(run.paths.case(number, case), remedy=remedy)


def labelling_members(run: Run, of: Round) -> tuple[tuple[str, str], ...]:
    """Those of a round's members that make its labels: all, or the last checkpoint alone."""
    return of.members[-1:] if run.recipe.fusion.method == "last" else of.members


class Labeller(Protocol):
    """What labels a preprocessed scan: a :class:`Segmenter`, or the last of several checkpoints."""

    @property
    def plans_manager(self) -> PlansManager: ...

    @property
    def configuration_manager(self) -> ConfigurationManager: ...

    @property
    def label_manager(self) -> LabelManager: ...

    def predict_members(self, data: np.ndarray, *, only: Sequence[int] | None = None) -> MembersPrediction:
        """Every member's label map and the mean of their softmax."""
        ...


class _LastCheckpoint:
    """Labels by the last of several checkpoints with test-time augmentation, judged by all of them without (Fosun)."""

    def __init__(self, judges: Labeller, labeller: Labeller) -> None:
        self._judges, self._labeller = judges, labeller
        self.plans_manager = labeller.plans_manager
        self.configuration_manager = labeller.configuration_manager
        self.label_manager = labeller.label_manager

    def predict_members(self, data: np.ndarray, *, only: Sequence[int] | None = None) -> MembersPrediction:
        """The label map of every checkpoint, and the softmax of the last one augmented."""
        judged = self._judges.predict_members(data, only=only).labels
        return replace(self._labeller.predict_members(data, only=only), labels=judged)


def _load_labeller(run: Run, of: Round) -> Labeller:
    """What labels the cases of a round and gives the members' label maps beside."""
    labelling = labelling_members(run, of)
    labeller = open_members(run, of.model, labelling)
    if of.number == 0 and run.settings.init_map is not None:
        from nnunet_flare.rounds.stages.mapped import MappedLabeller

        ours = labeller.plans_manager.get_label_manager(dataset_json(run))
        mapped = MappedLabeller(labeller, load_id_map(run.settings.init_map), ours)
        if labelling == of.members:
            return mapped
        judges = MappedLabeller(open_members(run, of.model, of.members, tta="none"), mapped.id_map, ours)
        return _LastCheckpoint(judges, mapped)
    if labelling == of.members:
        return labeller
    return _LastCheckpoint(open_members(run, of.model, of.members, tta="none"), labeller)


def open_members(run: Run, folder: Path, members: Sequence[tuple[str, str]], *, tta: str | None = None) -> Segmenter:
    """The members of a model folder, opened with the recipe's settings, or other test-time augmentation."""
    from nnunet_flare.inference.core import Segmenter
    from nnunet_flare.inference.members import Member
    from nnunet_flare.inference.settings import PredictionSettings

    predict = run.recipe.predict
    settings = PredictionSettings(
        step_size=predict.step_size,
        tta=tta or predict.tta,
        precision=predict.precision,
        backend=predict.backend,
        device=run.settings.device,
        trust_checkpoint=run.settings.trust_checkpoint,
    )
    return Segmenter.from_members(
        [Member(folder, fold if fold == "all" else int(fold), checkpoint) for fold, checkpoint in members], settings
    )


def label_shard(run: Run, of: Round, part: int, parts: int) -> dict[str, int]:
    """Label one part of the unlabelled cases; those that are done already are kept.

    Returns how many cases were labelled (now or before) and how many failed.

    Raises:
        TaskError: when none of several preprocessed cases of the part could be labelled, or the model
            (``--init_model``) expects other input than the preprocessed scans.
        DeviceError: when a case, which is set aside, made the GPU unusable for those after it.
    """
    number = of.number
    cases = shard(round_scans(run, of), part, parts)
    ending = dataset_json(run)["file_ending"]
    remove_leftovers(run.paths.label(number, "case", ending).parent)
    weights = _weights_given(run, of)
    todo = [case for case in cases if not _is_labelled(run, number, case.case, ending, weights)]
    if todo:
        loader = ThreadPoolExecutor(1, "flare-read")
        try:
            ahead = each_ahead(todo, partial(read_unless_failed, run), loader)
            predictor = _load_labeller(run, of)  # while the first case is being read
            _check_input(run, of.model, predictor)
            organs, title = round_organs(run, of), f"round {number}: labelling"
            for case, reading in tqdm(ahead, total=len(todo), desc=title, disable=None, unit="case"):
                reason = failure(arrays_of(run, case), case.case)
                labelled = (
                    _label_case(run, of, case, reading, predictor, organs) if reason is None else LabelledCase(reason)
                )
                labelled = replace(labelled, weights=weights)
                write_labelled_case(run.paths.case(number, case.case), case.case, number, labelled)
                if labelled.failed is not None and (lost := lost_gpu()) is not None:
                    raise DeviceError(
                        f"{case.case}: set aside ({labelled.failed}); the GPU cannot be used any more ({lost}). The "
                        "same command goes on with the other scans"
                    )
        finally:
            loader.shutdown(cancel_futures=True)
    failed = [c.case for c in cases if read_labelled(run, number, c.case).failed is not None]
    tried = [c for c in cases if failure(arrays_of(run, c), c.case) is None]
    if len(tried) > 1 and len(failed) == len(cases):  # one alone may be at fault itself
        first = read_labelled(run, number, failed[0]).failed
        for name in failed:  # so that the next try labels them again
            run.paths.case(number, name).unlink()
        raise TaskError(f"none of {len(cases)} unlabelled cases could be labelled; the first, {failed[0]}: {first}")
    return {"labelled": len(cases) - len(failed), "failed": len(failed)}


def _weights_given(run: Run, of: Round) -> tuple[str, ...]:
    """Digests of the checkpoints of ``--init_model``, of which the run does not know when they are trained again."""
    if of.number != 0 or run.settings.init_model is None:
        return ()
    try:
        return tuple(file_digest(of.model / f"fold_{fold}" / checkpoint) for fold, checkpoint in of.members)
    except OSError:  # gone; what is still to be labelled will say so
        return ()


def _is_labelled(run: Run, number: int, case: str, ending: str, weights: tuple[str, ...]) -> bool:
    """Whether a case was labelled by these weights, its label map still whole, or set aside."""
    if not holds(run.paths.case(number, case), LABELLED):
        return False
    labelled = read_labelled(run, number, case)
    if labelled.failed is not None:
        return True
    by_these = not (weights and labelled.weights) or labelled.weights == weights
    return by_these and is_kept(run.paths.label(number, case, ending))


def _check_input(run: Run, model: Path, predictor: Labeller) -> None:
    """The scans were preprocessed once, by the run's plans; a model that was given must expect just that input."""
    ours = {**read_plans(run.plans_file), **base_configuration(run.base)}
    theirs = {**predictor.plans_manager.plans, **predictor.configuration_manager.configuration}
    different = [
        f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in INPUT_KEYS if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise TaskError(
            f"{model} expects a different input than {run.settings.plans_name} gives: {'; '.join(different)}. "
            "Use the planner and plan.* keys that the model was trained with"
        )


def _label_case(
    run: Run,
    of: Round,
    case: UnlabelledCase,
    reading: Future[Arrays],
    predictor: Labeller,
    organs: Mapping[str, Sequence[int]],
) -> LabelledCase:
    """Label one case and write its arrays; a case that fails says why."""
    started = time.monotonic()
    try:
        name, number = case.case, of.number
        data, crop_mask_seg, properties = reading.result()
        only = None if of.loop is None else list(round_labels(run, of))
        prediction = predictor.predict_members(data, only=only)
        document = dataset_json(run)
        fuse = partial(_fused, labels=Labels(document))
        fused = fuse(prediction)
        spacing = network_spacing_mm(properties, predictor.plans_manager.transpose_forward, fused.shape)
        fused = _cleaned(run, fused, spacing)
        num_labels, ids = max(foreground_ids(run)) + 1, list(organs.values())
        agreement = _agreement(prediction.labels, num_labels, ids)
        rule = run.recipe.selection_of(of.planned).rule
        per_organ, absent = judged_by(agreement, rule), absent_by(agreement, rule)
        steady, absent_copies = None, None
        if rule.copies:
            copies = labels_of_copies(lambda copy: fuse(predictor.predict_members(copy, only=only)), data)
            steady, absent_copies = steadiness(fuse(prediction), copies, num_labels, ids)
        _write_label(run, number, name, predictor, prediction, properties)
        compares = of.learns_from is not None and run.recipe.needs_change(number)
        change = _change(run, number, name) if compares else None
        label = training_label(fused, crop_mask_seg)
        patch = predictor.configuration_manager.patch_size
        write_array(run.paths.members(number, name), np.stack(prediction.labels).astype(np.uint8), patch)
        write_array(run.paths.training_label(number, name), label[None], patch)
        located = class_locations(label, sampled_groups(document["labels"], organs))
        write_properties(run.paths.properties(number, name), {**properties, "class_locations": located})
    except MemoryError:
        raise
    except Exception as error:
        if concerns_disk(error):  # the next case would meet it too
            raise
        log.exception("%s could not be labelled", case.case)
        return LabelledCase(f"labelling failed ({type(error).__name__}: {error})")
    voxel_mm3 = float(np.prod(spacing))
    voxels = membership(ids, num_labels) @ np.bincount(fused.ravel(), minlength=num_labels)

    def by_organ(values: np.ndarray | None) -> dict[str, float]:
        return {} if values is None else dict(zip(organs, map(float, values), strict=True))

    return LabelledCase(
        agreement=dict.fromkeys(organs) if agreement is None else {**by_organ(per_organ)},
        present=dict(
            zip(organs, [True] * len(organs) if agreement is None else agreement.present.tolist(), strict=True)
        ),
        absent_pairs=by_organ(None if agreement is None else absent),
        steady=by_organ(steady),
        absent_copies=by_organ(absent_copies),
        volume_mm3=by_organ(voxels * voxel_mm3),
        members=len(prediction.labels),
        change=change,
        label_sha256=label_hash(fused),
        odd=tuple(odd(arrays_of(run, case), case.case)),
        seconds=round(time.monotonic() - started, 3),
    )


def _fused(prediction: MembersPrediction, *, labels: Labels) -> np.ndarray:
    """The label map (Z, Y, X) of the members' mean probabilities."""
    return there_or_on_cpu(prediction.mean_softmax, lambda mean: fetched(labels.decided(mean, probabilities=True)))


def _cleaned(run: Run, labels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """A label map with the components that the recipe keeps."""
    fusion = run.recipe.fusion
    if fusion.components == "all":
        return labels
    from nnunet_flare.postprocessing.operations import keep_largest

    z, y, x = spacing_mm
    return keep_largest(
        np.ascontiguousarray(labels),
        (z, y, x),
        organs=[ids[0] if len(ids) == 1 else ids for ids in organ_ids(run).values()],
        minimum_mm3=fusion.min_component_mm3,
    )


def _change(run: Run, number: int, case: str) -> float | None:
    """How much the case's fused label map changed since the round before; None where that cannot be said."""
    ending = dataset_json(run)["file_ending"]
    before = run.paths.label(number - 1, case, ending)
    if not before.is_file():  # the case could not be labelled then
        return None
    after = run.paths.label(number, case, ending)
    change = label_change(read_labels(before, case).array, read_labels(after, case).array)
    return None if np.isnan(change) else change


def _agreement(labels: Sequence[np.ndarray], num_labels: int, organs: Sequence[Sequence[int]]) -> Agreement | None:
    """Agreement of two or more members; one member alone has none."""
    return pairwise_dice(labels, num_labels, organs) if len(labels) > 1 else None


def judged_by(agreement: Agreement | None, rule: Rule) -> np.ndarray:
    """(organs,) what a rule judges a case by: all pairs, or those with the last checkpoint."""
    if agreement is None:
        return np.empty(0)
    return agreement.with_last if rule.table == "last" else agreement.per_organ


def absent_by(agreement: Agreement | None, rule: Rule) -> np.ndarray:
    """(organs,) of the pairs that a rule judges by, the share that both lack the organ."""
    if agreement is None:
        return np.empty(0)
    return agreement.absent_with_last if rule.table == "last" else agreement.absent


def _write_label(
    run: Run, number: int, case: str, predictor: Labeller, prediction: MembersPrediction, properties: dict[str, Any]
) -> None:
    """Write the fused label map on the image's own grid, through the reader of the plans."""
    from nnunet_flare.inference.export import labels_on_image_grid

    labels = labels_on_image_grid(
        prediction.mean_softmax,
        properties,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        probabilities=True,
    )
    labels = _cleaned(run, labels, [float(edge) for edge in properties["spacing"]])
    path = run.paths.label(number, case, dataset_json(run)["file_ending"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        predictor.plans_manager.image_reader_writer_class().write_seg(labels, str(temporary), properties)
