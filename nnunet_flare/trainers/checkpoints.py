"""Checkpoints of a training folder: written whole or not at all, and the newest readable one found."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nnunet_flare.errors import InputError
from nnunet_flare.files import replacing

NEEDED_TO_RESUME = ("network_weights", "optimizer_state", "logging", "current_epoch", "init_args")
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, AttributeError)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to save to; its bytes are on the disk before it gets the name ``path``."""
    with replacing(path) as temporary:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed training left half-written."""
    for leftover in folder.glob(".tmp-*-checkpoint_*.pth"):
        with suppress(OSError):
            leftover.unlink()


def problem_of(path: Path) -> str | None:
    """Why a training cannot be resumed from this file of its own folder, or None when it can."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}"
    missing = [key for key in NEEDED_TO_RESUME if not isinstance(checkpoint, dict) or key not in checkpoint]
    return f"lacks {', '.join(missing)}" if missing else None


def newest_good(folder: Path, *, besides: Path) -> Path | None:
    """The readable checkpoint of the most epochs in a training folder, other than ``besides``; None without one."""
    best: tuple[int, float, Path] | None = None
    for path in sorted(folder.glob("checkpoint_*.pth")):
        if path == besides or problem_of(path) is not None:
            continue
        epoch = int(torch.load(path, map_location="cpu", weights_only=False)["current_epoch"])
        best = max(best or (-1, 0.0, path), (epoch, path.stat().st_mtime, path))
    return None if best is None else best[2]


def load_weights_strictly(network: torch.nn.Module, weights: dict[str, Any], *, source: Path) -> None:
    """Copy all weights, segmentation head included, into a network of the same shape.

    Raises:
        InputError: naming what differs.
    """
    own = network.state_dict()
    different = sorted(
        f"{key} {tuple(weights[key].shape) if key in weights else 'missing'}, here "
        f"{tuple(own[key].shape) if key in own else 'missing'}"
        for key in own.keys() | weights.keys()
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    )
    if different:
        raise InputError(
            f"{source}: its network differs from this configuration's in {len(different)} weights "
            f"({'; '.join(different[:3])}). Start from a model of the same plan and labels"
        )
    network.load_state_dict(weights)
