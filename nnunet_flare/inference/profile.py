"""Wall time per stage of a prediction."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Profile:
    """Adds up seconds and calls per stage; stages of several threads overlap, so that they may exceed the wall time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float, calls: int = 1) -> None:
        """Add a time measured elsewhere."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.calls[name] = self.calls.get(name, 0) + calls

    def table(self) -> str:
        """One line per stage, in the order of their first end, and the wall time since this profile was made."""
        with self._lock:
            rows = [(name, self.seconds[name], self.calls[name]) for name in self.seconds]
        width = max([len("stage"), *(len(name) for name, *_ in rows)])
        lines = [f"{'stage':<{width}}  {'seconds':>9}  {'calls':>6}"]
        lines += [f"{name:<{width}}  {seconds:>9.2f}  {calls:>6}" for name, seconds, calls in rows]
        lines.append(f"{'wall time':<{width}}  {time.perf_counter() - self._start:>9.2f}")
        return "\n".join(lines)
