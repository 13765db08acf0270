"""The exponential moving average of a network's weights, and how fast its loss comes in (Tarvainen & Valpola 2017)."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

RAMP_SHARPNESS = 5.0
"""The paper's ramp-up is exp(-5 (1 - t)^2) for t from 0 to 1."""


def ramp_up(position: float) -> float:
    """The paper's sigmoid-shaped ramp: 0.0067 at position 0, 1 from position 1 on."""
    missing = 1.0 - min(max(position, 0.0), 1.0)
    return math.exp(-RAMP_SHARPNESS * missing**2)


def decay_at(updates: int, decay: float) -> float:
    """The decay of an update after ``updates`` others: a plain mean of all weights at first, as in the paper's code."""
    return min(decay, 1.0 - 1.0 / (updates + 1))


class WeightAverage:
    """A copy of a network, never trained, whose weights are the average of those that the network had.

    Attributes:
        network: the copy.
        updates: how often it was updated.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: nn.Module = copy.deepcopy(network).requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Take in the weights of ``network``: w' = d w' + (1 - d) w; what is no weight (running counts) is copied."""
        take_in = get_ema_multi_avg_fn(decay_at(self.updates, decay))  # all weights in one call
        take_in(list(self.network.parameters()), list(network.parameters()), self.updates)
        for value, count in zip(self.network.buffers(), network.buffers(), strict=True):
            value.copy_(count)
        self.updates += 1
