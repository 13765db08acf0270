"""Each challenge's download, as a tree of tiny files: what is found in it, and whose download it is not."""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cases import read_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.datasets import check_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.listing import list_scans
from nnunet_flare.preparation.download import find_download
from nnunet_flare.preparation.layouts import LAYOUTS, YEARS, layout_of

SHAPE = (4, 6, 7)
SPACING_MM = (5.0, 2.0, 2.0)
SCAN = None
Tree = Mapping[str, Iterable[int] | None]
"""Files below a folder: a scan, or the ids of a label map."""

ARCHIVES_1: Tree = {
    "Train-Labeled/COVID-19-209/covid_01_0000": SCAN,
    "Train-Labeled/DeepLesion-1093/000001_01_01_103-115_0000": SCAN,
    "Train-Labeled/TCIA-NSCLC-581/LUNG1-001_0000": SCAN,
    "Train-Labeled/labelsTr/covid_01": (1,),
    "Train-Labeled/labelsTr/000001_01_01_103-115": (1,),
    "Train-Labeled/labelsTr/LUNG1-001": (),
    "Train-Unlabeled/AMOS-image-Part1-750/amos_0001_0000": SCAN,
    "Train-Unlabeled/MSD-506/colon_001": SCAN,
    "Validation-Hidden/FLARE24Val_0001_0000": SCAN,
    "Validation-Public/HealthyImages-noLesion/CHAOS_01_0000": SCAN,
    "Validation-Public/lesion-images/FLARE23Ts_0001_0000": SCAN,
    "Validation-Public/lesion-gts/FLARE23Ts_0001": (1,),
}
HUB_1: Tree = {
    "train_label/DeepLesion-1093/imagesTr/lesion_7_0000": SCAN,
    "train_label/DeepLesion-1093/labelsTr/lesion_7_0000": (1,),
    "train_label/KiTS23-488/case_00007_0000": SCAN,
    "train_label/KiTS23-488/case_00007": (1,),
    "train_unlabel/MELA-image-880/mela_0003_0000": SCAN,
    "validation/Validation-Public-Images/FLARE23Ts_0057_0000": SCAN,
    "validation/Validation-Public-Labels/FLARE23Ts_0057": (1,),
    "validation/Validation-Hidden-Images/FLARE24Val_0002_0000": SCAN,
}
PANCANCER: Tree = {
    "train_per_cancer_type/Dataset001_HeadNeckCancer/imagesTr/HeadNeck_SegRap25_3-cect_0000": SCAN,
    "train_per_cancer_type/Dataset001_HeadNeckCancer/labelsTr/HeadNeck_SegRap25_3-cect": (1,),
    "new_cancer_datasets_after202606/20260820_SpinalMyelomaCT/imagesTr/SpinalMyeloma_Myel_003_1_0000": SCAN,
    "new_cancer_datasets_after202606/20260820_SpinalMyelomaCT/labelsTr/SpinalMyeloma_Myel_003_1": (1,),
    "train_label/HeadNeck_SegRap25_3-cect_0000": SCAN,
    "train_label/labelsTr/HeadNeck_SegRap25_3-cect": (1,),
    "train_label/Adrenal-ACC-Ki67-Seg/adrenal_12_0000": SCAN,
    "train_label/labelsTr/adrenal_12": (1,),
    "validation/HealthyImages-noLesion/PANCREAS_0001_0000": SCAN,
    "validation/HealthyImages-noLesion/train_1_a": SCAN,
    "validation/Validation-Public-Images/FLARE23Ts_0057_0000": SCAN,
    "validation/Validation-Public-Labels/FLARE23Ts_0057": (1,),
    "validation/Validation-Hidden-Images/hidden_9_0000": SCAN,
}
LAPTOP: Tree = {
    "coreset_train_50_random/Case_00002_0000": SCAN,
    "coreset_train_50_random/Case_00044_0000": SCAN,
    "train_gt_label/imagesTr/FLARE22_Tr_0001_0000": SCAN,
    "train_gt_label/labelsTr/FLARE22_Tr_0001": (1, 13),
    "train_gt_label/imagesTr/FLARE22_Tr_0002_0000": SCAN,
    "train_gt_label/labelsTr/FLARE22_Tr_0002_0000": (5,),
    "train_pseudo_label/imagesTr/Case_00001_0000": SCAN,
    "train_pseudo_label/imagesTr/Case_00002_0000": SCAN,
    "train_pseudo_label/imagesTr/Case_01234_0000": SCAN,
    "train_pseudo_label/flare22_aladdin5_pseudo/Case1": (1, 3),
    "train_pseudo_label/flare22_aladdin5_pseudo/Case_00002": (1,),
    "train_pseudo_label/flare22_aladdin5_pseudo/Case1234": (4,),
    "train_pseudo_label/pseudo_label_blackbean_flare22/Case_00001_0000": (1, 2),
    "train_pseudo_label/pseudo_label_blackbean_flare22/Case_00002": (1,),
    "validation/Validation-Public-Images/FLARETs_0001_0000": SCAN,
    "validation/Validation-Public-Labels/FLARETs_0001": (1, 2),
    "validation/Validation-Hidden-Images/Val_0051_0000": SCAN,
}
ADAPTATION: Tree = {
    "coreset_train_unlabeled_MRI_PET/MRI_unlabeled_100_random/amos_0507_0000": SCAN,
    "coreset_train_unlabeled_MRI_PET/PET_unlabeled_100_random/fdg_9_0000": SCAN,
    "train_CT_gt_label/imagesTr/FLARE22_Tr_0001_0000": SCAN,
    "train_CT_gt_label/labelsTr/FLARE22_Tr_0001_0000": (1,),
    "train_CT_pseudolabel/imagesTr/Case_00001_0000": SCAN,
    "train_CT_pseudolabel/flare22_aladdin5_pseudo/Case1": (1,),
    "train_CT_pseudolabel/pseudo_label_blackbean_flare22/Case_00001": (1, 2),
    "train_MRI_unlabeled/AMOS-833/amos_0507_0000": SCAN,
    "train_MRI_unlabeled/LLD-MMRI-3984/MR-391135_C+Delay_0000": SCAN,
    "train_PET_unlabeled/fdg_1_0000": SCAN,
    "train_PET_unlabeled/psma_2": SCAN,
    "validation/MRI_imagesVal/amos_7296_0000": SCAN,
    "validation/MRI_labelsVal/amos_7296": (1,),
    "validation/PET_imagesVal/fdg_3_0000": SCAN,
    "validation/PET_labelsVal/fdg_3": (1, 2),
    "validation/PET_imagesHidden/fdg_4_0000": SCAN,
}
ADAPTATION_2024: Tree = {
    "FLARE_LabeledCase50/images/FLARE22_Tr_0001_0000": SCAN,
    "FLARE_LabeledCase50/labels/FLARE22_Tr_0001": (1,),
    "Training/AMOS_MR_good_spacing-833/amos_0507_0000": SCAN,
    "Training/LLD-MMRI-3984/MR-391135_T2WI_0000": SCAN,
    "PublicValidation/imagesVal/amos_7296_0000": SCAN,
    "PublicValidation/labelsVal/amos_7296": (1,),
}
FLARE22_TREE: Tree = {
    "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000": SCAN,
    "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001": (1,),
    "Training/FLARE_UnlabeledCase1-1000/Case_00001_0000": SCAN,
}
FLARE23_TREE: Tree = {
    "imagesTr2200/FLARE23_0001_0000": SCAN,
    "labelsTr2200/FLARE23_0001": (1,),
    "unlabeledTr1800/FLARE23_2201_0000": SCAN,
}
DOWNLOADS = {
    ("FLARE24-Task1", ("flare24", 1)): ARCHIVES_1,
    ("FLARE-Task1-Pancancer", ("flare24", 1), ("flare25", 1)): HUB_1,
    ("PancancerCTSeg", ("flare26", 1)): PANCANCER,
    ("FLARE-Task2-LaptopSeg", ("flare24", 2), ("flare25", 2), ("flare26", 2)): LAPTOP,
    ("FLARE-Task3-DomainAdaption", ("flare24", 3), ("flare25", 3), ("flare26", 3)): ADAPTATION,
    ("FLARE24-Task3-MR", ("flare24", 3), ("flare25", 3), ("flare26", 3)): ADAPTATION_2024,
    ("FLARE22", ("flare22", None)): FLARE22_TREE,
    ("FLARE23", ("flare23", None)): FLARE23_TREE,
}


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    return tmp_path / "nnUNet_raw"


