"""Where arrays lie: on the CPU, or on a GPU. Nothing of PyTorch is imported until a tensor or a GPU comes."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunet_flare.inference.arrays import HOST, Array, BFloat16, Place


def place_at(device: Any) -> Place:
    """The place of arrays on a device, PyTorch's or of :mod:`nnunet_flare.inference.devices`."""
    if device.type == "cpu":
        return HOST
    from nnunet_flare.inference.torch_arrays import OnDevice

    return OnDevice(device)


def place_of(array: Array) -> Place:
    """Where an array lies; a tensor on the CPU is one of its arrays after :meth:`Place.take`."""
    return HOST if isinstance(array, (np.ndarray, BFloat16)) else place_at(array.device)


def is_on_gpu(array: Array) -> bool:
    """Whether an array is a tensor on another device than the CPU."""
    return place_of(array) is not HOST
