"""What a process does when it is asked to end, for as long as one piece of its work lasts and no longer.

A handler that outlives its work harms what comes after in the same process: nnU-Net ends its forked pool workers with
SIGTERM, and a worker that inherited a Python handler can lose the request, so that the pool waits for it for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_active = threading.Event()
_hooks_are_set = threading.Event()  # Python has no way to take a fork hook back
_mask_before_fork = threading.local()


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object], *numbers: int) -> Iterator[None]:
    """Inside, these signals call ``handler``; outside, what was before. In other threads than the main one: nothing."""
    is_main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    previous = {number: signal.signal(number, handler) for number in numbers} if is_main else {}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: set by no Python


@contextmanager
def held_back(*numbers: int) -> Iterator[None]:
    """Inside, these signals wait; those that came arrive at the end."""
    came: list[int] = []
    try:
        with handling(lambda number, frame: came.append(number), *numbers):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit in the main thread, so that locks are given back; forked workers just end.

    A worker that is asked to end before it has the default action again would lose the request: so the signal stays
    blocked in it until then.
    """
    if not _hooks_are_set.is_set():
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_default_in_child)
        _hooks_are_set.set()
    with handling(_unwind, signal.SIGTERM):
        try:
            _active.set()
            yield
        finally:
            _active.clear()


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
