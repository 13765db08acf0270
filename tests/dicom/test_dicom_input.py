"""DICOM series as input: order by position, and what is no single even scan is refused."""

from __future__ import annotations

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from bad_dicom import slices
from small_series import write_patient_series, write_series

from nnunet_flare.cli import predict
from nnunet_flare.dicom.series import read_scan, read_series
from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, geometry_difference, read_volume


@pytest.fixture
def volume() -> Volume:
    return scans.blobs((10, 36, 40), spacing=(4.0, 1.5, 2.0))


def test_slices_are_ordered_by_position_with_the_scans_geometry(tmp_path, volume):
    write_series(tmp_path / "s", volume)
    found = read_series(tmp_path / "s", "case")
    np.testing.assert_array_equal(found.array, volume.array)
    assert geometry_difference(found, volume) is None


def test_a_folder_of_series_is_predicted_each_on_its_own_grid(tmp_path, volume):
    write_series(tmp_path / "in" / "anna", volume)
    write_series(tmp_path / "in" / "bert", scans.blobs((12, 36, 40), seed=1))
    folder = models.write_model(tmp_path / "model")
    words = ["-m", folder, "--backend", "torch", "-o", tmp_path / "out"]
    assert predict.main([str(w) for w in ("-i", tmp_path / "in", *words)]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["anna.nii.gz", "bert.nii.gz"]
    assert geometry_difference(read_volume(tmp_path / "out" / "anna.nii.gz"), volume) is None
    single = ["-i", tmp_path / "in" / "anna", "-m", folder, "--backend", "torch", "-o", tmp_path / "single"]
    assert predict.main([str(w) for w in single]) == 0
    one, other = (read_volume(tmp_path / d / "anna.nii.gz").array for d in ("out", "single"))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("more", [[], ["--continue_prediction"]])
def test_a_name_too_long_for_its_label_map_sets_that_case_aside_and_the_others_are_written(
    tmp_path, volume, capsys, more
):
    write_series(tmp_path / "in" / ("s" * 250), volume)
    write_series(tmp_path / "in" / "good", volume)
    words = ["-i", tmp_path / "in", "-m", models.write_model(tmp_path / "model"), "-o", tmp_path / "out", *more]
    assert predict.main([str(word) for word in (*words, "--backend", "torch")]) == 1
    assert "has 250 bytes, at most 248 are possible" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


def test_gaps_are_refused_naming_the_slices(tmp_path, volume):
    write_series(tmp_path / "s", volume, skip=4)
    with pytest.raises(CaseError, match=r"a gap of 8\.00 mm between IM\d+\.dcm and IM\d+\.dcm.*4\.00 mm apart"):
        read_series(tmp_path / "s", "case")


def test_doubled_slices_are_refused(tmp_path, volume):
    write_series(tmp_path / "s", volume)
    (tmp_path / "s" / "copy.dcm").write_bytes((tmp_path / "s" / "IM000.dcm").read_bytes())
    with pytest.raises(CaseError, match="two slices at one position"):
        read_series(tmp_path / "s", "case")


def test_mixed_series_and_orientations_are_refused(tmp_path, volume):
    write_series(tmp_path / "mixed", volume)
    write_series(tmp_path / "mixed", volume, uid="1.2.3.5", prefix="other")
    with pytest.raises(CaseError, match="holds 2 series"):
        read_series(tmp_path / "mixed", "case")
    turned = Volume(volume.array, volume.spacing_mm, volume.origin, (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    write_series(tmp_path / "turned", volume)
    write_series(tmp_path / "turned", turned, prefix="other")
    with pytest.raises(CaseError, match="different orientations"):
        read_series(tmp_path / "turned", "case")


def test_a_damaged_slice_is_named(tmp_path, volume):
    write_series(tmp_path / "s", volume)
    path = tmp_path / "s" / "IM003.dcm"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CaseError, match=r"IM003\.dcm"):
        read_series(tmp_path / "s", "case")


@pytest.mark.parametrize(("step", "digits"), [(1.25, 1), (0.625, 1), (0.7031, 1), (2.534, 1), (5.0, 1)])
def test_positions_that_were_rounded_are_evenly_spaced(tmp_path, step, digits) -> None:
    """Compared with a straight line, and not one with the next; the spacing is the line's."""

    def rounded(z, one):
        one.ImagePositionPatient = [0.0, 0.0, round(z * step, digits)]

    slices(tmp_path / "series", rounded)
    volume = read_scan(tmp_path / "series", "a")
    assert volume.array.shape[0] == 20
    assert volume.spacing_mm[0] == pytest.approx(step, rel=5e-3)


@pytest.mark.parametrize("step", [0.625, 5.0])
@pytest.mark.parametrize("missing", [1, 9, 18])
def test_a_missing_slice_is_found_all_the_same(tmp_path, step, missing) -> None:
    slices(tmp_path / "series", lambda z, one: setattr(one, "ImagePositionPatient", [0.0, 0.0, round(z * step, 1)]))
    (tmp_path / "series" / f"IM{missing:03d}.dcm").unlink()
    with pytest.raises(CaseError, match="missing or duplicated"):
        read_scan(tmp_path / "series", "a")


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian"])
def test_values_that_a_table_turns_into_others_are_refused(tmp_path, syntax):
    """Some scanners store one in the place of slope and intercept; the reader would take the stored values."""
    pydicom = pytest.importorskip("pydicom")
    folder = write_patient_series(tmp_path / "series", scans.blobs((4, 8, 8)))
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        del one.RescaleSlope, one.RescaleIntercept
        one.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        one.save_as(path, implicit_vr=syntax.startswith("Implicit"), little_endian=True)
    assert len(read_series(folder, "scan").array) == 4  # as MR, which has neither
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "HU", bytes(4)
    one = pydicom.dcmread(path)
    one.ModalityLUTSequence = [table]
    one.save_as(path, implicit_vr=syntax.startswith("Implicit"), little_endian=True)
    with pytest.raises(CaseError, match=rf"{path.name}: turns stored values .* a table \(Modality LUT Sequence\)"):
        read_series(folder, "scan")


def test_a_slice_that_lies_beside_the_others_is_refused(tmp_path):
    """As where some slices were reconstructed with another centre; the first and the last lie where they should."""

    def beside(z, one):
        one.ImagePositionPatient = [30.0 if 5 < z < 10 else 0.0, 0.0, z * 3.0]

    slices(tmp_path / "series", beside)
    with pytest.raises(CaseError, match=r"IM006.dcm lies 30.0 mm beside the line from the first slice to the last"):
        read_scan(tmp_path / "series", "a")


@pytest.mark.parametrize("kind", ["NuclearMedicineImageStorage", "XRayAngiographicImageStorage"])
def test_kinds_of_picture_whose_place_the_reader_leaves_out_are_refused(tmp_path, volume, kind):
    """It would take a spacing of 1 mm, and for some an origin of 0, whatever the slices say."""
    pydicom = pytest.importorskip("pydicom")
    folder = write_patient_series(tmp_path / "series", volume)
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = getattr(pydicom.uid, kind)
        one.save_as(path)
    with pytest.raises(CaseError, match=r"pixels of \(1.5, 2.0\) mm, 4.00 mm apart, but the reader takes"):
        read_series(folder, "scan")


@pytest.mark.parametrize("is_signed", [False, True])
def test_values_that_do_not_lie_in_the_lowest_bits_are_refused(tmp_path, is_signed):
    """Old scanners stored 12 bits at the upper end of 16; the reader would take the lowest 12."""
    pydicom = pytest.importorskip("pydicom")
    folder = write_patient_series(tmp_path / "series", scans.blobs((4, 8, 8)))
    values = np.random.default_rng(0).integers(0, 2048, (8, 8)) - 1024 * is_signed
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        one.BitsStored, one.HighBit, one.PixelRepresentation = 12, 11, int(is_signed)
        one.PixelData = values.astype("<i2").tobytes()
        one.save_as(path)
    np.testing.assert_array_equal(read_series(folder, "scan").array[0], values)
    one.HighBit, one.PixelData = 15, (values.astype("<i2") * 16).tobytes()
    one.save_as(path)
    with pytest.raises(CaseError, match=rf"{path.name}: its values have 12 bits with the highest at 15"):
        read_series(folder, "scan")
