"""More than a hundred kinds of scans as they come: broken, odd, or named to do harm, each a function that writes one.

Every kind says what must happen to it: ``refused`` (set aside with one line), ``fine`` (it can be used), ``doubted``
(SimpleITK and nibabel read it differently: predicted with a warning, refused where it would be trained on), or
``either`` where readers differ and only silence or a traceback would be wrong. The reader is SimpleITKIO.
"""

from __future__ import annotations

import bz2
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

Fate = Literal["refused", "fine", "doubted", "either"]
SHAPE = (32, 32, 20)
"""(X, Y, Z), as NIfTI stores it."""

SPACING_MM = (5.2, 5.0, 8.5)


@dataclass(frozen=True)
class Kind:
    """One kind of scan; ``write`` gets the path of the file to make."""

    name: str
    fate: Fate
    write: Callable[[Path], Any]
    file: str = ""

    @property
    def file_name(self) -> str:
        return self.file or f"{self.name}_0000.nii.gz"


def scan() -> np.ndarray:
    """A body of soft tissue in air, with noise; int16 HU (X, Y, Z)."""
    x, y, _ = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
    body = np.broadcast_to(x**2 + y**2 < 0.7, SHAPE)
    noise = np.random.default_rng(0).normal(0, 20, SHAPE)
    return (np.where(body, 40, -1000) + noise).astype(np.int16)


def good(path: Path) -> None:
    nifti(path, scan())


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write an array as NIfTI, its spacing in the affine."""
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING_MM, 1.0]) if affine is None else affine), path)


def raw_bytes() -> bytearray:
    """An uncompressed good file: a 348-byte header, 4 bytes of extension, the voxels."""
    return bytearray(nibabel.Nifti1Image(scan(), np.diag([*SPACING_MM, 1.0])).to_bytes())


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A good compressed file whose bytes are changed."""
    return lambda path: path.write_bytes(change(gzip.compress(bytes(raw_bytes()), mtime=0))) and None


def header(offset: int, form: str, *values: float) -> Callable[[Path], None]:
    """A good file with header fields overwritten."""

    def write(path: Path) -> None:
        data = raw_bytes()
        struct.pack_into(f"<{form}", data, offset, *values)
        path.write_bytes(gzip.compress(bytes(data)))

    return write


def values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: nifti(path, change(scan()))


def grid(affine: Any) -> Callable[[Path], None]:
    return lambda path: nifti(path, scan(), np.array(affine, dtype=float))


def one_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[3, 4, 5] = value
        return array

    return change


def coloured(names: str) -> Callable[[Path], None]:
    kind = np.dtype([(name, "u1") for name in names])
    return lambda path: nifti(path, np.zeros(SHAPE, dtype=kind))


def plain(text: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text) and None


def without_permission(path: Path) -> None:
    good(path)
    path.chmod(0)


def flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def big_endian(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(scan(), np.diag([*SPACING_MM, 1.0])).__class__(
        scan().astype(">i2"), np.diag([*SPACING_MM, 1.0]), nibabel.Nifti1Header(endianness=">")
    ), path)  # fmt: skip


def meta_image(path: Path, *, keep: float = 1.0, dims: str = "32 32 20") -> None:
    voxels = stored()
    meta(voxels[: int(len(voxels) * keep)], DimSize=dims)(path)


def stored() -> bytes:
    """The voxels of a good scan as they lie in a file."""
    return scan().T.tobytes()


def big_endian_bytes() -> bytes:
    return scan().T.astype(">i2").tobytes()


def meta(voxels: bytes, *, beside: dict[str, bytes] | None = None, **fields: Any) -> Callable[[Path], None]:
    """A MetaImage of some fields and bytes, with other files beside it."""

    def write(path: Path) -> None:
        known = {"ObjectType": "Image", "NDims": 3, "BinaryData": True, "DimSize": "32 32 20"}
        known |= {"ElementSpacing": "5 5 8", "ElementType": "MET_SHORT", **fields}
        known["ElementDataFile"] = known.pop("ElementDataFile", "LOCAL")
        path.write_bytes("".join(f"{name} = {value}\n" for name, value in known.items()).encode() + voxels)
        for name, content_of_it in (beside or {}).items():
            (path.parent / name).write_bytes(content_of_it)

    return write


