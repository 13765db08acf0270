"""Runs on data sets of other channels, formats, places and plans than a FLARE data set has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from in_process import do_all, phantom, started
from kinds import DATASET, dice, expect_dice_by_hand, mask, redress

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.datasets import check_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, read_volume, write_labels, write_volume
from nnunet_flare.report.gather import gather
from nnunet_flare.report.page import write_report
from nnunet_flare.rounds.run.ledger import read_ledger
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_left, read_list
from nnunet_flare.rounds.stages.arrays import read_array, read_properties
from nnunet_flare.rounds.stages.label import read_labelled

LABELS = {"background": 0, "hepar": 1, "ren": 2, "lien": 3, "ignore": 4}
ORGANS = {"hepar": (1,), "ren": (2,), "lien": (3,)}
IGNORE = 4
LACKING = "lacking"


def scribbles(labels: np.ndarray) -> np.ndarray:
    """Three organs, of which every third slice alone was looked at."""
    labels = np.where(labels > 3, 0, labels)
    labels[::3] = IGNORE
    labels[1::3] = IGNORE
    return labels


def two_channels(source: Path, folder: Path, case: str) -> list[Path]:
    """A scan as two ``.mha`` files, the second of which is its negative."""
    folder.mkdir(exist_ok=True)
    volume = read_volume(source)
    paths = [folder / f"{case}_{channel:04d}.mha" for channel in range(2)]
    write_volume(paths[0], volume)
    write_volume(paths[1], volume.with_array(-volume.array))
    return paths


def sites(folder: Path) -> Path:
    """The phantom as two sites would give it: files anywhere, listed in dataset.json, in ``.mha``, two channels."""
    raw = redress(folder, scribbles, labels=LABELS, channel_names={"0": "CT", "1": "negative"}, file_ending=".mha")
    listed = {}
    for number, label in enumerate(sorted((raw / "labelsTr").iterdir())):
        case = label.name.removesuffix(".nii.gz")
        site = folder / f"site_{number}"
        images = two_channels(raw / "imagesTr" / f"{case}_0000.nii.gz", site, case)
        write_labels(site / f"{case}_truth.mha", read_labels(label).array, read_labels(label))
        place = str(site) if number else f"../../site_{number}"  # absolute, or from the data set's folder
        listed[case] = {"images": [f"{place}/{i.name}" for i in images], "label": f"{place}/{case}_truth.mha"}
    for part in ("imagesTr", "labelsTr"):
        shutil.rmtree(raw / part)
    redress(folder, dataset=listed)
    for part in (folder / "unlabelled", folder / "test" / "images"):
        for path in sorted(part.glob("*.nii.gz")):
            two_channels(path, part, path.name.removesuffix("_0000.nii.gz"))
            path.unlink()
    for path in sorted((folder / "test" / "labels").glob("*.nii.gz")):
        write_labels(
            path.with_name(f"{path.name.removesuffix('.nii.gz')}.mha"), read_labels(path).array, read_labels(path)
        )
        path.unlink()
    scan = min((folder / "unlabelled").glob("*_0000.mha"))
    shutil.copy(scan, folder / "unlabelled" / f"{LACKING}_0000.mha")
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of 2-d networks on it."""
    folder = tmp_path_factory.mktemp("clothes")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=2, test=1)
        sites(folder)
        settings = {"members.count": "2", "configuration": "2d", "plan.spacing_mm": "[5.0, 5.2]",
                    "plan.patch_size": "[32, 32]", "training.iterations_per_epoch": "6"}  # fmt: skip
        test = folder / "test"
        run = started(folder, folders, "demo", settings, eval_images=test / "images", eval_labels=test / "labels")
        do_all(run, monkeypatch)
        yield run


def test_files_anywhere_in_another_format_make_a_sound_data_set(finished: Run) -> None:
    assert check_dataset(finished.raw) == []
    assert {path.name for path in finished.raw.iterdir()} == {"dataset.json", "imagesUn"}


