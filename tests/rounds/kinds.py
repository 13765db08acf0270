"""Tiny phantoms in the clothes of other data sets: other labels, channels, formats and places; and runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_loop import TINY

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.phantom import write_phantom
from nnunet_flare.rounds.run.manifest import Run, load_run

DATASET = "Dataset022_FLAREPhantom"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class Kind:
    """A phantom data set in a folder of its own, to be dressed and run on."""

    def __init__(self, folder: Path, **phantom: Any) -> None:
        self.folder = folder
        write_phantom(folder, **{"labelled": 4, "unlabelled": 3, "test": 1, "size": (20, 32, 32), "seed": 3, **phantom})
        for name in VARIABLES:
            (folder / name).mkdir(exist_ok=True)

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw" / DATASET

    @property
    def unlabelled(self) -> Path:
        return self.folder / "unlabelled"

    @property
    def environment(self) -> dict[str, str]:
        folders = {name: str(self.folder / name) for name in VARIABLES}
        return {**folders, "nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}

    def document(self, **changes: Any) -> dict[str, Any]:
        """dataset.json with other entries; an entry of None goes."""
        document = {**read_json(self.raw / "dataset.json"), **changes}
        document = {key: value for key, value in document.items() if value is not None}
        write_json(self.raw / "dataset.json", document)
        return document

    def relabel(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change every label map, of labelled and held-out cases."""
        for path in [*(self.raw / "labelsTr").iterdir(), *(self.folder / "test" / "labels").iterdir()]:
            volume = read_labels(path)
            write_labels(path, change(volume.array).astype(np.uint8), volume)

    def command(self, *more: str, settings: Sequence[str] = (), evaluate: bool = True) -> list[str]:
        start = ["run", "-d", "22", "-u", str(self.unlabelled), "--recipe", "demo", "--name", "tiny", "-device", "cpu"]
        test = self.folder / "test"
        start += ["--eval", str(test / "images"), str(test / "labels")] if evaluate else []
        return [*start, *more, "--set", *TINY, *settings]

    def main(self, words: Sequence[str]) -> int:
        saved = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return main(list(words))
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def run(self) -> Run:
        return load_run(self.folder / "nnUNet_results" / DATASET / "flare_tiny")


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks, by hand: 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def of_ids(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """The mask of an organ or region, label by label."""
    found = np.zeros(labels.shape, bool)
    for label in ids:
        found |= labels == label
    return found


def expect_dice(run: Run, number: int, organs: Mapping[str, Sequence[int]], ignored: int | None) -> None:
    """The held-out Dice of a round, computed by hand from the files that it is of."""
    result = read_json(run.paths.evaluation(number) / "dice.json")
    for case, row in result["cases"].items():
        found = read_labels(run.paths.evaluation(number) / f"{case}.nii.gz").array
        truth = read_labels(Path(str(run.settings.eval_labels)) / f"{case}.nii.gz").array
        counted = np.ones(truth.shape, bool) if ignored is None else truth != ignored
        by_hand = {n: dice(of_ids(found, ids) & counted, of_ids(truth, ids) & counted) for n, ids in organs.items()}
        assert row == pytest.approx(by_hand)
