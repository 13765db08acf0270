"""Where and how a scan is computed so that it keeps to the memory that there is and that the settings allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from nnunet_flare.inference import memory
from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.attempts import Way
from nnunet_flare.inference.augment import central_crop
from nnunet_flare.inference.devices import Device
from nnunet_flare.inference.memory import FLOAT_BYTES, Need, affordable, sums_device, volume_device
from nnunet_flare.inference.networks import Networks
from nnunet_flare.inference.scans import PreparedScan
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.sliding import Slider
from nnunet_flare.inference.windows import Forward

Result = TypeVar("Result")


class Fitting:
    """Chooses window policy, device and place of the sums for each scan, and lets the networks work there."""

    def __init__(self, networks: Networks, slider: Slider, settings: PredictionSettings) -> None:
        self._networks, self._slider, self._settings = networks, slider, settings

    def device_for(self, needed: int) -> Device:
        """Where a scan is prepared that needs so many bytes there: on the GPU where it has room."""
        return volume_device(self._networks.device, self._settings.gpu_memory_gb, needed)

    def within_limits(
        self,
        scan: PreparedScan,
        policies: Sequence[str],
        heads: int,
        maps: int,
        work: Callable[[list[Forward], Way, str], Result],
        *,
        by_rows: bool = False,
    ) -> Result:
        """What ``work`` makes with the first of the window policies that keeps to the memory limits."""
        self._networks.load()

        window = self.window_bytes(apart=heads > self._slider.heads)

        def wanted(policy: str) -> Need:
            found = self.need(scan.shape, scan.grid.array.shape, heads, maps, policy, by_rows=by_rows)
            return found if window is None else replace(found, window=window)

        policy = affordable(scan.name, self._settings.max_memory_gb, policies, wanted)
        sums = wanted(policy).scores
        return self._attempt(scan.name, scan.prepared.data, sums, lambda forwards, way: work(forwards, way, policy))

    def window_bytes(self, *, apart: bool) -> int | None:
        """What windows take on the CPU, where a limit asks; None where the scores tell, as of a network on a GPU."""
        if self._settings.max_memory_gb is None or self._networks.device.type != "cpu":
            return None
        scores = FLOAT_BYTES * self._slider.heads * math.prod(self._slider.patch)
        counted = self._networks.window_bytes(scores, apart=apart)
        softmax = 2 * scores if self._settings.windows == "huang" else 0
        return None if counted is None else counted + softmax

    def on_best_device(self, data: Array, work: Callable[[list[Forward], Way], Result]) -> Result:
        """What ``work`` makes of a preprocessed scan (C, z, y, x)."""
        self._networks.load()
        shape = tuple(data.shape[1:])
        wanted = self.need(shape, shape, self._slider.heads, 1, self._settings.windows)
        return self._attempt("preprocessed scan", data, wanted.scores, work)

    def _attempt(self, case: str, data: Array, sums: int, work: Callable[[list[Forward], Way], Result]) -> Result:
        """What ``work`` makes with the networks, scan and sums where they fit, in a precision that suffices."""
        device, limit = self._networks.device, self._settings.gpu_memory_gb
        at = sums_device(device, limit, sums)
        if isinstance(data, np.ndarray):
            volume = volume_device(device, limit, data.size * FLOAT_BYTES, sums if at.type == "cuda" else 0)
        else:  # it lies there already
            volume = device
        return self._networks.attempt(case, at, volume, work)

    def need(
        self, grid: Sequence[int], image: Sequence[int], heads: int, maps: int, policy: str, *, by_rows: bool = False
    ) -> Need:
        middle = None
        if self._settings.tta == "crop-rotate":
            middle = [part.stop - part.start for part in central_crop(grid)]
        whole, on_cpu = policy == "skip-empty", self._networks.device.type == "cpu"
        rows = by_rows and on_cpu and policy == "all" and middle is None
        found = memory.need(
            grid, image, self._slider.patch, heads=heads, maps=maps, whole_volume=whole, by_rows=rows, kept=middle
        )
        return found if whole or on_cpu else replace(found, sums=self._slider.batch * found.sums)
