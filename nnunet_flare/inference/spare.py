"""What lies on a GPU only to save a copy, and is given up where memory is short.

A scan that two models see, coarse to fine or in a cascade, goes over once as it is stored. Each model's view of it, and
the crop that the fine one sees, are cut out there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

from nnunet_flare.inference.arrays import Array

Views = Sequence[Array]
"""A scan's channels on a GPU, each a view of what lies there."""


class Spare:
    """A scan's channels (Z, Y, X) as stored, on a GPU; or none, because they had no room or were given up."""

    def __init__(self, channels: Views | None = None) -> None:
        self._channels = channels
        if channels is not None:
            with _LOCK:
                _KNOWN.add(self)

    def part(self, cut: Callable[[Array], Array] = lambda channel: channel) -> Views | None:
        """Each channel, cut out by a function of it; None where there is none."""
        channels = self._channels  # another thread may give them up meanwhile
        return None if channels is None else [cut(channel) for channel in channels]

    def give_up(self) -> None:
        """Free the memory, once nobody else holds a view."""
        self._channels = None


def give_up_all() -> None:
    """Free what lies on a GPU only to save a copy."""
    with _LOCK:
        known = list(_KNOWN)
    for spare in known:
        spare.give_up()


_KNOWN: weakref.WeakSet[Spare] = weakref.WeakSet()
_LOCK = threading.Lock()
