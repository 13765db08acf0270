"""What a network's outputs stand for: classes that exclude each other (softmax), or regions (a sigmoid each).

Targets are stock's: label maps (B, 1, Z, Y, X), of which *ignore* is a value; or region maps (B, R, Z, Y, X), behind
which *ignore* has a map of its own. Losses and teachers ask here for what differs between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnunet_flare.inference.labels import REGION_THRESHOLD


@dataclass(frozen=True)
class Heads:
    """The outputs of a network, and the form of its targets.

    Attributes:
        ignore: value of voxels that are left out, or None.
        regions: label ids of each region, in the order of the outputs; None where classes exclude each other.
        order: the label that each region is drawn with, one over the other (``regions_class_order``).
    """

    ignore: int | None = None
    regions: tuple[tuple[int, ...], ...] | None = None
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, manager: Any) -> Heads:
        """Those of stock's ``LabelManager``."""
        if not manager.has_regions:
            return cls(manager.ignore_label)
        regions = tuple(each if isinstance(each, tuple) else (each,) for each in manager.foreground_regions)
        return cls(manager.ignore_label, regions, tuple(manager.regions_class_order))

    @property
    def first_organ(self) -> int:
        """The first output that stands for an organ: regions have no output for the background."""
        return 0 if self.regions else 1

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, K, ...), float32: the softmax over the classes, or each region's sigmoid."""
        return torch.sigmoid(logits.float()) if self.regions else torch.softmax(logits.float(), dim=1)

    def certain(self, target: torch.Tensor, heads: int) -> torch.Tensor:
        """A target as (B, ``heads``, ...) bool, the background included where it is a class; what is ignored is it."""
        counted = self.counted(target)
        if self.regions:
            maps = target[:, :heads].bool()
            return maps if counted is None else maps & counted
        labels = target.long() if counted is None else torch.where(counted, target.long(), 0)
        shape = (target.shape[0], heads, *target.shape[2:])
        return torch.zeros(shape, dtype=torch.bool, device=target.device).scatter_(1, labels, True)

    def counted(self, target: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, ...) bool, False where a target is ignored; None where nothing can be."""
        if self.ignore is None:
            return None
        return ~target[:, -1:].bool() if self.regions else target != self.ignore

    def drawn(self, probabilities: torch.Tensor) -> torch.Tensor:
        """What a prediction draws, in the form of a target without *ignore*: int64 labels, or bool maps of regions.

        Regions are those of the label map in which each is drawn over the ones before it, as in every pseudo-label.
        """
        if not self.regions:
            return probabilities.argmax(1, keepdim=True)
        labels = torch.zeros_like(probabilities[:, :1], dtype=torch.int64)
        for label, region in zip(self.order, probabilities.split(1, dim=1), strict=True):
            labels.masked_fill_(region > REGION_THRESHOLD, label)
        return self.regions_of(labels)

    def regions_of(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, R, ...) bool of a label map (B, 1, ...)."""
        return torch.cat([_one_of(labels, ids) for ids in self.regions or ()], dim=1)

    def confidence(self, probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, 1, ...): the probability of what was drawn, of regions that of the least sure one."""
        if not self.regions:
            return probabilities.gather(1, target)
        return torch.where(target, probabilities, 1 - probabilities).amin(dim=1, keepdim=True)

    def ignoring(self, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """A drawn target that is ignored in the voxels of (B, 1, ...) bool."""
        if self.ignore is None:
            raise ValueError("nothing can be ignored without an ignore label")
        if self.regions:
            return torch.cat((target, where), dim=1)
        return torch.where(where, self.ignore, target)


def _one_of(labels: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Where labels are one of some ids, which are not sent to the labels' device."""
    found = labels == ids[0]
    for label in ids[1:]:
        found |= labels == label
    return found
