"""The three steps of SZTU's adversarial training (S4) on tensors; the trainer owns networks and optimizers.

The discriminator sees an image and two masks of it and says which is better. It learns from the truth beside the
generator's mask, in random order (step 1). Of an unlabelled image there are two copies, one with noise; the
discriminator prefers the mask of one of them, and the generator learns that mask on the *other* copy, weighted by how
sure the discriminator is (step 3). Step 2 between them is ordinary supervised training.

Where the paper feeds sigmoids, the released code raw logits, both of 13 organs, here masks are the softmax of nnU-Net's
heads without the background (the sigmoids of regions), and the target of step 3 is what the winner draws, not its
logits. The choice and its weight
are made per image; the released code gives a whole batch one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.resolutions import samples_of

POISON_RANGE = (0.5, 1.0)
"""Both random factors of mask poisoning (S4, code)."""


@dataclass(frozen=True)
class Choice:
    """What the discriminator prefers, per image of a batch.

    ``second_wins`` (B,) bool; ``score`` (B,) float32 in 0.5 ... 1, the probability of the preferred mask.
    """

    second_wins: torch.Tensor
    score: torch.Tensor


def is_adversarial(epoch: int, num_epochs: int, *, warmup: float, finish: float) -> bool:
    """Whether an epoch (0 is the first) has all three steps; in warm-up and finish, shares of the epochs, only step 2.

    The released code has the three steps in epochs 50 to 450 of 500; the shares 0.1 and 0.1 give 50 to 449.
    """
    return round(warmup * num_epochs, 6) <= epoch < round((1 - finish) * num_epochs, 6)


def poisoned(probabilities: torch.Tensor) -> torch.Tensor:
    """SZTU's mask poisoning: softmax over the classes of (e p + r1) r2, r1 and r2 uniform in [0.5, 1) per voxel.

    The sum over the classes (axis 1) stays 1, and of a hard map every voxel's class stays the most probable one. The
    code's softmax runs over the last spatial axis, which is no probability of anything.
    """
    low, high = POISON_RANGE
    first, second = (torch.empty_like(probabilities).uniform_(low, high) for _ in range(2))
    return torch.softmax((math.e * probabilities + first) * second, dim=1)


def shown_masks(probabilities: torch.Tensor, *, heads: Heads, poison: bool) -> torch.Tensor:
    """What the discriminator sees of a mask: the probabilities of the organs, without the background (axis 1).

    A region is poisoned as a choice of two, being in it or not.
    """
    if poison and heads.regions:
        return poisoned(torch.stack((1 - probabilities, probabilities), dim=1))[:, 1]
    return (poisoned(probabilities) if poison else probabilities)[:, heads.first_organ :]


def discriminator_loss(
    discriminator: nn.Module, image: torch.Tensor, truth: torch.Tensor, prediction: torch.Tensor, *, truth_first: bool
) -> torch.Tensor:
    """Step 1: cross-entropy of telling which of two masks is the truth.

    Args:
        discriminator: image and two masks to logits (B, 2), the first being "the first mask is better".
        image: (B, C, Z, Y, X).
        truth: organs' masks (B, K, Z, Y, X).
        prediction: the generator's, same shape.
        truth_first: the coin of this batch.
    """
    first, second = (truth, prediction) if truth_first else (prediction, truth)
    logits = discriminator(image, first, second).float()
    target = torch.full((len(image),), 0 if truth_first else 1, device=logits.device)
    return functional.cross_entropy(logits, target)


@torch.no_grad()
def choose(
    discriminator: nn.Module, noised: torch.Tensor, clean: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> Choice:
    """Which of two masks of one image is better: the mean of the discriminator's opinions with either copy beside them.

    Args:
        discriminator: as in :func:`discriminator_loss`, in evaluation mode.
        noised: the copy with noise, whose mask is ``first`` (B, K, Z, Y, X).
        clean: the copy without, whose mask is ``second``.
    """
    opinions = [torch.softmax(discriminator(image, first, second).float(), dim=1) for image in (noised, clean)]
    score = torch.stack(opinions).mean(0)
    return Choice(score[:, 0] < score[:, 1], score.amax(1))


@torch.no_grad()
def lesson(
    choice: Choice,
    noised: torch.Tensor,
    clean: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    heads: Heads,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the generator learns in step 3: the loser's image (B, C, Z, Y, X) with the winner's mask.

    ``first`` and ``second`` are the generator's probabilities on the two copies, (B, K, Z, Y, X); the returned target
    is what the winner draws.
    """
    second_wins = choice.second_wins.view(-1, *[1] * (clean.ndim - 1))
    winner = torch.where(second_wins, second, first)
    return torch.where(second_wins, noised, clean), heads.drawn(winner)


def with_noise(images: torch.Tensor, max_std: float) -> torch.Tensor:
    """Normal noise on each image (B, C, Z, Y, X), its standard deviation drawn uniformly from 0 to ``max_std``."""
    std = torch.rand((len(images), *[1] * (images.ndim - 1)), device=images.device) * max_std
    return images + std * torch.randn_like(images)


def weighted_loss(
    loss: Callable[[Any, Any], torch.Tensor], outputs: Any, targets: Any, weights: torch.Tensor
) -> torch.Tensor:
    """The mean over the images of a batch of weight times loss, each image's loss taken by itself.

    Args:
        loss: of output and target, each with deep supervision a list.
        outputs: (B, K, Z, Y, X), or a list.
        targets: of the same batch, or a list.
        weights: (B,).
    """
    parts = [
        weight * loss(samples_of(outputs, slice(index, index + 1)), samples_of(targets, slice(index, index + 1)))
        for index, weight in enumerate(weights)
    ]
    return torch.stack(parts).mean()
