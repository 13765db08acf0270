"""Random convolutions: a patch through a shallow network of random weights, mixed with itself.

Xu et al. (ICLR 2021) showed that random filters keep shapes and change textures and contrasts; here it is the
volumetric form of Ouyang et al. (GIN, IEEE TMI 2023): four layers of 1- or 3-voxel kernels with leaky ReLUs between
them, mixed with the patch by a random share, and brought back to the patch's norm. Weights are drawn anew for every
sample and channel. Other than theirs, the background stays dark: it gets the values of the darkest hundredth of tissue.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from torch.nn import functional

from nnunet_flare.trainers.transforms.background import background_edge
from nnunet_flare.trainers.transforms.histogram import tissue_sample

LAYERS, HIDDEN, SLOPE = 4, 2, 0.01
"""GIN's: number of layers, channels between them, slope of the leaky ReLU."""
KERNELS = (1, 3)
DARKEST = 0.01
"""Quantile of tissue that the background gets, and below which no tissue lies: at the rim of a patch, which is padded
with zeros, filters leave single values far below all others."""

Layer = tuple[torch.Tensor, torch.Tensor]
"""Weight (out, in, k, ...) and bias (out,) of one convolution."""


def random_layers(dimensions: int) -> list[Layer]:
    """Weights and biases of a network from one channel to one, all from the standard normal distribution."""
    widths = [1, *[HIDDEN] * (LAYERS - 1), 1]
    layers = []
    for inside, outside in itertools.pairwise(widths):
        edge = KERNELS[int(torch.randint(len(KERNELS), (1,)))]
        layers.append((torch.randn(outside, inside, *[edge] * dimensions), torch.randn(outside)))
    return layers


def through(channel: torch.Tensor, layers: list[Layer]) -> torch.Tensor:
    """One channel, (Z, Y, X) or (Y, X), through the layers, zero padded, at the size that it has."""
    convolve = functional.conv3d if channel.ndim == 3 else functional.conv2d
    values = channel[None, None]
    for number, (weight, bias) in enumerate(layers):
        if number:
            values = functional.leaky_relu(values, SLOPE)
        values = convolve(values, weight.to(values), bias.to(values), padding=weight.shape[-1] // 2)
    return values[0, 0]


class RandomConvolutionTransform(ImageOnlyTransform):
    """Mixes every channel of a sample with its image under random layers; the norm stays, and the background dark."""

    def get_parameters(self, **data_dict: Any) -> dict:
        image = data_dict["image"]
        return {"layers": [random_layers(image.ndim - 1) for _ in image], "shares": torch.rand(len(image))}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel, layers, share in zip(img, params["layers"], params["shares"], strict=True):
            mixed = share * through(channel, layers) + (1 - share) * channel
            _, edge, _ = background_edge(channel)
            darkest = torch.quantile(tissue_sample(mixed, channel > edge), DARKEST)
            mixed = torch.where(channel > edge, mixed.clamp_min(darkest), darkest)
            channel.copy_(mixed * (channel.norm() / mixed.norm().clamp_min(1e-8)))
        return img
