"""Histogram matching: a patch gets the grey values of a scan of another modality.

The values of tissue are mapped piecewise linearly so that their percentiles become those of a reference (Nyul, Udupa
and Zhang, IEEE TMI 2000, with all percentiles as landmarks); the background gets the reference's, straight from its
lowest value to its darkest tissue. References are the unlabelled scans of a run. The map is monotone: what it cannot
turn round, the other transforms of the chain do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

from nnunet_flare.trainers.transforms.background import background_edge

PERCENTILES = 101
SAMPLE_VOXELS = 1_000_000
"""Percentiles are those of about as many voxels, evenly from all of an array."""


def tissue_sample(channel: torch.Tensor, is_tissue: torch.Tensor) -> torch.Tensor:
    """Float32 values of up to about :data:`SAMPLE_VOXELS` voxels of tissue; the highest of all where there is none."""
    stride = max(1, channel.numel() // SAMPLE_VOXELS) | 1
    found = channel.reshape(-1)[::stride][is_tissue.reshape(-1)[::stride]].to(torch.float32)
    return found if found.numel() else channel.max().to(torch.float32)[None]


def landmarks(channel: torch.Tensor) -> torch.Tensor:
    """(1 + :data:`PERCENTILES`,) the lowest value of a channel, and the percentiles 0 to 100 of what is tissue."""
    low, edge, _ = background_edge(channel)
    tissue = tissue_sample(channel, channel > edge)
    found = torch.quantile(tissue, torch.linspace(0, 1, PERCENTILES))
    return torch.cat([torch.tensor([low]), found])


def matched(channel: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A channel of any shape with the grey values that ``reference``, another's :func:`landmarks`, describes."""
    values = np.interp(channel.numpy(), landmarks(channel).numpy(), reference.numpy()).astype(np.float32)
    return torch.from_numpy(values).to(channel.dtype)


class HistogramMatchTransform(ImageOnlyTransform):
    """Matches a sample to one of some references, drawn anew for every sample.

    Args:
        references: (landmarks of every channel) of each reference scan, (C, 1 + PERCENTILES).
    """

    def __init__(self, references: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.references = list(references)

    def get_parameters(self, **data_dict: Any) -> dict:
        return {"reference": self.references[int(torch.randint(len(self.references), (1,)))]}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        for channel, reference in zip(img, params["reference"], strict=True):
            channel.copy_(matched(channel, reference))
        return img
