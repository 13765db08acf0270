"""The soft Dice loss of Fosun Aitrox (S1, seed-systems 1.4) and SZTU (S4): squared denominator, organs only.

Alone, as in the papers, it can lose a small organ for good in a short training: where an organ is predicted nowhere its
term has next to no gradient. A weighted cross-entropy beside it, which the papers do not have, prevents that.
"""

from __future__ import annotations

import torch
from torch import nn

from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.ignored import WeightedCrossEntropy, where_any

SMOOTH = 1e-8
"""Added to numerator and denominator (both papers)."""


class SquaredSoftDice(nn.Module):
    """1 - the mean over batch and organs of (2 sum(p g) + s) / (sum(p^2) + sum(g^2) + s).

    p is the softmax over background and organs, where the papers have a sigmoid per organ and no background; of regions
    it is their sigmoid. g is 1 in the organ's voxels. Sums run over the patch, in single precision. An organ that a
    patch does not hold counts too: its term is about 1 for any probability that is left, as in S1's code.

    Args:
        heads: what the outputs stand for; voxels that it ignores count nowhere.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits (B, K, z, y, x) and their target."""
        with torch.autocast(output.device.type, enabled=False):
            return self.of_probabilities(self.heads.probabilities(output), target)

    def of_probabilities(self, probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of probabilities (B, K, z, y, x), float32."""
        counted, first = self.heads.counted(target), self.heads.first_organ
        if counted is not None:
            probabilities = probabilities * counted
        truth = self.heads.certain(target, probabilities.shape[1])
        organs, truth = probabilities[:, first:].flatten(2), truth[:, first:].flatten(2)
        common = (organs * truth).sum(-1)
        size = organs.square().sum(-1) + truth.sum(-1)
        return 1 - ((2 * common + SMOOTH) / (size + SMOOTH)).mean()


class SoftDiceCE(nn.Module):
    """The soft Dice plus a cross-entropy with class weights, its mean taken over the weights (as torch's).

    Args:
        dice: a :class:`SquaredSoftDice`, which may be compiled.
        weights: (K,) of the classes, background first.
        ignore_label: voxels of this label count nowhere, in the Dice neither.
    """

    def __init__(self, dice: nn.Module, weights: torch.Tensor, *, ignore_label: int | None = None) -> None:
        super().__init__()
        self.dice, self.ignore_label = dice, ignore_label
        self.ce = WeightedCrossEntropy(weights.float(), ignore_index=-100 if ignore_label is None else ignore_label)

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits (B, K, z, y, x), background first, and labels (B, 1, z, y, x)."""
        dice: torch.Tensor = self.dice(output, target)
        with torch.autocast(output.device.type, enabled=False):
            entropy: torch.Tensor = self.ce(output.float(), target[:, 0].long())
        return dice + (entropy if self.ignore_label is None else where_any(target != self.ignore_label, entropy))
