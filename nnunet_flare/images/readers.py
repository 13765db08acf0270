"""nnU-Net's readers of volumes: which one a dataset or model names, and what each makes of a NIfTI header.

Stock nnU-Net trains on what the named reader reads, so prediction and every check read as it does. SimpleITK and
nibabel take some headers differently (two matrices that disagree, a slope of 0, a unit other than mm); what they
disagree about is said by :func:`doubt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.images.geometry import describe, is_same_grid
from nnunet_flare.images.nifti import load_header
from nnunet_flare.images.nifti_header import Header
from nnunet_flare.images.seen_by_nibabel import seen_by_nibabel
from nnunet_flare.images.seen_by_simpleitk import seen_by_simpleitk
from nnunet_flare.images.views import View

SITK, SITK_RAS, NIBABEL, NIBABEL_RAS = "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"

READERS = (SITK, NIBABEL, SITK_RAS, NIBABEL_RAS)
"""Readers of volumes; the reorienting ones bring every scan to RAS first."""

CANNOT = "cannot"

SAME_SPACING = 1e-3
"""Two libraries read one spacing when they differ by no larger share."""


def library(reader: str) -> str:
    """The library by which a reader reads NIfTI."""
    return "nibabel" if reader.startswith("Nibabel") else "SimpleITK"


def reader_of_plans(plans: Mapping[str, Any]) -> str:
    """The reader that a model's plans name; SimpleITK's where they name none that reads volumes."""
    reader = plans.get("image_reader_writer")
    return reader if reader in READERS else SITK


def reader_of_dataset(document: Mapping[str, Any], example: Path | None = None) -> str:
    """The reader that stock nnU-Net takes for a dataset: the one that dataset.json names, else by its file ending.

    Args:
        document: dataset.json.
        example: one of its images; a reader that cannot read it is passed over, as stock does.
    """
    named = document.get("overwrite_image_reader_writer")
    if named in READERS:
        return str(named)
    ending = str(document.get("file_ending", "")).lower()
    if ending == ".nii":
        return NIBABEL
    header = load_header(example) if ending == ".nii.gz" and example is not None else None
    if example is not None and header is not None and isinstance(seen_by_simpleitk(example, header), str):
        return NIBABEL
    return SITK


def seen_by(reader: str, path: Path, header: Header) -> View | str:
    """What a reader makes of a NIfTI file, or in words why it cannot read it."""
    if library(reader) == "nibabel":
        return seen_by_nibabel(path, header, reorient=reader == NIBABEL_RAS)
    return seen_by_simpleitk(path, header)


def doubt(path: Path, header: Header, reader: str, own: View) -> str | None:
    """Why a file is not to be trained on, in words: the other library takes it differently, or stock refuses it."""
    other_reader = SITK if library(reader) == "nibabel" else NIBABEL
    here, there = library(reader), library(other_reader)
    other = seen_by(other_reader, path, header)
    found = [] if own.refusal is None else [f"nnU-Net's {reader} cannot read the file: {own.refusal}"]
    if isinstance(other, str):
        return "; ".join([*found, f"{here} reads the file and {there} {CANNOT} ({other})"])
    if not np.allclose(own.spacing_mm, other.spacing_mm, rtol=SAME_SPACING, atol=0):
        found.append(
            f"{here} reads the spacing (z, y, x) {_rounded(own.spacing_mm)} mm, {there} {_rounded(other.spacing_mm)} mm"
        )
    if not is_same_grid(own.matrix, other.matrix, header.shape):
        found.append(f"{here} reads the axes (x, y, z) as {_place(own)}, {there} as {_place(other)}")
    if (own.slope, own.intercept) != (other.slope, other.intercept):
        found.append(
            f"{here} reads values as {own.slope:g} * stored + {own.intercept:g}, {there} as {other.slope:g} * stored "
            f"+ {other.intercept:g}"
        )
    return "; ".join(found) or None


def doubtful(reader: str) -> str:
    """What is to be done about a file that the two libraries read differently."""
    return f"{reader} takes {library(reader)}'s reading; save the file again with one matrix, in mm, with a slope of 1"


def is_doubt_of_one(said: str | None) -> bool:
    """Whether a doubt is no more than that the other library cannot read the file."""
    return said is not None and f" {CANNOT} (" in said


def _place(view: View) -> str:
    return f"{describe(view.direction)} from {_rounded(view.origin)}"


def _rounded(numbers: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(number), 3) for number in numbers)
