"""Pairing references with predictions, and reading a pair on one grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.errors import CaseError
from nnunet_flare.images import (
    Volume,
    geometry_difference,
    read_labels,
    rounding_difference,
    stem_of,
)
from nnunet_flare.images.geometry import describe
from nnunet_flare.images.orientation import turn_between, turn_volume
from nnunet_flare.images.readers import NIBABEL, SITK, library
from nnunet_flare.listing import label_maps


@dataclass(frozen=True)
class CasePair:
    """The two files of a case; ``name`` is the file name that the official table lists."""

    case: str
    name: str
    reference: Path
    prediction: Path


@dataclass(frozen=True)
class Pairing:
    """The pairs of two folders, the cases that one side lacks (file names, sorted), and why files were not taken."""

    pairs: tuple[CasePair, ...]
    without_prediction: tuple[str, ...]
    without_reference: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()


def find_pairs(reference: Path, prediction: Path) -> Pairing:
    """Pair the label maps of two folders by case id (two single files are one pair, whatever their names).

    Raises:
        InputError: when a folder is missing, holds no label map, or one case twice.
    """
    if reference.is_file() and prediction.is_file():
        pair = CasePair(stem_of(prediction), prediction.name, reference, prediction)
        return Pairing((pair,), (), ())
    references, left = label_maps(reference, "references", besides=[prediction], one_each=True)
    predictions, left_too = label_maps(prediction, "predictions", besides=[reference], one_each=True)
    pairs = tuple(
        CasePair(case, predictions[case].name, references[case], predictions[case])
        for case in sorted(references.keys() & predictions.keys())
    )
    return Pairing(
        pairs,
        tuple(references[case].name for case in sorted(references.keys() - predictions.keys())),
        tuple(predictions[case].name for case in sorted(predictions.keys() - references.keys())),
        (*left.items(), *left_too.items()),
    )


def read_pair(pair: CasePair, *, as_stored: bool = False) -> tuple[Volume, Volume, str | None]:
    """Reference and prediction on the reference's grid, and what had to be turned for that, in words.

    ``as_stored`` compares voxel by voxel whatever the headers say, as the official script does. Where SimpleITK and
    nibabel read a header differently, both files are read by the one under which they lie on one grid.

    Raises:
        CaseError: for unreadable files and for grids that flips and axis swaps do not make equal.
    """
    found: list[tuple[Volume, Volume, str | None]] = []
    errors: list[CaseError] = []
    doubts: list[str] = []
    for reader in (SITK, NIBABEL):
        try:
            reference = read_labels(pair.reference, pair.case, reader=reader, doubted=True)
            prediction = read_labels(pair.prediction, pair.case, reader=reader, doubted=True)
            said = [f"{v.doubt}; read as {library(reader)} reads it" for v in (reference, prediction) if v.doubt]
            doubts += said
            turned, note = on_grid_of(reference, prediction, case=pair.case, as_stored=as_stored)
        except CaseError as error:
            errors.append(error)
            continue
        if not said:
            return reference, turned, note
        if turned is prediction:
            found.append((reference, turned, f"{pair.case}: {'; '.join(said)}"))
    if found:
        return found[0]
    if errors:
        raise errors[0]
    raise CaseError(
        pair.case,
        f"{doubts[0]}: neither library reads reference and prediction on the same grid; export the prediction "
        "on the grid of its image, or compare voxel by voxel with --as_stored",
    )


def on_grid_of(
    reference: Volume, prediction: Volume, *, case: str, as_stored: bool = False
) -> tuple[Volume, str | None]:
    """The prediction turned to the reference's orientation where the headers ask for it; see :func:`read_pair`."""
    if as_stored:
        if reference.array.shape != prediction.array.shape:
            raise CaseError(
                case,
                f"prediction of shape (z, y, x) {prediction.array.shape}, expected the reference's "
                f"{reference.array.shape}; export it on the grid of its image",
            )
        return prediction, None
    turn = turn_between(prediction.direction, reference.direction)
    turned = prediction if turn.is_identity else turn_volume(prediction, turn)
    difference = geometry_difference(reference, turned)
    if difference is not None:
        raise CaseError(
            case,
            f"reference and prediction are on different grids: {difference}; export the prediction on the grid of its "
            "image, or compare voxel by voxel with --as_stored if only the header was lost",
        )
    notes = []
    if not turn.is_identity:
        notes.append(
            f"prediction stored as {describe(prediction.direction)}, reoriented to the reference's "
            f"{describe(reference.direction)}"
        )
    rounding = rounding_difference(reference, turned)
    if rounding is not None:
        notes.append(f"reference and prediction are on nearly the same grid: {rounding}")
    return turned, f"{case}: {'; '.join(notes)}" if notes else None
