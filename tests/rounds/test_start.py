"""What cannot work is refused before anything is trained, in one message that says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.dicom.series import read_scan
from nnunet_flare.errors import CaseError
from nnunet_flare.files import read_json
from nnunet_flare.images import Volume, geometry_difference, read_volume, to_sitk, write_volume
from nnunet_flare.phantom import write_phantom
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.do_task import do_task
from nnunet_flare.rounds.run.tasks import find_task
from nnunet_flare.rounds.run.unlabelled import find_sources, freeze, read_scans, safe_id
from nnunet_flare.rounds.stages.label import labelling_members
from nnunet_flare.rounds.start import plan_run, start_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_phantom(folder, labelled=2, unlabelled=2, test=1, size=(12, 16, 16), seed=1)
    return folder


@pytest.fixture
def data(source, tmp_path, monkeypatch):
    """Two labelled and two unlabelled scans with nnU-Net's variables set; free to be spoiled."""
    folder = tmp_path / "data"
    shutil.copytree(source, folder)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder / name))
    return folder


def refused(data, capsys, *more, settings=("members.count=2",)):
    """Try to start; the error text. Nothing may have been written into nnU-Net's folders."""
    code = main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu", *more,
                 "--set", *settings])  # fmt: skip
    assert code == 2
    assert not list((data / "nnUNet_results").rglob("*.pth"))
    return capsys.readouterr().err


def raw(data):
    return data / "nnUNet_raw" / "Dataset022_FLAREPhantom"


def test_an_unknown_dataset_names_those_there_are(data, capsys):
    code = main(["run", "-d", "7", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu"])
    assert code == 2 and "Dataset022_FLAREPhantom" in capsys.readouterr().err


def test_missing_environment_variables_are_named(data, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results is not set" in refused(data, capsys)


def test_all_problems_of_the_labelled_cases_are_listed_at_once(data, capsys):
    labels = sorted((raw(data) / "labelsTr").iterdir())
    volume = read_volume(labels[0])
    strange = volume.array.copy()
    strange[0, 0, 0] = 77
    write_volume(labels[0], volume.with_array(strange))
    images = sorted((raw(data) / "imagesTr").iterdir())
    images[1].write_bytes(images[1].read_bytes()[:200])
    error = refused(data, capsys)
    assert "2 problem" in error and "77" in error and images[1].name in error


def test_a_label_map_on_another_grid_than_its_scan_is_refused(data, capsys):
    label = sorted((raw(data) / "labelsTr").iterdir())[0]
    volume = read_volume(label)
    write_volume(label, Volume(volume.array, (1.0, 1.0, 1.0), volume.origin, volume.direction))
    assert "spacing" in refused(data, capsys)


def test_a_scan_that_is_labelled_and_unlabelled_is_refused(data, capsys):
    scan = sorted((raw(data) / "imagesTr").iterdir())[0]
    (data / "unlabelled" / scan.name).write_bytes(scan.read_bytes())
    assert "also labelled cases" in refused(data, capsys)


def test_two_files_of_one_id_are_refused(data, capsys):
    scan = sorted((data / "unlabelled").iterdir())[0]
    for name in ("knee_0000.nii.gz", "knee.nii.gz"):
        (data / "unlabelled" / name).write_bytes(scan.read_bytes())
    assert "both give the case 'knee'" in refused(data, capsys)


def test_an_empty_or_missing_folder_of_unlabelled_scans_is_refused(data, capsys):
    for path in (data / "unlabelled").iterdir():
        path.unlink()
    assert "no image" in refused(data, capsys)
    (data / "unlabelled").rmdir()
    assert "no such folder" in refused(data, capsys)


def labelled_as(data, labels, **more):
    path = raw(data) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels, **more}))


