"""Our trainers for stock nnU-Net where the plugin cannot run (``python -S``, ``pip install --target``).

Stock nnU-Net imports every module of the folders in ``nnUNet_extTrainer`` and asks it for the trainer's name. The
classes are only handed on from the installed package, never defined here, so spawned workers can unpickle them.
``flare-doctor`` prints the line to export. Planners need the plugin: this way knows trainers only.
"""

from __future__ import annotations

from typing import Any

from nnunet_flare.plugin import resolve


def __getattr__(name: str) -> Any:
    found = resolve(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
