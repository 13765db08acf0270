"""A scan is what the reader that the model names makes of it: values, axes, spacing, and the file written back."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunet_flare.errors import CaseError
from nnunet_flare.images import read_volume, seen_by_nibabel, seen_by_simpleitk, write_labels
from nnunet_flare.images.nifti import load_header
from nnunet_flare.images.orientation import turn_for_reader
from nnunet_flare.images.readers import READERS, reader_of_dataset, reader_of_plans

STOCK = {
    "SimpleITKIO": SimpleITKIO,
    "SimpleITKIOWithReorient": SimpleITKIOWithReorient,
    "NibabelIO": NibabelIO,
    "NibabelIOWithReorient": NibabelIOWithReorient,
}
SHAPE = (9, 8, 7)
"""(X, Y, Z), as NIfTI stores it."""

SPACING = (0.8, 1.1, 3.0)


def voxels(dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(dtype)


def rotated(degrees: tuple[float, float, float], axes: str = "RAS") -> np.ndarray:
    """A matrix of some orientation, turned about all three axes."""
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), (0, 0, 0))
    affine[:3, 3] = (-100.5, 20.25, 310)
    turn = np.eye(4)
    from scipy.spatial.transform import Rotation

    turn[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return turn @ affine @ np.diag([*SPACING, 1])


def nifti(path: Path, affine: np.ndarray, dtype: str = "int16", *, kind=nibabel.Nifti1Image, q=None) -> None:
    image = kind(voxels(dtype), affine, dtype=dtype)
    image.header.set_qform(affine if q is None else q, 1)
    image.header.set_sform(affine, 2)
    nibabel.save(image, path)


def changed(*fields: tuple[int, str, tuple[float, ...]], affine: np.ndarray | None = None) -> Callable[[Path], None]:
    """A file whose header fields are overwritten."""

    def write(path: Path) -> None:
        nifti(path, rotated((0, 0, 0)) if affine is None else affine)
        data = bytearray(gzip.decompress(path.read_bytes()))
        for offset, form, values in fields:
            struct.pack_into(f"<{form}", data, offset, *values)
        path.write_bytes(gzip.compress(bytes(data)))

    return write


def mirrored(path: Path) -> None:
    """Two matrices that disagree: the qform as it was, the sform with x mirrored."""
    nifti(path, np.diag([-1, 1, 1, 1]) @ rotated((0, 0, 0)), q=rotated((0, 0, 0)))


def sheared(path: Path) -> None:
    affine = rotated((0, 0, 0))
    affine[0, 1] = 0.3
    image = nibabel.Nifti1Image(voxels(), None)
    image.header.set_zooms(SPACING)
    image.header.set_sform(affine, 2)
    nibabel.save(image, path)


def big_endian(path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(voxels(">i2"), rotated((0, 0, 0), "LPS"), header), path)


def not_compressed(path: Path) -> None:
    nifti(path, rotated((0, 0, 0)))
    path.write_bytes(gzip.decompress(path.read_bytes()))


AGREED: dict[str, Callable[[Path], None]] = {
    "RAS": lambda path: nifti(path, rotated((0, 0, 0))),
    "LAS": lambda path: nifti(path, rotated((0, 0, 0), "LAS")),
    "PIR": lambda path: nifti(path, rotated((0, 0, 0), "PIR")),
    "oblique": lambda path: nifti(path, rotated((20, -15, 30), "LPS")),
    "steep": lambda path: nifti(path, rotated((40, 35, 44), "SAL")),
    "floats": lambda path: nifti(path, rotated((5, 0, 0)), "float32"),
    "doubles": lambda path: nifti(path, rotated((5, 0, 0)), "float64"),
    "unsigned": lambda path: nifti(path, rotated((5, 0, 0)), "uint16"),
    "long": lambda path: nifti(path, rotated((5, 0, 0)), "int64"),
    "scaled": changed((112, "2f", (1.7, -1024.3))),
    "shifted": changed((112, "2f", (1.0, -1024.0))),
    "slope nan": changed((112, "f", (np.nan,))),
    "big endian": big_endian,
}
"""Files of which SimpleITK and nibabel make the same."""

DOUBTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "mirrored sform": (mirrored, "reads the axes"),
    "sheared": (sheared, "cannot"),
    "slope 0": (changed((112, "2f", (0.0, -1024.0))), "stored + -1024"),
    "slope next to 0": (changed((112, "f", (1e-20,))), "1e-20 * stored + 0"),
    "NIfTI-2": (lambda path: nifti(path, rotated((3, 0, 0)), kind=nibabel.Nifti2Image), "NIfTI-2"),
    "metres": (changed((123, "B", (1,))), "spacing"),
    "negative spacing": (changed((80, "3f", (-0.8, -1.1, -3.0))), "reads the axes"),
    "negative x spacing": (changed((80, "f", (-0.8,)), affine=rotated((0, 0, 0), "LPS")), "reads the axes"),
    "no matrix": (changed((252, "2h", (0, 0))), "reads the axes"),
    "matrix of other scale": (changed((280, "f", (0.4,))), "reads the axes"),
}
"""Files of which they make different things, and a word of what is said about it."""

EVERY = {**AGREED, **{name: write for name, (write, _) in DOUBTED.items()}}


REFUSED_BY_NIBABEL: dict[str, Callable[[Path], None]] = {
    "one more axis": changed((40, "5h", (4, *SHAPE, 1))),
    "not compressed": not_compressed,
}
"""Files whose content is clear, which stock's readers by nibabel refuse."""