def packed_meta(packed: bytes, **fields: Any) -> Callable[[Path], None]:
    return meta(packed, CompressedData=True, CompressedDataSize=len(packed), **fields)


def nrrd(voxels: bytes, *, beside: dict[str, bytes] | None = None, **fields: Any) -> Callable[[Path], None]:
    """A NRRD of some fields (``_`` for a space) and bytes, with other files beside it."""

    def write(path: Path) -> None:
        known = {"type": "short", "dimension": 3, "sizes": "32 32 20", "spacings": "5 5 8", "endian": "little"}
        known |= {"encoding": "raw", **{name.replace("_", " "): value for name, value in fields.items()}}
        lines = "".join(f"{name}: {value}\n" for name, value in known.items())
        path.write_bytes(f"NRRD0004\n# made\n{lines}\n".encode() + voxels)
        for name, content_of_it in (beside or {}).items():
            (path.parent / name).write_bytes(content_of_it)

    return write


def zeroed(packed: bytes, count: int = 40) -> bytes:
    """Some bytes in the middle lost, as a bad disk loses them."""
    middle = len(packed) // 2
    return packed[:middle] + bytes(count) + packed[middle + count :]


def linked_out(path: Path) -> None:
    """Its data file is a link to a file elsewhere on the machine."""
    (path.parent / "linked_out.raw").symlink_to("/dev/zero")
    meta(b"", ElementDataFile="linked_out.raw")(path)


def fields(*changes: tuple[Any, ...]) -> Callable[[Path], None]:
    """A good file with several header fields overwritten: (offset, form, values ...)."""

    def write(path: Path) -> None:
        data = raw_bytes()
        for offset, form, *new in changes:
            struct.pack_into(f"<{form}", data, offset, *new)
        path.write_bytes(gzip.compress(bytes(data)))

    return write


NAN = float("nan")


SX, SY, SZ = SPACING_MM
DIAGONAL = np.diag([*SPACING_MM, 1.0])


def two_members() -> bytes:
    data = bytes(raw_bytes())
    return gzip.compress(data[:5000]) + gzip.compress(data[5000:])


def two_matrices(path: Path) -> None:
    """The sform has x mirrored, the qform has not."""
    affine = DIAGONAL.copy()
    affine[:3, 3] = 10, 20, 30
    image = nibabel.Nifti1Image(scan(), np.diag([-1.0, 1, 1, 1]) @ affine)
    image.header.set_sform(image.affine, 2)
    image.header.set_qform(affine, 1)
    nibabel.save(image, path)


def sheared_only(path: Path) -> None:
    """A sheared sform and no qform, which SimpleITK refuses."""
    header(284, "f", 2.0)(path)


HOSTILE = "$(touch pwned)';touch pwned #"

