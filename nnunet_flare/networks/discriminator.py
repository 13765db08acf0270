"""SZTU's discriminator (S4, seed-systems 4.4): of an image and two masks of it, which mask is better.

Image and masks each have a stream of their own first; three shared levels follow, and a maximum over space makes one
vector of each, whatever the size. Where the released code joins the three vectors of a batch along the batch axis,
which mixes its images, they are joined along the channels here; where it puts a softmax in front of the cross-entropy,
this returns logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnunet_flare.networks import blocks
from nnunet_flare.networks.blocks import Layers, ResidualUnit

FEATURES = 64
"""Channels of the streams (S4); the shared levels have two, four and eight times as many."""
SHARED_LEVELS = 3
DROPOUT = 0.2
NEGATIVE_SLOPE = 0.01
MIN_EDGE = 4
"""A shorter edge is not halved, so that at least two voxels are left to normalise."""


def halvings(patch_size: Sequence[int]) -> list[tuple[int, int, int]]:
    """Strides of the four levels for patches of this size: 2 along every axis that is long enough."""
    edges = [int(edge) for edge in patch_size]
    strides = []
    for _ in range(1 + SHARED_LEVELS):
        stride = blocks.axes([2 if edge >= MIN_EDGE else 1 for edge in edges])
        edges = [-(-edge // step) for edge, step in zip(edges, stride, strict=True)]
        strides.append(stride)
    return strides


class Discriminator(nn.Module):
    """Logits (B, 2), "the first mask is better" and "the second is", of an image and two masks.

    Args:
        image_channels: of the image.
        mask_channels: of each mask: one per organ, no background.
        patch_size: (z, y, x) of the patches it will see.
        features: channels of the three streams.
    """

    def __init__(
        self, image_channels: int, mask_channels: int, patch_size: Sequence[int], *, features: int = FEATURES
    ) -> None:
        super().__init__()
        layers = Layers(nn.Dropout3d, {"p": DROPOUT}, nn.LeakyReLU, {"negative_slope": NEGATIVE_SLOPE, "inplace": True})
        strides = halvings(patch_size)
        self.streams = nn.ModuleList(
            ResidualUnit(channels, features, layers, stride=strides[0])
            for channels in (image_channels, mask_channels, mask_channels)
        )
        widths = [features * 2**level for level in range(1 + SHARED_LEVELS)]
        self.shared = nn.Sequential(
            *(
                ResidualUnit(thin, wide, layers, stride=stride)
                for thin, wide, stride in zip(widths, widths[1:], strides[1:], strict=False)
            )
        )
        self.head = nn.Linear(len(self.streams) * widths[-1], 2)
        self.apply(blocks.initialize)

    def forward(self, image: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Of image (B, C, z, y, x) and masks (B, K, z, y, x)."""
        parts = zip(self.streams, (image, first, second), strict=True)
        vectors = [self.shared(stream(part)).amax((2, 3, 4)) for stream, part in parts]
        logits: torch.Tensor = self.head(torch.cat(vectors, dim=1))
        return logits
