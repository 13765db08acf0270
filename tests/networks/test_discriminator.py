"""The discriminator: one opinion per image whatever its size, its batch and its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_flare.networks.discriminator import Discriminator, halvings


def made(patch: tuple[int, int, int] = (8, 16, 16)) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(1, 2, patch, features=4).eval()


def sample(batch: int = 2, size: tuple[int, int, int] = (8, 16, 16)) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, channels, *size) for channels in (1, 2, 2)]


def test_the_papers_discriminator_has_the_papers_widths():
    with torch.device("meta"):
        network = Discriminator(1, 13, (192, 192, 192))
        shapes = []
        network.shared.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
        masks = torch.zeros(4, 13, 192, 192, 192)
        assert network(torch.zeros(4, 1, 192, 192, 192), masks, masks).shape == (4, 2)
    assert shapes == [(4, 512, 12, 12, 12)] * 3
    assert network.head.weight.shape == (2, 1536)
    assert [part.p for part in network.modules() if isinstance(part, nn.Dropout3d)] == [0.2] * 6


def test_images_of_a_batch_do_not_mix():
    network, parts = made(), sample()
    alone = torch.cat([network(*(part[i : i + 1] for part in parts)) for i in range(2)])
    torch.testing.assert_close(network(*parts), alone)


def test_it_knows_the_first_mask_from_the_second():
    network, (image, first, second) = made(), sample()
    assert not torch.allclose(network(image, first, second), network(image, second, first))


def test_every_weight_learns():
    network, parts = made(), sample()
    nn.functional.cross_entropy(network(*parts), torch.tensor([0, 1])).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


@pytest.mark.parametrize("size", [(8, 16, 16), (11, 17, 40), (4, 4, 4), (3, 9, 64)])
def test_any_size_gives_one_opinion(size):
    network = made(size).train()
    assert network(*sample(3, size)).shape == (3, 2)


def test_short_edges_are_not_halved_to_nothing():
    assert halvings((192, 192, 192)) == [(2, 2, 2)] * 4
    assert halvings((8, 16, 64)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2)]
