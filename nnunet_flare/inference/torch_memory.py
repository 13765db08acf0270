"""What a window of a PyTorch network takes on the CPU, counted without computing anything.

The network is gone through with tensors that have a shape and no values. What is alive is counted at each step. A
convolution also copies what it takes and what it gives into oneDNN's own order of values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_flare.wording import first_line

MORE = 1.1
"""What is lost between blocks of memory, as a factor."""

FIRST_USE = 120 << 20
"""Pages of PyTorch's libraries that a process has only once a network ran, and what its allocator keeps.

The first window of a tiny network takes 80 MB more than is counted, one of a large network (660 MB in bfloat16, 1320 MB
in single precision) 150 to 160 MB."""


def bytes_of_window(network: nn.Module, shape: Sequence[int], *, autocast: torch.dtype | None = None) -> int:
    """Bytes that a network's window takes at most: its input, intermediate results and scores, :data:`FIRST_USE` apart.

    Args:
        network: on any device; its weights are not counted.
        shape: of the window as the network takes it, (1, C, z, y, x) or (n, C, y, x).
        autocast: half precision of products, where they are computed in it.

    Raises:
        RuntimeError: for a network whose steps depend on values.
    """
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            pretended: dict[int, Any] = {
                id(value): _like(value) for value in (*network.parameters(), *network.buffers())
            }
            copied = copy.deepcopy(network, pretended)  # of everything but the values
            window = torch.empty(tuple(shape))
            half = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
            with half, _Alive() as alive:
                scores = copied(window)
    except Exception as error:  # what pretended tensors raise has nothing in common
        raise RuntimeError(f"its steps cannot be counted: {first_line(error)}") from error
    single = 0 if scores.dtype == torch.float32 else scores.numel() * (4 + scores.element_size())
    return int(MORE * (4 * math.prod(shape) + max(alive.most, single)))


def _like(value: torch.Tensor) -> torch.Tensor:
    """A weight or buffer without values."""
    empty = torch.empty(value.shape, dtype=value.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


class _Alive(TorchDispatchMode):
    """Notes the most bytes that were alive at once of all that was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [one for one in (found if isinstance(found, (tuple, list)) else [found]) if torch.is_tensor(one)]
        for tensor in given:
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        alive = sum(size for _, size in self._made.values())
        if "convolution" in str(func):
            alive += sum(tensor.numel() * tensor.element_size() for tensor in (args[0], *given))
        self.most = max(self.most, alive)
        return found
