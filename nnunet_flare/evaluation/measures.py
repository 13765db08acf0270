"""DSC and NSD of a case and of a folder, by the rules of the official FLARE22 to FLARE24 scripts or corrected.

Official rules, all of them kept by default: a structure absent from both maps scores 1, from one of them 0; aorta,
inferior vena cava and oesophagus count on the reference's labelled slices only, *without the highest of them* (the
script's upper bound is exclusive; a structure of a single slice, on which the script crashes, keeps that slice); NSD
is 0 without being computed where DSC is below 0.2; both are rounded to four decimals; where a structure is the only
class (lesions), a prediction with any higher value scores 0. ``corrected`` counts all labelled slices, always computes
NSD, rounds nothing, and passes over other values. Slices are those of the file's third axis (array axis 0), as in the
script, whatever the orientation.

A lesion that the reference has none of makes a scan a healthy one; what was predicted of it is its false positive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.evaluation.overlap import annotated_alone, compact, dice, dice_of_counts, joint_counts
from nnunet_flare.evaluation.pairs import CasePair, Pairing, find_pairs, on_grid_of, read_pair
from nnunet_flare.evaluation.structures import Structure, label_ids, structures_of
from nnunet_flare.evaluation.surface import Corners, find_corners, surface_dice, surface_of
from nnunet_flare.evaluation.table import CaseRow, ScoreTable
from nnunet_flare.images import Volume
from nnunet_flare.organs import Organ
from nnunet_flare.parallel import Workers

__all__ = ["CaseScores", "Missing", "dice", "evaluate_case", "evaluate_folders"]

NSD_NEEDS_DSC = 0.2
"""Official rule: below this DSC the NSD is 0 without being computed."""

MM3_PER_ML = 1000

DECIMALS = 4
"""Official rounding of DSC and NSD of a case."""

Missing = Literal["skip", "stop", "zero"]
"""A reference without prediction is left out (FLARE22's script), stops everything (FLARE23's), or scores 0."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseScores:
    """DSC and NSD of one case by structure id, false positives as in :class:`CaseRow`, and what a reader must know."""

    dsc: dict[int, float]
    nsd: dict[int, float]
    false_positive_ml: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Maps:
    """Both label maps of a case in compact ids, what is known of them, and the grid's spacing (z, y, x)."""

    reference: np.ndarray
    prediction: np.ndarray
    counts: np.ndarray
    corners: tuple[Corners, Corners]
    spacing_mm: tuple[float, float, float]


def evaluate_case(
    reference: Volume,
    prediction: Volume,
    organs: Sequence[Organ | Structure],
    *,
    corrected: bool = False,
    ignored: int | None = None,
) -> CaseScores:
    """DSC and NSD of every organ or region; the prediction is turned to the reference's orientation where needed.

    Voxels that the reference calls ``ignored`` count in neither.

    Raises:
        CaseError: when the two do not lie on the same grid, or the reference holds more than the only class.
    """
    turned, _ = on_grid_of(reference, prediction, case="case")
    maps = annotated_alone(reference.array, turned.array, ignored)
    return _score("case", maps[0], maps[1], reference.spacing_mm, structures_of(organs), corrected)


def _score(
    case: str,
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: tuple[float, float, float],
    structures: Sequence[Structure],
    corrected: bool,
) -> CaseScores:
    for structure in structures:
        if structure.sole and (more := _higher(reference, structure)):
            raise CaseError(
                case, f"the reference holds {more}, expected 0 and {structure.labels[0]} ({structure.name})"
            )
    ids = label_ids(structures)
    own = {label: place for place, label in enumerate(ids, 1)}
    ref, pred = compact(reference, ids), compact(prediction, ids)
    counts = joint_counts(ref, pred, len(ids))
    maps = _Maps(ref, pred, counts, (find_corners(ref), find_corners(pred)), spacing_mm)
    dsc, nsd, false_ml, notes = {}, {}, {}, []
    for structure in structures:
        members = [own[label] for label in structure.labels]
        more = _higher(prediction, structure) if structure.sole and not corrected else []
        scores = (0.0, 0.0) if more else _structure_scores(maps, structure, members, corrected)
        if more:
            only = f"{structure.name} is {structure.labels[0]} alone"
            notes.append(
                f"{case}: the prediction holds {more}, and {only}; such a label map scores 0 by the official rules"
            )
        dsc[structure.id], nsd[structure.id] = scores if corrected else (float(np.round(s, DECIMALS)) for s in scores)
        if structure.is_lesion and not counts[:, members, :].any():
            false_ml[structure.id] = float(counts[:, :, members].sum() * np.prod(spacing_mm) / MM3_PER_ML)
    return CaseScores(dsc, nsd, false_ml, tuple(notes))


def _higher(labels: np.ndarray, structure: Structure) -> list[int]:
    """The ids in a map above those of a structure that should be its only one."""
    return [int(label) for label in np.unique(labels) if label > max(structure.labels)]


