"""What executes the network: the choice of backend and precision, threads, and means over folds."""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.choices import BACKENDS, PRECISIONS
from nnunet_flare.inference.places import place_of
from nnunet_flare.inference.windows import Forward

log = logging.getLogger(__name__)

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU features with which bfloat16 products are faster than single precision."""


def choose_precision(asked: str, device: Any) -> str:
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


def choose_backend(asked: str, device: Any) -> str:
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


def averaged(forwards: Sequence[Forward]) -> Forward:
    """The mean of several networks' scores, as stock nnU-Net averages folds."""
    if len(forwards) == 1:
        return forwards[0]

    def average(window: Array) -> Array:
        scores = forwards[0](window)
        place = place_of(scores)
        total = place.copy(scores)
        for forward in forwards[1:]:
            total += place.take(forward(window))
        total /= len(forwards)
        return total

    return average


def stacked(forwards: Sequence[Forward]) -> Forward:
    """All networks' scores one after the other along the class axis."""

    def stack(window: Array) -> Array:
        scores = [forward(window) for forward in forwards]
        place = place_of(scores[0])
        return place.join([place.take(one) for one in scores], 0)

    return stack
