"""A training on a CPU computes its 3-D convolutions in halves: the values are PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_flare.planners.expected import expected_configuration
from nnunet_flare.planners.flare import nnUNetPlannerFlareTiny
from nnunet_flare.rounds.iteration_time import _adversarial_cost, iteration_cost
from nnunet_flare.trainers.halves import halve_convolutions
from nnunet_flare.trainers.settings import AdversarialSettings


@st.composite
def layers(draw: Any) -> tuple[nn.Conv3d, tuple[int, ...]]:
    """A convolution and the shape of what it takes."""
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel, stride, padding, dilation = (
        draw(st.tuples(*[st.integers(low, high)] * 3)) for low, high in ((1, 4), (1, 3), (0, 2), (1, 2))
    )
    layer = nn.Conv3d(
        2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())
    ).double()
    reach = [step * (edge - 1) + 1 for step, edge in zip(dilation, kernel, strict=True)]
    shape = tuple(edge + draw(st.integers(0, 7)) for edge in reach)
    return layer, (draw(st.sampled_from([1, 1, 1, 2])), 2 * groups, *shape)


def results(network: nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
    """What a network gives, and the gradients of the sum of its squares."""
    given = given.clone().requires_grad_()
    network.zero_grad()
    scores = network(given)
    scores.square().sum().backward()
    return [scores.detach(), given.grad, *(one.grad for one in network.parameters())]  # type: ignore[list-item]


@given(layers())
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_the_whole(drawn: tuple[nn.Conv3d, tuple[int, ...]]) -> None:
    layer, shape = drawn
    window = torch.randn(shape, dtype=torch.float64)
    halved = copy.deepcopy(layer)
    halve_convolutions(halved, torch.device("cpu"))
    for ours, stock in zip(results(halved, window), results(layer, window), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what PyTorch's convolutions take."""
    taken: list[tuple[int, ...]] = []
    stock = nn.functional.conv3d

    def noted(given: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if set(weight.shape[2:]) != {1}:
            taken.append(tuple(given.shape))
        return stock(given, weight, *rest)

    monkeypatch.setattr(nn.functional, "conv3d", noted)
    return taken


def test_pytorch_computes_no_batch_of_one_by_itself(tiny: Any, taken: list[tuple[int, ...]]) -> None:
    """The way that takes four times as long is PyTorch's for small volumes."""
    tiny.add(*(f"case{k}" for k in range(5)))
    trainer = tiny.trainer(name="nnUNetTrainerFlareST")
    trainer.initialize()
    patch = trainer.configuration_manager.patch_size
    trainer.network(torch.zeros(1, trainer.num_input_channels, *patch))
    assert taken
    assert all(shape[0] == 2 for shape in taken), taken


def test_a_dry_run_times_the_network_as_it_will_be_trained(taken: list[tuple[int, ...]]) -> None:
    configuration = expected_configuration(nnUNetPlannerFlareTiny, "3d_fullres", {"batch_size": 1})
    assert configuration is not None
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}

    def once(step: Any) -> float:
        step()
        return 1.0

    iteration_cost(None, None, configuration, dataset, "cpu", once)
    assert taken
    assert all(shape[0] == 2 for shape in taken), taken
    taken.clear()
    image = torch.zeros(1, 1, 16, 16, 16)
    few = AdversarialSettings(discriminator_features=2)
    _adversarial_cost(nn.Conv3d(1, 2, 1), image, dataset, few, 1.0, once)
    assert taken
    assert all(shape[0] == 2 for shape in taken), taken


def test_a_halved_network_keeps_its_names_and_can_be_copied(tiny: Any) -> None:
    tiny.add(*(f"case{k}" for k in range(5)))
    stock, ours = tiny.trainer(name="nnUNetTrainer"), tiny.trainer(name="nnUNetTrainerFlareST")
    for trainer in (stock, ours):
        trainer.initialize()
    assert list(ours.network.state_dict()) == list(stock.network.state_dict())
    stock.network.load_state_dict(ours.network.state_dict())
    window = torch.randn(1, ours.num_input_channels, *ours.configuration_manager.patch_size)
    for ours_, stock_ in zip(copy.deepcopy(ours.network)(window), stock.network(window), strict=True):
        torch.testing.assert_close(ours_, stock_, rtol=1e-4, atol=1e-5)
