"""Every kind of broken or odd scan through every command that reads scans: none crashes it, none is lost silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_dicom import DICOM_KINDS
from bad_labels import good_labels
from bad_scans import KINDS, OTHER_FORMATS, Kind, scan, write_corpus

from nnunet_flare.cli import doctor
from nnunet_flare.dicom.series import read_scan
from nnunet_flare.errors import CaseError, FlareError
from nnunet_flare.images import check_values
from nnunet_flare.rounds.disk import disk_needed
from nnunet_flare.rounds.run.manifest import load_run
from nnunet_flare.rounds.run.unlabelled import find_sources, freeze, read_list, write_list
from nnunet_flare.rounds.stages.preprocess import failure, is_ready, preprocess_unlabelled

EVERY = KINDS + OTHER_FORMATS + DICOM_KINDS
LOOPED = KINDS + OTHER_FORMATS[::3] + DICOM_KINDS[::2]
"""Kinds that go through the loop; the others are refused by the same reader at the same place."""


def named(kind: Kind) -> str:
    return kind.name


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_a_scan_is_read_or_refused_with_one_line(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / kind.file_name
    kind.write(path)
    try:
        volume = read_scan(path, "case")
        check_values(volume, "case", path)
        fate = "fine" if volume.doubt is None else "doubted"
    except CaseError as error:
        fate = "refused"
        assert error.case == "case" and len(error.reason) > 20
        assert "Traceback" not in error.reason
    assert kind.fate in (fate, "either")


CHANGED = ("wrapped", "unsigned_with", "shifted", "z_scores", "minus_one", "two_slices", "unsigned_after_first")
"""Fine kinds whose values are meant to be others than the scan's."""


