"""Volume and mean CT number of every organ of every case, in one table of a folder.

A case's rows are written when the case is done, so that a table can be read while others are predicted. What was
measured before stays: ``statistics.json`` is read, changed and written again under a lock, by every part of a
prediction that writes into the same folder, and ``statistics.csv`` is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.files import read_json, write_csv, write_json
from nnunet_flare.images import Volume, read_volume
from nnunet_flare.images.readers import SITK
from nnunet_flare.inference.forms import Finished, Form
from nnunet_flare.inference.inputs import InputCase

CSV, JSON, LOCK = "statistics.csv", "statistics.json", ".statistics.lock"

HU, VALUE = "mean_hu", "mean_value"
"""What the mean is called: of CTs, and of other images."""

ROW = {"id": int, "voxels": int, "volume_ml": float}
DOCUMENT = {"cases": {str: {str: {**ROW, f"{HU}?": (float, None), f"{VALUE}?": (float, None)}}}}


def measured(folder: Path) -> set[str]:
    """The cases that a folder's table has; none where there is no table, or one of something else."""
    try:
        return set(read_json(folder / JSON, DOCUMENT)["cases"])
    except InputError:
        return set()


def organ_statistics(
    labels: np.ndarray,
    image: np.ndarray,
    voxel_mm3: float,
    ids: Mapping[int, str],
    parts: Mapping[int, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Voxels, volume in ml and mean value of every organ, by its name.

    Args:
        labels: (Z, Y, X), uint8.
        image: the scan on the same grid, in any real type.
        voxel_mm3: volume of a voxel.
        ids: the name of every label id.
        parts: what a region holds, as :func:`nnunet_flare.labels.drawn_parts`; without it each id stands alone.

    Returns:
        ``{name: (id, voxels, ml, mean)}``; the mean of no voxel is None.
    """
    counts, sums = np.zeros(256, np.int64), np.zeros(256)
    for plane, values in zip(labels, image, strict=True):
        flat = plane.ravel()
        counts += np.bincount(flat, minlength=256)
        sums += np.bincount(flat, weights=values.ravel(), minlength=256)
    found = {}
    for number, name in ids.items():
        held = [number] if parts is None else list(parts[number])
        voxels, total = int(counts[held].sum()), float(sums[held].sum())
        found[name] = (number, voxels, voxels * voxel_mm3 / 1000, total / voxels if voxels else None)
    return found


class Statistics:
    """The table of a folder."""

    def __init__(
        self,
        folder: Path,
        organs: Mapping[int, str],
        *,
        ct: bool,
        parts: Mapping[int, Sequence[int]] | None = None,
        reader: str = SITK,
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: which need not be there yet.
            organs: the name of every label id.
            ct: whether values are CT numbers.
            parts: as in :func:`organ_statistics`.
            reader: of the model's plans, with which label maps are read.

        Raises:
            InputError: when the folder holds something else under one of the names.
        """
        self.folder, self._organs, self._parts, self._reader = folder, organs, parts, reader
        self.mean = HU if ct else VALUE
        self._read_at: tuple[int, int] | None = None
        self._cases: dict[str, Any] = {}
        if (folder / CSV).exists() and not (folder / JSON).exists():
            raise InputError(f"--statistics: {folder / CSV} already exists without the {JSON} of this command; move it")
        self._known()

    def form(self) -> Form:
        """What predicting a folder does with it."""
        return Form(
            "csv",
            "statistics",
            lambda case: (self.folder / CSV, self.folder / JSON),
            lambda finished, _: self.add(finished),
            self.has,
            wants_image=True,
            of_folder=True,
        )

    def has(self, case: InputCase) -> bool:
        """Whether a case was measured, with these organs, on the label map that is there."""
        row = self._known().get(case.name)
        if row is None or row.keys() != set(self._organs.values()) or not (self.folder / CSV).is_file():
            return False
        try:
            labels = read_volume(self.folder / f"{case.name}{case.suffix}", reader=self._reader).array
        except CaseError:
            return False
        found = organ_statistics(labels, labels, 1.0, self._organs, self._parts)
        return all(row[name]["voxels"] == voxels for name, (_, voxels, _, _) in found.items())

    def add(self, finished: Finished) -> None:
        """Measure a case and write the tables with it."""
        assert finished.image is not None
        image: Volume = finished.image
        found = organ_statistics(finished.labels, image.array, image.voxel_mm3, self._organs, self._parts)
        rows = {
            name: {"id": number, "voxels": voxels, "volume_ml": round(ml, 4), self.mean: mean and round(mean, 3)}
            for name, (number, voxels, ml, mean) in found.items()
        }
        with self._locked():
            cases = {**self._known(), finished.case.name: rows}
            write_csv(self.folder / CSV, self._table(cases))
            write_json(self.folder / JSON, {"cases": dict(sorted(cases.items()))})

    def _table(self, cases: Mapping[str, Any]) -> Iterator[list[Any]]:
        yield ["case", "id", "organ", "voxels", "volume_ml", self.mean]
        for case, organs in sorted(cases.items()):
            for name, row in organs.items():
                yield [case, row["id"], name, row["voxels"], row["volume_ml"], row.get(self.mean)]

    def _known(self) -> dict[str, Any]:
        """The cases that were measured, by whatever process."""
        path = self.folder / JSON
        try:
            found = path.stat()
        except FileNotFoundError:
            return {}
        state = (found.st_mtime_ns, found.st_size)
        if state != self._read_at:
            self._cases = read_json(path, DOCUMENT, remedy="move it away, then the cases are measured again")["cases"]
            self._read_at = state
        return self._cases

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Inside, no other process writes; where the system has no such locks (Windows), one process may write."""
        with open(self.folder / LOCK, "ab") as stream:
            with suppress(ImportError):
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX)
            yield
