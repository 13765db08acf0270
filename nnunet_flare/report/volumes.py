"""The 3-D view's data: scan and fused label of a case, made small, in a script that a page can load from disk.

A page that is opened from disk may load scripts beside it, but not fetch files; so both volumes are gzipped NIfTI
files in base64 text.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_flare.drawing import WINDOW_HU
from nnunet_flare.files import write_text
from nnunet_flare.report.planes import Scene

LONGEST = 128
"""Voxels of the longest axis at most; a case then takes about half a megabyte."""


def write_volumes(path: Path, key: str, scene: Scene, organ: Sequence[int]) -> None:
    """Write the script of a case: ``window.FLARE_VOLUMES[key] = {image, label, centre}``.

    ``centre`` is a voxel in the middle of the organ, where the view begins, as NiiVue counts: 0 to 1 from left to
    right, from the back to the front and upwards.
    """
    scan, labels, spacing_mm = smaller(scene)
    where = np.argwhere(np.isin(labels, organ))
    middle = where[np.abs(where - where.mean(axis=0)).sum(axis=1).argmin()] if len(where) else np.array(scan.shape) // 2
    centre = [round(float(1 - (middle[axis] + 0.5) / scan.shape[axis]), 4) for axis in (2, 1, 0)]
    document = {"image": _nifti(scan, spacing_mm), "label": _nifti(labels, spacing_mm), "centre": centre}
    text = json.dumps(key).replace("<", "\\u003c")
    write_text(path, f"window.FLARE_VOLUMES[{text}] = {json.dumps(document)};\n")


def smaller(scene: Scene) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """The soft-tissue window of the scan as uint8 (Z, Y, X), means over blocks of voxels; the label in the middle of
    each block; and the blocks' spacing in mm. No axis is longer than :data:`LONGEST`.
    """
    factors = [-(-size // LONGEST) for size in scene.scan.shape]
    low, high = WINDOW_HU
    grey: np.ndarray = np.clip((scene.scan - low) * (255 / (high - low)), 0, 255).astype(np.float32)
    for axis, factor in enumerate(factors):
        if factor > 1:
            starts = np.arange(0, grey.shape[axis], factor)
            lengths = np.diff([*starts, grey.shape[axis]])
            shape = [1, 1, 1]
            shape[axis] = len(starts)
            grey = np.add.reduceat(grey, starts, axis=axis) / lengths.reshape(shape).astype(np.float32)
    middles = [
        np.minimum(np.arange(0, size, factor) + factor // 2, size - 1)
        for size, factor in zip(scene.scan.shape, factors, strict=True)
    ]
    labels = scene.fused[np.ix_(*middles)].astype(np.uint8)
    z, y, x = (spacing * factor for spacing, factor in zip(scene.spacing_mm, factors, strict=True))
    return grey.round().astype(np.uint8), labels, (z, y, x)


def _nifti(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> str:
    """A gzipped NIfTI file in base64. The array begins superior, anterior and right; NIfTI's world is RAS."""
    import nibabel

    affine = np.diag([*(-np.array(spacing_mm[::-1])), 1.0])
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode("ascii")
