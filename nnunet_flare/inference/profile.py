"""Wall time per stage of a prediction.

A GPU works behind the program's back. With ``waits`` a stage ends when the GPU has done what the stage asked of it, so
that the network's time is not booked where its result is first looked at; without, nothing waits.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Profile:
    """Adds up seconds and calls per stage; stages of several threads overlap, so that they may exceed the wall time."""

    def __init__(self, *, waits: bool = False) -> None:
        self._waits = waits
        self._lock = threading.Lock()
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.shares: dict[str, list[float]] = {}
        self._prefix = ""

    def part(self, prefix: str) -> Profile:
        """A profile whose stages are entered here, under their names behind ``prefix``."""
        part = copy.copy(self)
        part._prefix = self._prefix + prefix
        return part

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def settle(self, array: Any) -> None:
        """Wait, at the end of a stage, for the GPU that makes this array."""
        device = getattr(array, "device", None)
        kind = getattr(device, "type", "cpu")
        if self._waits and kind in ("cuda", "mps"):
            import torch

            if kind == "cuda":
                torch.cuda.synchronize(device)
            else:
                torch.mps.synchronize()

    def add(self, name: str, seconds: float, calls: int = 1) -> None:
        """Add a time measured elsewhere."""
        name = self._prefix + name
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.calls[name] = self.calls.get(name, 0) + calls

    def share(self, name: str, share: float) -> None:
        """Note a part of a whole (0 to 1) of one scan."""
        with self._lock:
            self.shares.setdefault(name, []).append(share)

    def table(self) -> str:
        """One line per stage, in the order of their first end, the wall time since the start, and mean shares."""
        with self._lock:
            shares = {name: (100 * sum(values) / len(values), len(values)) for name, values in self.shares.items()}
            rows = [(name, self.seconds[name], self.calls[name]) for name in self.seconds]
        width = max([len("stage"), *(len(name) for name, *_ in rows)])
        lines = [f"{'stage':<{width}}  {'seconds':>9}  {'calls':>6}"]
        lines += [f"{name:<{width}}  {seconds:>9.2f}  {calls:>6}" for name, seconds, calls in rows]
        lines.append(f"{'wall time':<{width}}  {time.perf_counter() - self._start:>9.2f}")
        lines += [f"{name}: {percent:.1f} % (mean of {scans})" for name, (percent, scans) in shares.items()]
        return "\n".join(lines)
