"""Dice and cross-entropy of regions for cases of which only some labels are annotated.

Background in the label map of such a case means "none of the annotated labels": a label without annotation may well lie
there. So a voxel says of a region whether it lies in it

- where the map names a label: of every region, for a label lies in some regions and in no other;
- where it is background: of the regions all of whose labels are annotated, and of no other.

What is not said is left out of both sums. A case with all labels annotated has exactly stock's loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.marginal import KnownDice


class RegionDice(KnownDice):
    """Minus the soft Dice of the regions, over the voxels where it is known whether they lie in them."""

    def forward(
        self, logits: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, whole: torch.Tensor
    ) -> torch.Tensor:
        """Of logits, bool ``truth`` and ``known`` (B, R, ...).

        A region counts where all of its labels are annotated (``whole``, (B, R) bool), or where a voxel is named to lie
        in it.
        """
        found = (truth & known).flatten(2).any(2)
        return self.mean_of(torch.sigmoid(logits), truth.float(), known.float(), whole | found)


class KnownRegionsLoss(nn.Module):
    """nnU-Net's sum of Dice and binary cross-entropy, in float32, of what the label map of each case says.

    Args:
        dc: the Dice.
        heads: the regions, and whether voxels can be ignored.
        labels: every label id above 0, ascending.
        weight_ce: of the mean cross-entropy over what is known.
    """

    def __init__(self, dc: nn.Module, heads: Heads, labels: Sequence[int], *, weight_ce: float) -> None:
        super().__init__()
        self.dc = dc
        self.heads = heads
        self.weight_ce = weight_ce
        self._lies_in = heads.regions_of(torch.tensor(labels).reshape(-1, 1))

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        annotated: torch.Tensor | None = None,
        positive: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of one resolution.

        Args:
            logits: (B, R, ...).
            target: (B, R, ...) region maps, with *ignore* (B, R + 1, ...).
            annotated: (B, labels) bool, whether a label of a case is annotated; None: all are.
            positive: (B, labels) bool, of further labels of which only the voxels that name them are known.
        """
        truth = self.heads.certain(target, logits.shape[1])
        self._lies_in = lies_in = self._lies_in.to(logits.device)  # goes over once
        if annotated is None:
            annotated = torch.ones((len(logits), len(lies_in)), dtype=torch.bool, device=logits.device)
        named = self._named(truth, annotated if positive is None else annotated | positive, lies_in)
        whole = ~(~annotated[:, :, None] & lies_in).any(1)
        known = named | whole.reshape(*whole.shape, *(1,) * (logits.ndim - 2))
        counted = self.heads.counted(target)
        if counted is not None:
            known = known & counted
        with torch.autocast(logits.device.type, enabled=False):
            dice = self.dc(logits.float(), truth, known, whole)
            entropy = functional.binary_cross_entropy_with_logits(logits.float(), truth.float(), reduction="none")
            loss: torch.Tensor = dice + self.weight_ce * (entropy * known).sum() / known.sum().clamp_min(1)
        return loss

    def _named(self, truth: torch.Tensor, labels: torch.Tensor, lies_in: torch.Tensor) -> torch.Tensor:
        """(B, 1, ...) bool: where the map names one of a case's known ``labels``, told by the regions it lies in."""
        codes, of_labels = _as_numbers(truth), _as_numbers(lies_in)
        named = torch.zeros_like(codes, dtype=torch.bool)
        for label, code in enumerate(of_labels):  # no case is looked at from the CPU, which would wait for the GPU
            named |= (codes == code) & labels[:, label].reshape(-1, *(1,) * (codes.ndim - 1))
        return named[:, None]


def _as_numbers(maps: torch.Tensor) -> torch.Tensor:
    """(B, ...) int64 of bool (B, R, ...): equal numbers lie in the same regions."""
    numbers = torch.zeros_like(maps[:, 0], dtype=torch.int64)
    for region in range(maps.shape[1]):
        numbers |= maps[:, region].long() << region
    return numbers