def test_regions_whose_order_draws_one_over_the_other_are_refused(data, capsys):
    rest = {f"organ_{number}": number for number in range(3, 14)}
    order = [2, 1, *range(3, 14)]
    labelled_as(data, {"background": 0, "liver": 1, "organs": [1, 2], **rest}, regions_class_order=[1, 2, *order[2:]])
    error = refused(data, capsys)
    assert "a voxel of label 1 lies in liver, organs, and would be drawn as 2, which is only in organs" in error
    labelled_as(data, {"background": 0, "organs": [1, 2], "liver": 1, **rest}, regions_class_order=None)
    assert "regions_class_order is missing" in refused(data, capsys)


def test_what_a_trainer_cannot_learn_is_said_before_the_start(data, capsys):
    organs = {f"organ_{number}": number for number in range(3, 14)}
    labels = {"background": 0, "pair": [1, 2], "kidney": 2, **organs, "ignore": 14}
    labelled_as(data, labels, regions_class_order=[1, 2, *range(3, 14)])
    assert "training.class_weights: found 'inverse-sqrt-frequency', but dataset.json has regions" in refused(
        data, capsys
    )
    settings = ("members.count=2", "training.class_weights=null", "final.trainer=nnUNetTrainerFlareAdversarial")
    assert "final.trainer nnUNetTrainerFlareAdversarial: compares whole label maps" in refused(
        data, capsys, settings=settings
    )


def test_an_ignore_label_that_is_not_the_highest_is_refused(data, capsys):
    labels = {"background": 0, "ignore": 1, **{f"organ_{number}": number for number in range(2, 15)}}
    labelled_as(data, labels)
    assert "'ignore' is 1, expected the highest number, 14" in refused(data, capsys)


def test_more_folds_than_labelled_cases_are_refused_with_what_to_set(data, capsys):
    assert "has 2 labelled case(s), but members.count=5 needs 5" in refused(data, capsys, settings=("members.count=5",))
    case = min((raw(data) / "labelsTr").iterdir())
    for path in [case, *(raw(data) / "imagesTr").glob(f"{case.name.removesuffix('.nii.gz')}_*")]:
        path.unlink()
    path = raw(data) / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": 1}))
    error = refused(data, capsys, "--dry-run", settings=("members.count=5",))
    assert "1 labelled case(s), but members.count=5 needs 5" in error and "members.kind=checkpoints" in error


def test_a_name_with_other_letters_is_refused(data, capsys):
    assert "letters, digits and hyphens" in refused(data, capsys, "--name", "my run/1")


def test_held_out_cases_must_have_labels_and_not_be_training_cases(data, capsys):
    images, labels = data / "test" / "images", data / "test" / "labels"
    taken = sorted((raw(data) / "imagesTr").iterdir())[0]
    (images / taken.name).write_bytes(taken.read_bytes())
    assert "no such file" in refused(data, capsys, "--eval", str(images), str(labels))
    label = taken.name.replace("_0000.nii.gz", ".nii.gz")
    shutil.copyfile(raw(data) / "labelsTr" / label, labels / label)
    assert "are training or unlabelled cases" in refused(data, capsys, "--eval", str(images), str(labels))


