"""Leaving a group of two processes."""

from __future__ import annotations

import os
import time
from pathlib import Path


def leave_together(folder: str, rank: int) -> None:
    """End this process once the other has come here too, without taking the process group down.

    Torch's Gloo group can wait for itself for ever as it goes: its end, which holds the interpreter's lock, waits for a
    thread of its own that wants that lock to give a tensor back.
    """
    Path(folder, f"left{rank}").touch()
    while not Path(folder, f"left{1 - rank}").exists():
        time.sleep(0.01)
    os._exit(0)