def stock_reads(reader: str, path: Path) -> tuple[np.ndarray, dict]:
    with redirect_stdout(StringIO()):
        return STOCK[reader]().read_images([str(path)])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", EVERY)
def test_what_is_read_and_written_is_what_the_stock_reader_reads_and_writes(
    tmp_path: Path, name: str, reader: str
) -> None:
    path = tmp_path / "scan_0000.nii.gz"
    EVERY[name](path)
    try:
        expected, properties = stock_reads(reader, path)
    except Exception:
        with pytest.raises(CaseError, match=f"cannot be read by .*, as {reader} reads it"):
            read_volume(path, "a", reader=reader)
        return
    volume = read_volume(path, "a", reader=reader)
    turn = turn_for_reader(reader, volume)
    assert np.array_equal(turn.apply(volume.array).astype(np.float32), expected[0])
    assert turn.spacing_mm(volume.spacing_mm) == pytest.approx(tuple(properties["spacing"]), rel=1e-7)
    labels = (expected[0] > 300).astype(np.uint8)
    labels[:2, :3, 1] = 2
    with redirect_stdout(StringIO()):
        STOCK[reader]().write_seg(labels, str(tmp_path / "stock.nii.gz"), properties)
    write_labels(tmp_path / "ours.nii.gz", np.ascontiguousarray(turn.undo(labels)), volume)
    ours, stock = (nibabel.load(tmp_path / f"{who}.nii.gz") for who in ("ours", "stock"))
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(stock.dataobj))
    assert ours.affine == pytest.approx(stock.affine, abs=1e-4)
    assert ours.header.get_zooms() == pytest.approx(stock.header.get_zooms(), rel=1e-6)
    for code in ("sform_code", "qform_code"):
        assert ours.header[code] == stock.header[code]


def spaces(qform: int, sform: int, intent: int = 0) -> Callable[[Path], None]:
    return changed((252, "2h", (qform, sform)), (68, "h", (intent,)))


CODES = {f"codes {q} and {s}": spaces(q, s) for q in (-1, 0, 1, 2, 5, 300) for s in (-1, 0, 1, 2, 3, 4, 5, 300)}


