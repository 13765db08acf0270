"""What a training has said of its epochs so far: nnU-Net's ``training_log_*.txt`` read back, without importing torch.

Stock's trainers and ours write the same words. A training that was continued has several files, of which the last one
that tells of an epoch counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

NEW_VALUE = 0.1
"""Share of the newest epoch in the moving Dice, as in nnU-Net's logger."""

SMALL_WINDOW = 20
"""Epochs over which the time of one is taken, so that a slow start or a busy hour does not count for ever."""

_STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?: "
_LINE = re.compile(_STAMP + r"(Epoch time:|Epoch|train_loss|val_loss|Pseudo dice) (.*)")
_NUMBER = re.compile(r"(?<![\w.])(?:-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan)(?![\w.])")


@dataclass(frozen=True)
class Epoch:
    """One epoch that is over; NaN where the training logs no such value.

    Attributes:
        number: 0 is the first.
        train_loss: mean loss on training batches.
        val_loss: mean loss on validation batches.
        dice: mean Dice over the organs of the validation batches (nnU-Net's pseudo Dice).
        moving_dice: its moving average, by which nnU-Net chooses ``checkpoint_best``.
        seconds: how long it took.
    """

    number: int
    train_loss: float
    val_loss: float
    dice: float
    moving_dice: float
    seconds: float


def read_epochs(folder: Path) -> list[Epoch]:
    """The epochs that are over of the training in a fold's folder, in order; none where it has no log."""
    known = []
    for path in sorted(folder.glob("training_log_*.txt"), key=_started):
        with suppress(OSError):  # gone meanwhile
            found = path.stat()
            known.append((path, found.st_size, found.st_mtime_ns))
    return list(_read(tuple(known)))


def _started(path: Path) -> list[int]:
    """When a log was begun, from its name, in which nnU-Net writes months and days without zeros before them."""
    return [int(number) for number in re.findall(r"\d+", path.stem)]


@lru_cache(256)
def _read(files: tuple[tuple[Path, int, int], ...]) -> tuple[Epoch, ...]:
    """The same of files that are known by size and time: a driver asks for each many times."""
    texts = []
    for path, _, _ in files:
        with suppress(OSError):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return tuple(epochs_of(line for text in texts for line in text.splitlines()))


def epochs_of(lines: Iterable[str]) -> list[Epoch]:
    """The epochs that are over according to the lines of one or several logs, the oldest first."""
    found: dict[int, dict[str, float]] = {}
    number: int | None = None
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        word, values = match[1], [float(value) for value in _NUMBER.findall(match[2])]
        if word == "Epoch":
            number = int(values[0]) if values and values[0] >= 0 else None
            if number is not None:  # begun again after a stop: what came later then was lost
                found = {k: v for k, v in found.items() if k < number}
        elif number is not None and values:
            here = found.setdefault(number, {})
            here[word] = _mean(values) if word == "Pseudo dice" else values[0]
    return _with_moving_dice({k: v for k, v in found.items() if "Epoch time:" in v})


def _with_moving_dice(found: dict[int, dict[str, float]]) -> list[Epoch]:
    epochs: list[Epoch] = []
    moving = math.nan
    for number, values in sorted(found.items()):
        dice = values.get("Pseudo dice", math.nan)
        if not math.isnan(dice):
            moving = dice if math.isnan(moving) else (1 - NEW_VALUE) * moving + NEW_VALUE * dice
        losses = (values.get("train_loss", math.nan), values.get("val_loss", math.nan))
        epochs.append(Epoch(number, *losses, dice, moving, values["Epoch time:"]))
    return epochs


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def epoch_seconds(epochs: Sequence[Epoch]) -> float | None:
    """The usual time of one of the last epochs (their median); None before the first is over."""
    times = sorted(epoch.seconds for epoch in epochs[-SMALL_WINDOW:])
    return times[len(times) // 2] if times else None
