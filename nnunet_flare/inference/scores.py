"""Scores on the image's grid for whoever wants more of them than the label that wins: slice by slice, never whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nnunet_flare.inference.export import SliceExporter
from nnunet_flare.inference.forms import Receiver, View
from nnunet_flare.inference.model import Model
from nnunet_flare.inference.scans import PreparedScan


class ScoreExporter(SliceExporter):
    """Interpolates all scores of a slice where :class:`SliceExporter` asks for the winner alone."""

    def __init__(self, receivers: Sequence[Receiver], view: View, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._receivers, self._view = receivers, view
        for receiver in receivers:
            receiver.begin(view)

    @classmethod
    def of(cls, scan: PreparedScan, model: Model, receivers: Sequence[Receiver], *, members: int) -> ScoreExporter:
        """For a scan; ``members`` scores come one after the other, each of all classes."""
        properties, labels = scan.prepared.properties, model.label_manager
        view = View(
            heads=int(labels.num_segmentation_heads),
            members=members,
            shape=tuple(int(n) for n in properties["shape_before_cropping"]),
            box=tuple((int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]),
            backward=tuple(int(axis) for axis in model.plans_manager.transpose_backward),
            turn=scan.turn,
            has_regions=bool(labels.has_regions),
            properties=properties,
            grid=scan.grid,
            placed=tuple((0, n) for n in scan.grid.array.shape),
        )
        managers = (model.plans_manager, model.configuration_manager, labels)
        return cls(receivers, view, scan.shape, properties, *managers)

    def _take(self, targets: np.ndarray, plane: torch.Tensor) -> None:
        planes = [np.asarray(self._interpolate(one).cpu(), np.float32) for one in plane]
        apart = np.stack(planes).reshape(self._view.members, self._view.heads, *planes[0].shape)
        mean = apart.mean(axis=0, keepdims=True) if self._view.members > 1 else apart
        for receiver in self._receivers:
            receiver.take(targets, apart if receiver.apart else mean)
