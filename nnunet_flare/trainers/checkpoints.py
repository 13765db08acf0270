"""Checkpoints of a training folder: written whole or not at all, and the newest readable one found."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nnunet_flare.errors import InputError
from nnunet_flare.files import replacing

STATE_KEY = "flare_state"
"""Of a checkpoint: what a trainer of this package keeps beside stock's content."""
NEEDED_TO_RESUME = ("network_weights", "optimizer_state", "logging", "current_epoch", "init_args")


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


def read_to_resume(path: Path) -> dict[str, Any]:
    """A checkpoint of this computer's own training, read whole.

    Raises:
        InputError: with the reason, when a training cannot be resumed from it.
    """
    try:
        damaged = _damaged_record(path)
        if damaged is not None:
            raise ValueError(f"the checksum of record {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{path}: {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
        ) from error
    missing = [key for key in NEEDED_TO_RESUME if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}")
    return dict(checkpoint)


def _damaged_record(path: Path) -> str | None:
    """The first part of a checkpoint whose checksum is wrong: torch itself loads changed bytes without a word."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def add_state(path: Path, state: dict[str, Any], *, weights: dict[str, Any] | None = None) -> None:
    """Put what a trainer needs beside stock's content into a checkpoint that was just written.

    Stock's ``save_checkpoint`` has no place for it, and a second file could be newer or older than the first.
    ``weights`` take the place of the network's.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    exported = {} if weights is None else {"network_weights": weights}
    torch.save({**checkpoint, **exported, **({STATE_KEY: state} if state else {})}, path)


def added_state(checkpoint: Any) -> dict[str, Any]:
    """What :func:`add_state` put into a checkpoint (a file's name, or its content); empty where there is nothing."""
    if not isinstance(checkpoint, dict):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False)
    return dict(checkpoint.get(STATE_KEY, {}))


def newest_good(folder: Path, *, besides: Path) -> Path | None:
    """The readable checkpoint of the most epochs in a training folder, other than ``besides``; None without one."""
    found: list[tuple[int, str]] = []
    for path in folder.glob("checkpoint_*.pth"):
        if path != besides:
            with suppress(InputError):
                found.append((int(read_to_resume(path)["current_epoch"]), path.name))
    return folder / max(found)[1] if found else None
