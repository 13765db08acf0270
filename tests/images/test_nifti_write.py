"""A written NIfTI file is what SimpleITK or nibabel would have written of the whole image, compressed otherwise."""

from __future__ import annotations

import gzip
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.images import Volume, to_sitk, write_volume
from nnunet_flare.images.nifti_write import LONGEST_AXIS

ROTATED = (0.36, 0.48, -0.8, -0.8, 0.6, 0.0, 0.48, 0.64, 0.6)
MIRRORED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PLAIN = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
TYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]


def volume(dtype: str, direction: tuple[float, ...] = PLAIN, **more: tuple[float, ...]) -> Volume:
    array = np.random.default_rng(0).integers(0, 120, (6, 7, 9)).astype(dtype)
    return Volume(array, (2.5, 0.8, 0.7), (-100.25, 30.5, 7.125), direction, **more)


def simpleitks(own: Volume, folder: Path) -> bytes:
    """The file that SimpleITK writes of a volume."""
    sitk.WriteImage(to_sitk(own), str(folder / "stock.nii"))
    return (folder / "stock.nii").read_bytes()


def without_negative_zeros(file: bytes) -> bytes:
    """A file in whose quaternion, offset and matrix no zero has a sign."""
    placed = np.frombuffer(file, "f4", 18, 256) + np.float32(0)
    return file[:256] + placed.tobytes() + file[328:]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("direction", [PLAIN, ROTATED, MIRRORED], ids=["plain", "rotated", "mirrored"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_byte_is_simpleitks(tmp_path: Path, dtype: str, direction: tuple[float, ...], ending: str) -> None:
    write_volume(tmp_path / f"ours{ending}", volume(dtype, direction))
    ours = (tmp_path / f"ours{ending}").read_bytes()
    ours = gzip.decompress(ours) if ending.endswith("gz") else ours
    assert without_negative_zeros(ours) == without_negative_zeros(simpleitks(volume(dtype, direction), tmp_path))


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1.0, -1.0), repeat=3)))
def test_of_a_grid_along_the_scanners_axes_simpleitk_need_not_be_asked(
    tmp_path: Path, order: tuple[int, ...], signs: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = volume("uint8", tuple((np.eye(3)[list(order)] * signs).ravel().tolist()))
    expected = without_negative_zeros(simpleitks(own, tmp_path))
    monkeypatch.setattr("nnunet_flare.images.write.simpleitk_header", lambda *given: pytest.fail("SimpleITK was asked"))
    write_volume(tmp_path / "ours.nii", own)
    assert without_negative_zeros((tmp_path / "ours.nii").read_bytes()) == expected


@pytest.mark.parametrize("place", [(1e39, 0.0, 0.0), (-1e39, 0.0, 0.0)])
def test_a_place_that_the_format_cannot_tell_of_is_refused(tmp_path: Path, place: tuple[float, ...]) -> None:
    far = Volume(np.zeros((2, 2, 2), np.uint8), (1.0, 1.0, 1.0), place)
    with pytest.raises(OSError, match="infinity"):
        write_volume(tmp_path / "far.nii", far)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", TYPES)
def test_every_byte_is_nibabels_where_nibabel_read_the_grid(tmp_path: Path, dtype: str) -> None:
    affine = np.array([[0.7, 0.1, 0, 4], [0, -0.8, 0.2, 5], [0.1, 0, 2.5, 6], [0, 0, 0, 1]])
    own = volume(dtype, affine=tuple(affine.ravel().tolist()))
    write_volume(tmp_path / "ours.nii.gz", own)
    nibabel.save(nibabel.Nifti1Image(own.array.transpose(2, 1, 0), affine), tmp_path / "stock.nii")
    assert gzip.decompress((tmp_path / "ours.nii.gz").read_bytes()) == (tmp_path / "stock.nii").read_bytes()


def test_voxels_in_another_order_of_memory_are_the_same(tmp_path: Path) -> None:
    own = volume("int16")
    write_volume(tmp_path / "a.nii", own)
    write_volume(tmp_path / "b.nii", own.with_array(np.asfortranarray(own.array)))
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_an_axis_that_the_format_cannot_tell_of_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    long = Volume(np.zeros((1, 1, LONGEST_AXIS + 1), np.uint8), (1.0, 1.0, 1.0))
    with pytest.raises(OSError, match="32768 voxels"):
        write_volume(tmp_path / "long.nii.gz", long)
    assert not list(tmp_path.iterdir())