def test_an_init_model_with_other_labels_or_none_is_refused_naming_both(data, capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no nnU-Net model folder" in refused(data, capsys, "--init_model", str(folder))
    (folder / "plans.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "tumour": 1}}))
    error = refused(data, capsys, "--init_model", str(folder))
    assert "tumour" in error and "liver" in error


def test_folds_of_no_given_model_are_refused(data, capsys):
    error = refused(data, capsys, "-f", "0", "1", "--executor", "print")
    assert "-f 0 1: chooses folds of --init_model" in error and "members.count" in error


def test_a_fold_of_a_given_model_that_is_named_twice_is_refused(data, capsys):
    """It would agree with itself, and every scan be taken."""
    given = write_given_model(data, "checkpoint_final.pth")
    error = refused(data, capsys, "--init_model", str(given), "-f", "all", "all", "--executor", "print")
    assert "-f all all: names a fold twice" in error


def test_gpus_without_a_gpu_are_refused(data, capsys):
    code = main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-num_gpus", "999"])
    assert code != 0 and "GPU" in capsys.readouterr().err


@pytest.mark.parametrize("executor", [["slurm"], ["print"], ["print", "--slurm", "partition=gpu"]])
def test_a_number_of_gpus_that_nothing_would_heed_is_refused(data, capsys, executor):
    error = refused(data, capsys, "-num_gpus", "2", "--executor", *executor)
    assert "-num_gpus 2: needs --executor local" in error


def test_a_run_that_does_not_fit_the_disk_does_not_start(data, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code = main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu", "--set",
                 "members.count=2"])  # fmt: skip
    assert code == 1 and "are free" in capsys.readouterr().err


def test_a_dry_run_shows_every_task_and_writes_nothing(data, capsys):
    before = set(data.rglob("*"))
    code = main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "uncertainty", "-device", "cpu",
                 "--dry-run", "--set", "rounds=2", "members.count=2"])  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "nnUNetv2_train 22 3d_fullres_uncertainty_r1 1 -tr nnUNetTrainerFlareST -p nnUNetPlansFlare" in text
    for task in ("plan", "unlabelled", "build-r0", "train-r0-f0", "label-r1-p0", "select-r1", "train-r2-fall"):
        assert any(re.match(rf"{task}(: |$)", line) for line in text.splitlines()), task
    assert "GB  free" in text and "nothing was written" in text
    assert set(data.rglob("*")) == before


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_decisions_that_cannot_be_read_stop_a_run_before_it_starts(data, capsys, dry):
    decisions = data / "decisions.csv"
    decisions.write_text("case,decision,organ,comment\nnobody,reject,,\n")
    command = ["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu", *dry,
               "--set", "members.count=2", "--decisions"]  # fmt: skip
    assert main([*command, str(decisions)]) == 2
    assert "nobody" in capsys.readouterr().err
    assert main([*command, str(data / "missing.csv")]) == 2
    assert "missing.csv" in capsys.readouterr().err
    assert not list((data / "nnUNet_results").rglob("*"))


def test_a_dry_run_needs_no_gpu_and_says_the_hours_and_how_to_go_on(data, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "uncertainty", "--set", "members.count=2"]
    assert main([*command, "--dry_run"]) == 0
    text = capsys.readouterr().out
    # Radboud's network computes 0.99 of what stock's of 128^3 does, which nnU-Net trains in 9 hours on that GPU.
    (one,) = {re.search(r"about (\S+) h$", line).group(1) for line in text.splitlines() if line.startswith("train-")}
    assert 7 <= float(one) <= 11
    assert re.search(r"^training: about \d+(\.\d)? days on an NVIDIA A100\. This is an estimate", text, re.M)
    assert "device: no cuda device here; the dry run needs none, the run does" in text
    assert f"next: flare-pseudolabel preprocess -d Dataset022_FLAREPhantom -u {data / 'unlabelled'} --recipe" in text
    assert main(command) == 2
    assert "-device cpu" in capsys.readouterr().err
    assert not list((data / "nnUNet_results").rglob("*"))


def test_a_dry_run_is_for_the_machine_that_will_run(data, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "--dry_run"]
    assert main([*command, "-num_gpus", "3", "--set", "members.count=2"]) == 0
    assert re.search(r"^label-r0-p2$", capsys.readouterr().out, re.M), "a part for each of the three GPUs"


