"""Learning rates as closed formulas of the epoch.

nnU-Net does not save a scheduler's state, so a schedule that counts its own steps would start anew at ``--c``. These
depend on nothing but the epoch and the iteration that they are told.
"""

from __future__ import annotations

from typing import Literal

import torch

POLY_EXPONENT = 0.9
"""Stock's ``PolyLRScheduler``."""
STEPS: tuple[tuple[float, float], ...] = ((0.66, 0.1), (0.86, 0.05))
"""Fosun's schedule (S1): from this share of the epochs on, this factor of the initial rate."""


def learning_rate(initial_lr: float, *, epoch: int, num_epochs: int, schedule: Literal["poly", "steps"]) -> float:
    """The rate of an epoch (0 is the first): ``poly`` decays as (1 - epoch / num_epochs)^0.9, ``steps`` as S1's."""
    if schedule == "poly":
        return float(initial_lr * (1 - epoch / num_epochs) ** POLY_EXPONENT)
    factor = 1.0
    for share, reduced in STEPS:
        if epoch >= share * num_epochs:
            factor = reduced
    return initial_lr * factor


def warmup_factor(iteration: int, warmup_iterations: int) -> float:
    """What the rate is multiplied by in an iteration of the whole training (0 is the first): rises linearly to 1."""
    return min(1.0, (iteration + 1) / warmup_iterations) if warmup_iterations > 0 else 1.0


class EpochSchedule:
    """Sets an optimizer's rate; the trainer calls :meth:`step` as it does stock's scheduler."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        num_epochs: int,
        *,
        schedule: Literal["poly", "steps"] = "poly",
        warmup_iterations: int = 0,
        iterations_per_epoch: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.num_epochs = num_epochs
        self.schedule: Literal["poly", "steps"] = schedule
        self.warmup_iterations = warmup_iterations
        self.iterations_per_epoch = iterations_per_epoch

    def step(self, current_step: int, iteration: int = 0) -> None:
        """Set the rate of iteration ``iteration`` of epoch ``current_step``."""
        rate = learning_rate(
            self.initial_lr, epoch=current_step, num_epochs=self.num_epochs, schedule=self.schedule
        ) * warmup_factor(current_step * self.iterations_per_epoch + iteration, self.warmup_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def is_warming_up(self, current_step: int, iteration: int) -> bool:
        """Whether the rate still differs from one iteration to the next."""
        return current_step * self.iterations_per_epoch + iteration < self.warmup_iterations