def scan_of(case: str) -> Volume:
    """A scan that differs from case to case, and is the same wherever it lies."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    return Volume(rng.integers(-900, 900, SHAPE).astype(np.int16), SPACING_MM)


def labels_of(ids: Iterable[int]) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for place, label in enumerate(ids):
        labels[1:3, 1:3, 1 + 2 * place : 3 + 2 * place] = label
    return labels


def write(folder: Path, tree: Tree) -> Path:
    for name, ids in tree.items():
        path = folder / f"{name}.nii.gz"
        if ids is SCAN:
            write_volume(path, scan_of(path.name.removesuffix(".nii.gz").removesuffix("_0000")))
        else:
            write_labels(path, labels_of(ids), Volume(labels_of(ids), SPACING_MM))
    return folder


def call(year: str, folder: Path, task: int | None = None, *more: str) -> int:
    return main(["prepare", f"--{year}", str(folder), *([] if task is None else ["--task", str(task)]), *more])


def found(dataset: Path) -> dict[str, list[str]]:
    """The cases in every folder with files."""
    folders: dict[str, list[str]] = {}
    for path in sorted(dataset.rglob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz")
        folder = path.parent.relative_to(dataset).as_posix()
        images = folder.startswith(("images", "unlabelled"))
        assert name.endswith("_0000") == images
        folders.setdefault(folder, []).append(name.removesuffix("_0000"))
    return folders


def test_task_1_of_flare24_as_its_archives_unpack(tmp_path, raw, capsys):
    assert call("flare24", write(tmp_path / "FLARE24-Task1", ARCHIVES_1), 1) == 0
    dataset = raw / "Dataset241_FLARE24Task1"
    assert found(dataset) == {
        "imagesTr": ["000001_01_01_103-115", "covid_01"],
        "labelsTr": ["000001_01_01_103-115", "covid_01"],
        "unlabelled": ["LUNG1-001", "amos_0001", "colon_001"],  # an empty map says nothing
        "imagesVal": ["FLARE23Ts_0001"],
        "labelsVal": ["FLARE23Ts_0001"],
        "imagesTs": ["FLARE24Val_0001"],
        "imagesHealthy": ["CHAOS_01"],
        "labelsHealthy": ["CHAOS_01"],
    }
    assert json.loads((dataset / "dataset.json").read_text())["labels"] == {"background": 0, "lesion": 1}
    assert check_dataset(dataset) == []
    table = read_table(dataset / "flare_cases.json").cases
    assert {case: entry.role for case, entry in table.items()} == {
        "000001_01_01_103-115": "labelled",
        "covid_01": "labelled",
    }
    said = capsys.readouterr().out
    assert "training                   2   (the full challenge has 5000)" in said
    assert "LUNG1-001: its label map is empty" in said


def test_a_training_scan_that_is_known_to_be_free_of_lesions_is_a_labelled_one(tmp_path, raw):
    table = tmp_path / "annotated.csv"
    table.write_text("case,annotated\nLUNG1-001,lesion\n")
    download = write(tmp_path / "FLARE24-Task1", ARCHIVES_1)
    assert call("flare24", download, 1, "--annotated", str(table)) == 0
    dataset = raw / "Dataset241_FLARE24Task1"
    assert "LUNG1-001" in found(dataset)["labelsTr"] and "LUNG1-001" not in found(dataset)["unlabelled"]
    assert read_table(dataset / "flare_cases.json").cases["LUNG1-001"].is_complete
    assert check_dataset(dataset) == []


@pytest.mark.parametrize("year", ["flare24", "flare25"])
def test_task_1_as_the_hub_has_it(tmp_path, raw, year):
    assert call(year, write(tmp_path / "FLARE-Task1-Pancancer", HUB_1), 1) == 0
    dataset = raw / f"Dataset{year[5:]}1_{year.upper()}Task1"
    assert found(dataset) == {
        "imagesTr": ["case_00007", "lesion_7"],
        "labelsTr": ["case_00007", "lesion_7"],
        "unlabelled": ["mela_0003"],
        "imagesVal": ["FLARE23Ts_0057"],
        "labelsVal": ["FLARE23Ts_0057"],
        "imagesTs": ["FLARE24Val_0002"],
    }
    assert read_labels(dataset / "labelsTr/case_00007.nii.gz").array.max() == 1


def test_task_1_of_flare26_with_copies_by_cancer_type_and_healthy_scans(tmp_path, raw, capsys):
    download = write(tmp_path / "PancancerCTSeg", PANCANCER)
    assert call("flare26", download, 1) == 0
    dataset = raw / "Dataset261_FLARE26Task1"
    training = ["HeadNeck_SegRap25_3-cect", "SpinalMyeloma_Myel_003_1", "adrenal_12"]
    assert found(dataset) == {
        "imagesTr": training,
        "labelsTr": training,
        "imagesVal": ["FLARE23Ts_0057"],
        "labelsVal": ["FLARE23Ts_0057"],
        "imagesTs": ["hidden_9"],
        "imagesHealthy": ["PANCREAS_0001", "train_1_a"],
        "labelsHealthy": ["PANCREAS_0001", "train_1_a"],
    }
    empty = read_labels(dataset / "labelsHealthy/train_1_a.nii.gz")
    assert empty.array.shape == SHAPE and empty.array.max() == 0 and empty.spacing_mm == SPACING_MM
    said = capsys.readouterr().out
    assert "2 file(s) lie in the download more than once" in said
    assert "healthy                    2   (the full challenge has 172)" in said
    assert call("flare26", download, 1) == 0  # a second call changes nothing


def test_a_lesion_map_with_organs_in_it_is_set_aside(tmp_path, raw, capsys):
    tree = {**HUB_1, "train_label/KiTS23-488/case_00007": (1, 5)}
    assert call("flare25", write(tmp_path / "FLARE-Task1-Pancancer", tree), 1) == 1
    said = capsys.readouterr().err
    assert "set aside: case_00007: " in said and "[5]" in said
    assert found(raw / "Dataset251_FLARE25Task1")["imagesTr"] == ["lesion_7"]


@pytest.mark.parametrize("year", ["flare24", "flare25", "flare26"])
def test_task_2_with_pseudo_labels_under_the_names_of_their_scans(tmp_path, raw, capsys, year):
    download = write(tmp_path / "FLARE-Task2-LaptopSeg", LAPTOP)
    assert call(year, download, 2) == 0
    dataset = raw / f"Dataset{year[5:]}2_{year.upper()}Task2"
    assert found(dataset) == {
        "imagesTr": ["FLARE22_Tr_0001", "FLARE22_Tr_0002"],
        "labelsTr": ["FLARE22_Tr_0001", "FLARE22_Tr_0002"],
        "unlabelled": ["Case_00001", "Case_00002", "Case_00044", "Case_01234"],
        "pseudo/aladdin5": ["Case_00001", "Case_00002", "Case_01234"],
        "pseudo/blackbean": ["Case_00001", "Case_00002"],
        "imagesVal": ["FLARETs_0001"],
        "labelsVal": ["FLARETs_0001"],
        "imagesTs": ["Val_0051"],
    }
    given = download / "train_pseudo_label/flare22_aladdin5_pseudo"
    assert (dataset / "pseudo/aladdin5/Case_00001.nii.gz").samefile(given / "Case1.nii.gz")
    assert (dataset / "pseudo/aladdin5/Case_01234.nii.gz").samefile(given / "Case1234.nii.gz")
    assert check_dataset(dataset) == [] and not (dataset / "flare_cases.json").exists()
    assert not (dataset / "unlabelled_domains.csv").exists()
    said = capsys.readouterr().out
    assert f"pseudo-labels aladdin5     3   {dataset / 'pseudo/aladdin5'}" in said
    teachers = f"[{dataset / 'pseudo/aladdin5'}, {dataset / 'pseudo/blackbean'}]"
    assert f'add: --recipe laptop --set "fusion.teachers={teachers}"\n' in said
    assert "unlabelled                 4   (the full challenge has 2000)" in said


def test_the_folders_of_pseudo_labels_can_be_merged_at_once(tmp_path, raw):
    assert call("flare25", write(tmp_path / "FLARE-Task2-LaptopSeg", LAPTOP), 2) == 0
    pseudo, merged = raw / "Dataset252_FLARE25Task2" / "pseudo", tmp_path / "merged"
    teams = ["--base", str(pseudo / "blackbean"), "--teacher", str(pseudo / "aladdin5")]
    assert main(["merge", *teams, "-o", str(merged), "--labels", "flare25-organs", "-np", "1"]) == 0
    labels = read_labels(merged / "Case_00001.nii.gz").array
    both, one = labels[1:3, 1:3, 1:3], labels[1:3, 1:3, 3:5]
    assert (both == 1).all() and (one == 14).all()  # 3 against 2: left open


def test_pseudo_labels_that_cannot_be_used_are_named_and_their_scans_are_used(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task2-LaptopSeg", LAPTOP)
    team = download / "train_pseudo_label/flare22_aladdin5_pseudo"
    write_labels(team / "Case_00002.nii.gz", labels_of((1,)), Volume(labels_of((1,)), (5.0, 2.0, 2.5)))
    write(team, {"Case_00001": (1, 4), "Case77": (1,)})
    assert call("flare24", download, 2) == 1
    said = capsys.readouterr().err
    assert "set aside: pseudo/aladdin5/Case_00002: " in said and "not on the grid of its scan: spacing" in said
    assert f"{team / 'Case77.nii.gz'}: a pseudo-label of 'Case_00077', whose scan is not in this download" in said
    for name in ("Case1", "Case_00001"):
        assert f"{team / name}.nii.gz: one of 2 different pseudo-labels of 'Case_00001' by aladdin5" in said
    made = found(raw / "Dataset242_FLARE24Task2")
    assert made["pseudo/aladdin5"] == ["Case_01234"] and made["pseudo/blackbean"] == ["Case_00001", "Case_00002"]
    assert len(made["unlabelled"]) == 4
    (team / "Case77.nii.gz").unlink()
    (team / "Case1.nii.gz").unlink()
    write(team, {"Case_00002": (1,)})  # mended: it is looked at again
    assert call("flare24", download, 2) == 0
    assert found(raw / "Dataset242_FLARE24Task2")["pseudo/aladdin5"] == ["Case_00001", "Case_00002", "Case_01234"]


@pytest.mark.parametrize("year", ["flare24", "flare25", "flare26"])
def test_task_3_remembers_the_modality_of_every_unlabelled_scan(tmp_path, raw, capsys, year):
    assert call(year, write(tmp_path / "FLARE-Task3-DomainAdaption", ADAPTATION), 3) == 0
    dataset = raw / f"Dataset{year[5:]}3_{year.upper()}Task3"
    assert found(dataset) == {
        "imagesTr": ["FLARE22_Tr_0001"],
        "labelsTr": ["FLARE22_Tr_0001"],
        "unlabelled": ["MR-391135_C+Delay", "amos_0507", "fdg_1", "fdg_9", "psma_2"],
        "unlabelledCT": ["Case_00001"],
        "pseudo/aladdin5": ["Case_00001"],
        "pseudo/blackbean": ["Case_00001"],
        "imagesValMR": ["amos_7296"],
        "labelsValMR": ["amos_7296"],
        "imagesValPET": ["fdg_3"],
        "labelsValPET": ["fdg_3"],
        "imagesTsPET": ["fdg_4"],
    }
    with open(dataset / "unlabelled_domains.csv", newline="") as stream:
        domains = {row["case"]: row["domain"] for row in csv.DictReader(stream)}
    assert domains == {"MR-391135_C+Delay": "MR", "amos_0507": "MR", "fdg_1": "PET", "fdg_9": "PET", "psma_2": "PET"}
    listing = list_scans(dataset / "unlabelled", 1)
    assert set(listing.cases) == set(domains) and not listing.not_taken
    said = capsys.readouterr().out
    assert "unlabelled by domain: 2 MR, 3 PET" in said and "imagesValMR" in said
    assert (
        f"to adapt to MR and PET, add: --recipe adaptation --set domains.table={dataset}/unlabelled_domains.csv" in said
    )
    assert "as teachers" not in said, "the published labels are of other scans than those that a run labels"
    assert "note: 2 archive" not in said and "note: 1 file(s) lie in the download more than once" in said


def test_values_of_mr_and_pet_are_not_judged_as_hounsfield_units(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task3-DomainAdaption", ADAPTATION)
    strange = Volume(scan_of("bright").array.astype(np.int32) * 40 + 40_000, SPACING_MM)
    write_volume(download / "train_PET_unlabeled/fdg_1_0000.nii.gz", strange)
    write_volume(download / "train_CT_pseudolabel/imagesTr/Case_00001_0000.nii.gz", strange)
    assert call("flare26", download, 3) == 0
    said = capsys.readouterr().out
    assert "Case_00001: values from" in said and "fdg_1" not in said


def test_task_3_of_flare24_as_its_archives_unpack(tmp_path, raw):
    assert call("flare24", write(tmp_path / "FLARE24-Task3-MR", ADAPTATION_2024), 3) == 0
    dataset = raw / "Dataset243_FLARE24Task3"
    assert found(dataset) == {
        "imagesTr": ["FLARE22_Tr_0001"],
        "labelsTr": ["FLARE22_Tr_0001"],
        "unlabelled": ["MR-391135_T2WI", "amos_0507"],
        "imagesValMR": ["amos_7296"],
        "labelsValMR": ["amos_7296"],
    }
    assert (dataset / "unlabelled_domains.csv").read_text().split() == [
        "case,domain",
        "MR-391135_T2WI,MR",
        "amos_0507,MR",
    ]


def test_scans_of_an_unknown_modality_are_listed_with_those_that_are_known(tmp_path, raw, capsys):
    tree = {
        **ADAPTATION,
        "train_US_unlabeled/us_1_0000": SCAN,
        "coreset_train_unlabeled_MRI_PET/x_1_0000": SCAN,
        "validation/imagesVal/y_1_0000": SCAN,
    }
    download = write(tmp_path / "FLARE-Task3-DomainAdaption", tree)
    assert call("flare25", download, 3) == 1
    said = capsys.readouterr().err
    for name in ("train_US_unlabeled/us_1", "coreset_train_unlabeled_MRI_PET/x_1", "validation/imagesVal/y_1"):
        assert f"{download / name}_0000.nii.gz: a scan of an unknown modality; expected one of MR, PET" in said
    assert len(found(raw / "Dataset253_FLARE25Task3")["unlabelled"]) == 5


def test_many_files_that_are_not_recognised_are_counted_by_folder(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task2-LaptopSeg", LAPTOP)
    for number in range(35):
        write(download / "more" / str(number % 2), {f"scan {number:02d}": SCAN})
    assert call("flare25", download, 2) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not recognised")]
    assert len(lines) == 21  # 20 one by one, and the rest of the second folder
    assert lines[-1] == f"not recognised: and 15 more in {download / 'more/1'}, such as scan 05.nii.gz"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("download", DOWNLOADS, ids=lambda download: download[0])
def test_a_download_is_taken_for_what_it_is_and_the_flag_that_fits_is_named(tmp_path, download, layout):
    name, *fitting = download
    for file in DOWNLOADS[download]:
        path = tmp_path / name / f"{file}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    if (layout.year, layout.task) in fitting:
        assert any(scan.group == "training" for scan in find_download(tmp_path / name, layout).scans.values())
        return
    with pytest.raises(InputError) as refused:
        find_download(tmp_path / name, layout)
    flags = [f"--{year} DIR" + (f" --task {task}" if task else "") for year, task in fitting]
    assert str(refused.value).endswith(f"this is not {layout.name}; its file names are those of {' or '.join(flags)}")


def test_a_wrong_download_stops_before_anything_is_written(tmp_path, raw, capsys):
    assert call("flare25", write(tmp_path / "PancancerCTSeg", PANCANCER), 1) == 2
    assert "this is not FLARE25Task1; its file names are those of --flare26 DIR --task 1" in capsys.readouterr().err
    assert not raw.exists()


def test_archives_that_wait_are_named_where_no_labelled_scan_is_there(tmp_path, raw, capsys):
    folder = tmp_path / "FLARE-Task2-LaptopSeg" / "train_gt_label"
    folder.mkdir(parents=True)
    (folder / "labelsTr.7z").write_bytes(b"7z")
    assert call("flare25", folder.parent, 2) == 2
    said = capsys.readouterr().err
    assert "1 archive(s) wait to be unpacked" in said and "FLARE22_Tr_0001_0000.nii.gz" in said


@pytest.mark.parametrize(
    ("year", "task", "said"),
    [
        ("flare24", None, "--task 1 (pan-cancer lesions)"),
        ("flare26", None, "--task 3 (organs in MR and PET)"),
        ("flare22", 1, "FLARE22 has one task"),
        ("flare23", 2, "FLARE23 has one task"),
    ],
)
def test_a_task_is_asked_for_where_a_year_has_several(tmp_path, raw, capsys, year, task, said):
    assert call(year, tmp_path, task) == 2
    assert said in capsys.readouterr().err


def test_every_layout_has_a_name_and_an_id_of_its_own():
    assert len({layout.dataset_id for layout in LAYOUTS}) == len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert YEARS == ("flare22", "flare23", "flare24", "flare25", "flare26")
    assert [layout_of("flare25", task).dataset_id for task in (1, 2, 3)] == [251, 252, 253]


def test_the_scan_in_the_dataset_is_the_one_of_the_download(tmp_path, raw):
    assert call("flare25", write(tmp_path / "FLARE-Task3-DomainAdaption", ADAPTATION), 3) == 0
    for case in ("fdg_9", "psma_2"):
        stored = read_volume(raw / "Dataset253_FLARE25Task3" / "unlabelled" / f"{case}_0000.nii.gz")
        np.testing.assert_array_equal(stored.array, scan_of(case).array)


def test_a_case_of_two_kinds_of_folders_is_set_aside_and_keeps_no_half_of_itself(tmp_path, raw, capsys):
    tree = {
        **HUB_1,
        "train_unlabel/MSD-506/lesion_7_0000": SCAN,  # labelled elsewhere
        "train_unlabel/MSD-506/FLARE23Ts_0057_0000": SCAN,  # a validation scan
        "train_label/KiTS23-488/mela_0003": (1,),  # of an unlabelled scan
    }
    download = write(tmp_path / "FLARE-Task1-Pancancer", tree)
    assert call("flare25", download, 1) == 1
    said = capsys.readouterr().err
    for case in ("lesion_7", "FLARE23Ts_0057"):
        assert f"set aside: {case}: the same scan in folders of 2 kinds: " in said
        assert str(download / f"train_unlabel/MSD-506/{case}_0000.nii.gz") in said
    label = download / "train_label/KiTS23-488/mela_0003.nii.gz"
    assert f"set aside: mela_0003: {label} is a training label map" in said
    assert found(raw / "Dataset251_FLARE25Task1") == {
        "imagesTr": ["case_00007"],
        "labelsTr": ["case_00007"],
        "imagesTs": ["FLARE24Val_0002"],
    }


def test_copies_are_equal_byte_by_byte_whatever_their_size_and_time(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task1-Pancancer", {**HUB_1, "train_label/more/case_00007_0000": SCAN})
    one, other = (download / f"train_label/{name}/case_00007_0000.nii.gz" for name in ("KiTS23-488", "more"))
    content = bytearray(one.read_bytes())
    content[4] ^= 1  # the time in gzip's header
    other.write_bytes(content)
    for path in (one, other):
        os.utime(path, (0, 0))
    assert call("flare25", download, 1) == 1
    assert f"set aside: case_00007: 2 different scans with this name: {one} and {other}" in capsys.readouterr().err


def test_a_spare_scan_that_differs_from_the_one_that_is_taken_is_named(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task3-DomainAdaption", ADAPTATION)
    spare = download / "coreset_train_unlabeled_MRI_PET/MRI_unlabeled_100_random/amos_0507_0000.nii.gz"
    write_volume(spare, scan_of("another"))
    assert call("flare25", download, 3) == 1
    said = capsys.readouterr()
    taken = download / "train_MRI_unlabeled/AMOS-833/amos_0507_0000.nii.gz"
    assert f"not recognised: {spare}: differs from {taken}, which is used for 'amos_0507'" in said.err
    assert "more than once" not in said.out
    assert (raw / "Dataset253_FLARE25Task3/unlabelled/amos_0507_0000.nii.gz").samefile(taken)


def test_a_link_to_nothing_beside_a_scan_sets_its_case_aside_alone(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task1-Pancancer", HUB_1)
    (download / "train_label/AAA").mkdir()
    for case in ("lesion_7", "alone"):
        (download / f"train_label/AAA/{case}_0000.nii.gz").symlink_to(tmp_path / "nothing")
    assert call("flare25", download, 1) == 1
    said = capsys.readouterr().err
    assert "set aside: lesion_7: 2 different scans with this name" in said and "set aside: alone: " in said
    assert found(raw / "Dataset251_FLARE25Task1")["imagesTr"] == ["case_00007"]


def test_downloads_of_two_tasks_in_one_folder_are_refused(tmp_path, raw, capsys):
    write(tmp_path / "all/FLARE-Task2-LaptopSeg", LAPTOP)
    write(tmp_path / "all/FLARE-Task3-DomainAdaption", {"validation/MRI_imagesVal/amos_7296_0000": SCAN})
    assert call("flare25", tmp_path / "all", 2) == 2
    assert "holds files of task 3 too" in capsys.readouterr().err and not raw.exists()
    assert call("flare25", tmp_path / "all/FLARE-Task2-LaptopSeg", 2) == 0


def test_validation_scans_of_an_earlier_call_are_not_scored_unseen(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE-Task1-Pancancer", {**HUB_1, "validation/Validation-Public-Images/b_0000": SCAN})
    assert call("flare25", write(download, {"validation/Validation-Public-Labels/b": (1,)}), 1) == 0
    for path in list(download.rglob("FLARE23Ts_0057*")):
        path.unlink()
    assert call("flare25", download, 1) == 1
    said, dataset = capsys.readouterr().err, raw / "Dataset251_FLARE25Task1"
    for path in (dataset / "imagesVal/FLARE23Ts_0057_0000.nii.gz", dataset / "labelsVal/FLARE23Ts_0057.nii.gz"):
        assert f"{path} is from an earlier call" in said
        path.unlink()
    assert call("flare25", download, 1) == 0


def test_an_empty_map_on_the_grid_of_an_earlier_scan_is_not_kept_for_a_new_one(tmp_path, raw, capsys):
    download = write(tmp_path / "PancancerCTSeg", PANCANCER)
    assert call("flare26", download, 1) == 0
    dataset = raw / "Dataset261_FLARE26Task1"
    scan = download / "validation/HealthyImages-noLesion/train_1_a.nii.gz"
    write_volume(scan, Volume(scan_of("new").array[:3], SPACING_MM))
    (dataset / "imagesHealthy/train_1_a_0000.nii.gz").unlink()
    assert call("flare26", download, 1) == 1
    empty = dataset / "labelsHealthy/train_1_a.nii.gz"
    assert f"set aside: train_1_a: {empty}: is not an empty label map on the grid of {scan}" in capsys.readouterr().err
    empty.unlink()
    assert call("flare26", download, 1) == 0
    assert read_labels(empty).array.shape == (3, *SHAPE[1:])
    lesion = np.ones((3, *SHAPE[1:]), dtype=np.uint8)
    write_labels(empty, lesion, read_volume(scan))  # somebody drew one
    assert call("flare26", download, 1) == 1
    assert f"{empty}: is not an empty label map" in capsys.readouterr().err and read_labels(empty).array.all()


def test_a_case_table_outlives_a_call_that_was_interrupted(tmp_path, raw, monkeypatch):
    download, dataset = write(tmp_path / "FLARE23", FLARE23_TREE), raw / "Dataset023_FLARE23"
    assert call("flare23", download) == 0
    write(download, {"imagesTr2200/FLARE23_0002_0000": SCAN, "labelsTr2200/FLARE23_0002": (2,)})
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_flare.preparation.build.place", interrupt)
        assert call("flare23", download) == 130
    assert call("flare23", download) == 0
    cases = read_table(dataset / "flare_cases.json").cases  # one that is not in it would count as fully labelled
    assert {case: entry.annotated for case, entry in cases.items()} == {"FLARE23_0001": (1,), "FLARE23_0002": (2,)}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_case_that_a_table_changed_by_hand_does_not_name_is_set_aside(tmp_path, raw, capsys):
    download, dataset = write(tmp_path / "FLARE23", FLARE23_TREE), raw / "Dataset023_FLARE23"
    assert call("flare23", download) == 0
    table = dataset / "flare_cases.json"
    table.write_text(table.read_text().replace('"partial"', '"labelled"'))
    assert call("flare23", download) == 0
    write(download, {"imagesTr2200/FLARE23_0002_0000": SCAN, "labelsTr2200/FLARE23_0002": (2,)})
    assert call("flare23", download) == 1
    said = capsys.readouterr()
    assert f"set aside: FLARE23_0002: {table}, which was changed by hand, does not name it" in said.err
    assert "is kept" in said.out and list(read_table(table).cases) == ["FLARE23_0001"]


def test_what_was_changed_by_hand_in_dataset_json_is_kept(tmp_path, raw, capsys):
    download = write(tmp_path / "FLARE24-Task3-MR", ADAPTATION_2024)
    assert call("flare24", download, 3) == 0
    path = raw / "Dataset243_FLARE24Task3" / "dataset.json"
    first = path.read_text()
    assert call("flare24", download, 3) == 0
    assert path.read_text() == first and "by hand" not in capsys.readouterr().out
    path.write_text(json.dumps({**json.loads(first), "channel_names": {"0": "MR"}, "licence": "CC BY"}))
    labelled = "FLARE_LabeledCase50/{}/FLARE22_Tr_0002"
    write(download, {labelled.format("images") + "_0000": SCAN, labelled.format("labels"): (1,)})
    assert call("flare24", download, 3) == 0
    kept = {"channel_names": {"0": "MR"}, "licence": "CC BY", "numTraining": 2}
    assert json.loads(path.read_text()) == {**json.loads(first), **kept}
    assert f"{path}: channel_names, licence changed by hand; your changes are kept" in capsys.readouterr().out
    assert check_dataset(path.parent) == []


def test_why_no_training_case_can_be_taken_is_told(tmp_path, raw, capsys):
    two = {f"labelsTr2200/{name}-fix/FLARE23_0001": (label,) for label, name in enumerate("ab", 1)}
    assert call("flare23", write(tmp_path / "FLARE23", {**FLARE23_TREE, **two})) == 2
    assert (
        "1 case(s) cannot be taken, the first: FLARE23_0001: 2 different label maps with this name"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("place", ["", "Dataset251_FLARE25Task1"])
def test_a_file_where_the_dataset_should_be_is_refused(tmp_path, raw, capsys, place):
    download = write(tmp_path / "FLARE-Task1-Pancancer", HUB_1)
    path = raw / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert call("flare25", download, 1) == 2
    assert f"{path}: exists and is not a folder" in capsys.readouterr().err
