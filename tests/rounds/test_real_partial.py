"""Real CT through the recipe partial: a scan with the liver alone, and pieces of one with 12 of the 13 organs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process import FOLDERS, do_all, started

from nnunet_flare.cases import Case, read_table, write_table
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, geometry_difference, read_labels, read_volume, write_labels, write_volume
from nnunet_flare.organs import FLARE22, dataset_labels
from nnunet_flare.rounds.ledger import read_decisions
from nnunet_flare.rounds.manifest import Run
from nnunet_flare.rounds.work import TASK_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OESOPHAGUS, GALLBLADDER = 10, 9
TORSO = tuple(organ.id for organ in FLARE22 if organ.id != OESOPHAGUS)
LOOPS = "[{name: organs, all_but: [9]}, {name: gallbladder, organs: [9], absence: open}]"
"""No scan here has a tumour; the gallbladder takes its part."""


def thinned(volume: Volume, step: tuple[int, int, int], rows: slice = slice(None)) -> Volume:
    array = np.ascontiguousarray(volume.array[tuple(slice(None, None, s) for s in step)][rows])
    spacing = tuple(mm * s for mm, s in zip(volume.spacing_mm, step, strict=True))
    return Volume(array, spacing, volume.origin, volume.direction)


@pytest.fixture(scope="module")
def run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real_partial")
    raw = folder / "nnUNet_raw" / "Dataset022_Real"
    pieces = {
        "chaos3": ("chaos3_ct", "chaos3_liver_gt", (3, 8, 8), slice(None)),
        "torso_low": ("ts_torso3mm_ct", "ts_torso3mm_flare13", (2, 2, 2), slice(0, 40)),
        "torso_high": ("ts_torso3mm_ct", "ts_torso3mm_flare13", (2, 2, 2), slice(20, None)),
    }
    for name, (image, label, step, rows) in pieces.items():
        scan = thinned(read_volume(real_data / f"{image}.nii.gz"), step, rows)
        write_volume(raw / "imagesTr" / f"{name}_0000.nii.gz", scan)
        known = thinned(read_labels(real_data / f"{label}.nii.gz"), step, rows)
        write_labels(raw / "labelsTr" / f"{name}.nii.gz", known.array.astype(np.uint8), scan)
    document = {"channel_names": {"0": "CT"}, "labels": dataset_labels(FLARE22), "file_ending": ".nii.gz"}
    write_json(raw / "dataset.json", {**document, "numTraining": len(pieces)})
    torso = Case("partial", TORSO)
    write_table(raw / "flare_cases.json", {"chaos3": Case("partial", (1,)), "torso_low": torso, "torso_high": torso})
    (folder / "unlabelled").mkdir()
    slab = thinned(read_volume(real_data / "ts_slab512_ct.nii.gz"), (1, 8, 8))
    write_volume(folder / "unlabelled" / "slab_0000.nii.gz", slab)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True)
            monkeypatch.setenv(name, str(folder / name))
        variables = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "NNUNET_FLARE_THREADS": "1", TASK_VARIABLE: ""}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        settings = {
            "rounds": "1",
            "loops": LOOPS,
            "plan.spacing_mm": "[6.0, 6.0, 6.0]",
            "plan.patch_size": "[16, 32, 32]",
        }
        made = started(folder, {name: folder / name for name in FOLDERS}, "partial", settings)
        do_all(made, monkeypatch)
    return made


def test_every_scan_ends_with_a_label_map_on_its_own_grid_in_which_the_annotation_holds(run: Run) -> None:
    decided = {entry.case: entry.decision for entry in read_decisions(run.paths, run.last_round)}
    assert set(decided) == {"chaos3", "slab", "torso_low", "torso_high"}, "nobody annotated the oesophagus"
    for case, annotated in (("chaos3", (1,)), ("torso_low", TORSO), ("torso_high", TORSO)):
        if decided[case] != "taken":
            continue
        made = read_labels(run.paths.label(run.last_round, case, ".nii.gz"), allowed=range(14))
        assert geometry_difference(made, read_volume(run.raw / "imagesTr" / f"{case}_0000.nii.gz")) is None
        truth = read_labels(run.raw / "labelsTr" / f"{case}.nii.gz").array
        for organ in annotated:
            np.testing.assert_array_equal(made.array == organ, truth == organ)
    assert "taken" in decided.values()


def test_the_table_says_what_each_scan_teaches(run: Run) -> None:
    start = read_table(run.preprocessed / f"flare_cases.{run.configuration(1)}.json")
    assert start["chaos3"].role == "unlabelled", "its gallbladder is not annotated"
    assert start["torso_low"] == Case("partial", (GALLBLADDER,))
    final = read_table(run.preprocessed / f"flare_cases.{run.configuration(2)}.json")
    assert final["torso_low"].validated == TORSO or final["torso_low"].annotated == TORSO
    if "slab" in final.cases:
        assert final["slab"].positive == (GALLBLADDER,)
    assert (run.model(2) / "fold_all" / "checkpoint_final.pth").is_file()
