"""Tiny phantoms in the clothes of other data sets: other labels, channels, formats and places; and Dice by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.rounds.run.manifest import Run

DATASET = "Dataset022_FLAREPhantom"


def redress(folder: Path, change: Callable[[np.ndarray], np.ndarray] | None = None, **document: Any) -> Path:
    """Give a phantom other label maps, of labelled and held-out cases, and other entries of dataset.json.

    ``change`` makes the new label map of the phantom's; an entry of None goes. Returns the raw dataset.
    """
    raw = folder / "nnUNet_raw" / DATASET
    for path in [] if change is None else [*(raw / "labelsTr").iterdir(), *(folder / "test" / "labels").iterdir()]:
        volume = read_labels(path)
        write_labels(path, change(volume.array).astype(np.uint8), volume)
    entries = {**read_json(raw / "dataset.json"), **document}
    write_json(raw / "dataset.json", {key: value for key, value in entries.items() if value is not None})
    return raw


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks: 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def mask(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Where an organ or region lies, label by label."""
    found = np.zeros(labels.shape, bool)
    for label in ids:
        found |= labels == label
    return found


def expect_dice_by_hand(run: Run, number: int, organs: Mapping[str, Sequence[int]], ignored: int, ending: str) -> None:
    """The held-out Dice of a round is that of the files, without the voxels that the truth ignores."""
    result = read_json(run.paths.evaluation(number) / "dice.json")
    assert result["cases"]
    for case, row in result["cases"].items():
        found = read_labels(run.paths.evaluation(number) / f"{case}{ending}").array
        truth = read_labels(Path(str(run.settings.eval_labels)) / f"{case}{ending}").array
        counted = truth != ignored
        assert not counted.all()
        by_hand = {n: dice(mask(found, ids) & counted, mask(truth, ids) & counted) for n, ids in organs.items()}
        assert row == pytest.approx(by_hand)
