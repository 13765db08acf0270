"""Kinds of DICOM folders as a PACS gives them: each a function that writes one folder of a broken or odd series."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bad_scans import SPACING_MM, Kind, scan

SERIES, CT = "1.2.826.0.1.3680043.2.1125.1", "1.2.840.10008.5.1.4.1.1.2"
SCOUT, PDF = "1.2.826.0.1.3680043.2.1125.9", "1.2.840.10008.5.1.4.1.1.104.1"
EXPLICIT, JPEG_2000 = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90"

Change = Callable[[int, Any], None]


def slices(folder: Path, change: Change | None = None, *, series: str = SERIES, prefix: str = "IM", stop: int = 20):
    """Write a good CT series, one file per slice; ``change(z, dataset)`` spoils a slice before it is written."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    folder.mkdir(parents=True, exist_ok=True)
    voxels = scan()
    for z in range(stop):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.UID(EXPLICIT), pydicom.uid.UID(CT)
        meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(f"{series}.{z + 1}")
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CT, f"{series}.{z + 1}"
        one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.826.0.1.3680043.2.1125", series
        one.Modality, one.PatientName, one.InstanceNumber = "CT", "Nobody", z + 1
        one.ImagePositionPatient = [0.0, 0.0, z * SPACING_MM[2]]
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.SliceThickness = [SPACING_MM[1], SPACING_MM[0]], SPACING_MM[2]
        one.Rows, one.Columns, one.SamplesPerPixel = voxels.shape[1], voxels.shape[0], 1
        one.PhotometricInterpretation, one.PixelRepresentation = "MONOCHROME2", 1
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
        one.RescaleIntercept, one.RescaleSlope = 0, 1
        one.PixelData = np.ascontiguousarray(voxels[:, :, z].T).tobytes()
        if change is not None:
            change(z, one)
        one.save_as(folder / f"{prefix}{z:03d}.dcm", enforce_file_format=True)


def series(change: Change | None = None, *, stop: int = 20) -> Callable[[Path], None]:
    return lambda folder: slices(folder, change, stop=stop)


def without(*names: str, at: int | None = None) -> Change:
    """Leave attributes out, of every slice or of one."""

    def change(z: int, one: Any) -> None:
        for name in names if at in (None, z) else ():
            delattr(one, name)

    return change


def with_values(at: int | None = None, **values: Any) -> Change:
    def change(z: int, one: Any) -> None:
        for name, value in values.items() if at in (None, z) else ():
            setattr(one, name, value(z) if callable(value) else value)

    return change