@pytest.mark.parametrize("name", ["mean_teacher", "adversarial", "selective", "resenc", "blackbean", "noisy_student"])
def test_every_recipe_has_its_hours_before_anything_is_planned(data, capsys, monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    raw = data / "nnUNet_raw" / "Dataset022_FLAREPhantom"
    for number in range(2, 5):  # one for each of five folds
        for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            shutil.copyfile(
                raw / folder / f"FLAREPhantom_Tr_0000{ending}", raw / folder / f"FLAREPhantom_Tr_{number:04d}{ending}"
            )
    path = raw / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": 5}))
    code = main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", name, "--dry_run"])
    text = capsys.readouterr().out
    assert code == 0
    assert all(
        re.search(r", about \S+ (s|min|h|days)$", line) for line in text.splitlines() if line.startswith("train-")
    )
    has_coarse_model = name in ("adversarial", "selective")
    assert ("after the run has planned the dataset" in text) == has_coarse_model
    assert ("next: flare-pseudolabel preprocess" in text) != has_coarse_model


def test_scans_with_strange_names_get_safe_ids_and_files_that_come_later_are_reported(data, capsys, caplog):
    scan = sorted((data / "unlabelled").iterdir())[0]
    scan.rename(scan.with_name("Fall 7 (größer)_0000.nii.gz"))
    command = ["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu",
               "--executor", "print", "--set", "members.count=2"]  # fmt: skip
    assert main(command) == 0
    listed = json.loads((raw(data).parent.parent / "nnUNet_results" / raw(data).name / "flare_demo"
                         / "unlabelled.json").read_text())  # fmt: skip
    ids = {case["case"]: case["source"] for case in listed["cases"]}
    assert any(i.startswith("Fall_7_gr") and "größer" in source for i, source in ids.items())
    (data / "unlabelled" / "late_0000.nii.gz").write_bytes(b"x")
    assert main(command) == 0
    assert "left out: late" in capsys.readouterr().err


def test_the_printed_script_lists_every_task_and_is_valid_shell(data, capsys):
    import subprocess

    main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu",
          "--executor", "print", "--set", "members.count=2"])  # fmt: skip
    script = data / "nnUNet_results" / raw(data).name / "flare_demo" / "run.sh"
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    assert "nnUNetv2_train 22 3d_fullres_demo_r0 0" in text and 'task -o "$RUN_DIR" select-r0' in text


def test_scans_of_another_format_are_converted(data):
    scan = sorted((data / "unlabelled").iterdir())[0]
    volume = read_volume(scan)
    scan.unlink()
    write_volume(scan.with_name("abdomen.mha"), volume)
    main(["run", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo", "-device", "cpu",
          "--executor", "print", "--set", "members.count=2"])  # fmt: skip
    converted = read_volume(raw(data) / "imagesUn" / "abdomen_0000.nii.gz")
    np.testing.assert_array_equal(converted.array, volume.array)


def test_unlabelled_dicom_series_become_scans_named_as_their_folders(data, tmp_path):
    scans = sorted((data / "unlabelled").glob("*.nii.gz"))
    volume = read_volume(scans[0])
    folder = tmp_path / "pacs"
    write_dicom(folder / "patient_0001", volume)
    write_dicom(folder / "patient_0002", volume, leave_out=4)
    shutil.copy(scans[1], folder / "file_0000.nii.gz")
    sources = find_sources(folder, channels=1)
    assert {case: [p.name for p in paths] for case, paths in sources.items()} == {
        "file": ["file_0000.nii.gz"], "patient_0001": ["patient_0001"], "patient_0002": ["patient_0002"],
    }  # fmt: skip
    preprocessed = data / "nnUNet_preprocessed" / "Dataset022_FLAREPhantom"
    cases = {c.case: c for c in freeze(sources, raw=raw(data), preprocessed=preprocessed, file_ending=".nii.gz")}
    converted = read_volume(Path(cases["patient_0001"].images[0]))
    np.testing.assert_array_equal(converted.array, volume.array)
    assert geometry_difference(converted, volume) is None
    assert cases["patient_0001"].size_bytes > volume.array.nbytes
    with pytest.raises(CaseError, match=r"patient_0002.*slice"):
        read_scan(Path(cases["patient_0002"].source), "patient_0002")
    assert not Path(cases["patient_0002"].images[0]).exists()


