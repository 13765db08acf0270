"""What executes the network: the choice of backend and precision, PyTorch, and means over folds."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nnunet_flare.errors import InputError
from nnunet_flare.inference.choices import BACKENDS, PRECISIONS
from nnunet_flare.inference.held import BENCHMARK, EXACT
from nnunet_flare.inference.windows import Forward

if TYPE_CHECKING:
    from nnunet_flare.inference.model import Model

log = logging.getLogger(__name__)

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU features with which bfloat16 products are faster than single precision."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Quota and period of the control group: what ``docker run --cpus`` sets."""


def choose_precision(asked: str, device: torch.device) -> str:
    """The precision to compute in: what was asked for, else what the hardware is fast at. Nothing is measured.

    ``auto`` is half precision on CUDA, bfloat16 on CPUs with instructions for it, single precision elsewhere.

    Raises:
        InputError: for an unknown precision, or half precision on a CPU.
    """
    if asked not in PRECISIONS:
        raise InputError(f"precision {asked!r}: expected one of {', '.join(PRECISIONS)}")
    if asked == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU; on a CPU choose bf16, fp32 or auto")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "fp16"
    return "bf16" if device.type == "cpu" and BF16_FLAGS & cpu_flags() else "fp32"


def choose_backend(asked: str, device: torch.device) -> str:
    """The backend: what was asked for, else OpenVINO on a CPU where it is installed, else PyTorch.

    Raises:
        InputError: for an unknown backend, OpenVINO on a GPU, or OpenVINO where it is not installed.
    """
    if asked not in BACKENDS:
        raise InputError(f"backend {asked!r}: expected one of {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("openvino") is not None
    if asked == "openvino" and device.type != "cpu":
        raise InputError(f"backend openvino runs on the CPU, not on {device.type}; use -device cpu")
    if asked == "openvino" and not installed:
        raise InputError("backend openvino is not installed: pip install 'nnunet-flare[openvino]'")
    if asked == "auto":
        return "openvino" if device.type == "cpu" and installed else "torch"
    return asked


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Feature flags of the first CPU; empty where the system does not tell (other systems than Linux)."""
    path = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not path.is_file():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def usable_cpus(quota_file: Path = CPU_QUOTA) -> int:
    """CPUs that this process may use: those it may run on, and no more than its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """A network on a device, in one precision: a window (1, C, z, y, x) to scores (K, z, y, x).

    Half precision is autocast's, as in stock nnU-Net: products are computed in it, while weights, running statistics
    and what normalisations learn stay in single precision. Single precision on CUDA is no TF32.
    """

    def __init__(self, network: nn.Module, *, device: torch.device, precision: str, two_d: bool = False) -> None:
        self._device, self._precision, self._two_d = device, precision, two_d
        self._network = network.to(device, torch.float32)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        window = window.to(self._device, torch.float32)
        with ExitStack() as stack:
            if self._precision in HALF_TYPES:
                stack.enter_context(torch.autocast(self._device.type, dtype=HALF_TYPES[self._precision]))
            if self._device.type == "cuda":
                stack.enter_context(BENCHMARK.hold())
                if self._precision == "fp32":
                    stack.enter_context(EXACT.hold())
            if self._two_d:
                return self._network(window[:, :, 0])[0][:, None]
            return self._network(window)[0]


def open_runtime(
    model: Model,
    *,
    backend: str,
    fall_back: bool,
    device: torch.device,
    precision: str,
    patch: Sequence[int],
    two_d: bool,
) -> Forward:
    """What executes a model's network for windows of one size.

    Args:
        model: with its weights.
        backend: ``torch`` or ``openvino``.
        fall_back: whether PyTorch takes over a network that OpenVINO does not run.
        device: of PyTorch.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        patch: window size (z, y, x).
        two_d: whether the network takes single slices.

    Raises:
        InputError: when the checkpoint does not fit the network, or OpenVINO alone may run it and does not.
    """
    network = model.network()
    if backend == "openvino":
        from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

        try:
            return OpenVinoRuntime(model, network, patch=patch, precision=precision, two_d=two_d)
        except RuntimeError as error:
            if not fall_back:
                raise InputError(f"{model.member}: OpenVINO does not run this network ({error})") from error
            log.warning("OpenVINO does not run this network (%s); PyTorch does", str(error).splitlines()[0])
    return TorchRuntime(network, device=device, precision=precision, two_d=two_d)


def averaged(forwards: Sequence[Forward]) -> Forward:
    """The mean of several networks' scores, as stock nnU-Net averages folds."""
    if len(forwards) == 1:
        return forwards[0]

    def average(window: torch.Tensor) -> torch.Tensor:
        total = forwards[0](window).float().clone()
        for forward in forwards[1:]:
            total += forward(window)
        return total.div_(len(forwards))

    return average


def stacked(forwards: Sequence[Forward]) -> Forward:
    """All networks' scores one after the other along the class axis."""
    return lambda window: torch.cat([forward(window) for forward in forwards])
