"""Where networks run, by name: nothing of PyTorch is imported for the CPU."""

from __future__ import annotations

import ctypes
import logging
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_flare.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A device as PyTorch names it; ``str`` gives that name."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")
AMPERE = 8
"""The major compute capability of NVIDIA's first GPUs that multiply in bfloat16."""


def open_device(name: str) -> Device:
    """The device of a name; ``auto`` is CUDA where PyTorch finds a device, else the CPU.

    Raises:
        InputError: when it does not exist here.
    """
    if name == "auto":
        return Device("cuda") if _has_cuda() else CPU
    kind, colon, index = name.partition(":")
    if kind not in ("cuda", "cpu", "mps") or (colon and not index.isdecimal()):
        raise InputError(f"device {name!r}: expected auto, cuda, cpu or mps")
    device = Device(kind, int(index) if colon else None)
    if kind != "cpu":
        _check_accelerator(device)
    return device


def named(device: Device) -> str:
    """A device with the name of its GPU, for messages."""
    if device.type != "cuda":
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(of_torch(device))})"


def of_torch(device: Any) -> Any:
    """PyTorch's device of the same name."""
    import torch

    return torch.device(str(device))


def gpu_number(device: Any) -> int:
    """PyTorch's number of a GPU, the current one's where none was named: not all of its calls take ``cuda`` alone."""
    import torch

    return torch.cuda.current_device() if device.index is None else int(device.index)


def computes_bf16(device: Any) -> bool:
    """Whether PyTorch has bfloat16 products on the device: on x86 from AVX-512 on, on NVIDIA's GPUs from Ampere on.

    Older ones hold such numbers and compute otherwise: a convolution took 80 times as long on a CPU with AVX2.
    """
    import torch

    if device.type == "cpu":
        asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return torch.backends.mkldnn.is_available() and asks is not None and bool(asks())
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(of_torch(device))[0] >= AMPERE
    return True


def lost_gpu() -> str | None:
    """What CUDA says where a GPU that this process uses cannot be used any more; None where all is well.

    After an illegal access to memory or a fault of the card every later call fails in the same way.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        for number in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(number):
                torch.cuda.synchronize(number)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


@cache  # said once, not for every fold
def say_no_bf16(library: str, device: str) -> None:
    """Say that single precision takes the place of bfloat16."""
    log.warning("precision bf16: %s cannot compute in it on this device (%s); fp32 is used", library, device)


def _has_cuda() -> bool:
    if "torch" not in sys.modules and not _has_driver():
        return False
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _has_driver() -> bool:
    """Whether there may be a driver of GPUs: PyTorch, whose import takes a second, finds no device without one."""
    if not sys.platform.startswith("linux") or Path("/dev/kfd").exists():  # AMD's
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _check_accelerator(device: Device) -> None:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"device {device}: needs PyTorch, which is not installed here; use -device cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: no CUDA device was found; use -device auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"device {device}: this process sees {torch.cuda.device_count()} CUDA device(s), from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps: not available here; use -device cpu")
