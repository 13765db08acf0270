"""``nnUNetTrainerFlarePartial``: for each case only its annotated organs are supervised (marginal loss).

The case table says which they are: those of ``annotated`` for a ``partial`` case, and for a pseudo case that a model of
some organs labelled, else all. Of ``positive`` organs the marked voxels are learnt, and nothing about the others.
Regions learn what the annotated labels say of them (:mod:`nnunet_flare.trainers.known_regions`).
Without such cases it trains exactly like ``nnUNetTrainerFlareST``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnunet_flare.inference.torch_arrays import upload
from nnunet_flare.trainers.known_regions import KnownRegionsLoss, RegionDice
from nnunet_flare.trainers.lengths import class_with_length
from nnunet_flare.trainers.marginal import MarginalDice, MarginalDiceCE
from nnunet_flare.trainers.resolutions import highest
from nnunet_flare.trainers.self_training import nnUNetTrainerFlareST

SMOOTH = 1e-5
"""Stock's smoothing of the Dice."""


class nnUNetTrainerFlarePartial(nnUNetTrainerFlareST):
    """Self-training whose partial cases are silent about the organs that nobody annotated in them."""

    partial_note = "Organs that a partial case does not annotate may lie in its background; the loss leaves that open."

    def _build_loss(self) -> nn.Module:
        """The marginal loss, with stock's weights of resolutions and classes."""
        loss = super()._build_loss()
        stock: Any = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        kind = RegionDice if self.heads.regions else MarginalDice
        dice: Any = kind(batch_dice=self.configuration_manager.batch_dice, smooth=SMOOTH, ddp=self.is_ddp)
        if self._do_i_compile():
            dice = torch.compile(dice)
        marginal = self._regions_loss(stock, dice) if self.heads.regions else self._organs_loss(stock, dice)
        if not isinstance(loss, DeepSupervisionWrapper):
            return marginal
        loss.loss = marginal
        return loss

    def _organs_loss(self, stock: Any, dice: nn.Module) -> nn.Module:
        return MarginalDiceCE(stock.ce, dice, ignore_label=self.heads.ignore)

    def _regions_loss(self, stock: Any, dice: nn.Module) -> nn.Module:
        """With stock's weight of the cross-entropy, whose mean is over voxels alone where some can be ignored."""
        summed = 1 if self.heads.ignore is None else self.label_manager.num_segmentation_heads
        labels = self.label_manager.foreground_labels
        return KnownRegionsLoss(dice, self.heads, labels, weight_ce=stock.weight_ce * summed)

    def loss_on_labels(self, output: Any, target: Any, batch: dict) -> torch.Tensor:
        """The marginal loss of a batch; every resolution gets the same (B, labels) tables of what is known."""
        labels = self.label_manager.foreground_labels
        annotated = self._organs_of(batch["keys"], "annotated", organs=labels)
        positive = self._organs_of(batch["keys"], "positive", organs=labels)
        tables: tuple[torch.Tensor, ...] = ()
        if annotated is not None and positive is not None:
            further = positive & ~annotated
            known = np.stack([annotated, further] if further.any() else [annotated])
            tables = tuple(upload(known, highest(output).device))
        levels = [[table] * len(output) for table in tables] if isinstance(output, (list, tuple)) else tables
        loss: torch.Tensor = self.loss(output, target, *levels)
        return loss


def __getattr__(name: str) -> type:
    return class_with_length(name, globals())
