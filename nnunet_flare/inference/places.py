"""Where scores lie: on the CPU, or on a GPU. Nothing of PyTorch is imported until a tensor or a GPU comes."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunet_flare.inference.arrays import HOST, Array, BFloat16, Place
from nnunet_flare.inference.planes import HostPlanes, Planes


def place_at(device: Any) -> Place:
    """The place of arrays on a device, PyTorch's or of :mod:`nnunet_flare.inference.devices`."""
    if device.type == "cpu":
        return HOST
    from nnunet_flare.inference.torch_arrays import OnDevice

    return OnDevice(device)


def place_of(array: Array) -> Place:
    """Where an array lies; a tensor on the CPU is one of its arrays after :meth:`Place.take`."""
    return HOST if isinstance(array, (np.ndarray, BFloat16)) else place_at(array.device)


def planes_beside(scores: Array, host: HostPlanes) -> Planes:
    """What makes labels of slices where their scores lie, as ``host`` does on the CPU."""
    if isinstance(scores, np.ndarray) or scores.device.type == "cpu":
        return host
    from nnunet_flare.inference.torch_planes import DevicePlanes

    return DevicePlanes(host)
