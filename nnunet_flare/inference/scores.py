"""Scores on the image's grid for whoever wants more of them than the label that wins: slice by slice, never whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.export import SliceExporter
from nnunet_flare.inference.forms import Receiver, View
from nnunet_flare.inference.opened import Opened
from nnunet_flare.inference.planes import ScorePlanes
from nnunet_flare.inference.scans import PreparedScan


class ScoreExporter(SliceExporter):
    """Interpolates all scores of a slice where :class:`SliceExporter` asks for the winner alone."""

    in_order = True

    def __init__(self, receivers: Sequence[Receiver], view: View, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._receivers, self._view = receivers, view
        for receiver in receivers:
            receiver.begin(view)

    @classmethod
    def of(cls, scan: PreparedScan, model: Opened, receivers: Sequence[Receiver], *, members: int) -> ScoreExporter:
        """For a scan; ``members`` scores come one after the other, each of all classes."""
        properties, labels = scan.prepared.properties, model.labels
        view = View(
            heads=labels.heads,
            members=members,
            shape=tuple(int(n) for n in properties["shape_before_cropping"]),
            box=tuple((int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]),
            backward=tuple(int(axis) for axis in model.plans_manager.transpose_backward),
            turn=scan.turn,
            has_regions=labels.has_regions,
            properties=properties,
            grid=scan.grid,
            placed=tuple((0, n) for n in scan.grid.array.shape),
        )
        managers = (model.plans_manager, model.configuration_manager, labels)
        return cls(receivers, view, scan.shape, properties, *managers)

    def _take(self, targets: np.ndarray, plane: Array, planes: ScorePlanes) -> None:
        scores = planes.scores(plane)
        apart = scores.reshape(self._view.members, self._view.heads, *scores.shape[1:])
        mean = apart.mean(axis=0, keepdims=True) if self._view.members > 1 else apart
        for receiver in self._receivers:
            receiver.take(targets, apart if receiver.apart else mean)

    def _take_between(
        self, targets: np.ndarray, one: Array, other: Array, shares: np.ndarray, planes: ScorePlanes
    ) -> None:
        for target, share in zip(targets, shares.tolist(), strict=True):
            self._take(np.array([target]), one * (1 - share) + other * share, planes)
