"""Outputs and targets of several resolutions."""

from __future__ import annotations

import torch

from nnunet_flare.trainers.resolutions import at_resolutions


def test_labels_at_the_resolutions_of_deep_supervision() -> None:
    labels = torch.zeros(1, 1, 4, 8, 8, dtype=torch.long)
    labels[..., :4] = 3
    assert at_resolutions(labels, torch.zeros(1, 4, 4, 8, 8)) is labels
    parts = at_resolutions(labels, [torch.zeros(1, 4, 4, 8, 8), torch.zeros(1, 4, 4, 4, 4)])
    assert parts[0] is labels
    assert parts[1].shape == (1, 1, 4, 4, 4)
    assert (parts[1][..., :2] == 3).all() and (parts[1][..., 2:] == 0).all()