def write_dicom(folder, volume, leave_out=None):
    """A CT series, one file a slice."""
    folder.mkdir(parents=True)
    image = to_sitk(volume)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(image.GetSize()[2]):
        if z == leave_out:
            continue
        plane = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        orientation = [image.GetDirection()[i] for i in (0, 3, 6, 1, 4, 7)]
        for key, value in {
            "0008|0060": "CT", "0008|0018": f"1.2.3.{z}", "0020|000d": "1.2", "0020|000e": "1.2.3",
            "0020|0032": "\\".join(f"{p:.6f}" for p in position),
            "0020|0037": "\\".join(f"{o:.6f}" for o in orientation),
            "0028|1052": "0", "0028|1053": "1",
        }.items():  # fmt: skip
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        writer.Execute(plane)


def test_preprocessing_ahead_leaves_a_later_run_nothing_to_preprocess(data, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    (data / "unlabelled" / "broken_0000.nii.gz").write_bytes(b"\x1f\x8b no scan")
    recipe = ["--recipe", "demo", "--name", "later"]
    small = ["--set", "members.count=2", "plan.patch_size=[8, 16, 16]", "plan.base_features=4", "plan.stages=3"]
    command = ["-d", "22", "-u", str(data / "unlabelled"), *recipe]
    assert main(["preprocess", *command, *small]) == 1
    assert "2 unlabelled scans" in (said := capsys.readouterr().out) and "set aside: broken" in said
    arrays = sorted((data / "nnUNet_preprocessed" / "Dataset022_FLAREPhantom").rglob("*.b2nd"))
    assert len(arrays) == 2 * (2 + 2)
    before = [path.stat().st_mtime_ns for path in arrays]
    assert not list((data / "nnUNet_results").iterdir())
    run_dir = data / "nnUNet_results" / "run"
    plan = plan_run(
        Request("22", data / "unlabelled", run_dir, "later", "cpu"),
        load_recipe("demo", dict(word.split("=") for word in small[1:])),
        {name: data / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
    )
    run = start_run(plan)
    for name in ("plan", "unlabelled"):
        do_task(run, find_task(run, name))
    assert [path.stat().st_mtime_ns for path in arrays] == before
    assert read_json(run.paths.done("unlabelled"))["result"] == {"ready": 2, "failed": 1}


# ------------------------------------------------------------------ everything at once


def write_given_model(data, *checkpoints):
    """A model folder of one training with some checkpoint files; nothing but names is looked at."""
    folder = data / "given"
    (folder / "fold_all").mkdir(parents=True)
    shutil.copyfile(raw(data) / "dataset.json", folder / "dataset.json")
    (folder / "plans.json").write_text("{}")
    for name in checkpoints:
        (folder / "fold_all" / name).write_bytes(b"")
    return folder


def test_all_that_is_wrong_is_said_at_once(data, capsys):
    """A label map of another shape, no unlabelled scan, no checkpoint after 36 % of a given training, a coarse model
    that is none."""
    label = next((raw(data) / "labelsTr").iterdir())
    write_volume(label, Volume(np.zeros((3, 3, 3), np.uint8), (1.0, 1.0, 1.0)))
    shutil.rmtree(data / "unlabelled")
    (data / "unlabelled").mkdir()
    given = write_given_model(data, "checkpoint_final.pth", "checkpoint_2of3.pth", "checkpoint_3of3.pth")
    coarse = f"roi.model={data / 'coarse'}"
    error = refused(data, capsys, "--recipe", "selective", "--init_model", str(given), settings=("rounds=1", coarse))
    assert "4 problems must be fixed first" in error
    for part in (label.name, "no image", "no fold_all/checkpoint_1of3.pth (after 36% of the training)", "roi.model"):
        assert part in error, part


def test_a_given_training_with_its_checkpoints_makes_the_members_of_round_0(data):
    names = ["checkpoint_final.pth", *(f"checkpoint_{k}of3.pth" for k in (1, 2, 3))]
    folders = {name: data / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    request = Request("22", data / "unlabelled", device="cpu", init_model=write_given_model(data, *names))
    run = plan_run(request, load_recipe("selective"), folders).run
    assert run.round(0).members == tuple(("all", f"checkpoint_{k}of3.pth") for k in (1, 2, 3))
    assert labelling_members(run, run.round(0)) == (("all", "checkpoint_3of3.pth"),)
    assert labelling_members(run, run.round(5)) == (("all", "checkpoint_final.pth"),)


def test_scans_that_a_coarse_model_crops_cannot_be_preprocessed_ahead_of_its_training(data, capsys):
    assert main(["preprocess", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "selective"]) == 2
    assert "the run first trains a coarse model" in capsys.readouterr().err
    assert not list((data / "nnUNet_preprocessed").rglob("*.b2nd"))


# ------------------------------------------------------------------ names too long for what is written from them


def test_an_unlabelled_scan_whose_name_leaves_no_room_is_refused_before_anything_is_written(data, capsys):
    scan = next((data / "unlabelled").iterdir())
    scan.rename(scan.with_name("u" * 236 + "_0000.nii.gz"))
    error = refused(data, capsys)
    assert (
        "1 name(s) are too long: the name of case 'uuuuu" in error
        and "has 236 bytes, at most 224 are possible" in error
    )
    assert not list((data / "nnUNet_results").rglob("run.json"))
    assert main(["preprocess", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo"]) == 2
    assert "has 236 bytes" in capsys.readouterr().err


def test_a_labelled_and_a_held_out_case_with_such_names_are_refused(data, capsys):
    label = sorted((raw(data) / "labelsTr").iterdir())[0]
    case = label.name.removesuffix(".nii.gz")
    label.rename(label.with_name("l" * 236 + ".nii.gz"))
    (raw(data) / "imagesTr" / f"{case}_0000.nii.gz").rename(raw(data) / "imagesTr" / ("l" * 236 + "_0000.nii.gz"))
    test = data / "test"
    image = sorted((test / "images").iterdir())[0]
    held = image.name.removesuffix("_0000.nii.gz")
    image.rename(image.with_name("t" * 230 + "_0000.nii.gz"))
    (test / "labels" / f"{held}.nii.gz").rename(test / "labels" / ("t" * 230 + ".nii.gz"))
    error = refused(data, capsys, "--eval", str(test / "images"), str(test / "labels"))
    assert "has 236 bytes" in error and "has 230 bytes" in error


def test_the_longest_name_that_fits_is_taken(data):
    scan = next((data / "unlabelled").iterdir())
    scan.rename(scan.with_name("u" * 224 + "_0000.nii.gz"))
    assert "u" * 224 in find_sources(data / "unlabelled", 1)


def test_names_that_are_no_text_give_ids_that_differ() -> None:
    assert safe_id(os.fsdecode(b"\xb8\xce")) == "b8ce" and safe_id(os.fsdecode(b"M\xfcller")) == "Mfcller"


def test_a_scan_that_libraries_read_differently_is_never_converted_or_trained_on(tmp_path: Path) -> None:
    """Converting it would settle silently which of them was right."""
    scan = tmp_path / "unlabelled" / "a_0000.nii"
    scan.parent.mkdir()
    affine = np.diag([2.0, 2, 3, 1])
    affine[:3, 3] = 5, 6, 7
    image = nibabel.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.diag([-1.0, 1, 1, 1]) @ affine)
    image.header.set_sform(image.affine, 2)
    image.header.set_qform(affine, 1)
    nibabel.save(image, scan)
    for folder in ("raw", "preprocessed"):
        (tmp_path / folder).mkdir()
    for reader in ("SimpleITKIO", "NibabelIO"):
        cases = freeze(
            {"a": [scan]},
            raw=tmp_path / "raw",
            preprocessed=tmp_path / "preprocessed",
            file_ending=".nii.gz",
            reader=reader,
        )
        assert not Path(cases[0].images[0]).exists()
        with pytest.raises(CaseError, match="reads the axes"):
            read_scans(cases[0], reader)
