"""What executes a trained network that PyTorch built: PyTorch itself on any device, or OpenVINO."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.devices import computes_bf16, of_torch, say_no_bf16
from nnunet_flare.inference.held import BENCHMARK, EXACT
from nnunet_flare.inference.opened import Execution, Runtime, WindowBytes
from nnunet_flare.inference.remembered import remember
from nnunet_flare.wording import first_line

if TYPE_CHECKING:
    from nnunet_flare.inference.model import Model

log = logging.getLogger(__name__)

HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """A network on a device, in one precision: a window (1, C, z, y, x) to scores (K, z, y, x).

    A 2-D network takes the slices of a window as samples of one batch.

    Scores of a CPU are a NumPy array, of a GPU a tensor there.

    Half precision is autocast's, as in stock nnU-Net: products are computed in it, while weights, running statistics
    and what normalisations learn stay in single precision. Single precision on CUDA is no TF32.
    Where PyTorch has no bfloat16 products, single precision is used.
    """

    def __init__(self, network: nn.Module, *, device: Any, precision: str, two_d: bool = False) -> None:
        self._device, self._two_d = of_torch(device), two_d
        self._precision = precision
        if precision == "bf16" and not computes_bf16(self._device):
            say_no_bf16("PyTorch", str(self._device))
            self._precision = "fp32"
        self._network = network.to(self._device, torch.float32)
        self._has_run = False

    def __call__(self, window: Array) -> Array:
        if isinstance(window, np.ndarray):
            window = torch.from_numpy(np.ascontiguousarray(window))
        with torch.inference_mode():
            scores = self._scores(window.to(self._device, torch.float32))
        self._has_run = True
        return scores.float().numpy() if self._device.type == "cpu" else scores

    def window_bytes(self, window: Sequence[int]) -> WindowBytes:
        """As :class:`nnunet_flare.inference.opened.Runtime`, on the CPU."""
        from nnunet_flare.inference.torch_memory import FIRST_USE, bytes_of_window

        shape = (*window[:2], *window[3:]) if self._two_d else window
        counted = bytes_of_window(self._network, shape, autocast=HALF_TYPES.get(self._precision))
        return WindowBytes(kept=0, passing=counted + (0 if self._has_run else FIRST_USE))

    def _scores(self, window: torch.Tensor) -> torch.Tensor:
        with ExitStack() as stack:
            if self._precision in HALF_TYPES:
                stack.enter_context(torch.autocast(self._device.type, dtype=HALF_TYPES[self._precision]))
            if self._device.type == "cuda":
                stack.enter_context(BENCHMARK.hold())
                if self._precision == "fp32":
                    stack.enter_context(EXACT.hold())
            if self._two_d and window.shape[2] > 1:
                return self._network(window[0].transpose(0, 1)).transpose(0, 1)
            if self._two_d:
                return self._network(window[:, :, 0])[0][:, None]
            return self._network(window)[0]


def open_runtime(model: Model, how: Execution) -> Runtime:
    """What executes a model's network.

    Raises:
        InputError: when the checkpoint does not fit the network, or OpenVINO alone may run it and does not.
    """
    network = model.network()
    if how.backend == "openvino":
        from nnunet_flare.inference.openvino_conversion import openvino_network
        from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

        try:
            source = openvino_network(model, network, patch=how.patch, two_d=how.two_d)
            runtime = OpenVinoRuntime(source, precision=how.precision, two_d=how.two_d)
        except (RuntimeError, ImportError) as error:  # of an installation that is not whole
            if not how.fall_back:
                raise InputError(f"{model.member}: OpenVINO cannot run this network ({error})") from error
            log.warning("OpenVINO cannot run this network (%s); PyTorch runs it", first_line(error))
        else:
            if isinstance(source, Path):
                remember(model, source)
            return runtime
    return TorchRuntime(network, device=how.device, precision=how.precision, two_d=how.two_d)
