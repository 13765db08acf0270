"""A request to end (SIGTERM) unwinds the process, so that its locks are given back; its forked workers just end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_active = threading.Event()
_hooks_are_set = threading.Event()  # Python has no way to take a fork hook back
_mask_before_fork = threading.local()


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit in the main thread; outside, what was before. Main thread only.

    nnU-Net ends its forked pool workers with SIGTERM. A worker that is asked before it has the default action again
    would lose the request, and the pool would wait for it for ever: so the signal stays blocked in it until then.
    """
    if not _hooks_are_set.is_set():
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_default_in_child)
        _hooks_are_set.set()
    previous = signal.signal(signal.SIGTERM, _unwind)
    try:
        _active.set()
        yield
    finally:
        _active.clear()
        signal.signal(signal.SIGTERM, previous)


def _unwind(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _block() -> None:
    if _active.is_set():
        _mask_before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    mask = getattr(_mask_before_fork, "mask", None)
    if mask is not None:
        del _mask_before_fork.mask
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _default_in_child() -> None:
    if _active.is_set():
        _active.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()
