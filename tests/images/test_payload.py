"""Voxels that a header tells of are all there, undamaged and beside it, before any reader is asked."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, read_volume, write_volume

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype("<i2")
FIELDS = {"NDims": 3, "DimSize": "6 5 4", "ElementType": "MET_SHORT"}
NRRD = {"type": "short", "dimension": 3, "sizes": "6 5 4", "spacings": "1 1 1", "endian": "little"}


def meta(path: Path, voxels: bytes, **fields: object) -> Path:
    known = {**FIELDS, **fields}
    known["ElementDataFile"] = known.pop("ElementDataFile", "LOCAL")
    path.write_bytes("".join(f"{name} = {value}\n" for name, value in known.items()).encode() + voxels)
    return path


def nrrd(path: Path, voxels: bytes, **fields: object) -> Path:
    known = {**NRRD, "encoding": "raw", **{name.replace("_", " "): value for name, value in fields.items()}}
    path.write_bytes(
        b"NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in known.items()).encode() + b"\n" + voxels
    )
    return path


def refused(path: Path) -> str:
    with pytest.raises(CaseError) as refusal:
        read_volume(path, "case")
    assert str(path) in refusal.value.reason
    return refusal.value.reason


@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd"])
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_every_voxel_type_that_is_written_is_read_again(tmp_path: Path, ending: str, dtype: str) -> None:
    array = np.abs(VOXELS % 100).astype(dtype)
    write_volume(tmp_path / f"a.{ending}", Volume(array, (1, 2, 3)))
    found = read_volume(tmp_path / f"a.{ending}").array
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


PACKED_TYPES = {"MET_SHORT": ("short", "i2"), "MET_FLOAT": ("float", "f4"), "MET_UCHAR": ("uchar", "u1")}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", PACKED_TYPES)
def test_compressed_voxels_are_unpacked_once_and_are_what_simpleitk_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, order: str
) -> None:
    other, code = PACKED_TYPES[kind]
    data = np.abs(VOXELS % 100).astype(order + code).tobytes()
    packed, is_big = zlib.compress(data), order == ">"
    more = {"CompressedData": True, "ElementType": kind, "BinaryDataByteOrderMSB": is_big}
    grid = {"ElementSpacing": "0.7 0.8 2.5", "Offset": "1 -2 3.5", "TransformMatrix": "-1 0 0 0 0 1 0 1 0"}
    endian = {"type": other, "encoding": "gzip", "endian": "big" if is_big else "little"}
    for path in (
        meta(tmp_path / "a.mha", packed, **more, **grid, CompressedDataSize=len(packed)),
        nrrd(tmp_path / "a.nrrd", gzip.compress(data), **endian),
    ):
        image = sitk.ReadImage(str(path))
        with monkeypatch.context() as patch:
            patch.setattr(sitk, "ReadImage", lambda name: pytest.fail("inflated twice"))
            volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
        assert volume.array.dtype == np.dtype(code)
        assert (volume.spacing_mm[::-1], volume.origin) == (image.GetSpacing(), image.GetOrigin())
        assert volume.direction == image.GetDirection()


@pytest.mark.parametrize("word", ["True", "T", "t", "1", "False", "F", "yes"])
@pytest.mark.parametrize("field", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData"])
def test_words_for_true_are_those_that_simpleitk_takes(tmp_path: Path, field: str, word: str) -> None:
    packed = zlib.compress(VOXELS.tobytes(), 0)  # longer than the voxels, which it can be taken for
    fields = {"CompressedData": True, "CompressedDataSize": len(packed), field: word}
    path = meta(tmp_path / "a.mha", packed, **fields)
    np.testing.assert_array_equal(read_volume(path).array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


@pytest.mark.parametrize(
    "fields", [{"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, {"CompressedDataSize": 99999}, {"BinaryData": "F"}], ids=str
)
def test_compressed_voxels_under_a_header_that_simpleitk_refuses_are_refused(tmp_path: Path, fields: dict) -> None:
    packed = zlib.compress(VOXELS.tobytes())
    whole = {"CompressedData": True, "CompressedDataSize": len(packed)}
    read_volume(meta(tmp_path / "a.mha", packed, **whole))
    path = meta(tmp_path / "b.mha", packed, **{**whole, **fields})
    with pytest.raises(RuntimeError):
        sitk.ReadImage(str(path))
    refused(path)


@pytest.mark.parametrize("place", range(3, 12))
def test_a_stream_with_lost_bytes_is_refused_wherever_they_were(tmp_path: Path, place: int) -> None:
    whole = np.random.default_rng(1).integers(-1000, 1000, (20, 50, 60)).astype("<i2").tobytes()
    for packed, write in (
        (zlib.compress(whole), lambda data: meta(
            tmp_path / "a.mha", data, DimSize="60 50 20", CompressedData=True, CompressedDataSize=len(data))),
        (gzip.compress(whole), lambda data: nrrd(tmp_path / "a.nrrd", data, sizes="60 50 20", encoding="gzip")),
    ):  # fmt: skip
        assert read_volume(write(packed)).array.tobytes() == whole
        at = len(packed) * place // 12
        assert "is damaged" in refused(write(packed[:at] + bytes(50) + packed[at + 50 :]))


def test_a_data_file_may_be_a_link_beside_its_linked_header(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "folder"
    store.mkdir()
    folder.mkdir()
    meta(store / "a.mhd", b"", ElementDataFile="a.raw")
    (store / "a.raw").write_bytes(VOXELS.tobytes())
    for name in ("a.mhd", "a.raw"):
        (folder / name).symlink_to(store / name)
    np.testing.assert_array_equal(read_volume(folder / "a.mhd").array, VOXELS)


@pytest.mark.parametrize("name", ["../secret.raw", "sub/../../secret.raw", "{folder}/secret.raw", "inside.raw"])
def test_a_header_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.raw").write_bytes(VOXELS.tobytes())
    (folder / "inside.raw").symlink_to(tmp_path / "secret.raw")
    name = name.format(folder=tmp_path)
    for path in (
        meta(folder / "a.mhd", b"", ElementDataFile=name),
        meta(folder / "a.mha", b"", ElementDataFile=name),
        nrrd(folder / "a.nrrd", b"", data_file=name),
        nrrd(folder / "b.nrrd", b"", datafile=name),
        nrrd(folder / "c.nhdr", b"", data_file=name),
    ):
        assert "data file" in refused(path) and name in refused(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.raw")
    assert "not a regular file" in refused(meta(tmp_path / "a.mhd", b"", ElementDataFile="pipe.raw"))


def test_bytes_after_the_voxels_are_padding_when_they_are_zeros_or_few(tmp_path: Path) -> None:
    a_slice = VOXELS[0].nbytes
    for rest, fine in ((bytes(9999), True), (b"x" * (a_slice - 1), True), (b"x" * a_slice, False)):
        for path in (
            meta(tmp_path / "a.mha", VOXELS.tobytes() + rest),
            nrrd(tmp_path / "a.nrrd", VOXELS.tobytes() + rest),
        ):
            if fine:
                np.testing.assert_array_equal(read_volume(path).array, VOXELS)
            else:
                assert "file or header is damaged" in refused(path)


def test_skipped_lines_and_bytes_are_no_voxels(tmp_path: Path) -> None:
    data = VOXELS.tobytes()
    for path in (
        nrrd(tmp_path / "a.nrrd", b"one\ntwo\n" + data, line_skip=2),
        nrrd(tmp_path / "b.nrrd", b"junk" + data, byte_skip=4),
        nrrd(tmp_path / "c.nrrd", b"junk" + data, byte_skip=-1),
        nrrd(tmp_path / "d.nrrd", gzip.compress(b"junk" + data), encoding="gzip", byte_skip=4),
        nrrd(tmp_path / "e.nrrd", b"one\n" + gzip.compress(data), encoding="gz", lineskip=1),
    ):
        np.testing.assert_array_equal(read_volume(path).array, VOXELS)
    assert "is truncated" in refused(nrrd(tmp_path / "f.nrrd", b"junk" + data[4:], byte_skip=4))