def _structure_scores(maps: _Maps, structure: Structure, members: list[int], corrected: bool) -> tuple[float, float]:
    ref_per_slice = maps.counts[:, members, :].sum(axis=(1, 2))
    pred_per_slice = maps.counts[:, :, members].sum(axis=(1, 2))
    both_per_slice = maps.counts[:, members][:, :, members].sum(axis=(1, 2))
    if not ref_per_slice.any() and not pred_per_slice.any():
        return 1.0, 1.0
    if not ref_per_slice.any() or not pred_per_slice.any():
        return 0.0, 0.0
    slices = _scored_slices(ref_per_slice, corrected) if structure.labelled_slices_only else slice(None)
    dsc = dice_of_counts(*(per_slice[slices].sum() for per_slice in (ref_per_slice, pred_per_slice, both_per_slice)))
    if not corrected and dsc < NSD_NEEDS_DSC:
        return dsc, 0.0
    surfaces = [
        surface_of(corners, members, labels=labels, slices=slices if structure.labelled_slices_only else None)
        for corners, labels in zip(maps.corners, (maps.reference, maps.prediction), strict=True)
    ]
    nsd = surface_dice(*surfaces, spacing_mm=maps.spacing_mm, tolerance_mm=structure.nsd_tolerance_mm)
    return dsc, nsd


def _scored_slices(per_slice: np.ndarray, corrected: bool) -> slice:
    labelled = np.flatnonzero(per_slice)
    first, last = int(labelled[0]), int(labelled[-1])
    return slice(first, last + 1 if corrected or first == last else last)


def evaluate_folders(
    reference: Path,
    prediction: Path,
    organs: Sequence[Organ | Structure],
    *,
    corrected: bool = False,
    missing: Missing = "skip",
    as_stored: bool = False,
    ignored: int | None = None,
    processes: int | None = None,
    progress: bool = True,
) -> ScoreTable:
    """Score every case of two folders, in parallel; cases that cannot be scored are in the table's ``failed``.

    Args:
        reference: folder of reference label maps, ``<case>.nii.gz``, or one file.
        prediction: folder of predicted ones of the same names, or one file.
        organs: what to score.
        corrected: see the module's text.
        missing: what a reference without prediction means. A prediction without reference is always listed, and is a
            failed case under ``skip``, whose list of cases is the predictions.
        as_stored: ignore the headers' geometry, as the official script does.
        ignored: id of voxels that the reference does not annotate: they count neither for nor against a prediction.
        processes: workers; default one per core, at most one per case.
        progress: show a bar where there is a terminal.

    Raises:
        InputError: for missing or empty folders, and under ``missing="stop"`` for references without prediction.
    """
    structures = structures_of(organs)
    pairing = find_pairs(reference, prediction)
    notes, failed = _missing_cases(pairing, missing)
    failed += pairing.left
    rows = []
    if missing == "zero":
        zeros = {s.id: 0.0 for s in structures}
        rows = [CaseRow(name, zeros, zeros) for name in pairing.without_prediction]
    score = partial(_score_pair, structures=structures, corrected=corrected, as_stored=as_stored, ignored=ignored)
    with Workers(processes, progress=progress) as workers:
        for pair, outcome in workers.each_case(score, pairing.pairs, description="scoring"):
            if isinstance(outcome, CaseError):
                failed.append((outcome.case, outcome.reason))
                continue
            scores, note = outcome
            rows.append(CaseRow(pair.name, scores.dsc, scores.nsd, scores.false_positive_ml))
            notes += [*([note] if note else []), *scores.notes]
    for note in notes:
        log.warning(note)
    rows.sort(key=lambda row: row.name)
    return ScoreTable(structures, tuple(rows), corrected, tuple(sorted(failed)), tuple(sorted(notes)))


def _missing_cases(pairing: Pairing, missing: Missing) -> tuple[list[str], list[tuple[str, str]]]:
    notes: list[str] = []
    failed: list[tuple[str, str]] = []
    if pairing.without_prediction:
        names = ", ".join(pairing.without_prediction)
        count = len(pairing.without_prediction)
        if missing == "stop":
            raise InputError(
                f"{count} reference(s) have no prediction: {names}. Predict them, or set with --missing how they count"
            )
        notes.append(
            f"{count} reference(s) without prediction {'left out' if missing == 'skip' else 'score 0'}: {names}"
        )
    if pairing.without_reference:
        notes.append(
            f"{len(pairing.without_reference)} prediction(s) without reference: {', '.join(pairing.without_reference)}"
        )
        if missing == "skip":
            failed += [(name, "no reference with this name") for name in pairing.without_reference]
    return notes, failed


def _score_pair(
    pair: CasePair, *, structures: Sequence[Structure], corrected: bool, as_stored: bool, ignored: int | None
) -> tuple[CaseScores, str | None]:
    reference, prediction, note = read_pair(pair, as_stored=as_stored)
    maps = annotated_alone(reference.array, prediction.array, ignored)
    return _score(pair.case, maps[0], maps[1], reference.spacing_mm, structures, corrected), note