@pytest.mark.parametrize("name", [*EVERY, *REFUSED_BY_NIBABEL, *CODES])
def test_headers_that_nibabel_takes_as_they_stand_are_told_without_it_and_told_the_same(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "scan.nii.gz"
    {**EVERY, **REFUSED_BY_NIBABEL, **CODES}[name](path)
    header = load_header(path)
    assert header is not None
    plain = seen_by_nibabel._as_it_stands(header)
    if plain is None:
        assert name not in AGREED
        return
    told, refusal = seen_by_nibabel._by_nibabel(header, reorient=False)
    assert refusal is None
    assert np.array_equal(plain.affine, told.affine) and plain.zooms == told.zooms
    assert (plain.slope, plain.intercept) == (told.slope, told.intercept)


def by_simpleitk(path: Path, axes: str, degrees: float = 0.0) -> None:
    """A scan as SimpleITK writes it."""
    image = sitk.GetImageFromArray(voxels().transpose())
    matrix = np.diag([-1, -1, 1]) @ rotated((degrees, -degrees / 2, 2 * degrees), axes)[:3, :3] / SPACING
    image.SetDirection(matrix.ravel().tolist())
    image.SetSpacing(tuple(s + 1 / 3 for s in SPACING))
    image.SetOrigin((-187.3, 20.1, 1 / 3))
    sitk.WriteImage(image, str(path))


BY_SIMPLEITK = {
    f"{axes} by {degrees}": (axes, degrees) for axes in ("RAS", "LPS", "LAI", "PIR", "SAL") for degrees in (0, 0.01, 22)
}


@pytest.mark.parametrize("name", [*EVERY, *REFUSED_BY_NIBABEL, *CODES, *BY_SIMPLEITK])
def test_grids_that_simpleitk_takes_as_they_stand_are_told_without_it_and_told_the_same(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "scan.nii.gz"
    if name in BY_SIMPLEITK:
        by_simpleitk(path, *BY_SIMPLEITK[name])
    else:
        {**EVERY, **REFUSED_BY_NIBABEL, **CODES}[name](path)
    header = load_header(path)
    assert header is not None
    plain = seen_by_simpleitk._plain_grid(header) if header.version == "NIfTI-1" else None
    assert plain is not None or name not in BY_SIMPLEITK
    assert plain is None or plain == seen_by_simpleitk._by_simpleitk(path)


@pytest.mark.parametrize("at", [76, 80, 88, 256, 264, 268, 276, 280, 284, 292, 300, 308, 324])
@pytest.mark.parametrize("by", [1e-7, 1e-4, 0.2])
def test_a_grid_with_one_odd_number_is_told_as_simpleitk_tells_it(tmp_path: Path, at: int, by: float) -> None:
    path = tmp_path / "scan.nii.gz"
    by_simpleitk(path, "LPS", 22)
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", data, at, struct.unpack_from("<f", data, at)[0] * (1 + by) + by)
    path.write_bytes(gzip.compress(bytes(data)))
    header = load_header(path)
    assert header is not None
    plain = seen_by_simpleitk._plain_grid(header)
    assert plain is None or plain == seen_by_simpleitk._by_simpleitk(path)


@pytest.mark.parametrize("library", ["nibabel", "SimpleITK"])
def test_an_ordinary_scan_is_read_without_importing_a_library(tmp_path: Path, library: str) -> None:
    by_simpleitk(tmp_path / "scan.nii.gz", "LPS", 22)
    code = (
        "import sys; from pathlib import Path; from nnunet_flare.images import read_volume\n"
        f"assert read_volume(Path({str(tmp_path / 'scan.nii.gz')!r})).doubt is None\n"
        f"sys.exit({library!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", AGREED)
def test_no_doubt_about_ordinary_files(tmp_path: Path, name: str, reader: str) -> None:
    AGREED[name](tmp_path / "scan.nii.gz")
    assert read_volume(tmp_path / "scan.nii.gz", "a", reader=reader).doubt is None


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("name", DOUBTED)
def test_what_the_two_libraries_disagree_about_is_said(tmp_path: Path, name: str, reader: str) -> None:
    write, word = DOUBTED[name]
    write(tmp_path / "scan.nii.gz")
    try:
        said = read_volume(tmp_path / "scan.nii.gz", "a", reader=reader).doubt
    except CaseError as error:
        said = error.reason
    assert said is not None
    assert word in said or "cannot" in said
    assert "SimpleITK" in said and ("nibabel" in said.lower() or reader in said)


@pytest.mark.parametrize("name", REFUSED_BY_NIBABEL)
def test_what_stock_refuses_is_read_all_the_same_and_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / "scan.nii.gz"
    REFUSED_BY_NIBABEL[name](path)
    expected, properties = stock_reads("SimpleITKIO", path)
    with pytest.raises(Exception, match=r"3d images|gzip"):
        stock_reads("NibabelIO", path)
    for reader in READERS:
        volume = read_volume(path, reader=reader)
        assert np.array_equal(volume.array, expected[0])
        assert volume.spacing_mm == pytest.approx(properties["spacing"])
        assert (volume.doubt is None) == reader.startswith("SimpleITK")
        assert volume.doubt is None or f"nnU-Net's {reader} cannot read the file" in volume.doubt


def test_ordinary_types_stay_as_they_are_stored(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz", rotated((0, 0, 0)))
    for reader in READERS:
        assert read_volume(tmp_path / "scan.nii.gz", reader=reader).array.dtype == np.int16


@pytest.mark.parametrize(
    "document",
    [
        {"file_ending": ".nii.gz"},
        {"file_ending": ".nii"},
        {"file_ending": ".mha"},
        {"file_ending": ".nrrd"},
        {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "NibabelIOWithReorient"},
        {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "None"},
        {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "SimpleITKIOWithReorient"},
    ],
)
def test_a_dataset_is_read_with_the_reader_that_stock_takes(document: dict) -> None:
    assert reader_of_dataset(document) == determine_reader_writer_from_dataset_json(document, verbose=False).__name__


@pytest.mark.parametrize("name", ["RAS", "sheared", "NIfTI-2", "mirrored sform"])
def test_a_reader_that_cannot_read_the_first_image_is_passed_over_as_stock_does(tmp_path: Path, name: str) -> None:
    EVERY[name](tmp_path / "a_0000.nii.gz")
    document = {"file_ending": ".nii.gz"}
    stock = determine_reader_writer_from_dataset_json(document, str(tmp_path / "a_0000.nii.gz"), verbose=False)
    assert reader_of_dataset(document, tmp_path / "a_0000.nii.gz") == stock.__name__


def test_plans_without_a_reader_of_volumes_are_read_by_simpleitk() -> None:
    assert reader_of_plans({"image_reader_writer": "NibabelIO"}) == "NibabelIO"
    assert reader_of_plans({"image_reader_writer": "NaturalImage2DIO"}) == reader_of_plans({}) == "SimpleITKIO"


def test_other_formats_are_read_by_simpleitk_whatever_the_reader(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(voxels())
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(tmp_path / "scan.mha"))
    for reader in READERS:
        volume = read_volume(tmp_path / "scan.mha", reader=reader)
        assert np.array_equal(volume.array, voxels()) and volume.spacing_mm == SPACING[::-1]