@pytest.mark.parametrize(
    "kind", [kind for kind in EVERY if kind.fate == "fine" and not kind.name.startswith(CHANGED)], ids=named
)
def test_what_is_read_holds_the_values_that_were_written(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / kind.file_name
    kind.write(path)
    np.testing.assert_array_equal(read_scan(path, "case").array.T, scan())


def test_slices_of_several_voxel_types_keep_their_own_values(tmp_path: Path) -> None:
    (kind,) = (kind for kind in DICOM_KINDS if kind.name == "unsigned_after_first")
    kind.write(tmp_path / "series")
    expected = scan()
    expected[:, :, 0] = expected[:, :, 0].clip(0)
    found = read_scan(tmp_path / "series", "case").array
    assert found.min() < -1000, "air wrapped to large values"
    np.testing.assert_array_equal(found.T, expected)


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 95 and len(OTHER_FORMATS) >= 40 and len(DICOM_KINDS) >= 60
    for kinds in (KINDS, DICOM_KINDS):
        assert {kind.fate for kind in kinds} >= {"refused", "fine", "either"}
        assert len({kind.name for kind in kinds}) == len(kinds)
    assert len({kind.file_name for kind in EVERY}) == len(EVERY)


def test_as_labelled_scans_all_of_them_are_listed_at_once(nnunet_folders, capsys) -> None:
    folder = nnunet_folders["nnUNet_raw"] / "Dataset022_Bad"
    kinds = [kind for kind in KINDS if kind.name != "new_line"]  # nnU-Net has no case names with line breaks
    write_corpus(folder / "imagesTr", kinds)
    cases = {path.name.removesuffix("_0000.nii.gz"): path for path in (folder / "imagesTr").iterdir()}
    (folder / "labelsTr").mkdir()
    for case in cases:
        good_labels(folder / "labelsTr" / f"{case}.nii.gz")
    labels = {"background": 0, **{f"organ{number}": number for number in range(1, 14)}}
    document = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(document))
    assert doctor.main(["-d", "22"]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    refused = {case for case in cases if f"problem  {case}: " in printed.out}
    assert not {"good0", "good1", "good2"} & refused
    other_grid = ("two_slices", "spacing", "sheared", "no_direction", "direction", "axes", "left_handed", "far_away")
    for kind in kinds:
        case = kind.file_name.removesuffix("_0000.nii.gz")
        is_usable = kind.fate == "fine" and not kind.name.startswith(other_grid)  # not the grid of its label map
        if kind.fate != "either":
            assert (case in refused) != is_usable, kind.name


@pytest.mark.timeout(600)
def test_as_unlabelled_scans_they_are_set_aside_and_the_good_ones_are_ready(tiny_environment, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_environment.folder, folder, symlinks=True)
    for path in folder.glob("nnUNet_*/Dataset022_FLAREPhantom/**/*.json"):
        path.write_text(path.read_text().replace(str(tiny_environment.folder), str(folder)))
    run = load_run(folder / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_tiny")
    corpus = tmp_path / "corpus"
    write_corpus(corpus, LOOPED)
    sources = find_sources(corpus, 1)
    assert len(sources) == len(LOOPED) + 3, "a file was lost"
    assert disk_needed(run, sources)["unlabelled arrays"] > 0
    cases = freeze(sources, raw=run.raw, preprocessed=run.preprocessed, file_ending=".nii.gz")
    write_list(run.paths.unlabelled, cases)
    counts = preprocess_unlabelled(run)
    assert sum(counts.values()) == len(LOOPED) + 3
    kinds = {str(corpus / kind.file_name): kind for kind in LOOPED}
    for case in read_list(run.paths.unlabelled):
        reason, ready = failure(run.unlabelled_data, case.case), is_ready(run.unlabelled_data, case.case)
        assert (reason is None) == ready, f"{case.case}: neither ready nor set aside"
        kind = kinds.get(str(sources[case.case][0]))
        if kind is None:
            assert ready, f"good scan {case.case}: {reason}"
        else:
            allowed = {"fine", "either"} if ready else {"refused", "doubted", "either"}
            assert kind.fate in allowed, f"{kind.name}: {reason}"
            assert reason is None or ("\n" not in reason.strip() and "Traceback" not in reason), kind.name
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["files", "DICOM series"])
def test_flare_predict_lists_what_it_could_not_do_and_does_the_rest(tiny_environment, tmp_path, capfd, what) -> None:
    from nnunet_flare.cli.predict import main

    corpus, output = tmp_path / "corpus", tmp_path / "out"
    kinds = {"files": KINDS, "DICOM series": DICOM_KINDS}[what]
    write_corpus(corpus, kinds, good_scans=3 if what == "files" else 0)
    run = load_run(tiny_environment.run_dir)
    command = ["-i", str(corpus), "-o", str(output), "-m", str(run.final.model), "-device", "cpu"]
    assert main([*command, "--precision", "fp32", "--backend", "torch"]) == 1
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    for number in range(3 if what == "files" else 0):
        assert (output / f"good{number}.nii.gz").is_file()
    for kind in kinds:
        case = kind.file_name.removesuffix("_0000.nii.gz")
        predicted = (output / f"{case}.nii.gz").is_file()
        assert kind.fate in ({"fine", "doubted", "either"} if predicted else {"refused", "either"}), kind.name
        if kind.fate == "doubted":
            assert f"{case}: SimpleITK reads" in printed, f"{kind.name}: no warning"
        assert predicted or " ".join(case.split()) in " ".join(printed.split()), f"{kind.name}: lost silently"
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_two_files_of_one_case_are_refused_before_anything_starts(tmp_path) -> None:
    write_corpus(tmp_path, [])
    shutil.copyfile(tmp_path / "good0_0000.nii.gz", tmp_path / "a b_0000.nii.gz")
    shutil.copyfile(tmp_path / "good0_0000.nii.gz", tmp_path / "a_b_0000.nii.gz")
    with pytest.raises(FlareError, match="both give the case 'a_b'"):
        find_sources(tmp_path, 1)