KINDS: list[Kind] = [
    # ---- bytes
    Kind("empty", "refused", plain(b"")),
    Kind("one_byte", "refused", plain(b"\x1f")),
    Kind("text", "refused", plain(b"this is no scan\n")),
    Kind("error_page", "refused", plain(b"<html><body>403 Forbidden</body></html>")),
    Kind("picture", "refused", plain(b"\x89PNG\r\n\x1a\n" + bytes(500))),
    Kind("zeros", "refused", plain(bytes(50_000))),
    Kind("gzip_of_nothing", "refused", plain(gzip.compress(b""))),
    Kind("gzip_of_zeros", "refused", plain(gzip.compress(bytes(50_000)))),
    Kind("gzip_of_gzip", "refused", content(gzip.compress)),
    Kind("not_compressed", "fine", lambda path: path.write_bytes(bytes(raw_bytes())) and None),
    Kind("cut_in_the_header", "refused", content(lambda data: data[:100])),
    Kind("cut_in_half", "refused", content(lambda data: data[: len(data) // 2])),
    Kind("last_bytes_missing", "refused", content(lambda data: data[:-20])),
    Kind("bit_flipped", "refused", content(flipped_bit)),
    Kind("garbage_at_the_end", "fine", content(lambda data: data + b"garbage")),
    Kind("zeros_at_the_end", "fine", content(lambda data: data + bytes(700))),
    Kind("two_members", "fine", lambda path: path.write_bytes(two_members()) and None),
    Kind("header_only", "refused", lambda path: path.write_bytes(gzip.compress(bytes(raw_bytes()[:352])))),
    Kind("voxels_missing", "refused", lambda path: path.write_bytes(gzip.compress(bytes(raw_bytes()[:9000])))),
    # ---- header
    Kind("wrong_magic", "refused", header(344, "4s", b"abcd")),  # type: ignore[arg-type]
    Kind("header_size_zero", "refused", header(0, "i", 0)),
    Kind("voxels_beyond_the_file", "refused", header(108, "f", 1e8)),
    Kind("voxels_within_the_header", "refused", header(108, "f", 0.0)),
    Kind("no_dimensions", "refused", header(40, "h", 0)),
    Kind("nine_dimensions", "refused", header(40, "h", 9)),
    Kind("huge", "refused", header(40, "4h", 3, 32767, 32767, 32767)),
    Kind("negative_axis", "refused", header(42, "h", -32)),
    Kind("empty_axis", "refused", header(46, "h", 0)),
    Kind("unknown_voxel_type", "refused", header(70, "h", 9999)),
    Kind("wrong_voxel_size", "refused", header(72, "h", 64)),
    Kind("voxel_size_zero", "refused", header(72, "h", 0)),
    Kind("voxel_size_negative", "refused", header(72, "h", -16)),
    Kind("voxel_size_of_another_type", "refused", header(72, "h", 8)),
    Kind("voxels_before_the_file", "refused", header(108, "f", -1.0)),
    Kind("voxels_at_nan", "refused", header(108, "f", NAN)),
    Kind("voxels_at_infinity", "refused", header(108, "f", float("inf"))),
    Kind("voxels_one_byte_early", "refused", header(108, "f", 351.0)),
    Kind("voxels_at_half_a_byte", "refused", header(108, "f", 352.5)),
    Kind("voxels_in_another_file", "refused", header(344, "4s", b"ni1\0")),  # type: ignore[arg-type]
    Kind("two_negative_axes", "refused", header(42, "2h", -32, -32)),
    Kind("fourth_axis_empty", "refused", header(40, "5h", 4, 32, 32, 20, 0)),
    Kind("axes_below_zero", "refused", header(40, "h", -1)),
    Kind("a_slice_not_told_of", "refused", header(46, "h", 19)),
    Kind("intercept_nan", "refused", fields((112, "2f", 1.0, NAN))),
    Kind("slope_nan", "fine", header(112, "f", float("nan"))),
    Kind("slope_zero_with_intercept", "doubted", header(112, "2f", 0.0, -1024.0)),
    Kind("in_metres", "either", header(123, "B", 1)),
    Kind("nifti_2", "refused", lambda path: nibabel.save(nibabel.Nifti2Image(scan(), DIAGONAL), path)),
    Kind("slope_huge", "either", header(112, "f", 1e30)),
    Kind("big_endian", "fine", big_endian),
    # ---- values
    Kind("one_nan", "refused", values(one_voxel(np.nan))),
    Kind("one_inf", "refused", values(one_voxel(np.inf))),
    Kind("one_minus_inf", "refused", values(one_voxel(-np.inf))),
    Kind("all_nan", "refused", values(lambda a: np.full(a.shape, np.nan, np.float32))),
    Kind("all_zero", "refused", values(np.zeros_like)),
    Kind("all_air", "refused", values(lambda a: np.full_like(a, -1000))),
    Kind("absurd_values", "either", values(lambda a: a.astype(np.float32) * 1e30)),
    Kind("wrapped_to_bytes", "fine", values(lambda a: a.astype(np.uint8))),
    Kind("unsigned_with_offset", "fine", values(lambda a: (a.astype(np.int32) + 1200).clip(0).astype(np.uint16))),
    Kind("shifted_by_1024", "fine", values(lambda a: a + np.int16(1024))),
    Kind("z_scores", "fine", values(lambda a: ((a - a.mean()) / a.std()).astype(np.float32))),
    Kind("minus_one_to_one", "fine", values(lambda a: (a / 1200).astype(np.float32))),
    Kind("four_byte_whole_numbers", "fine", values(lambda a: a.astype(np.int32))),
    Kind("doubles", "fine", values(lambda a: a.astype(np.float64))),
    Kind("complex", "refused", values(lambda a: a.astype(np.complex64))),
    Kind("colour", "refused", coloured("RGB")),
    Kind("colour_with_alpha", "refused", coloured("RGBA")),
    # ---- shape
    Kind("flat", "refused", values(lambda a: a[..., 0])),
    Kind("a_line", "refused", values(lambda a: a[:, 0, 0])),
    Kind("two_times", "refused", values(lambda a: np.stack([a, a], axis=3))),
    Kind("one_time", "fine", values(lambda a: a[..., None])),
    Kind("a_vector_field", "refused", values(lambda a: np.stack([a] * 3, axis=-1)[:, :, :, None])),
    Kind("one_slice", "refused", values(lambda a: a[..., :1])),
    Kind("one_column", "refused", values(lambda a: a[:1])),
    Kind("one_voxel", "refused", values(lambda a: a[:1, :1, :1])),
    Kind("two_slices", "fine", values(lambda a: a[..., 9:11])),
    # ---- grid
    Kind("spacing_zero", "either", header(80, "3f", 0, 0, 0)),
    Kind("spacing_negative", "doubted", header(80, "3f", -SX, -SY, -SZ)),
    Kind("two_matrices", "doubted", two_matrices),
    Kind("matrix_of_other_scale", "doubted", header(280, "f", SX / 2)),
    Kind("no_matrix", "doubted", header(252, "2h", 0, 0)),
    Kind("spacing_nan", "either", header(80, "3f", *[float("nan")] * 3)),
    Kind("spacing_tiny", "either", grid(np.diag([1e-6, 1e-6, 1e-6, 1]))),
    Kind("spacing_large", "fine", grid(np.diag([30, 30, 40, 1]))),
    Kind("sheared", "refused", sheared_only),
    Kind("sheared_with_qform", "either", grid([[SX, 2, 0, 0], [0, SY, 0, 0], [0, 0, SZ, 0], [0, 0, 0, 1]])),
    Kind("no_direction", "either", header(280, "12f", *[0.0] * 12)),
    Kind("direction_nan", "refused", header(280, "12f", *[NAN] * 12)),
    Kind("one_direction_nan", "refused", header(280, "f", NAN)),
    Kind("quaternion_nan", "refused", fields((252, "2h", 1, 0), (256, "6f", *[NAN] * 6))),
    Kind("unused_quaternion_nan", "fine", header(256, "6f", *[NAN] * 6)),
    Kind("slices_of_900_mm", "refused", grid(np.diag([SX, SY, 900, 1]))),
    Kind("length_of_a_street", "refused", grid(np.diag([100, 100, SZ, 1]))),
    Kind("axes_swapped", "fine", grid([[0, 0, SZ, 0], [SX, 0, 0, 0], [0, SY, 0, 0], [0, 0, 0, 1]])),
    Kind("axes_flipped", "fine", grid(np.diag([-SX, -SY, SZ, 1]))),
    Kind("left_handed", "fine", grid(np.diag([SX, -SY, SZ, 1]))),
    Kind("far_away", "fine", grid([[SX, 0, 0, 1e6], [0, SY, 0, 1e6], [0, 0, SZ, -1e6], [0, 0, 0, 1]])),
    # ---- not a plain file
    Kind("folder", "refused", Path.mkdir),
    Kind("link_to_nothing", "refused", lambda path: path.symlink_to("nothing")),
    Kind("link_to_itself", "refused", lambda path: path.symlink_to(path.name)),
    Kind("no_permission", "either", without_permission),
    Kind("a_pipe", "refused", os.mkfifo),
    # ---- names
    Kind("unicode", "fine", good, "Löwe_漢字_0000.nii.gz"),
    Kind("gbk", "fine", good, os.fsdecode(b"\xb8\xce\xd4\xe0_0000.nii.gz")),
    Kind("latin_1", "fine", good, os.fsdecode(b"M\xfcller_0000.nii.gz")),
    Kind("spaces", "fine", good, "a scan of mine_0000.nii.gz"),
    Kind("dash", "fine", good, "-rf_0000.nii.gz"),
    Kind("commands", "fine", good, f"{HOSTILE}_0000.nii.gz"),
    Kind("new_line", "fine", good, "two\nlines_0000.nii.gz"),
    Kind("long_name", "fine", good, f"{'n' * 180}_0000.nii.gz"),
]
"""Kinds of files that every command that reads scans must survive."""


def other(name: str, fate: Fate, write: Callable[[Path], Any]) -> Kind:
    """A kind of another format; ``name`` with its ending."""
    stem, _, ending = name.partition(".")
    return Kind(stem, fate, write, f"{stem}_0000.{ending}")


DEFLATED, GZIPPED = zlib.compress(stored()), gzip.compress(stored())

OTHER_FORMATS: list[Kind] = [
    other("meta_cut.mha", "refused", lambda path: meta_image(path, keep=0.3)),
    other("meta_huge.mha", "refused", lambda path: meta_image(path, dims="30000 30000 30000")),
    other("meta_good.mha", "fine", meta_image),
    other("meta_a_voxel_missing.mha", "refused", meta(stored()[:-2])),
    other("meta_packed.mha", "fine", packed_meta(DEFLATED)),
    other("meta_zeroed.mha", "refused", packed_meta(zeroed(DEFLATED))),
    other("meta_checksum.mha", "refused", packed_meta(DEFLATED[:-4] + b"sums")),
    other("meta_packed_short.mha", "refused", packed_meta(zlib.compress(stored()[:20_000]))),
    other("meta_packed_long.mha", "refused", packed_meta(zlib.compress(stored() * 2))),
    other("meta_packed_cut.mha", "refused", packed_meta(DEFLATED[:-9000])),
    Kind(
        "meta_size_wrong",
        "refused",
        meta(DEFLATED, CompressedData=True, CompressedDataSize=99),
        "meta_size_wrong_0000.mha",
    ),
    Kind(
        "meta_size_missing",
        "refused",
        meta(DEFLATED, CompressedData=True),
        "meta_size_missing_0000.mha",
    ),
    Kind(
        "meta_two_streams",
        "refused",
        packed_meta(zlib.compress(stored()[:9000]) + zlib.compress(stored()[9000:])),
        "meta_two_streams_0000.mha",
    ),
    other("meta_header_size_wrong.mha", "refused", meta(stored(), HeaderSize=80)),
    other("meta_voxels_at_the_end.mha", "fine", meta(b"junk" + stored(), HeaderSize=-1)),
    other("meta_big_endian.mha", "fine", meta(big_endian_bytes(), BinaryDataByteOrderMSB=True)),
    other("meta_origin_nan.mha", "refused", meta(stored(), Offset="nan 0 0")),
    Kind(
        "meta_beside",
        "fine",
        meta(b"", ElementDataFile="beside.raw", beside={"beside.raw": stored()}),
        "meta_beside_0000.mhd",
    ),
    Kind(
        "meta_beside_short",
        "refused",
        meta(b"", ElementDataFile="short.raw", beside={"short.raw": stored()[:-2]}),
        "meta_beside_short_0000.mhd",
    ),
    other("meta_device.mhd", "refused", meta(b"", ElementDataFile="/dev/zero")),
    Kind(
        "meta_climbs_to_device",
        "refused",
        meta(b"", ElementDataFile="../" * 30 + "dev/zero"),
        "meta_climbs_to_device_0000.mha",
    ),
    other("meta_linked_out.mhd", "refused", linked_out),
    other("meta_list.mhd", "refused", meta(b"beside.raw\n", ElementDataFile="LIST")),
    other("meta_pattern.mhd", "refused", meta(b"", ElementDataFile="slice%02d.raw 1 20 1")),
    Kind("meta_without_voxels", "refused", plain(b"NDims = 3\nElementDataFile = gone.raw\n"), "gone_0000.mhd"),
    other("nrrd_text.nrrd", "refused", plain(b"NRRD0004\ntype: banana\n\n")),
    other("nrrd_good.nrrd", "fine", nrrd(stored())),
    other("nrrd_cut.nrrd", "refused", nrrd(stored()[:-2])),
    other("nrrd_big_endian.nrrd", "fine", nrrd(big_endian_bytes(), endian="big")),
    other("nrrd_gzip.nrrd", "fine", nrrd(GZIPPED, encoding="gzip")),
    Kind(
        "nrrd_gzip_two",
        "fine",
        nrrd(gzip.compress(stored()[:999]) + gzip.compress(stored()[999:]), encoding="gz"),
        "nrrd_gzip_two_0000.nrrd",
    ),
    Kind(
        "nrrd_gzip_two_short",
        "refused",
        nrrd(gzip.compress(stored()[:999]) + gzip.compress(stored()[1999:]), encoding="gz"),
        "nrrd_gzip_two_short_0000.nrrd",
    ),
    other("nrrd_gzip_long.nrrd", "refused", nrrd(gzip.compress(stored() * 2), encoding="gzip")),
    Kind(
        "nrrd_gzip_zeroed",
        "refused",
        nrrd(zeroed(GZIPPED), encoding="gzip"),
        "nrrd_gzip_zeroed_0000.nrrd",
    ),
    Kind(
        "nrrd_gzip_without_end",
        "refused",
        nrrd(GZIPPED[:-4], encoding="gzip"),
        "nrrd_gzip_without_end_0000.nrrd",
    ),
    other("nrrd_bzip2.nrrd", "refused", nrrd(bz2.compress(stored()), encoding="bzip2")),
    other("nrrd_hex.nrrd", "fine", nrrd(stored().hex().encode(), encoding="hex")),
    other("nrrd_hex_cut.nrrd", "refused", nrrd(stored().hex().encode()[:-200], encoding="hex")),
    Kind(
        "nrrd_beside",
        "fine",
        nrrd(b"", data_file="of_nrrd.raw", beside={"of_nrrd.raw": stored()}),
        "nrrd_beside_0000.nrrd",
    ),
    Kind(
        "nrrd_beside_short",
        "refused",
        nrrd(b"", data_file="cut.raw", beside={"cut.raw": stored()[:-2]}),
        "nrrd_beside_short_0000.nrrd",
    ),
    other("nrrd_device.nrrd", "refused", nrrd(b"", datafile="/dev/zero")),
    Kind(
        "nrrd_climbs_to_device",
        "refused",
        nrrd(b"", data_file="../" * 30 + "dev/zero"),
        "nrrd_climbs_to_device_0000.nrrd",
    ),
    other("nrrd_standard_input.nrrd", "refused", nrrd(b"", data_file="-")),
    other("nrrd_list.nrrd", "refused", nrrd(b"of_nrrd.raw\n", data_file="LIST")),
]
"""Kinds that only commands see which take other formats than the dataset's."""


def write_corpus(folder: Path, kinds: list[Kind], *, good_scans: int = 3) -> None:
    """Write every kind and some good scans (``good0`` ...) beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        kind.write(folder / kind.file_name)
    for number in range(good_scans):
        good(folder / f"good{number}_0000.nii.gz")
