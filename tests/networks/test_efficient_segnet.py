"""SZTU's generator: the paper's size, its context block and decoder layer by layer, and what nnU-Net expects."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nnunet_flare.networks.blocks import Layers
from nnunet_flare.networks.efficient_segnet import Context, EfficientSegNet

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
LEAKY = Layers(nonlin=nn.LeakyReLU, nonlin_kwargs={"negative_slope": 0.01})


def small(**changes: object) -> EfficientSegNet:
    torch.manual_seed(0)
    network = EfficientSegNet(1, 3, **{**SMALL, **changes})
    network.apply(network.initialize)
    return network


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, nn.Conv3d)]


def test_the_papers_network_has_the_papers_size():
    """Nine million weights and 333 billion multiplications are the paper's figures."""
    with torch.device("meta"):
        network = EfficientSegNet(1, 13, **PAPER)
        with FlopCounterMode(display=False) as counted:
            assert network(torch.zeros(1, 1, 192, 192, 192)).shape == (1, 13, 192, 192, 192)
    assert 9.0e6 < sum(weight.numel() for weight in network.parameters()) < 9.6e6
    assert 0.95 < counted.get_total_flops() / 2 / 333e9 < 1.1


def test_the_encoder_has_two_residual_units_a_level_and_halves_by_stride():
    network = EfficientSegNet(1, 14, **PAPER)
    assert [len(stage) for stage in network.encoder.stages] == [2] * 5
    assert [stage[0].first[0].stride for stage in network.encoder.stages] == [(1, 1, 1)] + [(2, 2, 2)] * 4
    assert not any(isinstance(module, nn.MaxPool3d) for module in network.modules())


def test_the_context_block_looks_around_at_three_scales_and_along_whole_planes():
    torch.manual_seed(0)
    block = Context(8, LEAKY).eval()
    x = torch.randn(2, 8, 8, 4, 12)
    reduce, *scales, z, y, along_x, merge, expand = weights_of(block)
    assert len(scales) == 3

    def act(value: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(value, 0.01)

    def conv(value: torch.Tensor, weight: torch.Tensor, padding: int | tuple[int, ...]) -> torch.Tensor:
        return F.instance_norm(F.conv3d(value, weight, padding=padding))

    few = act(conv(x, reduce, 0))
    # A quarter of the edge of four would be a single voxel, so that axis is pooled to two.
    pooled = [few, F.avg_pool3d(few, 2), F.avg_pool3d(few, (4, 2, 4))]
    around = [
        F.interpolate(conv(value, weight, 1), (8, 4, 12), mode="trilinear", align_corners=True)
        for value, weight in zip(pooled, scales, strict=True)
    ]
    across = [
        conv(few.mean((3, 4), keepdim=True), z, (1, 0, 0)).expand_as(few),
        conv(few.mean((2, 4), keepdim=True), y, (0, 1, 0)).expand_as(few),
        conv(few.mean((2, 3), keepdim=True), along_x, (0, 0, 1)).expand_as(few),
    ]
    both = torch.cat([act(sum(around)), act(sum(across))], 1)
    expected = act(x + conv(act(conv(both, merge, 1)), expand, 0))
    torch.testing.assert_close(block(x), expected)


def test_a_decoder_level_adds_the_skip_and_runs_one_anisotropic_block():
    network = small().eval()
    decoder = network.decoder
    level = EfficientSegNet.decoder_stage(8, 4, 2, 3, LEAKY)
    assert [weight.shape[2:] for weight in weights_of(level)] == [(3, 3, 1), (1, 1, 3)]
    seen: dict[str, torch.Tensor] = {}
    decoder.stages[1].register_forward_pre_hook(lambda _, given: seen.update(entered=given[0]))
    decoder.upsamplings[1].register_forward_hook(lambda _, __, made: seen.update(upsampled=made))
    network.encoder.stages[0].register_forward_hook(lambda _, __, made: seen.update(skip=made))
    network(torch.randn(1, 1, 8, 16, 16))
    torch.testing.assert_close(seen["entered"], seen["upsampled"] + seen["skip"])


def test_deep_supervision_needs_no_weights_of_its_own():
    plain, supervised = small(), small(deep_supervision=True)
    assert plain.state_dict().keys() == supervised.state_dict().keys()
    x = torch.randn(1, 1, 8, 16, 16)
    outputs = supervised(x)
    torch.testing.assert_close(outputs[0], plain(x))
    assert [tuple(output.shape[2:]) for output in outputs] == [(8, 16, 16), (8, 8, 8)]
    supervised.decoder.deep_supervision = False  # how nnU-Net turns it off for validation
    torch.testing.assert_close(supervised(x), outputs[0])


def test_every_weight_learns():
    network = small()
    network(torch.randn(1, 1, 8, 16, 16)).square().mean().backward()
    without = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


def test_dropout_is_random_in_training_and_off_in_prediction():
    network = small(dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.5})
    x = torch.randn(1, 1, 8, 16, 16)
    assert not torch.equal(network(x), network(x))
    network.eval()
    torch.testing.assert_close(network(x), network(x))


def test_stock_nnunet_builds_it_from_plans():
    kwargs = {
        **SMALL,
        "dropout_op": "torch.nn.modules.dropout.Dropout3d",
        "dropout_op_kwargs": {"p": 0.2},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": 0.01},
    }
    name = "nnunet_flare.networks.efficient_segnet.EfficientSegNet"
    network = get_network_from_plans(name, kwargs, ["dropout_op", "nonlin"], 1, 3, deep_supervision=True)
    assert isinstance(network, EfficientSegNet)
    assert len(network(torch.randn(1, 1, 8, 16, 16))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_sizes": [[3, 3, 3]]}, "kernel_sizes: found 1 entries"),
        ({"n_conv_per_stage_decoder": [2, 3]}, "even numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
