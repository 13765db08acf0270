"""Pairing references with predictions, and reading a pair on one grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, geometry_difference, read_labels, stem_of
from nnunet_flare.listing import label_maps
from nnunet_flare.orientation import describe, turn_between, turn_volume


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

    ``as_stored`` compares voxel by voxel whatever the headers say, as the official script does.

    Raises:
        CaseError: for unreadable files and for grids that flips and axis swaps do not make equal.
    """
    reference, prediction = read_labels(pair.reference, pair.case), read_labels(pair.prediction, pair.case)
    prediction, note = on_grid_of(reference, prediction, case=pair.case, as_stored=as_stored)
    return reference, prediction, note


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
            f"reference and prediction lie on different grids: {difference}; export the prediction on the grid of its "
            "image, or compare voxel by voxel with --as_stored if only the header was lost",
        )
    if turn.is_identity:
        return prediction, None
    return turned, (
        f"{case}: prediction stored as {describe(prediction.direction)}, turned to the reference's "
        f"{describe(reference.direction)}"
    )
