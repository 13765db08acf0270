"""A smooth multiplicative bias field, as receive coils of an MR scanner leave it.

The logarithm of the field is a polynomial of the position (Van Leemput et al., IEEE TMI 1999), its coefficients drawn
as for augmentation (Sudre et al. 2017, as TorchIO's RandomBiasField has it). Signals are counted from the lowest value
of the patch, because normalised arrays have no zero of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

ORDER = 3
"""Order of the polynomial: TorchIO's default."""
COEFFICIENT = 0.2
"""Largest coefficient: one voxel in twenty changes by more than a factor of 1.6. With TorchIO's 0.5 that factor is 3,
and organs no longer differ by their signal."""


def exponents(dimensions: int, order: int = ORDER) -> list[tuple[int, ...]]:
    """The exponents of all monomials of degree 1 to ``order``; a constant would only scale the patch."""
    everything = itertools.product(range(order + 1), repeat=dimensions)
    return [powers for powers in everything if 1 <= sum(powers) <= order]


def log_field(shape: Sequence[int], coefficients: torch.Tensor) -> torch.Tensor:
    """The polynomial over a patch, whose axes run from -1 to 1; one coefficient for each of :func:`exponents`."""
    total = torch.zeros(tuple(shape))
    axes = [torch.linspace(-1, 1, edge) if edge > 1 else torch.zeros(1) for edge in shape]
    for powers, coefficient in zip(exponents(len(shape)), coefficients, strict=True):
        term = coefficient
        for axis, (values, power) in enumerate(zip(axes, powers, strict=True)):
            term = term * (values**power).reshape([-1 if other == axis else 1 for other in range(len(shape))])
        total += term
    return total


class BiasFieldTransform(ImageOnlyTransform):
    """Multiplies a sample by one random field, in place; all channels by the same."""

    def __init__(self, coefficient: float = COEFFICIENT) -> None:
        super().__init__()
        self.coefficient = coefficient

    def get_parameters(self, **data_dict: Any) -> dict:
        count = len(exponents(data_dict["image"].ndim - 1))
        return {"coefficients": (2 * torch.rand(count) - 1) * self.coefficient}

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        field = torch.exp(log_field(img.shape[1:], params["coefficients"])).to(img.dtype)
        for channel in img:
            low = channel.min()
            channel.sub_(low).mul_(field).add_(low)
        return img
