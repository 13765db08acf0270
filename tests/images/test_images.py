"""Images keep values and geometry exactly; unusable ones are refused with file, finding and expectation."""

from __future__ import annotations

import gzip
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import (
    SUFFIXES,
    Volume,
    check_values,
    checks,
    find_cases,
    geometry_difference,
    oddities,
    read_labels,
    read_volume,
    stem_of,
    suffix_of,
    write_labels,
    write_volume,
)

SHAPE = (5, 6, 7)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def ct(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def rotation(angles: tuple[float, float, float]) -> tuple[float, ...]:
    return tuple(Rotation.from_euler("xyz", angles, degrees=True).as_matrix().ravel().tolist())


SPACING = st.floats(0.3, 9)
COORDINATE = st.floats(-500, 500)
ANGLE = st.floats(-180, 180)
GRIDS = st.builds(
    lambda spacing, origin, angles: Volume(ct(), spacing, origin, rotation(angles)),
    st.tuples(SPACING, SPACING, SPACING),
    st.tuples(COORDINATE, COORDINATE, COORDINATE),
    st.tuples(ANGLE, ANGLE, ANGLE),
)
per_folder = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(volume=GRIDS)
@per_folder
def test_written_and_read_again_it_is_the_same(tmp_path: Path, suffix: str, volume: Volume) -> None:
    write_volume(tmp_path / f"scan{suffix}", volume)
    again = read_volume(tmp_path / f"scan{suffix}")
    assert np.array_equal(again.array, volume.array)
    assert again.array.dtype == np.int16
    assert geometry_difference(again, volume) is None


@given(volume=GRIDS)
@per_folder
def test_another_reader_sees_the_same_geometry(tmp_path: Path, volume: Volume) -> None:
    """nibabel reads (x, y, z) and RAS coordinates; where voxels lie must not depend on who reads."""
    write_volume(tmp_path / "scan.nii.gz", volume)
    other = nibabel.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(np.asarray(other.dataobj).transpose(2, 1, 0), volume.array)
    direction = np.asarray(volume.direction).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(volume.spacing_mm)[::-1]
    affine[:3, 3] = volume.origin
    assert np.diag([-1, -1, 1, 1]) @ affine == pytest.approx(other.affine, abs=2e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_the_voxel_type_is_kept(tmp_path: Path, dtype: str) -> None:
    volume = Volume(np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype), (1, 1, 1))
    write_volume(tmp_path / "scan.nii.gz", volume)
    assert read_volume(tmp_path / "scan.nii.gz").array.dtype == dtype


def test_axis_order_is_z_y_x(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(ct())
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert volume.spacing_mm == (3.0, 2.0, 1.0)
    assert volume.array.shape == SHAPE
    assert volume.voxel_mm3 == pytest.approx(6)


def test_writing_leaves_only_the_file_and_replaces_a_link_instead_of_its_target(tmp_path: Path) -> None:
    target = tmp_path / "original.nii.gz"
    write_volume(target, Volume(ct(1), (1, 1, 1)))
    link = tmp_path / "new" / "scan.nii.gz"
    link.parent.mkdir()
    os.link(target, link)
    write_volume(link, Volume(ct(2), (1, 1, 1)))
    assert [p.name for p in link.parent.iterdir()] == ["scan.nii.gz"]
    assert np.array_equal(read_volume(target).array, ct(1))
    assert np.array_equal(read_volume(link).array, ct(2))


def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grid that is told by SimpleITK's header."""
    write_volume(tmp_path / "scan.nii.gz", Volume(ct(1), (1, 1, 1)))
    oblique = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)

    def full(image: object, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("ITK ERROR: no space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(OSError, match=r"scan\.nii\.gz: cannot be written \(ITK ERROR: no space left"):
        write_volume(tmp_path / "scan.nii.gz", Volume(ct(2), (1, 1, 1), direction=oblique))
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").array, ct(1))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_written_elsewhere_than_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A container whose root cannot be written has no folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    write_volume(tmp_path / f"scan{suffix}", Volume(ct(1), (1, 1, 1)))
    assert np.array_equal(read_volume(tmp_path / f"scan{suffix}").array, ct(1))


def test_a_header_with_a_second_file_gets_both_by_their_final_names(tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.mhd", Volume(ct(1), (1, 1, 1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.mhd", "scan.zraw"]


def refused(path: Path) -> str:
    with pytest.raises(CaseError) as refusal:
        check_values(read_volume(path, "liver_7"), "liver_7", path)
    assert refusal.value.case == "liver_7"
    assert refusal.value.exit_code == 1
    text = str(refusal.value)
    assert text.startswith("liver_7: ")
    assert "\n" not in text
    assert str(path) in text
    return text


def write_array(path: Path, array: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
    return path


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.nii.gz").endswith("no such file")
    assert refused(tmp_path).endswith("not a file")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").touch()
    assert "the file is empty (0 bytes)" in refused(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_instead_of_an_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    path.write_text("<html>404</html>" * 50)
    assert any(word in refused(path) for word in ("cannot be read", "is damaged"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.3, 0.8, 0.99])
def test_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    write_volume(tmp_path / f"scan{suffix}", Volume(ct(shape=(13, 40, 50)), (1, 1, 1)))
    data = tmp_path / ("scan.zraw" if suffix == ".mhd" else f"scan{suffix}")
    data.write_bytes(data.read_bytes()[: int(kept * data.stat().st_size)])
    assert "truncated" in refused(tmp_path / f"scan{suffix}")


def test_header_whose_second_file_is_gone(tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.mhd", Volume(ct(), (1, 1, 1)))
    (tmp_path / "scan.zraw").unlink()
    assert "cannot be read" in refused(tmp_path / "scan.mhd")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_nan_and_infinite_voxels(tmp_path: Path, suffix: str, bad: float) -> None:
    array = ct().astype(np.float32)
    array[1, 2, 3:5] = bad
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    assert "2 of 210 voxels are NaN or infinite" in refused(path)


def test_constant_image(tmp_path: Path) -> None:
    path = write_array(tmp_path / "scan.nii.gz", np.full(SHAPE, -1000, np.int16))
    assert "all voxels are -1000; the scan is empty" in refused(path)


def test_two_and_four_dimensions(tmp_path: Path) -> None:
    flat = tmp_path / "flat.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ct(shape=(6, 7))), str(flat))
    assert "has 2 dimensions (7, 6), expected 3" in refused(flat)
    path = write_array(tmp_path / "film.nii.gz", ct(shape=(4, 5, 6, 7)))
    assert "has 4 dimensions (7, 6, 5, 4), expected 3" in refused(path)


def test_colour_image(tmp_path: Path) -> None:
    path = tmp_path / "colour.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ct(shape=(*SHAPE, 3)), isVector=True), str(path))
    assert "has 3 values per voxel, expected 1" in refused(path)


def test_vectors_with_a_slope_are_refused_and_end_no_process(tmp_path: Path) -> None:
    path = tmp_path / "moved.nii"
    sitk.WriteImage(sitk.GetImageFromArray(ct(shape=(*SHAPE, 3)), isVector=True), str(path))
    with open(path, "r+b") as file:
        file.seek(112)
        file.write(struct.pack("<f", 2))
    code = (
        "import sys; from pathlib import Path; from nnunet_flare.images import read_volume as r; r(Path(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, text=True)
    assert ended.returncode == 1  # SimpleITK ends the process with a signal
    assert "has 3 values per voxel, expected 1" in ended.stderr


@pytest.mark.parametrize("shape", [(1, 6, 7), (5, 1, 7), (5, 6, 1)])
def test_an_axis_of_one_voxel(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = tmp_path / "thin.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ct(shape=shape)), str(path))
    assert f"shape (z, y, x) {shape} has an axis of fewer than 2 voxels" in refused(path)


def test_an_axis_of_two_voxels_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "thin.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ct(shape=(2, 2, 2))), str(path))
    assert read_volume(path).array.shape == (2, 2, 2)


@pytest.mark.parametrize("spacing", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_impossible_spacing_in_the_header(tmp_path: Path, axis: int, spacing: float) -> None:
    """ITK repairs them in silence, so the header itself is changed and must be looked at."""
    path = write_array(tmp_path / "scan.nii.gz", ct())
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", data, 76 + 4 * axis, spacing)
    path.write_bytes(gzip.compress(bytes(data)))
    assert "expected three numbers above 0" in refused(path)


def test_grid_checks_without_a_file() -> None:
    with pytest.raises(CaseError, match=r"spacing \(z, y, x\) \(1.0, -1.0, 1.0\) mm"):
        checks.check_grid(Volume(ct(), (1.0, -1.0, 1.0)), "a")
    with pytest.raises(CaseError, match="has 2 dimensions"):
        checks.check_grid(Volume(ct(shape=(6, 7)), (1.0, 1.0, 1.0)), "a")
    with pytest.raises(CaseError, match="voxels are of type complex64"):
        check_values(Volume(ct().astype(np.complex64), (1, 1, 1)), "a")


@pytest.mark.parametrize(
    ("volume", "says"),
    [
        (Volume(ct(), (1, 1, 1)), None),
        (Volume(ct() + 20000, (1, 1, 1)), "outside CT's -2048 to 8192 HU"),
        (Volume(ct().astype(np.int32) - 60000, (1, 1, 1)), "outside CT's"),
        (Volume((ct() % 256).astype(np.uint8), (1, 1, 1)), "look like an 8-bit picture"),
        (Volume(ct(), (1, 1, 0.1)), "spacing (z, y, x) (1, 1, 0.1) mm, outside 0.2 to 15 mm"),
        (Volume(ct(), (20.0, 1, 1)), "outside 0.2 to 15 mm"),
        (Volume(ct(), (15.0, 0.2, 1)), None),
        (Volume(np.clip(ct().astype(np.int32) * 9, -2048, 8192), (1, 1, 1)), None),
    ],
)
def test_odd_scans_are_told_in_words(volume: Volume, says: str | None) -> None:
    found = oddities(volume)
    assert (found == []) if says is None else (len(found) == 1 and says in found[0])


def test_labels_are_small_integers_whatever_the_file_holds(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE)
    labels[1:3] = 13
    for dtype in ("float64", "float32", "int32", "uint8"):
        write_volume(tmp_path / "labels.nii.gz", Volume(labels.astype(dtype), (1, 1, 1)))
        read = read_labels(tmp_path / "labels.nii.gz", allowed=range(14)).array
        assert read.dtype == np.uint8
        assert np.array_equal(read, labels)
    labels[0, 0, 0] = 300
    write_volume(tmp_path / "labels.nii.gz", Volume(labels.astype(np.int32), (1, 1, 1)))
    assert read_labels(tmp_path / "labels.nii.gz").array.dtype == np.uint16


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.5, "holds fractions or NaN; expected whole label ids"),
        (-1, "holds the negative id -1"),
        (70000, "holds the id 70000"),
        (15, "holds the ids [15], which are not in the label set [0, 1, 2"),
    ],
)
def test_label_maps_with_impossible_ids(tmp_path: Path, value: float, says: str) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[2, 2, 2] = value
    write_volume(tmp_path / "labels.nii.gz", Volume(labels, (1, 1, 1)))
    with pytest.raises(CaseError) as refusal:
        read_labels(tmp_path / "labels.nii.gz", "liver_7", allowed=range(15))
    assert says in str(refusal.value)


def test_written_labels_are_bytes_on_the_images_grid(tmp_path: Path) -> None:
    image = Volume(ct(), (3.0, 0.8, 0.7), (-12.5, 3.25, 100.0), rotation((3, 0, 170)))
    labels = np.zeros(SHAPE, np.int64)
    labels[1] = 255
    write_labels(tmp_path / "labels.nii.gz", labels, image)
    read = read_labels(tmp_path / "labels.nii.gz")
    assert read.array.dtype == np.uint8
    assert np.array_equal(read.array, labels)
    assert geometry_difference(read, image) is None
    labels[1] = 256
    with pytest.raises(ValueError, match="256 does not fit uint8"):
        write_labels(tmp_path / "labels.nii.gz", labels, image)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Volume(ct(shape=(5, 6, 8)), (1, 1, 1)), "shape (z, y, x) (5, 6, 7) and (5, 6, 8)"),
        (Volume(ct(), (1, 1, 1.2)), "spacing (1.0, 1.0, 1.0) and (1.0, 1.0, 1.2)"),
        (Volume(ct(), (1, 1, 1), (0, 0, 0.5)), "origin"),
        (Volume(ct(), (1, 1, 1), (0, 0, 0), rotation((0, 0, 10))), "direction"),
        (Volume(ct(1), (1, 1, 1.0005), (0, 5e-4, 0)), None),
        (Volume(ct(), (1, 1, 1), (0.004, 0, 0)), None),
        (Volume(ct(), (1, 1, 1), (0, 0, 0), rotation((0, 0, 0.09))), None),
    ],
)
def test_differences_of_two_grids_in_words(other: Volume, says: str | None) -> None:
    found = geometry_difference(Volume(ct(), (1, 1, 1)), other)
    assert (found is None) if says is None else (found is not None and says in found)


def test_another_array_keeps_the_grid_and_must_fit_it() -> None:
    volume = Volume(ct(), (3.0, 2.0, 1.0), (1.0, 2.0, 3.0), rotation((1, 2, 3)))
    changed = volume.with_array(ct(5))
    assert (changed.spacing_mm, changed.origin, changed.direction) == (
        volume.spacing_mm, volume.origin, volume.direction
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"shape \(5, 6, 8\) does not fit a grid of shape \(5, 6, 7\)"):
        volume.with_array(ct(shape=(5, 6, 8)))


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("a.nii.gz", "a", ".nii.gz"),
        ("a.b.NII.GZ", "a.b", ".nii.gz"),
        ("a.nii", "a", ".nii"),
        ("a.nrrd", "a", ".nrrd"),
        ("a.png", "a.png", None),
        ("a.gz", "a.gz", None),
    ],
)
def test_suffix_and_stem(name: str, stem: str, suffix: str | None) -> None:
    assert stem_of(Path("folder") / name) == stem
    assert suffix_of(Path("folder") / name) == suffix


def test_cases_of_an_image_folder(tmp_path: Path) -> None:
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a_1_0000.nii.gz", "._a_0000.nii.gz", "a_0000.nii", "notes.txt"):
        (tmp_path / name).touch()
    found = find_cases(tmp_path, ".nii.gz", channels=2)
    assert list(found) == ["a_1", "b"]
    assert [p.name for p in found["b"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    assert [p.name for p in found["a_1"]] == ["a_1_0000.nii.gz", "a_1_0001.nii.gz"], "left for the reader to report"


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing"):
        find_cases(tmp_path, ".nii.gz")
    (tmp_path / "scan.nii.gz").touch()
    with pytest.raises(InputError, match=r"no image named <case>_0000\.nii\.gz; found \['scan\.nii\.gz'\]"):
        find_cases(tmp_path, ".nii.gz")
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / "absent", ".nii.gz")


def test_real_scans_come_through_unchanged(real_data: Path, tmp_path: Path) -> None:
    for name in ("ts_torso3mm_ct", "ts_slab512_ct"):
        volume = read_volume(real_data / f"{name}.nii.gz")
        check_values(volume, name)
        assert oddities(volume) == []
        write_volume(tmp_path / "copy.nii.gz", volume)
        copy = sitk.ReadImage(str(tmp_path / "copy.nii.gz"))
        original = sitk.ReadImage(str(real_data / f"{name}.nii.gz"))
        assert np.array_equal(sitk.GetArrayViewFromImage(copy), sitk.GetArrayViewFromImage(original))
        assert copy.GetOrigin() == pytest.approx(original.GetOrigin(), abs=1e-3)
        assert copy.GetDirection() == pytest.approx(original.GetDirection(), abs=1e-6)
        assert copy.GetSpacing() == pytest.approx(original.GetSpacing(), abs=1e-6)


@pytest.mark.parametrize(
    "after",
    [bytes(1), bytes(512), b"garbage", bytes(1 << 20)],
    ids=["one zero", "zeros", "garbage", "a megabyte of zeros"],
)
def test_what_follows_a_whole_compressed_file_is_left_alone_as_stock_leaves_it(tmp_path: Path, after: bytes) -> None:
    path = write_array(tmp_path / "scan.nii.gz", ct())
    path.write_bytes(path.read_bytes() + after)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(expected, ct()) and np.array_equal(read_volume(path).array, expected)


def test_a_file_of_several_gzip_members_is_read_whole(tmp_path: Path) -> None:
    path = write_array(tmp_path / "scan.nii.gz", ct())
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(b"".join(gzip.compress(data[first : first + 100]) for first in range(0, len(data), 100)))
    assert np.array_equal(read_volume(path).array, ct())


def test_a_plain_file_whose_name_ends_in_gz_is_read_as_stock_reads_it(tmp_path: Path) -> None:
    path = write_array(tmp_path / "scan.nii.gz", ct())
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), ct())
    assert np.array_equal(read_volume(path).array, ct())
    path.write_bytes(path.read_bytes()[:-3])
    assert "truncated" in refused(path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_an_ending_in_capitals_is_the_same_format(tmp_path, ending, compressed):
    """As some scanners and Windows programs write it."""
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10.0, 20.0, 30.5))
    sitk.WriteImage(image, str(tmp_path / f"scan{ending}"), useCompression=compressed)
    expected = read_volume(tmp_path / f"scan{ending}")
    capital = (tmp_path / f"scan{ending}").rename(tmp_path / f"SCAN{ending.upper()}")
    found = read_volume(capital)
    np.testing.assert_array_equal(found.array, array)
    assert (found.spacing_mm, found.origin) == (expected.spacing_mm, expected.origin)
    assert found.spacing_mm == pytest.approx((2.5, 0.8, 0.7)) and found.origin == pytest.approx((-10.0, 20.0, 30.5))
