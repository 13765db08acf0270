"""Dice and cross-entropy for cases of which only some organs are annotated (marginal loss).

Background in the label map of such a case means "none of the annotated organs": an organ without annotation may well
lie there. So, per case, the probability of every organ without annotation is merged with that of the background. On
logits that is one logsumexp, after which nnU-Net's Dice and cross-entropy hold unchanged: a case with all organs
annotated has exactly stock's loss. HKUST (S2) trained on merged pseudo-labels with the stock loss instead.
"""

from __future__ import annotations

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import nn

from nnunet_flare.trainers.ignored import where_any

NEVER = float(torch.finfo(torch.float32).min)
"""Logit of a class of probability zero; finite, so that no difference of two of them is NaN."""


def merge_into_background(logits: torch.Tensor, annotated: torch.Tensor) -> torch.Tensor:
    """Logits whose softmax is that of ``logits`` with the organs that are not annotated added to the background.

    Args:
        logits: (B, K, ...), background first.
        annotated: (B, K - 1) bool, whether an organ of a case is annotated, or (B, K - 1, ...) voxel by voxel.

    Returns:
        float32 of the same shape; the organs without annotation have probability 0.
    """
    logits = logits.float()
    kept = annotated.reshape((*annotated.shape, *(1,) * (logits.ndim - annotated.ndim)))
    organs = logits[:, 1:]
    merged = torch.cat((logits[:, :1], organs.masked_fill(kept, NEVER)), dim=1).logsumexp(dim=1, keepdim=True)
    return torch.cat((merged, organs.masked_fill(~kept, NEVER)), dim=1)


def drop_unannotated(target: torch.Tensor, annotated: torch.Tensor) -> torch.Tensor:
    """The label map (B, 1, ...) with the voxels of organs that are not annotated set to background.

    Such voxels must go before a loss sees them: their class has probability zero, its logarithm is infinite.
    """
    known = torch.cat((torch.ones_like(annotated[:, :1]), annotated), dim=1)
    kept = known.gather(1, target.flatten(1).long()).view_as(target)
    return torch.where(kept, target, torch.zeros_like(target))


def with_positives(annotated: torch.Tensor, positive: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, K - 1, ...) bool: organs that are annotated, and those of ``positive`` in the voxels that name them.

    Elsewhere such an organ stays merged with the background: the label map does not say that it is not there.
    """
    organs = torch.arange(1, positive.shape[1] + 1, device=target.device).reshape(1, -1, *(1,) * (target.ndim - 2))
    shape = (*positive.shape, *(1,) * (target.ndim - 2))
    return annotated.reshape(shape) | (positive.reshape(shape) & (target == organs))


class KnownDice(nn.Module):
    """Minus the mean of soft Dices, of which some are left out.

    Args:
        batch_dice: one Dice per organ over the batch (and over the processes of a distributed training), as the plans
            say, instead of one per case and organ.
        smooth: added to numerator and denominator.
        ddp: whether the training is distributed.
    """

    def __init__(self, *, batch_dice: bool, smooth: float, ddp: bool) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.ddp = ddp

    def mean_of(
        self, probabilities: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None, counted: torch.Tensor
    ) -> torch.Tensor:
        """Of probabilities and ``truth`` (B, K, ...), over the voxels of ``mask``; ``counted`` (B, K) are in the mean.

        In a batch Dice, all cases make one of each; it counts where it does so in any case.
        """
        axes = tuple(range(2, probabilities.ndim))
        if mask is not None:
            truth = truth * mask
        overlap = (probabilities * truth).sum(axes, dtype=torch.float32)
        predicted = (probabilities if mask is None else probabilities * mask).sum(axes, dtype=torch.float32)
        true = truth.sum(axes, dtype=torch.float32)
        counted = counted.float()
        if self.batch_dice:
            if self.ddp:
                overlap, predicted, true, counted = (
                    AllGatherGrad.apply(part).sum(0, dtype=torch.float32)
                    for part in (overlap, predicted, true, counted)
                )
            overlap, predicted, true = (part.sum(0, dtype=torch.float32) for part in (overlap, predicted, true))
            counted = (counted.sum(0) > 0).float()
        dice = (2 * overlap + self.smooth) / (true + predicted + self.smooth).clamp_min(1e-8)
        return -(dice * counted).sum() / counted.sum().clamp_min(1)


class MarginalDice(KnownDice):
    """Minus the soft Dice of the annotated organs, background left out, like nnU-Net's ``do_bg=False``."""

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        mask: torch.Tensor | None,
        annotated: torch.Tensor | None,
        positive: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`MarginalDiceCE`; ``logits`` are merged, ``mask`` (B, 1, ...) is False where voxels are ignored.

        In a batch Dice, a case adds nothing to an organ that it has no annotation of: prediction and target are zero
        there. Organs that no case of the batch has annotated, or names a voxel of, are left out of the mean.
        """
        probabilities = torch.softmax(logits, dim=1)[:, 1:]
        with torch.no_grad():
            one_hot = torch.zeros(logits.shape, device=logits.device, dtype=torch.float32)
            one_hot = one_hot.scatter_(1, target.long(), 1)[:, 1:]
            if mask is not None:
                one_hot = one_hot * mask
            if annotated is None:
                counted = torch.ones(one_hot.shape[:2], dtype=torch.bool, device=one_hot.device)
            elif positive is None:
                counted = annotated
            else:
                counted = annotated | (positive & one_hot.flatten(2).any(2))
        return self.mean_of(probabilities, one_hot, mask, counted)


class MarginalDiceCE(nn.Module):
    """nnU-Net's sum of Dice and cross-entropy, in float32, over the annotated organs of each case.

    Args:
        ce: the cross-entropy of logits and label maps, with its class weights and ignored value.
        dc: the Dice.
        ignore_label: value of voxels that are left out, or None.
    """

    def __init__(self, ce: nn.Module, dc: nn.Module, *, ignore_label: int | None) -> None:
        super().__init__()
        self.ce = ce
        self.dc = dc
        self.ignore_label = ignore_label

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        annotated: torch.Tensor | None = None,
        positive: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of one resolution.

        Args:
            logits: (B, K, ...), background first.
            target: (B, 1, ...) label ids.
            annotated: (B, K - 1) bool, whether an organ of a case is annotated; None: all are, and nothing is merged.
            positive: (B, K - 1) bool, of further organs of which only the voxels that name them are known.
        """
        mask = None if self.ignore_label is None else target != self.ignore_label
        known = target if mask is None else torch.where(mask, target, torch.zeros_like(target))
        separate = annotated
        if annotated is not None:
            known = drop_unannotated(known, annotated if positive is None else annotated | positive)
            separate = annotated if positive is None else with_positives(annotated, positive, known)
        with torch.autocast(logits.device.type, enabled=False):
            merged = logits.float() if separate is None else merge_into_background(logits, separate)
            dice = self.dc(merged, known, mask, annotated, positive)
            if mask is None:
                return dice + self.ce(merged, known[:, 0])
            return dice + where_any(mask, self.ce(merged, torch.where(mask, known, target)[:, 0]))
