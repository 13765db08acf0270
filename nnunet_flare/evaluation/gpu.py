"""Memory of one NVIDIA GPU, whole device and by process, through NVML or, without its bindings, ``nvidia-smi``."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

MIB = 1024 * 1024

QUERY_SECONDS = 10
"""A driver that answers later than this counts as absent."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuReading:
    """MiB in use on the device (total - free, the driver's share included) and by the asked processes.

    ``processes_mb`` is None where the driver does not tell, as in many containers.
    """

    device_mb: float
    processes_mb: float | None


class Gpu(Protocol):
    """One GPU that can be asked for its memory."""

    def read(self, pids: Collection[int]) -> GpuReading:
        """Memory now, of the device and of the processes ``pids``."""
        ...


def open_gpu(index: int) -> Gpu | None:
    """The GPU of this index, or None where there is none; says why at debug level."""
    for opener in (NvmlGpu, SmiGpu):
        try:
            gpu: Gpu = opener(index)
            gpu.read(())
            return gpu
        except Exception as error:
            # Either way in may be missing or broken in ways of its own (import, library, driver, index, permissions).
            log.debug("no GPU through %s: %s", opener.__name__, error)
    return None


class NvmlGpu:
    """A GPU asked through the NVML bindings (``pip install nvidia-ml-py``), when installed."""

    def __init__(self, index: int) -> None:
        import pynvml  # type: ignore[import-untyped, import-not-found, unused-ignore]

        pynvml.nvmlInit()
        self._nvml: Any = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def read(self, pids: Collection[int]) -> GpuReading:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        used = {p.pid: p.usedGpuMemory for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        return GpuReading((memory.total - memory.free) / MIB, _of_processes(used, pids, MIB))


class SmiGpu:
    """A GPU asked through the ``nvidia-smi`` command."""

    def __init__(self, index: int) -> None:
        if shutil.which("nvidia-smi") is None:
            raise FileNotFoundError("nvidia-smi is not on the PATH")
        self._index = index

    def read(self, pids: Collection[int]) -> GpuReading:
        ((total, free),) = self._query("--query-gpu=memory.total,memory.free")
        used: dict[int, float | None] = {}
        for pid, memory in self._query("--query-compute-apps=pid,used_memory"):
            used[int(pid)] = float(memory) if memory.isdigit() else None
        return GpuReading(float(total) - float(free), _of_processes(used, pids, 1))

    def _query(self, question: str) -> list[list[str]]:
        command = ["nvidia-smi", f"--id={self._index}", question, "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_SECONDS)
        return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]


def _of_processes(used: dict[int, float | None], pids: Collection[int], unit: float) -> float | None:
    known = [used[pid] for pid in pids if pid in used]
    if any(value is None for value in known):
        return None
    return sum(value for value in known if value is not None) / unit
