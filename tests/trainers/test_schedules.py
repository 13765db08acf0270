"""Learning rates are stock's, or the papers', and depend on nothing but the epoch."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_flare.trainers.schedules import EpochSchedule, learning_rate, warmup_factor


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)


def test_poly_is_stocks_schedule_at_every_epoch() -> None:
    stock_optimizer, our_optimizer = optimizer(), optimizer()
    stock, ours = PolyLRScheduler(stock_optimizer, 0.01, 37), EpochSchedule(our_optimizer, 0.01, 37)
    for epoch in range(37):
        stock.step(epoch)
        ours.step(epoch)
        assert our_optimizer.param_groups[0]["lr"] == stock_optimizer.param_groups[0]["lr"]


def test_steps_fall_after_66_and_86_percent() -> None:
    rates = [learning_rate(1e-3, epoch=epoch, num_epochs=100, schedule="steps") for epoch in range(100)]
    assert rates[0] == rates[65] == pytest.approx(1e-3)
    assert rates[66] == rates[85] == pytest.approx(1e-4)
    assert rates[86] == rates[99] == pytest.approx(5e-5)


def test_warm_up_rises_linearly_across_epochs_and_then_follows_the_schedule() -> None:
    ours = optimizer()
    schedule = EpochSchedule(ours, 0.01, 10, warmup_iterations=6, iterations_per_epoch=4)
    seen = []
    for epoch in range(3):
        schedule.step(epoch)
        for iteration in range(4):
            if schedule.is_warming_up(epoch, iteration):
                schedule.step(epoch, iteration)
            seen.append(ours.param_groups[0]["lr"])
    for index, rate in enumerate(seen):
        epoch = index // 4
        expected = learning_rate(0.01, epoch=epoch, num_epochs=10, schedule="poly") * min(1, (index + 1) / 6)
        assert rate == pytest.approx(expected), f"iteration {index}"


def test_no_warm_up_leaves_the_rate_alone() -> None:
    assert warmup_factor(0, 0) == 1.0
    assert not EpochSchedule(optimizer(), 0.01, 10, iterations_per_epoch=4).is_warming_up(0, 0)
