"""Headers of NIfTI-1 and NIfTI-2, in both byte orders, and what in them cannot be true."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_flare.errors import CaseError
from nnunet_flare.images.nifti import load_nifti
from nnunet_flare.images.nifti_header import parse_header

ARRAY = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
OFFSETS = {1: {"bits": (72, "h"), "start": (108, "f"), "axis": (44, "h"), "row": (284, "f")}}
OFFSETS[2] = {"bits": (14, "h"), "start": (168, "q"), "axis": (32, "q"), "row": (408, "d")}


def written(version: int, order: str) -> bytearray:
    image, header = (
        (nibabel.Nifti1Image, nibabel.Nifti1Header) if version == 1 else (nibabel.Nifti2Image, nibabel.Nifti2Header)
    )
    affine = np.diag([1.5, 2.5, 3.5, 1])
    return bytearray(image(ARRAY.astype(f"{order}f4"), affine, header(endianness=order)).to_bytes())


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_a_good_header_says_where_the_voxels_are(tmp_path: Path, version: int, order: str) -> None:
    data = written(version, order)
    header = parse_header(bytes(data))
    assert header is not None and header.problem is None
    assert (header.size, header.spacing_mm) == ((2, 3, 4), (1.5, 2.5, 3.5))
    assert header.file_bytes == len(data) and header.voxel_type == f"{order}f4"
    found = np.frombuffer(bytes(data[header.offset :]), header.voxel_type).reshape(ARRAY.shape, order="F")
    np.testing.assert_array_equal(found, ARRAY)
    (tmp_path / "a.nii").write_bytes(bytes(data))
    load_nifti(tmp_path / "a.nii", "case")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bits", 0, "0 bits per voxel, expected 32 for its voxel type 16"),
        ("bits", -32, "-32 bits per voxel"),
        ("start", -8, "voxels start at byte -8"),
        ("start", 100, "voxels start at byte 100"),
        ("axis", -3, "voxels, expected 1 or more each"),
        ("row", float("nan"), "NaN or infinity in the sform"),
    ],
)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_header_is_named(
    tmp_path: Path, version: int, order: str, field: str, value: float, says: str
) -> None:
    data = written(version, order)
    at, form = OFFSETS[version][field]
    struct.pack_into(order + form, data, at, value)
    (tmp_path / "a.nii").write_bytes(bytes(data))
    with pytest.raises(CaseError) as refusal:
        load_nifti(tmp_path / "a.nii", "case")
    assert says in refusal.value.reason and str(tmp_path / "a.nii") in refusal.value.reason
