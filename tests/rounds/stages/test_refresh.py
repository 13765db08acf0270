"""Scans and label maps that were corrected since they were preprocessed: made anew for the next run, and named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_loop import TINY

from nnunet_flare.cases import Case, write_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.errors import InputError, TaskError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, read_volume, write_labels, write_volume
from nnunet_flare.rounds.export import check_dataset
from nnunet_flare.rounds.run.dataset import base_table, raw_cases
from nnunet_flare.rounds.run.ledger import Entry, read_decisions
from nnunet_flare.rounds.run.manifest import Run, load_run
from nnunet_flare.rounds.run.sources import table_path
from nnunet_flare.rounds.run.unlabelled import freeze, read_list
from nnunet_flare.rounds.stages.arrays import read_array, read_properties
from nnunet_flare.rounds.stages.build import build_round
from nnunet_flare.rounds.stages.label import label_shard
from nnunet_flare.rounds.stages.plan import _preprocess, plan_and_preprocess
from nnunet_flare.rounds.stages.preprocess import failure, preprocess_unlabelled
from nnunet_flare.rounds.stages.replanned import cases_folder, prepare_cases
from nnunet_flare.rounds.stages.select import select_round

LIVER = 1


@pytest.fixture
def run(tiny_loop, tmp_path, monkeypatch) -> Run:
    """A copy of the whole tiny run that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_loop.folder, folder, symlinks=True)
    for path in folder.glob("nnUNet_*/Dataset022_FLAREPhantom/**/*.json"):
        if str(tiny_loop.folder) in (text := path.read_text()):
            path.write_text(text.replace(str(tiny_loop.folder), str(folder)))
    for path in (folder / "nnUNet_raw" / "Dataset022_FLAREPhantom" / "imagesUn").iterdir():
        if path.is_symlink():
            target = os.readlink(path).replace(str(tiny_loop.folder), str(folder))
            path.unlink()
            path.symlink_to(target)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder / name))
    return load_run(folder / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_tiny")


def erase_liver(run: Run, case: str) -> Path:
    path = run.raw / "labelsTr" / f"{case}.nii.gz"
    volume = read_labels(path)
    assert (volume.array == LIVER).any()
    write_labels(path, np.where(volume.array == LIVER, 0, volume.array).astype(np.uint8), volume)
    return path


def arrays(run: Run) -> dict[str, tuple[int, int]]:
    """Identity and time of every file of the labelled cases' data."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in run.base_data.iterdir()}


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "made-by-stock"])
def test_an_organ_that_was_erased_from_a_label_map_is_not_trained_on(run, caplog, noted):
    first, *others = raw_cases(run)
    plan_and_preprocess(run)
    before = arrays(run)
    assert "changed since" not in caplog.text
    if not noted:
        table_path(run.base_data).unlink()
    erase_liver(run, first)
    plan_and_preprocess(run)
    assert not (read_array(run.base_data / f"{first}_seg.b2nd") == LIVER).any()
    assert len(read_properties(run.base_data / f"{first}.pkl")["class_locations"][LIVER]) == 0
    assert f"{first} ({first}.nii.gz)" in caplog.text
    kept = {name: found for name, found in arrays(run).items() if not name.startswith(first)}
    assert kept == {name: found for name, found in before.items() if name in kept} and len(kept) == 3 * len(others)
    copy = run.preprocessed / "gt_segmentations" / f"{first}.nii.gz"
    assert not (read_labels(copy).array == LIVER).any()
    caplog.clear()
    plan_and_preprocess(run)
    assert "changed since" not in caplog.text


def test_what_is_made_anew_is_what_stock_makes(run):
    case = raw_cases(run)[0]
    plan_and_preprocess(run)
    path = erase_liver(run, case)
    scan = run.raw / "imagesTr" / f"{case}_0000.nii.gz"
    volume = read_volume(scan)
    write_volume(scan, volume.with_array(np.minimum(volume.array, 60)))
    plan_and_preprocess(run)
    ours = [read_array(run.base_data / f"{case}{ending}") for ending in (".b2nd", "_seg.b2nd")]
    properties = read_properties(run.base_data / f"{case}.pkl")
    _preprocess(run, run.base)
    stock = [read_array(run.base_data / f"{case}{ending}") for ending in (".b2nd", "_seg.b2nd")]
    for one, other in zip(ours, stock, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    expected = read_properties(run.base_data / f"{case}.pkl")
    assert properties.keys() == expected.keys()
    for organ, places in expected["class_locations"].items():
        np.testing.assert_array_equal(properties["class_locations"][organ], places)
    assert path.is_file()


def test_a_label_map_of_equal_size_and_time_is_not_taken_for_the_one_before(run):
    case = raw_cases(run)[0]
    plan_and_preprocess(run)
    path = run.raw / "labelsTr" / f"{case}.nii.gz"
    before = path.stat()
    erase_liver(run, case)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * (before.st_size - len(content)))  # zeros after gzip's end are ignored
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    plan_and_preprocess(run)
    assert not (read_array(run.base_data / f"{case}_seg.b2nd") == LIVER).any()


def test_files_that_only_look_new_are_not_preprocessed_again(run, caplog):
    plan_and_preprocess(run)
    before = arrays(run)
    for path in (run.raw / "labelsTr").iterdir():
        os.utime(path)
    for path in (run.raw / "imagesTr").iterdir():
        path.write_bytes(path.read_bytes())
    plan_and_preprocess(run)
    assert arrays(run) == before and "changed since" not in caplog.text


def test_an_earlier_rounds_data_keeps_what_it_was_trained_on(run):
    case = raw_cases(run)[0]
    plan_and_preprocess(run)
    linked = run.round(1).data / f"{case}_seg.b2nd"
    before = read_array(linked)
    erase_liver(run, case)
    plan_and_preprocess(run)
    np.testing.assert_array_equal(read_array(linked), before)


def test_a_corrected_scan_that_cannot_be_preprocessed_is_named_and_not_trained_on(run):
    case = raw_cases(run)[0]
    plan_and_preprocess(run)
    path = run.raw / "imagesTr" / f"{case}_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    for _ in range(2):
        with pytest.raises(TaskError, match=f"{case}: changed since it was preprocessed"):
            plan_and_preprocess(run)


def test_a_damaged_table_of_sources_is_said_and_made_anew(run, caplog):
    plan_and_preprocess(run)
    table_path(run.base_data).write_text('{"cases": [')
    plan_and_preprocess(run)
    assert "_sources.json: not readable as JSON" in caplog.text
    assert set(read_json(table_path(run.base_data))["cases"]) == set(raw_cases(run))


def test_no_stray_file_lies_among_the_arrays(run):
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    plan_and_preprocess(run)
    preprocess_unlabelled(run)
    for folder in (run.base_data, run.unlabelled_data):
        assert {path.suffix for path in folder.iterdir()} == {".b2nd", ".pkl"}
        infer_dataset_class(str(folder))


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older"])
def test_a_corrected_unlabelled_scan_is_preprocessed_anew(run, caplog, noted):
    case, other = [c for c in read_list(run.paths.unlabelled) if c.case != "truncated"][:2]
    preprocess_unlabelled(run)
    states = run.unlabelled_data.with_name(f"{run.unlabelled_data.name}_state")
    if not noted:
        for path in states.iterdir():
            write_json(path, {key: value for key, value in read_json(path).items() if key != "sources"})
    before = read_array(run.unlabelled_data / f"{case.case}.b2nd")
    kept = (run.unlabelled_data / f"{other.case}.b2nd").stat().st_mtime_ns
    path = Path(os.path.realpath(case.images[0]))
    volume = read_volume(path)
    write_volume(path, volume.with_array(np.ascontiguousarray(volume.array[:, ::-1])))
    preprocess_unlabelled(run)
    after = read_array(run.unlabelled_data / f"{case.case}.b2nd")
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, before[:, :, ::-1], atol=1e-3)
    assert f"preprocessed again: {case.case} (" in caplog.text
    assert (run.unlabelled_data / f"{other.case}.b2nd").stat().st_mtime_ns == kept


def mirror_a_taken_scan(run: Run) -> Entry:
    """Replace the file of a scan whose label round 0 took by one of the same shape."""
    entry = next(entry for entry in read_decisions(run.paths, 0) if entry.decision == "taken")
    images = {scan.case: scan.images for scan in read_list(run.paths.unlabelled)}
    path = Path(os.path.realpath(images[entry.case][0]))
    volume = read_volume(path)
    write_volume(path, volume.with_array(np.ascontiguousarray(volume.array[:, ::-1])))
    return entry


def test_the_old_label_of_a_scan_that_another_run_preprocessed_again_is_not_trained_on(run):
    taken = mirror_a_taken_scan(run)
    build_round(run, run.round(1))  # the arrays are still those of the scan that was labelled
    preprocess_unlabelled(run)  # as another run on the dataset does at its start
    with pytest.raises(TaskError, match=f"their scans, are damaged or changed.*{taken.case}"):
        build_round(run, run.round(1))
    assert not run.paths.case(0, taken.case).is_file()
    label_shard(run, run.round(0), 0, 1)
    select_round(run, run.round(0))
    build_round(run, run.round(1))


def test_a_final_model_of_other_plans_does_not_read_another_scan_than_was_labelled(run, tmp_path):
    taken = [entry for entry in read_decisions(run.paths, 0) if entry.decision == "taken"]
    changed = mirror_a_taken_scan(run)
    failed = prepare_cases(run, run.base, tmp_path / "data", 0, taken)
    assert list(failed) == [changed.case] and "changed since the scan was labelled" in failed[changed.case]
    made = {path.name.removesuffix("_seg.b2nd") for path in cases_folder(tmp_path / "data").glob("*_seg.b2nd")}
    assert made == {entry.case for entry in taken} - {changed.case}


def test_a_dataset_of_scans_that_are_not_those_that_were_labelled_is_not_exported(run):
    check_dataset(run, 1, 501)
    changed = mirror_a_taken_scan(run)
    refusal = rf"1 scan\(s\) changed since they were labelled \({changed.case}\)"
    with pytest.raises(InputError, match=refusal):
        check_dataset(run, 1, 501)
    preprocess_unlabelled(run)  # as another run on the dataset does at its start
    with pytest.raises(InputError, match=refusal):
        check_dataset(run, 1, 501)
    shutil.rmtree(run.paths.round(0) / "seg")  # by flare-pseudolabel clean
    with pytest.raises(InputError, match=refusal):
        check_dataset(run, 1, 501)


def test_a_scan_that_was_set_aside_is_tried_again_once_it_is_another_file(run):
    assert failure(run.unlabelled_data, "truncated") is not None
    preprocess_unlabelled(run)
    assert failure(run.unlabelled_data, "truncated") is not None
    good = next(c for c in read_list(run.paths.unlabelled) if c.case != "truncated")
    bad = next(c for c in read_list(run.paths.unlabelled) if c.case == "truncated")
    shutil.copyfile(os.path.realpath(good.images[0]), os.path.realpath(bad.images[0]))
    assert preprocess_unlabelled(run)["failed"] == 0


def test_a_converted_copy_follows_its_scan_whatever_the_times_say(tmp_path):
    raw, preprocessed, scans = tmp_path / "raw", tmp_path / "pre", tmp_path / "scans"
    for folder in (raw, preprocessed, scans):
        folder.mkdir()
    from nnunet_flare.phantom import write_phantom

    write_phantom(tmp_path / "phantom", labelled=1, unlabelled=2, test=1, size=(8, 16, 16), seed=0)
    one, other = sorted((tmp_path / "phantom" / "unlabelled").glob("*.nii.gz"))
    scan = scans / "a.mha"
    write_volume(scan, read_volume(one))
    os.utime(scan, (1e9, 1e9))
    freeze({"a": [scan]}, raw=raw, preprocessed=preprocessed, file_ending=".nii.gz")
    write_volume(scan, read_volume(other))
    os.utime(scan, (1e9, 1e9))  # as old as before: a copy that keeps times
    (case,) = freeze({"a": [scan]}, raw=raw, preprocessed=preprocessed, file_ending=".nii.gz")
    np.testing.assert_array_equal(read_volume(Path(case.images[0])).array, read_volume(other).array)
    first = Path(case.images[0]).stat().st_mtime_ns
    freeze({"a": [scan]}, raw=raw, preprocessed=preprocessed, file_ending=".nii.gz")
    assert Path(case.images[0]).stat().st_mtime_ns == first


def test_dataset_level_copies_follow_the_raw_dataset(run, caplog):
    plan_and_preprocess(run)
    cases = raw_cases(run)
    table = {"version": 1, "cases": {case: {"role": "labelled"} for case in cases}}
    write_json(run.raw / "flare_cases.json", table)
    plan_and_preprocess(run)
    assert read_json(run.preprocessed / "flare_cases.json") == table
    table["cases"][cases[0]] = {"role": "partial", "annotated": [1]}
    write_json(run.raw / "flare_cases.json", table)
    plan_and_preprocess(run)
    assert read_json(run.preprocessed / "flare_cases.json") == table
    document = read_json(run.raw / "dataset.json")
    labels = {("left kidney" if name == "liver" else name): value for name, value in document["labels"].items()}
    write_json(run.raw / "dataset.json", {**document, "labels": labels})
    plan_and_preprocess(run)
    assert read_json(run.preprocessed / "dataset.json")["labels"] == labels
    assert f"{cases[0]} (dataset.json)" in caplog.text
    write_json(run.raw / "dataset.json", {**document, "channel_names": {"0": "MR"}})
    with pytest.raises(TaskError, match="Plan the dataset again"):
        plan_and_preprocess(run)


def test_patches_are_centred_on_the_labels_of_today_whoever_copied_dataset_json(run, caplog):
    """Stock's planning copies it, too, as that of another run with other plans does."""
    plan_and_preprocess(run)
    document = read_json(run.raw / "dataset.json")
    names = [name for name in document["labels"] if name not in ("background", "right_kidney", "left_kidney")]
    labels = {"background": 0, "kidneys": [2, 13], "left_kidney": 13, **{n: document["labels"][n] for n in names}}
    order = [2, 13, *(labels[name] for name in names)]
    for folder in (run.raw, run.preprocessed):
        write_json(folder / "dataset.json", {**document, "labels": labels, "regions_class_order": order})
    plan_and_preprocess(run)
    case = raw_cases(run)[0]
    assert len(read_properties(run.base_data / f"{case}.pkl")["class_locations"][(2, 13)]) > 0
    caplog.clear()
    plan_and_preprocess(run)
    assert "changed since" not in caplog.text


def test_other_plans_are_made_after_a_case_became_partial(run):
    """The planner reads the table of cases, of which an earlier run has left a copy."""
    cases = raw_cases(run)
    write_table(run.raw / "flare_cases.json", {cases[0]: Case("partial", (1, 2))})
    plan_and_preprocess(run)
    write_table(run.raw / "flare_cases.json", {cases[0]: Case("partial", (1, 2, 3))})
    run.plans_file.unlink()
    plan_and_preprocess(run)
    assert base_table(run)[cases[0]].annotated == (1, 2, 3)


def test_cases_whose_annotation_was_completed_are_not_taken_for_partial_because_of_an_old_copy(run):
    table = run.raw / "flare_cases.json"
    write_table(table, {raw_cases(run)[0]: Case("partial", (1, 2, 3))})
    plan_and_preprocess(run)
    table.unlink()
    copy = run.preprocessed / "flare_cases.json"
    with pytest.raises(InputError, match=rf"{copy}: gives roles to cases, but there is no {table}"):
        plan_and_preprocess(run)
    copy.unlink()
    plan_and_preprocess(run)
    assert base_table(run)[raw_cases(run)[0]] == Case()


def test_the_command_preprocess_makes_corrected_cases_anew(run, capsys):
    case = raw_cases(run)[0]
    erase_liver(run, case)
    words = ["preprocess", "-d", "22", "-u", run.settings.unlabelled_dir, "--recipe", "demo", "--name", "tiny"]
    assert main([*words, "--set", *TINY]) == 1  # for the truncated scan
    assert f"preprocessed again: {case} ({case}.nii.gz)" in capsys.readouterr().err
    assert not (read_array(run.base_data / f"{case}_seg.b2nd") == LIVER).any()