def then(spoil: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A good series whose folder is changed afterwards."""

    def write(folder: Path) -> None:
        slices(folder)
        spoil(folder)

    return write


def file(folder: Path, z: int = 7) -> Path:
    return folder / f"IM{z:03d}.dcm"


def cut(share: float) -> Callable[[Path], Any]:
    return lambda folder: file(folder).write_bytes(
        file(folder).read_bytes()[: int(file(folder).stat().st_size * share)]
    )


def compressed(z: int, one: Any) -> None:
    """Says JPEG 2000 and holds garbage."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    one.file_meta.TransferSyntaxUID = UID(JPEG_2000)
    one.PixelData = encapsulate([b"no picture" * 20])
    one["PixelData"].is_undefined_length = True


def coloured(z: int, one: Any) -> None:
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 8, 8, 7, 0
    one.PixelData = bytes(one.Rows * one.Columns * 3)
    for name in ("RescaleIntercept", "RescaleSlope"):
        delattr(one, name)


def localizer_beside(folder: Path) -> None:
    scout = with_values(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    slices(folder, scout, series=SCOUT, prefix="SC", stop=1)


def tall(z: int, one: Any) -> None:
    if z == 5:
        one.Rows, one.PixelData = one.Rows * 2, one.PixelData * 2


def no_dicom(folder: Path) -> None:
    folder.mkdir()
    (folder / "IM000.dcm").write_bytes(bytes(128) + b"DICM" + b"and then nothing of the kind")


def stored_as(z: int, one: Any, *, slope: float = 1, intercept: float = 0, signed: bool = True) -> None:
    """The same HU, kept with another slope, intercept and sign."""
    hu = scan()[:, :, z].T.astype(float)
    one.RescaleSlope, one.RescaleIntercept, one.PixelRepresentation = slope, intercept, int(signed)
    one.PixelData = np.rint((hu - intercept) / slope).astype("<i2" if signed else "<u2").tobytes()


def unsigned_after_first(z: int, one: Any) -> None:
    """The first slice unsigned and without offset, its air at 0; the others with one, as some scanners mix them."""
    if z == 0:
        one.PixelData = scan()[:, :, 0].T.clip(0).astype("<u2").tobytes()
        one.PixelRepresentation = 0
    else:
        stored_as(z, one, intercept=-1200, signed=False)


def half_units_after_first(z: int, one: Any) -> None:
    if z:
        stored_as(z, one, slope=0.5, intercept=-1024)


def signs_in_turn(z: int, one: Any) -> None:
    if z % 2:
        stored_as(z, one, intercept=-1200, signed=False)


def no_rescale_of_one(z: int, one: Any) -> None:
    stored_as(z, one, intercept=-1200, signed=False)
    if z == 5:
        del one.RescaleSlope, one.RescaleIntercept


def colour_of_one(z: int, one: Any) -> None:
    if z == 5:
        coloured(z, one)


def last(spoil: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A good series whose last slice, which no gap betrays, is changed afterwards."""
    return then(lambda folder: spoil(file(folder, 19)))


def gzipped(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def bare(path: Path) -> None:
    """Without preamble and file meta information, as old PACS keep slices."""
    import pydicom
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    plain = DicomBytesIO()
    plain.is_little_endian, plain.is_implicit_VR = True, True
    write_dataset(plain, pydicom.dcmread(path))
    path.write_bytes(plain.getvalue())


def without_preamble(path: Path) -> None:
    path.write_bytes(path.read_bytes()[132:])


def of_all(spoil: Callable[[Path], Any]) -> Callable[[Path], None]:
    return then(lambda folder: [spoil(file(folder, z)) for z in range(20)])


def linked_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.dcm")


def unfinished(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.part"))
    path.with_name(f"{path.name}.part").write_bytes(b"\1" * 500)


def nan_position(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.0\\0.0\\161.5", b"0.0\\0.0\\nan  "))


def two_frames(z: int, one: Any) -> None:
    one.NumberOfFrames, one.PixelData = 2, one.PixelData * 2


STEP = SPACING_MM[2]

_KINDS = [
    # ---- slices
    Kind("gap", "refused", then(lambda folder: file(folder).unlink()), "gap"),
    Kind("two_gaps", "refused", then(lambda folder: [file(folder, z).unlink() for z in (4, 11)]), "two_gaps"),
    Kind("doubled", "refused", series(with_values(at=8, ImagePositionPatient=[0.0, 0.0, 7 * STEP])), "doubled"),
    Kind("copied", "refused", then(lambda folder: shutil.copyfile(file(folder), folder / "copy.dcm")), "copied"),
    Kind("all_at_one_place", "refused", series(with_values(ImagePositionPatient=[0.0, 0.0, 0.0])), "all_at_one_place"),
    Kind("one_slice", "refused", series(stop=1), "one_slice"),
    Kind("two_slices", "fine", series(stop=2), "two_slices"),
    Kind("uneven", "refused", series(with_values(ImagePositionPatient=lambda z: [0, 0, z**1.3])), "uneven"),
    Kind("tilted_gantry", "refused", series(with_values(ImagePositionPatient=lambda z: [0, z, STEP * z])), "tilted"),
    Kind("other_size", "refused", series(tall), "other_size"),
    # ---- series
    Kind("two_series", "refused", then(lambda folder: slices(folder, series=SCOUT, prefix="B")), "two_series"),
    Kind("localizer_beside", "refused", then(localizer_beside), "localizer_beside"),
    Kind("localizer_only", "refused", localizer_beside, "localizer_only"),
    Kind(
        "two_orientations", "refused",
        series(with_values(at=3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])), "two_orientations",
    ),
    # ---- attributes
    Kind("no_position", "refused", series(without("ImagePositionPatient")), "no_position"),
    Kind("no_position_of_one", "refused", series(without("ImagePositionPatient", at=6)), "no_position_of_one"),
    Kind("no_orientation", "refused", series(without("ImageOrientationPatient")), "no_orientation"),
    Kind("no_series", "refused", series(without("SeriesInstanceUID")), "no_series"),
    Kind("no_spacing", "refused", series(without("PixelSpacing")), "no_spacing"),
    Kind("spacing_zero", "refused", series(with_values(PixelSpacing=[0, 0])), "spacing_zero"),
    Kind("two_spacings", "refused", series(with_values(at=9, PixelSpacing=[1, 1])), "two_spacings"),
    Kind("no_rows", "refused", series(without("Rows")), "no_rows"),
    Kind("no_rescale", "either", series(without("RescaleIntercept", "RescaleSlope")), "no_rescale"),
    Kind("orientation_zero", "refused", series(with_values(ImageOrientationPatient=[0] * 6)), "orientation_zero"),
    # ---- voxels
    Kind("no_voxels", "refused", series(without("PixelData", at=7)), "no_voxels"),
    Kind("too_few_voxels", "refused", series(with_values(at=7, PixelData=bytes(100))), "too_few_voxels"),
    Kind("compressed_garbage", "refused", series(compressed), "compressed_garbage"),
    Kind("coloured", "refused", series(coloured), "coloured"),
    Kind("constant", "refused", series(with_values(PixelData=bytes(32 * 32 * 2))), "constant"),
    Kind("unsigned_after_first", "fine", series(unsigned_after_first), "unsigned_after_first"),
    Kind("half_units_after_first", "fine", series(half_units_after_first), "half_units_after_first"),
    Kind("signs_in_turn", "fine", series(signs_in_turn), "signs_in_turn"),
    Kind("no_rescale_of_one", "refused", series(no_rescale_of_one), "no_rescale_of_one"),
    Kind("slope_zero_of_one", "refused", series(with_values(at=5, RescaleSlope=0)), "slope_zero_of_one"),
    Kind("inverted", "refused", series(with_values(PhotometricInterpretation="MONOCHROME1")), "inverted"),
    Kind("inverted_one", "refused", series(with_values(at=5, PhotometricInterpretation="MONOCHROME1")), "inverted_one"),
    Kind("colour_of_one", "refused", series(colour_of_one), "colour_of_one"),
    Kind("two_frames", "refused", series(two_frames), "two_frames"),
    Kind("two_frames_alone", "refused", series(two_frames, stop=1), "two_frames_alone"),
    Kind("position_nan", "refused", then(lambda folder: nan_position(file(folder, 19))), "position_nan"),
    Kind("slices_of_900_mm", "refused", series(with_values(ImagePositionPatient=lambda z: [0, 0, 900 * z])), "thick"),
    # ---- the last file of the series
    Kind("last_gzipped", "refused", last(gzipped), "last_gzipped"),
    Kind("last_gzipped_in_place", "refused", last(lambda p: p.write_bytes(gzip.compress(p.read_bytes()))), "last_gz"),
    Kind("all_gzipped", "refused", of_all(gzipped), "all_gzipped"),
    Kind("last_bare", "fine", last(bare), "last_bare"),
    Kind("all_bare", "fine", of_all(bare), "all_bare"),
    Kind("last_without_preamble", "fine", last(without_preamble), "last_without_preamble"),
    Kind("all_without_preamble", "fine", of_all(without_preamble), "all_without_preamble"),
    Kind("last_cut_to_1", "refused", last(lambda p: p.write_bytes(p.read_bytes()[:1])), "last_cut_to_1"),
    Kind("last_cut_to_100", "refused", last(lambda p: p.write_bytes(p.read_bytes()[:100])), "last_cut_to_100"),
    Kind("last_cut_by_2", "refused", last(lambda p: p.write_bytes(p.read_bytes()[:-2])), "last_cut_by_2"),
    Kind("last_zeros", "refused", last(lambda p: p.write_bytes(bytes(3000))), "last_zeros"),
    Kind("last_error_page", "refused", last(lambda p: p.write_bytes(b"<html>403</html>" * 90)), "last_error_page"),
    Kind("last_link_to_nothing", "refused", last(linked_to_nothing), "last_link_to_nothing"),
    Kind("last_unfinished", "refused", last(unfinished), "last_unfinished"),
    # ---- files
    Kind("cut_in_half", "refused", then(cut(0.5)), "cut_in_half"),
    Kind("last_bytes_missing", "refused", then(cut(0.98)), "last_bytes_missing"),
    Kind("cut_in_the_header", "refused", then(cut(0.1)), "cut_in_the_header"),
    Kind("empty_file", "refused", then(lambda folder: file(folder, 19).write_bytes(b"")), "empty_file"),
    Kind("magic_only", "refused", no_dicom, "magic_only"),
    Kind("no_picture", "refused", series(with_values(at=7, SOPClassUID=PDF)), "no_picture"),
    Kind("notes_beside", "fine", then(lambda folder: (folder / "notes.txt").write_text("hello")), "notes_beside"),
    Kind("index_beside", "fine", then(lambda folder: (folder / "DICOMDIR").write_bytes(b"x" * 200)), "index_beside"),
    Kind("good", "fine", slices, "good_dicom"),
    Kind("name", "fine", slices, "$(touch pwned)';touch pwned # ü"),
]  # fmt: skip
DICOM_KINDS: list[Kind] = [replace(kind, file=f"dicom_{kind.file_name}") for kind in _KINDS]
"""Kinds of folders that every command that reads DICOM must survive."""
