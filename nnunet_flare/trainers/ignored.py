"""Losses where some voxels are ignored, without asking the device whether any voxel is left.

Stock's Dice and cross-entropy asks at every resolution, and a GPU stands still until the answer is there.
"""

from __future__ import annotations

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import nn


def where_any(mask: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """A mean over the voxels of a mask, and 0 where there is none, whose mean is NaN.

    Its gradient is 0 then, too: torch's cross-entropy gives none to voxels that it ignores.
    """
    return torch.where(mask.any(), mean, torch.zeros_like(mean))


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with class weights. Classes of weight 0 are ignored: where a patch has no other, the loss is 0.

    Torch divides by the sum of the weights, which is 0 there.
    """

    def __init__(self, weight: torch.Tensor, *, ignore_index: int) -> None:
        super().__init__(weight, ignore_index=ignore_index)
        self.without_weight = torch.nonzero(weight == 0).flatten().tolist()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits (B, K, ...) and labels (B, ...)."""
        target = target.long()
        if not self.without_weight:
            return super().forward(input, target)
        counted = target != self.ignore_index
        for label in self.without_weight:
            counted &= target != label
        return where_any(counted, super().forward(input, torch.where(counted, target, self.ignore_index)))


class DiceCEOfKnown(nn.Module):
    """Stock's ``DC_and_CE_loss`` with an ignore label: the same values, and nothing waits.

    Args:
        stock: the loss, whose parts are used.
    """

    def __init__(self, stock: DC_and_CE_loss) -> None:
        super().__init__()
        self.dc, self.ce = stock.dc, stock.ce
        self.weight_dice, self.weight_ce, self.ignore_label = stock.weight_dice, stock.weight_ce, stock.ignore_label

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits (B, K, ...), background first, and labels (B, 1, ...)."""
        known = target != self.ignore_label
        dice = self.dc(output, torch.where(known, target, 0), loss_mask=known)
        entropy = where_any(known, self.ce(output, target[:, 0]))
        loss: torch.Tensor = self.weight_ce * entropy + self.weight_dice * dice
        return loss