def test_a_scan_that_lacks_a_channel_is_set_aside_and_named(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert LACKING not in {scan.case for scan in read_list(finished.paths.unlabelled)}
    assert "has no file of channel(s) lacking_0001" in read_left(finished.paths.unlabelled)[LACKING]
    assert main(["status", "-o", str(finished.root)]) in (0, 1)
    assert LACKING in capsys.readouterr().out


def test_networks_of_slices_of_two_channels_were_trained(finished: Run) -> None:
    configuration = read_json(finished.plans_file)["configurations"]["2d"]
    assert configuration["patch_size"] == [32, 32] and configuration["spacing"] == [5.0, 5.2]
    assert configuration["architecture"]["arch_kwargs"]["conv_op"].endswith("Conv2d")
    assert (finished.final.model / "fold_all" / "checkpoint_final.pth").is_file()
    for scan in read_list(finished.paths.unlabelled):
        array = read_array(finished.unlabelled_data / f"{scan.case}.b2nd")
        assert array.shape[0] == 2 and len(scan.images) == 2
        assert np.corrcoef(array[0].ravel(), array[1].ravel())[0, 1] < -0.9, "the second is the negative of the first"


def test_agreement_and_volume_of_slices_are_those_of_the_whole_scan(finished: Run) -> None:
    entries = read_ledger(finished.paths)
    assert entries
    for entry in entries:
        members = read_array(finished.paths.members(0, entry.case))
        by_hand = {name: dice(*(mask(member, ids) for member in members)) for name, ids in ORGANS.items()}
        labelled = read_labelled(finished, 0, entry.case)
        assert labelled.agreement == pytest.approx(by_hand) and not (members == IGNORE).any()
        fused = np.maximum(read_array(finished.paths.training_label(0, entry.case))[0], 0)
        properties = read_properties(finished.paths.properties(0, entry.case))
        size_mm3 = np.prod(properties["spacing"]) * np.prod(properties["shape_after_cropping_and_before_resampling"])
        volumes = {name: mask(fused, ids).mean() * size_mm3 for name, ids in ORGANS.items()}
        assert labelled.volume_mm3 == pytest.approx(volumes)
        stored = read_labels(finished.paths.label(0, entry.case, ".mha"), allowed=range(4))
        assert stored.array.dtype == np.uint8


def test_scribbles_stay_the_only_annotated_voxels(finished: Run) -> None:
    for entry in read_json(finished.raw / "dataset.json")["dataset"].items():
        case, raw = entry[0], read_labels(finished.raw / entry[1]["label"]).array
        for of in finished.rounds:
            stored = read_array(of.data / f"{case}_seg.b2nd")[0]
            assert (stored == IGNORE).mean() == pytest.approx((raw == IGNORE).mean(), abs=0.02)
            assert (-1, 0, 1, 2, 3) in read_properties(of.data / f"{case}.pkl")["class_locations"]


def test_held_out_dice_counts_the_scribbles_alone(finished: Run) -> None:
    for of in finished.rounds:
        expect_dice_by_hand(finished, of.number, ORGANS, IGNORE, ".mha")


def test_the_report_draws_slices(finished: Run) -> None:
    assert gather(finished).ranges == {}, "no labelled case says how large an organ is"
    write_report(finished)
    assert list((finished.paths.report / "pictures" / "r0").glob("*.jpg"))


def test_a_listed_file_of_another_format_or_channel_count_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=1)
    raw = sites(tmp_path)
    listed = read_json(raw / "dataset.json")["dataset"]
    first, second = sorted(listed)
    listed[first]["images"].pop()
    listed[second]["label"] = listed[second]["label"].replace(".mha", ".nii.gz")
    redress(tmp_path, dataset=listed)
    told = "\n".join(check_dataset(raw))
    assert f"{first}: dataset.json lists 1 image(s), expected 2, one per channel" in told
    assert f"{second}: " in told and "is not a .mha file" in told


def test_plans_that_were_moved_from_another_data_set_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )

    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=0)
    settings = {"members.count": "2"}
    first = started(tmp_path, folders, "demo", settings)
    do_all(first, monkeypatch, until=lambda name: name != "plan")
    made = read_json(first.plans_file)
    made["configurations"]["3d_fullres"]["spacing"] = [9.0, 6.0, 6.0]  # so that they cannot have been made here
    write_json(first.plans_file, made)
    other = "Dataset022_Moved"
    shutil.copytree(first.raw, folders["nnUNet_raw"] / other)
    for folder in folders.values():  # the first one gets another number
        (folder / DATASET).rename(folder / DATASET.replace("022", "021"))
    (folders["nnUNet_preprocessed"] / other).mkdir()
    move_plans_between_datasets(21, 22, first.settings.plans_name, first.settings.plans_name)
    run = started(tmp_path, folders, "demo", settings)
    assert run.settings.dataset == other and run.settings.plans_name == first.settings.plans_name
    moved = read_json(run.plans_file)
    schemes = {"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]}
    other_scans = {"3d_fullres": {**moved["configurations"]["3d_fullres"], **schemes}}
    write_json(run.plans_file, {**moved, "configurations": other_scans})
    with pytest.raises(InputError, match=r"normalises 2 channel\(s\), Dataset022_Moved has 1"):
        do_all(run, monkeypatch, until=lambda name: name != "plan")
    write_json(run.plans_file, moved)
    do_all(run, monkeypatch, until=lambda name: name != "plan")
    plans = read_json(run.plans_file)
    assert plans["configurations"]["3d_fullres"]["spacing"] == [9.0, 6.0, 6.0] and plans["dataset_name"] == other
    for name in ("dataset.json", "dataset_fingerprint.json"):
        assert json.loads((run.preprocessed / name).read_text())
    assert len(list(run.base_data.glob("*_seg.b2nd"))) == 2
