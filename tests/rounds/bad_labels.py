"""Kinds of label maps as they come, on the grid of the scans of ``bad_scans``: each a function that writes one."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from bad_scans import SHAPE, SPACING_MM, Kind, coloured, flipped_bit, header, nifti, plain

HOSTILE = "$(touch pwned)';touch pwned #"


def labels() -> np.ndarray:
    """Thirteen organs of 4 x 4 x 4 voxels; uint8 (X, Y, Z)."""
    array = np.zeros(SHAPE, np.uint8)
    for organ in range(1, 14):
        x, y = 2 + (organ - 1) % 4 * 7, 2 + (organ - 1) // 4 * 7
        array[x : x + 4, y : y + 4, 6:10] = organ
    return array


def good_labels(path: Path) -> None:
    nifti(path, labels())


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: nifti(path, change(labels()))


def one(value: float, kind: type = np.float32) -> Callable[[Path], None]:
    """A good map but for one voxel."""

    def write(path: Path) -> None:
        array = labels().astype(kind)
        array[20, 20, 3] = value
        nifti(path, array)

    return write


def elsewhere(affine: np.ndarray) -> Callable[[Path], None]:
    """A good map on another grid than its scan's."""
    return lambda path: nifti(path, labels(), affine)


def moved() -> np.ndarray:
    affine = np.diag([*SPACING_MM, 1.0])
    affine[0, 3] = 7.0
    return affine


def compressed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    whole = nibabel.Nifti1Image(labels(), np.diag([*SPACING_MM, 1.0])).to_bytes()
    return lambda path: path.write_bytes(change(gzip.compress(whole, mtime=0))) and None


def nothing(path: Path) -> None:
    """No file at all."""


def without_permission(path: Path) -> None:
    good_labels(path)
    path.chmod(0)


SX, SY, SZ = SPACING_MM

LABEL_KINDS: list[Kind] = [
    # ---- files
    Kind("label_missing", "refused", nothing),
    Kind("label_empty_file", "refused", plain(b"")),
    Kind("label_text", "refused", plain(b"organs: 13\n")),
    Kind("label_gzip_of_nothing", "refused", plain(gzip.compress(b""))),
    Kind("label_cut_in_half", "refused", compressed(lambda data: data[: len(data) // 2])),
    Kind("label_last_bytes_missing", "refused", compressed(lambda data: data[:-10])),
    Kind("label_bit_flipped", "refused", compressed(flipped_bit)),
    Kind("label_link_to_nothing", "refused", lambda path: path.symlink_to("nothing")),
    Kind("label_link_to_itself", "refused", lambda path: path.symlink_to(path.name)),
    Kind("label_folder", "refused", Path.mkdir),
    Kind("label_pipe", "refused", os.mkfifo),
    Kind("label_no_permission", "either", without_permission),
    # ---- ids
    Kind("label_holes_in_ids", "fine", changed(lambda a: np.where(np.isin(a, (1, 7, 13)), a, 0).astype(np.uint8))),
    Kind("label_all_background", "fine", changed(np.zeros_like)),
    Kind("label_one_organ_everywhere", "fine", changed(np.ones_like)),
    Kind("label_one_voxel_organs", "fine", changed(lambda a: np.where(a == 3, 0, a).astype(np.uint8))),
    Kind("label_unknown_id", "refused", one(200, np.uint8)),
    Kind("label_next_id", "refused", one(99, np.uint8)),
    Kind("label_huge_id", "refused", one(70_000, np.int32)),
    Kind("label_negative", "refused", one(-1, np.int16)),
    Kind("label_most_negative", "refused", one(-32768, np.int16)),
    # ---- types
    Kind("label_whole_floats", "fine", changed(lambda a: a.astype(np.float32))),
    Kind("label_whole_doubles", "fine", changed(lambda a: a.astype(np.float64))),
    Kind("label_fractions", "refused", changed(lambda a: a.astype(np.float32) * 0.5)),
    Kind("label_one_fraction", "refused", one(2.5)),
    Kind("label_probabilities", "refused", changed(lambda a: (a > 0).astype(np.float32) * 0.7)),
    Kind("label_nan", "refused", one(np.nan)),
    Kind("label_inf", "refused", one(np.inf)),
    Kind("label_long", "fine", changed(lambda a: a.astype(np.int32))),
    Kind("label_unsigned", "fine", changed(lambda a: a.astype(np.uint16))),
    Kind("label_complex", "refused", changed(lambda a: a.astype(np.complex64))),
    Kind("label_colour", "refused", coloured("RGB")),
    Kind("label_scaled", "refused", changed(lambda a: a.astype(np.int16) * 37)),
    Kind("label_slope_nan", "either", header(112, "f", float("nan"))),
    # ---- shape
    Kind("label_flat", "refused", changed(lambda a: a[..., 8])),
    Kind("label_one_hot", "refused", changed(lambda a: (a[..., None] == np.arange(14)).astype(np.uint8))),
    Kind("label_two_times", "refused", changed(lambda a: np.stack([a, a], axis=3))),
    Kind("label_one_slice", "either", changed(lambda a: a[..., 8:9])),
]
"""Kinds of label maps that every command that reads them must survive."""

OTHER_GRID: list[Kind] = [
    Kind("label_spacing", "refused", elsewhere(np.diag([SX, SY, SZ + 0.5, 1.0]))),
    Kind("label_origin", "refused", elsewhere(moved())),
    Kind("label_flipped", "refused", elsewhere(np.diag([-SX, SY, SZ, 1.0]))),
    Kind("label_slices_missing", "refused", changed(lambda a: a[..., :-2])),
    Kind("label_transposed", "refused", changed(lambda a: a.transpose(2, 1, 0).copy())),
]
"""Label maps that can be used, but not with their scan or with another map of the case."""

LABEL_NAMES: list[Kind] = [
    Kind("label_unicode", "fine", good_labels, "Löwe_漢字"),
    Kind("label_spaces", "fine", good_labels, "a map of mine"),
    Kind("label_dash", "fine", good_labels, "-rf"),
    Kind("label_commands", "fine", good_labels, HOSTILE),
]
"""Names that mean something to a shell."""


def case_of(kind: Kind) -> str:
    return kind.file or kind.name


def write_labels(folder: Path, kinds: list[Kind], *, good: int = 3) -> dict[str, Kind | None]:
    """Write every kind as ``<case>.nii.gz`` and good maps beside them; returns each case with its kind (None: good)."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, Kind | None] = {}
    for kind in kinds:
        kind.write(folder / f"{case_of(kind)}.nii.gz")
        cases[case_of(kind)] = kind
    for number in range(good):
        good_labels(folder / f"good{number}.nii.gz")
        cases[f"good{number}"] = None
    return cases
