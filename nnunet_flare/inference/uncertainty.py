"""How sure a model is of every voxel, as an image on the scan's grid: 0 is sure, 255 could not be less so.

``entropy`` is that of the softmax, averaged over the members, as a share of the logarithm of the number of classes (of
regions: of their sigmoid, one bit each, averaged); several folds that contradict each other raise it as well as a fold
that is in doubt. ``disagreement`` is the share of members whose label is not the one written.

Values are uint8, a 255th of the range each; finer steps would be noise, and four times the bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_flare.images import write_volume
from nnunet_flare.images.readers import SITK
from nnunet_flare.inference.arrays import HOST, sigmoid
from nnunet_flare.inference.choices import UNCERTAINTIES, Uncertainty
from nnunet_flare.inference.entropy import entropy, region_entropy
from nnunet_flare.inference.forms import Finished, Form, View
from nnunet_flare.inference.inputs import InputCase
from nnunet_flare.kept import header_of, is_kept

FOLDER, SUFFIX = "uncertainty", ".nii.gz"

TOP = 255


class Entropy:
    """Receives the scores of one case and makes the map of their entropy, uint8, slice by slice."""

    apart = True

    def begin(self, view: View) -> None:
        """Make a map without doubt: outside of what the network saw all is background."""
        self.view = view
        self._map = np.zeros(view.shape, np.uint8)

    def take(self, targets: np.ndarray, scores: np.ndarray) -> None:
        """The entropy of some slices, all with the same scores (members, K, rows, columns)."""
        if self.view.has_regions:
            found = region_entropy(sigmoid(scores).mean(axis=0))
        else:
            found = entropy(np.mean([HOST.softmax(member) for member in scores], axis=0))
        (low, _), *inside = self.view.box
        rows, columns = (slice(first, last) for first, last in inside)
        self._map[:, rows, columns][low + targets] = scaled(found)

    def finish(self) -> np.ndarray:
        """The map (Z, Y, X), uint8, on the scan's own grid."""
        view = self.view
        whole = np.zeros(view.grid.array.shape, np.uint8)
        whole[tuple(slice(low, high) for low, high in view.placed)] = view.turn.undo(self._map.transpose(view.backward))
        return whole


def scaled(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 as uint8."""
    return np.rint(np.clip(shares, 0, 1) * TOP).astype(np.uint8)


def disagreement(labels: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """The share of members (Z, Y, X) that have another label than ``labels``, as uint8."""
    against = np.zeros(labels.shape, np.uint8)
    for member in members:
        against += member != labels
    steps = scaled(np.arange(len(members) + 1) / len(members))
    return np.asarray(steps[against])


def uncertainty_form(kind: Uncertainty, output: Path, reader: str = SITK) -> Form:
    """Writes ``output/uncertainty/<case>.nii.gz``, whose header names the kind; ``reader`` is of the model's plans."""
    assert kind in UNCERTAINTIES

    def file(case: InputCase) -> Path:
        return output / FOLDER / f"{case.name}{SUFFIX}"

    def write(done: Finished, received: Entropy | None) -> None:
        found = disagreement(done.labels, list(done.members)) if received is None else received.finish()
        write_volume(file(done.case), done.grid.with_array(found), description=kind)

    def is_whole(case: InputCase) -> bool:
        header = header_of(file(case))
        return header is not None and header.description == kind and is_kept(file(case), case.files[0], reader=reader)

    return Form(
        "uncertainty",
        f"uncertainty ({kind}, 0 to {TOP})",
        lambda case: (file(case),),
        write,
        is_whole,
        receiver=(lambda _: Entropy()) if kind == "entropy" else None,
        wants_members=kind == "disagreement",
    )
