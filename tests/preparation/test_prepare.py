"""A FLARE download, as it is unpacked, becomes a dataset that nnU-Net and this package read; bad cases are named."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_flare.cases import read_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.datasets import check_dataset
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.phantom import make_phantom
from nnunet_flare.preparation import examine
from nnunet_flare.preparation.build import prepare
from nnunet_flare.preparation.layouts import layout_of

SIZE = (12, 24, 28)
ALL = tuple(range(1, 15))


@pytest.fixture(scope="module")
def patient() -> tuple[Volume, np.ndarray]:
    """A scan and its label map with all 14 labels."""
    return make_phantom(3, domain="wide", size=SIZE, spacing_mm=(14.0, 13.0, 13.0), lesions=True)


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    return tmp_path / "nnUNet_raw"


def write_scan(path: Path, patient, number: int = 0) -> None:
    scan = patient[0]
    write_volume(path, scan.with_array((scan.array + number).astype(np.int16)))


def write_map(path: Path, patient, ids=ALL) -> None:
    scan, labels = patient
    write_labels(path, np.where(np.isin(labels, ids), labels, 0).astype(np.uint8), scan)


@pytest.fixture
def flare22(tmp_path, patient) -> Path:
    """3 labelled and 4 unlabelled scans, one validation scan with and one without a label map."""
    folder = tmp_path / "FLARE22"
    for number in (1, 2, 3):
        labelled = folder / "Training" / "FLARE22_LabeledCase50"
        write_scan(labelled / "images" / f"FLARE22_Tr_{number:04d}_0000.nii.gz", patient, number)
        write_map(labelled / "labels" / f"FLARE22_Tr_{number:04d}.nii.gz", patient, range(1, 14))
    for number, part in ((1, "1-1000"), (2, "1-1000"), (1001, "1001-2000"), (1002, "1001-2000")):
        parts = folder / "Training" / f"FLARE_UnlabeledCase{part}"
        write_scan(parts / f"Case_{number:05d}_0000.nii.gz", patient, number % 50)
    for number in (1, 2):
        write_scan(folder / "Validation" / f"FLARETs_{number:04d}_0000.nii.gz", patient, number)
    write_map(folder / "Validation" / "labels" / "FLARETs_0002.nii.gz", patient, range(1, 14))
    return folder


@pytest.fixture
def flare23(tmp_path, patient) -> Path:
    """Label maps of all organs and lesions, of organs only, of five organs, of lesions, and an empty one."""
    folder = tmp_path / "FLARE23"
    annotated = {1: ALL, 2: range(1, 14), 3: (1, 2, 3, 4, 13), 4: (14,), 5: ()}
    for number, ids in annotated.items():
        write_scan(folder / "imagesTr2200" / f"FLARE23_{number:04d}_0000.nii.gz", patient, number)
        write_map(folder / "labelsTr2200" / f"FLARE23_{number:04d}.nii.gz", patient, ids)
    write_scan(folder / "unlabeledTr1800" / "FLARE23_2201_0000.nii.gz", patient)
    write_scan(folder / "unlabeledTr1800" / "FLARE23_2202.nii.gz", patient)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def call(option: str, folder: Path, *more: str) -> int:
    return main(["prepare", f"--{option}", str(folder), *more])


def test_flare22_becomes_a_dataset_and_a_folder_of_unlabelled_scans(flare22, raw, capsys):
    assert call("flare22", flare22) == 0
    dataset = raw / "Dataset022_FLARE22"
    assert names(dataset / "imagesTr") == [f"FLARE22_Tr_000{n}_0000.nii.gz" for n in (1, 2, 3)]
    assert names(dataset / "labelsTr") == [f"FLARE22_Tr_000{n}.nii.gz" for n in (1, 2, 3)]
    assert names(dataset / "unlabelled") == [f"Case_{n:05d}_0000.nii.gz" for n in (1, 2, 1001, 1002)]
    assert names(dataset / "imagesVal") == ["FLARETs_0002_0000.nii.gz"] and names(dataset / "labelsVal")
    assert names(dataset / "imagesTs") == ["FLARETs_0001_0000.nii.gz"]
    assert check_dataset(dataset) == []
    assert not (dataset / "flare_cases.json").exists()  # every label map is complete
    said = capsys.readouterr().out
    assert "unlabelled                 4   (the full challenge has 2000)" in said
    assert f"run -d Dataset022_FLARE22 -u {dataset / 'unlabelled'} --eval {dataset / 'imagesVal'}" in said


def test_files_are_links_and_the_download_is_unchanged(flare22, raw):
    before = {path: path.stat().st_mtime_ns for path in flare22.rglob("*.nii.gz")}
    assert call("flare22", flare22) == 0
    source = flare22 / "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz"
    assert (raw / "Dataset022_FLARE22/imagesTr/FLARE22_Tr_0001_0000.nii.gz").samefile(source)
    assert {path: path.stat().st_mtime_ns for path in flare22.rglob("*.nii.gz")} == before


def test_copies_outlive_the_download(flare22, raw):
    assert call("flare22", flare22, "--copy", "-d", "122") == 0
    assert call("flare22", flare22, "--copy", "-d", "122") == 0  # equal copies are kept
    shutil.rmtree(flare22)
    assert check_dataset(raw / "Dataset122_FLARE22") == []


def test_copies_are_made_where_links_are_refused(flare22, raw, monkeypatch):
    def refused(*_):
        raise OSError("no links on this file system")

    monkeypatch.setattr("os.link", refused)
    monkeypatch.setattr("os.symlink", refused)
    assert call("flare22", flare22) == 0
    copied = raw / "Dataset022_FLARE22/imagesTr/FLARE22_Tr_0001_0000.nii.gz"
    assert copied.stat().st_nlink == 1 and not copied.is_symlink()
    assert call("flare22", flare22) == 0


def test_nnunet_reads_the_scans_in_one_orientation(flare22, raw, patient):
    stored = flare22 / "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0002_0000.nii.gz"
    scan = read_volume(stored)
    turned = Volume(scan.array[:, :, ::-1].copy(), scan.spacing_mm, scan.origin, (-1, 0, 0, 0, 1, 0, 0, 0, 1))
    write_volume(stored, turned)
    label = flare22 / "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0002.nii.gz"
    write_labels(label, read_labels(label).array[:, :, ::-1], turned)
    assert call("flare22", flare22) == 0
    dataset = raw / "Dataset022_FLARE22"
    document = json.loads((dataset / "dataset.json").read_text())
    reader = determine_reader_writer_from_dataset_json(document, verbose=False)()
    one, two = (reader.read_images([str(dataset / f"imagesTr/FLARE22_Tr_000{n}_0000.nii.gz")])[0] for n in (1, 2))
    np.testing.assert_array_equal(one + 1, two)  # scans 1 and 2 differ by 1 HU


def test_every_bad_case_is_named_and_the_others_are_prepared(flare22, raw, patient, capsys):
    labelled = flare22 / "Training/FLARE22_LabeledCase50"
    (labelled / "images/FLARE22_Tr_0001_0000.nii.gz").write_bytes(b"")
    scan, labels = patient
    shifted = Volume(scan.array, scan.spacing_mm, (5.0, 0.0, 0.0))
    write_labels(labelled / "labels/FLARE22_Tr_0002.nii.gz", np.where(labels == 14, 40, labels), shifted)
    write_scan(labelled / "images/FLARE22_Tr_0004_0000.nii.gz", patient)
    write_map(labelled / "labels/FLARE22_Tr_0005.nii.gz", patient)
    write_scan(flare22 / "again/Case_00002_0000.nii.gz", patient)
    broken = flare22 / "Training/FLARE_UnlabeledCase1-1000/Case_00001_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:2000])
    assert call("flare22", flare22) == 1
    lines = {line.split(": ")[1]: line for line in capsys.readouterr().err.splitlines() if line.startswith("set aside")}
    assert set(lines) == {f"FLARE22_Tr_000{n}" for n in (1, 2, 4, 5)} | {"Case_00001", "Case_00002"}
    assert "0 bytes" in lines["FLARE22_Tr_0001"] and "[40]" in lines["FLARE22_Tr_0002"]
    assert "without its label map" in lines["FLARE22_Tr_0004"] and "without its scan" in lines["FLARE22_Tr_0005"]
    assert "2 different scans with this name" in lines["Case_00002"]
    dataset = raw / "Dataset022_FLARE22"
    assert names(dataset / "imagesTr") == ["FLARE22_Tr_0003_0000.nii.gz"] and check_dataset(dataset) == []
    assert names(dataset / "unlabelled") == ["Case_01001_0000.nii.gz", "Case_01002_0000.nii.gz"]


def test_a_label_map_on_another_grid_is_set_aside(flare22, raw, patient, capsys):
    scan, labels = patient
    shifted = Volume(scan.array, scan.spacing_mm, (5.0, 0.0, 0.0))
    path = flare22 / "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0002.nii.gz"
    write_labels(path, np.where(labels == 14, 0, labels), shifted)
    assert call("flare22", flare22) == 1
    assert "not on the grid of its scan: origin" in capsys.readouterr().err


def test_a_second_call_opens_only_what_was_changed_or_bad(flare22, raw, patient, monkeypatch):
    bad = flare22 / "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    assert call("flare22", flare22) == 1
    opened = []
    monkeypatch.setattr(
        examine, "read_volume", lambda path, case, **how: opened.append(case) or read_volume(path, case, **how)
    )
    assert call("flare22", flare22) == 1  # perhaps the disk was away for a moment
    bad.write_bytes(good)
    assert call("flare22", flare22) == 0
    assert opened == ["FLARE22_Tr_0001"] * 2
    assert call("flare22", flare22) == 0
    assert len(opened) == 2
    assert json.loads((raw / "Dataset022_FLARE22/dataset.json").read_text())["numTraining"] == 3


def test_another_file_in_the_dataset_is_never_overwritten(flare22, raw, patient, capsys):
    target = raw / "Dataset022_FLARE22/imagesTr/FLARE22_Tr_0001_0000.nii.gz"
    assert call("flare22", flare22) == 0
    target.unlink()
    write_scan(target, patient, 77)
    kept = target.read_bytes()
    assert call("flare22", flare22) == 1
    assert "nothing is overwritten" in capsys.readouterr().err and target.read_bytes() == kept


def test_a_case_that_left_the_download_is_named(flare22, raw, capsys):
    assert call("flare22", flare22) == 0
    for path in flare22.rglob("FLARE22_Tr_0003*"):
        path.unlink()
    assert call("flare22", flare22) == 1
    assert "FLARE22_Tr_0003_0000.nii.gz is from an earlier call" in capsys.readouterr().err


def test_links_to_a_download_that_was_moved_are_made_anew(flare22, raw, monkeypatch, tmp_path):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    assert call("flare22", flare22) == 0
    moved = flare22.rename(tmp_path / "elsewhere")
    assert call("flare22", moved) == 0
    assert check_dataset(raw / "Dataset022_FLARE22") == []


def test_flare23_takes_the_organs_in_a_label_map_for_the_annotated_ones(flare23, raw, capsys):
    assert call("flare23", flare23) == 0
    dataset = raw / "Dataset023_FLARE23"
    table = read_table(dataset / "flare_cases.json").cases
    assert {case: (entry.role, entry.annotated) for case, entry in table.items()} == {
        "FLARE23_0001": ("labelled", None),
        "FLARE23_0002": ("partial", tuple(range(1, 14))),
        "FLARE23_0003": ("partial", (1, 2, 3, 4, 13)),
        "FLARE23_0004": ("partial", (14,)),
    }
    # An empty map says nothing: its scan serves as unlabelled.
    assert names(dataset / "unlabelled") == [f"FLARE23_{n}_0000.nii.gz" for n in ("0005", "2201", "2202")]
    assert check_dataset(dataset) == []
    said = capsys.readouterr().out
    assert "FLARE23_0005: its label map is empty" in said and "  liver                      3\n" in said


def test_the_name_of_the_download_says_nothing_of_its_scans(flare23, raw):
    assert call("flare23", flare23.rename(flare23.with_name("FLARE23 labelled and unlabelled"))) == 0
    dataset = raw / "Dataset023_FLARE23"
    assert names(dataset / "imagesTr") == [f"FLARE23_{n:04d}_0000.nii.gz" for n in (1, 2, 3, 4)]
    assert names(dataset / "unlabelled") == [f"FLARE23_{n}_0000.nii.gz" for n in ("0005", "2201", "2202")]


def test_what_is_known_better_than_from_the_map_is_stated_in_a_csv(flare23, raw, tmp_path, capsys):
    table = tmp_path / "annotated.csv"
    table.write_text("case,annotated\nFLARE23_0005,14\nFLARE23_0003,1 2 3 4 13 gallbladder\n")
    assert call("flare23", flare23, "--annotated", str(table)) == 0
    cases = read_table(raw / "Dataset023_FLARE23" / "flare_cases.json").cases
    assert cases["FLARE23_0005"].annotated == (14,) and cases["FLARE23_0003"].annotated == (1, 2, 3, 4, 9, 13)
    table.write_text("case,annotated\nFLARE23_0003,1 2\n")
    assert call("flare23", flare23, "--annotated", str(table)) == 1
    assert "holds [3, 4, 13], but only [1, 2]" in capsys.readouterr().err


def test_a_case_table_that_was_changed_by_hand_is_kept(flare23, raw, tmp_path, capsys):
    assert call("flare23", flare23) == 0
    path = raw / "Dataset023_FLARE23" / "flare_cases.json"
    table = tmp_path / "annotated.csv"
    table.write_text("case,annotated\nFLARE23_0004,14 9\n")
    assert call("flare23", flare23, "--annotated", str(table)) == 0  # its own table it writes anew
    assert read_table(path).cases["FLARE23_0004"].annotated == (9, 14)
    by_hand = path.read_text().replace('"partial"', '"partial", "weight": 0.5', 1)
    path.write_text(by_hand)
    for _ in range(2):
        assert call("flare23", flare23) == 0
        assert path.read_text() == by_hand and "changed by hand and is kept" in capsys.readouterr().out
    path.unlink()
    assert call("flare23", flare23) == 0
    assert read_table(path).cases["FLARE23_0004"].annotated == (14,)


def test_a_wrong_csv_is_refused_before_anything_is_written(flare23, raw, tmp_path, capsys):
    table = tmp_path / "annotated.csv"
    table.write_text(
        "case,annotated\nFLARE23_2201,1\nFLARE23_0001,heart\nFLARE23_0002,\nFLARE23_0003,1\nFLARE23_0003,2\n"
        "FLARE23_0004,1,2\n"
    )
    assert call("flare23", flare23, "--annotated", str(table)) == 2
    said = capsys.readouterr().err
    assert all(f"line {number}" in said for number in (2, 3, 4, 6, 7)) and "'heart'" in said
    assert not raw.exists()


def test_repaired_label_maps_win_and_published_pseudo_labels_have_a_folder_of_their_own(flare23, raw, patient, capsys):
    write_map(flare23 / "labelsTr2200/20230507-fix/FLARE23_0004.nii.gz", patient, (13, 14))
    write_map(flare23 / "aladdin5-pseudo-labels/labels/FLARE23_0001.nii.gz", patient, (1,))
    write_map(flare23 / "aladdin5-pseudo-labels/labels/FLARE23_2202.nii.gz", patient, (1, 2))
    assert call("flare23", flare23) == 0
    cases = read_table(raw / "Dataset023_FLARE23" / "flare_cases.json").cases
    assert cases["FLARE23_0004"].annotated == (13, 14) and cases["FLARE23_0001"].role == "labelled"
    pseudo = raw / "Dataset023_FLARE23" / "pseudo" / "aladdin5"
    assert names(pseudo) == ["FLARE23_0001.nii.gz", "FLARE23_2202.nii.gz"]
    assert set(np.unique(read_labels(pseudo / "FLARE23_2202.nii.gz").array)) == {0, 1, 2}
    assert f"pseudo-labels aladdin5     2   {pseudo}" in capsys.readouterr().out


def test_the_dataset_may_lie_inside_the_download(flare22, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(flare22 / "nnUNet_raw"))
    (flare22 / "circle").symlink_to(flare22, target_is_directory=True)
    assert call("flare22", flare22) == 0
    assert call("flare22", flare22) == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder, raw: shutil.rmtree(folder), "no such folder"),
        (lambda folder, raw: [p.unlink() for p in folder.rglob("FLARE22_Tr*")], "FLARE22_Tr_0001_0000.nii.gz"),
        (lambda folder, raw: (raw / "Dataset022_Mine").mkdir(parents=True), "Dataset022_Mine"),
        (lambda folder, raw: (raw / "Dataset022_FLARE22/imagesTr").mkdir(parents=True), "not made by prepare"),
    ],
)
def test_what_cannot_be_prepared_is_refused(flare22, raw, capsys, spoil, said):
    spoil(flare22, raw)
    assert call("flare22", flare22) == 2
    assert said in capsys.readouterr().err


def test_archives_that_wait_to_be_unpacked_are_named(tmp_path, raw, capsys):
    (tmp_path / "FLARE22/Training").mkdir(parents=True)
    (tmp_path / "FLARE22/Training/images.zip").write_bytes(b"PK")
    assert call("flare22", tmp_path / "FLARE22") == 2
    assert "1 archive(s) wait to be unpacked" in capsys.readouterr().err


def test_an_odd_scan_is_prepared_and_noted(flare22, raw, patient):
    scan = patient[0]
    odd = flare22 / "Training/FLARE_UnlabeledCase1-1000/Case_00002_0000.nii.gz"
    write_volume(odd, scan.with_array((scan.array.astype(np.int32) * 40).astype(np.int32)))
    made = prepare(layout_of("flare22"), flare22, raw)
    assert "Case_00002" in made.cases["unlabelled"] and not made.set_aside
    assert made.notes[0].startswith("Case_00002: values from")


def test_cases_whose_names_are_too_long_for_what_follows_are_set_aside_and_the_others_are_prepared(
    flare22, raw, monkeypatch
):
    monkeypatch.setattr("os.pathconf", lambda path, name: 45)  # an encrypted file system has fewer bytes too
    made = prepare(layout_of("flare22"), flare22, raw)
    assert sorted(made.set_aside) == ["FLARE22_Tr_0001", "FLARE22_Tr_0002", "FLARE22_Tr_0003"]
    assert "has 15 bytes, at most 14 are possible" in made.set_aside["FLARE22_Tr_0001"]
    assert made.cases["training"] == [] and len(made.cases["unlabelled"]) == 4


def test_scans_in_a_folder_of_pseudo_labels_are_unlabelled_scans(flare22, raw, patient, capsys):
    """FLARE24 and 25 ship the unlabelled scans beside the published pseudo-labels of them."""
    pseudo = flare22 / "train_pseudo_label"
    for number in (11, 12, 13):
        write_scan(pseudo / "imagesTr" / f"Case_{number:05d}_0000.nii.gz", patient, number)
        write_map(pseudo / "flare22_aladdin5_pseudo" / f"Case_{number:05d}.nii.gz", patient, range(1, 14))
    write_scan(pseudo / "imagesTr" / "Case_00014.nii.gz", patient, 14)  # the folder says that it is a scan
    (pseudo / "imagesTr" / "Case_00014.nii.gz").rename(pseudo / "imagesTr" / "Case_00014.NII.GZ")
    write_scan(pseudo / "imagesTr" / "Case_00001_0000.nii.gz", patient, 1)  # again
    write_map(pseudo / "labelsTr" / "FLARE22_Tr_0001.nii.gz", patient, (1,))
    assert call("flare22", flare22) == 0
    dataset = raw / "Dataset022_FLARE22"
    cases = (1, 2, 11, 12, 13, 14, 1001, 1002)
    assert names(dataset / "unlabelled") == [f"Case_{n:05d}_0000.nii.gz" for n in cases]
    for case, number in (("Case_00012", 12), ("Case_00014", 14)):
        np.testing.assert_array_equal(
            read_volume(dataset / "unlabelled" / f"{case}_0000.nii.gz").array, patient[0].array + number
        )
    said = capsys.readouterr().out
    assert "unlabelled                 8 " in said and "1 file(s) lie in the download more than once" in said
    assert names(dataset / "pseudo/aladdin5") == [f"Case_{n:05d}.nii.gz" for n in (11, 12, 13)]
    assert names(dataset / "pseudo/labelsTr") == ["FLARE22_Tr_0001.nii.gz"]
    assert read_labels(dataset / "labelsTr/FLARE22_Tr_0001.nii.gz").array.max() == 13


def test_every_file_that_looks_like_an_image_is_taken_or_listed(flare22, raw, patient, capsys):
    strange = [
        flare22 / "Training" / "extra" / name
        for name in ("Case_00007_0000.nii", "Case_00008.nii.gz", "patient 9.mha", "Case_0010_0000.nii.gz.part")
    ]
    strange[0].parent.mkdir()
    for path in strange:
        path.write_bytes(b"some bytes")
    (flare22 / "Training" / "slice").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (flare22 / "Training" / "readme.txt").write_text("read me")
    (flare22 / "Training" / "more.zip").write_bytes(b"PK")
    assert call("flare22", flare22) == 1
    said = capsys.readouterr()
    listed = [line for line in said.err.splitlines() if line.startswith("not recognised")]
    assert len(listed) == 5
    for path in (*strange, flare22 / "Training" / "slice"):
        assert any(f": {path}: " in line for line in listed)
    assert "1 archive(s) were not unpacked" in said.out
    assert len(names(raw / "Dataset022_FLARE22" / "unlabelled")) == 4


@pytest.mark.parametrize("kind", ["two matrices", "metres", "one more axis"])
@pytest.mark.parametrize("of", ["images/FLARE22_Tr_0002_0000", "labels/FLARE22_Tr_0002"])
def test_what_the_named_reader_reads_otherwise_is_set_aside_and_said(flare22, raw, capsys, kind, of):
    """prepare names NibabelIOWithReorient in dataset.json: its all-clear is one for that reader."""
    path = flare22 / "Training/FLARE22_LabeledCase50" / f"{of}.nii.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    if kind == "two matrices":
        struct.pack_into("<4f", data, 280, *(-number for number in struct.unpack_from("<4f", data, 280)))
        struct.pack_into("<2h", data, 252, 1, 2)
    elif kind == "metres":
        struct.pack_into("<B", data, 123, 1)
    else:
        struct.pack_into("<5h", data, 40, 4, *SIZE[::-1], 1)
    path.write_bytes(gzip.compress(bytes(data)))
    assert call("flare22", flare22) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("set aside")]
    assert len(said) == 1 and path.name in said[0] and "NibabelIOWithReorient" in said[0]
    assert "4 dimensions" in said[0] if kind == "one more axis" else "SimpleITK" in said[0]
    dataset = raw / "Dataset022_FLARE22"
    assert "FLARE22_Tr_0002_0000.nii.gz" not in names(dataset / "imagesTr") and check_dataset(dataset) == []
