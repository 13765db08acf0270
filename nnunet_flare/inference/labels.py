"""What the outputs of a network stand for, as stock nnU-Net's label manager reads it from dataset.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.places import place_of
from nnunet_flare.labels import IGNORE, has_regions, ids_of

REGION_THRESHOLD = 0.5
"""A region holds a voxel where its probability is above this (stock nnU-Net)."""


class Labels:
    """Exclusive labels, or regions that are painted one over the other."""

    def __init__(self, dataset_json: Mapping[str, Any]) -> None:
        """Read dataset.json's ``labels`` and ``regions_class_order``.

        Raises:
            InputError: when they do not go together.
        """
        ids = {name: ids_of(value) for name, value in dataset_json["labels"].items() if name != IGNORE}
        self.has_regions = has_regions(dataset_json["labels"])
        self.all_labels = sorted({label for some in ids.values() for label in some})
        self.regions_class_order: list[int] | None = None
        self._regions: list[tuple[int, ...]] = []
        if self.has_regions:
            order = dataset_json.get("regions_class_order")
            self._regions = regions = [some for some in ids.values() if set(some) != {0}]
            if not isinstance(order, (list, tuple)) or len(order) != len(regions):
                raise InputError(
                    f"dataset.json: regions_class_order is {order}, expected a label for each of {len(regions)} regions"
                )
            self.regions_class_order = [int(label) for label in order]

    @property
    def foreground(self) -> list[int]:
        """All labels but the background, each once, in ascending order; of regions those that they are made of."""
        return [label for label in self.all_labels if label != 0]

    @cached_property
    def heads(self) -> int:
        """Number of classes or regions, which is the network's number of outputs."""
        return len(self.all_labels if self.regions_class_order is None else self.regions_class_order)

    def without(self, probabilities: Array, only: Collection[int]) -> None:
        """Leave of probabilities (K, ...) those of some label ids: a class joins the background, a region is nowhere.

        A region is left where all of its ids are.
        """
        if self.has_regions:
            for region, ids in enumerate(self._regions):
                if not set(ids) <= set(only):
                    probabilities[region] = 0
            return
        for head in range(1, self.heads):
            if head not in only:
                probabilities[0] += probabilities[head]
                probabilities[head] = 0

    def probabilities(self, scores: Array) -> Array:
        """Softmax, or the sigmoid of each region, of scores (K, ...), where they lie."""
        place = place_of(scores)
        return place.softmax(scores) if self.regions_class_order is None else place.sigmoid(scores)

    def decided(self, scores: Array, *, probabilities: bool = False) -> Array:
        """The label (...), uint8, of each voxel of scores (K, ...), or of probabilities, where they lie."""
        place = place_of(scores)
        if self.regions_class_order is None:
            return place.winner(scores)
        labels = place.labels(scores.shape[1:])
        for label, score in zip(self.regions_class_order, scores, strict=True):
            place.paint(labels, (score if probabilities else place.sigmoid(score)) > REGION_THRESHOLD, label)
        return labels
