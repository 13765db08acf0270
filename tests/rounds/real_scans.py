"""Data sets of real CT scans for runs of some seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.organs import FLARE22, dataset_labels

OESOPHAGUS, GALLBLADDER = 10, 9
TORSO = tuple(organ.id for organ in FLARE22 if organ.id != OESOPHAGUS)
"""Organs that are annotated in the torso."""

CHAOS = ("chaos3_ct", "chaos3_liver_gt", (3, 8, 8), slice(None))
TORSO_LOW = ("ts_torso3mm_ct", "ts_torso3mm_flare13", (2, 2, 2), slice(0, 40))
TORSO_HIGH = ("ts_torso3mm_ct", "ts_torso3mm_flare13", (2, 2, 2), slice(20, None))
"""Scan, its label map, every how many voxels are kept, and the slices of what is kept."""


def thinned(volume: Volume, step: tuple[int, int, int], rows: slice = slice(None)) -> Volume:
    """Every ``step``-th voxel (z, y, x), and of these some slices."""
    array = np.ascontiguousarray(volume.array[tuple(slice(None, None, s) for s in step)][rows])
    spacing = tuple(mm * s for mm, s in zip(volume.spacing_mm, step, strict=True))
    return Volume(array, spacing, volume.origin, volume.direction)


def write_labelled(
    raw: Path, real_data: Path, pieces: Mapping[str, tuple[str, str, tuple[int, int, int], slice]]
) -> None:
    """A raw data set of pieces of real scans by case name."""
    for name, (image, label, step, rows) in pieces.items():
        scan = thinned(read_volume(real_data / f"{image}.nii.gz"), step, rows)
        write_volume(raw / "imagesTr" / f"{name}_0000.nii.gz", scan)
        known = thinned(read_labels(real_data / f"{label}.nii.gz"), step, rows)
        write_labels(raw / "labelsTr" / f"{name}.nii.gz", known.array.astype(np.uint8), scan)
    document = {"channel_names": {"0": "CT"}, "labels": dataset_labels(FLARE22), "file_ending": ".nii.gz"}
    write_json(raw / "dataset.json", {**document, "numTraining": len(pieces)})
