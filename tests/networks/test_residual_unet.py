"""The residual U-Net of the whole-volume systems: the papers' layers, and what nnU-Net expects of a network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_flare.networks import blocks
from nnunet_flare.networks.residual_unet import ResidualUNet

PAPER = {
    "n_stages": 5,
    "features_per_stage": [16, 32, 64, 128, 256],
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 4,
    "kernel_sizes": [[3, 3, 3]] * 5,
    "n_blocks_per_stage": [2] * 5,
    "n_conv_per_stage_decoder": [2] * 4,
}
SMALL = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "n_blocks_per_stage": [2, 1, 1],
    "n_conv_per_stage_decoder": [2, 2],
}


def small(**changes: object) -> ResidualUNet:
    torch.manual_seed(0)
    network = ResidualUNet(1, 3, **{**SMALL, **changes})
    network.apply(network.initialize)
    return network


def unit_parameters(before: int, after: int) -> int:
    """Weights of a residual unit: two 3^3 convolutions without bias, and a 1^3 one where the channels change."""
    return 27 * before * after + 27 * after * after + (before * after if before != after else 0)


def test_the_papers_network_has_the_papers_layers():
    with torch.device("meta"):
        network = ResidualUNet(1, 14, **PAPER)
        assert network(torch.zeros(1, 1, 160, 192, 192)).shape == (1, 14, 160, 192, 192)
    widths = PAPER["features_per_stage"]
    encoder = sum(
        unit_parameters(before, after) + unit_parameters(after, after)
        for before, after in zip([1, *widths], widths, strict=False)
    )
    decoder = sum(unit_parameters(low + high, high) for high, low in itertools.pairwise(widths))
    assert sum(weight.numel() for weight in network.parameters()) == encoder + decoder + 14 * 16 + 14
    pools = [module for module in network.modules() if isinstance(module, nn.MaxPool3d)]
    assert [(pool.kernel_size, pool.stride, pool.padding) for pool in pools] == [((3,) * 3, (2,) * 3, (1,) * 3)] * 4


def test_a_residual_unit_is_two_convolutions_and_a_shortcut():
    torch.manual_seed(0)
    layers = blocks.Layers(nn.Dropout3d, {"p": 0.2})
    unit = blocks.ResidualUnit(2, 3, layers, stride=2).eval()
    x = torch.randn(1, 2, 6, 8, 4)
    convolutions = [module.weight for module in unit.modules() if isinstance(module, nn.Conv3d)]
    first = F.relu(F.instance_norm(F.conv3d(x, convolutions[0], stride=2, padding=1)))
    second = F.instance_norm(F.conv3d(first, convolutions[1], padding=1))
    shortcut = F.instance_norm(F.conv3d(x, convolutions[2], stride=2))
    torch.testing.assert_close(unit(x), F.relu(second + shortcut))
    assert [type(module) for module in unit.first] == [nn.Conv3d, nn.InstanceNorm3d, nn.Dropout3d, nn.ReLU]
    assert [type(module) for module in unit.second] == [nn.Conv3d, nn.InstanceNorm3d]
    assert isinstance(blocks.ResidualUnit(3, 3, layers).shortcut, nn.Identity)


def test_dropout_is_random_in_training_and_off_in_prediction():
    network = small(dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.5})
    x = torch.randn(1, 1, 8, 16, 16)
    assert not torch.equal(network(x), network(x))
    network.eval()
    torch.testing.assert_close(network(x), network(x))


def test_deep_supervision_needs_no_weights_of_its_own():
    plain, supervised = small(), small(deep_supervision=True)
    assert plain.state_dict().keys() == supervised.state_dict().keys()
    x = torch.randn(1, 1, 8, 16, 16)
    outputs = supervised(x)
    torch.testing.assert_close(outputs[0], plain(x))
    assert [tuple(output.shape[2:]) for output in outputs] == [(8, 16, 16), (8, 8, 8)]
    torch.testing.assert_close(outputs[1], F.avg_pool3d(outputs[0], (1, 2, 2)))
    supervised.decoder.deep_supervision = False  # how nnU-Net turns it off for validation
    torch.testing.assert_close(supervised(x), outputs[0])


def test_every_weight_learns_and_is_kaiming_normal():
    network = ResidualUNet(1, 14, **PAPER)
    network.apply(network.initialize)
    weight = network.encoder.stages[3][1][1].first[0].weight
    assert abs(weight.std().item() / np.sqrt(2 / (27 * 128)) - 1) < 0.02
    assert not network.decoder.seg_layers[0].bias.any()
    net = small()
    net(torch.randn(1, 1, 8, 16, 16)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [[1, 1, 1]]}, "strides: found 1 entries"),
        ({"n_conv_per_stage_decoder": [2, 1]}, "even numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
