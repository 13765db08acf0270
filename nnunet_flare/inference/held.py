"""Settings of the whole process that a prediction wants otherwise for a while: TF32, cuDNN's benchmarks.

Predictions of several threads may overlap. The first one in notes what a setting was, the last one out restores it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Held:
    """A setting, how it is read and how it is written, and the value that it has while someone holds it."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.Lock()
        self._holders, self._before = 0, None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A block in which the setting has its value."""
        with self._lock:
            if self._holders == 0:
                self._before = self._read()
            self._holders += 1
            self._write(self._value)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._write(self._before)


_Flags = list[tuple[Any, str, Any]]
"""Places with a setting's name and its value there."""


def _read_tf32() -> _Flags:
    """What the process says about TF32 in place of single precision."""
    places = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
    try:
        return [(place, name, getattr(place, name)) for place, name in places]
    except RuntimeError:  # set by the newer names, for some operations alone, which the older ones cannot tell
        newer: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
        return [(place, "fp32_precision", place.fp32_precision) for place in newer]


def _write_tf32(flags: _Flags | None) -> None:
    """Set what was read before; None: no TF32 anywhere."""
    for place, name, value in flags or [(*known, _NO_TF32[known[1]]) for known in _places()]:
        if getattr(place, name) != value:
            setattr(place, name, value)


def _places() -> list[tuple[Any, str]]:
    return [(place, name) for place, name, _ in _read_tf32()]


_NO_TF32 = {"allow_tf32": False, "fp32_precision": "ieee"}

EXACT = Held(_read_tf32, _write_tf32, None)
"""Single precision is single precision on CUDA too, not TF32 with its 10 bits."""


def _write_benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


BENCHMARK = Held(lambda: torch.backends.cudnn.benchmark, _write_benchmark, True)
"""cuDNN tries its algorithms once per window size, which a prediction does not change."""
