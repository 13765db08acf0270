"""Running a command while sampling the memory and processor use of its process tree and of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO

import psutil

from nnunet_flare.children import users_environment
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.gpu import Gpu, GpuReading
from nnunet_flare.signals import held_back

INTERVAL_S = 0.1
"""The official sampling period."""

CPU_FLOOR_S = 0.1
"""The official script adds this to the processor time that a share is taken of, so that its shares stay below 100 %."""

GRACE_S = 5.0
"""An interrupted command gets this long to end before it is killed."""

MIB = 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """One sample; memory in MiB, ``seconds`` since the start. GPU values are None without a GPU.

    ``cpu_percent`` is the machine's, by the official formula (100 = all cores); ``tree_cpu_percent`` that of the
    process tree (100 = one core); ``tree_ram_mb`` counts memory shared by processes once (PSS) where the system tells.
    All of the tree are None where its processes were never seen.
    """

    seconds: float
    cpu_percent: float
    ram_mb: float
    tree_cpu_percent: float | None
    tree_ram_mb: float | None
    gpu_mb: float | None
    tree_gpu_mb: float | None


@dataclass(frozen=True)
class Recording:
    """What a command used: wall time and processor time in s, samples, and the state of the machine before it.

    The processor time is None where the processes were never seen. ``interval_s`` is the nominal time between samples.
    """

    seconds: float
    cpu_seconds: float | None
    exit_code: int
    samples: tuple[Sample, ...]
    baseline_ram_mb: float
    baseline_gpu_mb: float | None
    interval_s: float = INTERVAL_S


def record(
    command: Sequence[str],
    *,
    gpu: Gpu | None,
    interval_s: float = INTERVAL_S,
    processes: Callable[[int], list[psutil.Process]] | None = None,
    output: IO[bytes] | None = None,
) -> Recording:
    """Run a command to its end and sample it.

    An interruption is passed on to the command's whole process group.

    Args:
        command: its words.
        gpu: the GPU to ask beside it.
        interval_s: seconds between samples.
        processes: gives those that are measured, from the command's own number; None takes the command and all below.
        output: where stdout and stderr go; None where ours go.

    Raises:
        InputError: when the command cannot be started.
    """
    baseline = gpu.read(()) if gpu is not None else None
    baseline_ram = psutil.virtual_memory().used / MIB
    start = time.perf_counter()
    process = sampler = None
    try:
        with held_back(signal.SIGINT, signal.SIGTERM):  # until the command, which runs already, can be ended
            process = _started(command, output)
            latest = None if gpu is None else _LatestGpu(gpu, baseline)
            sampler = _Sampler(process.pid, processes or tree, latest, start, interval_s)
            sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        if process is not None:
            _end_group(process)
        raise
    finally:
        if sampler is not None:
            sampler.stop()
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    return Recording(
        seconds,
        usage.ru_utime + usage.ru_stime if processes is None else sampler.cpu_seconds,
        process.returncode,
        tuple(sampler.samples if sampler.cpu_seconds is not None else map(_without_tree, sampler.samples)),
        baseline_ram,
        None if baseline is None else baseline.device_mb,
        interval_s,
    )


def _started(command: Sequence[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(command), env=users_environment(), start_new_session=True, stdout=output, stderr=output
        )
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be started ({error.strerror}); expected a program after --") from error


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with suppress(psutil.Error):
        return [psutil.Process(pid), *below(pid)]
    return []


def below(pid: int) -> list[psutil.Process]:
    """All processes below one, without itself."""
    with suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def _without_tree(sample: Sample) -> Sample:
    return replace(sample, tree_cpu_percent=None, tree_ram_mb=None, tree_gpu_mb=None)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Sampler(threading.Thread):
    """Takes samples on a fixed time grid until stopped; a late sample keeps its true time.

    ``cpu_seconds`` is what the processes had used when they were last seen, those that ended before them included;
    None before any was seen.
    """

    def __init__(
        self,
        pid: int,
        processes: Callable[[int], list[psutil.Process]],
        gpu: _LatestGpu | None,
        start: float,
        interval_s: float,
    ) -> None:
        super().__init__(name="resource sampler", daemon=True)
        self.samples: list[Sample] = []
        self.cpu_seconds: float | None = None
        self._root = pid
        self._processes = processes
        self._start_time = start
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._tree_cpu: dict[int, float] = {}
        self._machine_cpu = psutil.cpu_times()
        self._last_tick = start
        self._gpu = gpu

    def run(self) -> None:
        tick = 0
        while True:
            self.samples.append(self._sample())
            tick = max(tick + 1, int((time.perf_counter() - self._start_time) / self._interval_s) + 1)
            if self._ended.wait(max(0.0, self._start_time + tick * self._interval_s - time.perf_counter())):
                return

    def stop(self) -> None:
        self._ended.set()
        self.join()
        if self._gpu is not None:
            self._gpu.stop()

    def _sample(self) -> Sample:
        processes = self._processes(self._root)
        tree_cpu_s, tree_ram_mb, whole_cpu_s = 0.0, 0.0, 0.0
        for process in processes:
            with suppress(psutil.Error):
                tree_cpu_s += self._cpu_since_last(process)
                whole_cpu_s += sum(process.cpu_times()[:4])  # with the children it has seen the end of
                tree_ram_mb += _memory_mb(process)
        if processes:
            self.cpu_seconds = max(self.cpu_seconds or 0.0, whole_cpu_s)
        reading = self._gpu.latest([p.pid for p in processes]) if self._gpu is not None else None
        now = time.perf_counter()
        elapsed, self._last_tick = now - self._last_tick, now
        return Sample(
            now - self._start_time,
            self._machine_percent(),
            psutil.virtual_memory().used / MIB,
            100 * tree_cpu_s / elapsed if elapsed > 0 else 0.0,
            tree_ram_mb,
            None if reading is None else reading.device_mb,
            None if reading is None else reading.processes_mb,
        )

    def _cpu_since_last(self, process: psutil.Process) -> float:
        times = process.cpu_times()
        total = times.user + times.system
        since = total - self._tree_cpu.get(process.pid, 0.0)
        self._tree_cpu[process.pid] = total
        return max(0.0, since)

    def _machine_percent(self) -> float:
        now, before = psutil.cpu_times(), self._machine_cpu
        self._machine_cpu = now
        user, system, idle = now.user - before.user, now.system - before.system, now.idle - before.idle
        return 100 - 100 * idle / (user + system + idle + CPU_FLOOR_S)


def _memory_mb(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss / MIB
    except (AttributeError, psutil.AccessDenied):
        return process.memory_info().rss / MIB


class _LatestGpu(threading.Thread):
    """Asks the GPU over and over in its own thread, because nvidia-smi answers slower than the sampling period."""

    def __init__(self, gpu: Gpu, first: GpuReading | None) -> None:
        super().__init__(name="GPU sampler", daemon=True)
        self._gpu = gpu
        self._pids: list[int] = []
        self._reading = first
        self._ended = threading.Event()
        self.start()

    def latest(self, pids: list[int]) -> GpuReading | None:
        self._pids = pids
        return self._reading

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self._reading = self._gpu.read(self._pids)
            except Exception:  # a failed query leaves a gap in the curve, never ends the measured command
                self._reading = None
            self._ended.wait(INTERVAL_S / 4)
