"""Real CT through the recipe partial: a scan with the liver alone, and pieces of one with 12 of the 13 organs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process import do_all, nnunet_folders, started
from real_scans import CHAOS, GALLBLADDER, TORSO, TORSO_HIGH, TORSO_LOW, thinned, write_labelled

from nnunet_flare.cases import Case, read_table, write_table
from nnunet_flare.images import geometry_difference, read_labels, read_volume, write_volume
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LOOPS = "[{name: organs, all_but: [9]}, {name: gallbladder, organs: [9], absence: open}]"
"""No scan here has a tumour; the gallbladder takes its part."""


@pytest.fixture(scope="module")
def run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real_partial")
    raw = folder / "nnUNet_raw" / "Dataset022_Real"
    write_labelled(raw, real_data, {"chaos3": CHAOS, "torso_low": TORSO_LOW, "torso_high": TORSO_HIGH})
    torso = Case("partial", TORSO)
    write_table(raw / "flare_cases.json", {"chaos3": Case("partial", (1,)), "torso_low": torso, "torso_high": torso})
    slab = thinned(read_volume(real_data / "ts_slab512_ct.nii.gz"), (1, 8, 8))
    write_volume(folder / "unlabelled" / "slab_0000.nii.gz", slab)
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = nnunet_folders(folder, monkeypatch)
        settings = {
            "rounds": "1",
            "loops": LOOPS,
            "plan.spacing_mm": "[6.0, 6.0, 6.0]",
            "plan.patch_size": "[16, 32, 32]",
        }
        made = started(folder, folders, "partial", settings)
        do_all(made, monkeypatch)
    return made


def test_every_scan_ends_with_a_label_map_on_its_own_grid_in_which_the_annotation_holds(run: Run) -> None:
    decided = {entry.case: entry.decision for entry in read_decisions(run.paths, run.final.number)}
    assert set(decided) == {"chaos3", "slab", "torso_low", "torso_high"}, "nobody annotated the oesophagus"
    for case, annotated in (("chaos3", (1,)), ("torso_low", TORSO), ("torso_high", TORSO)):
        if decided[case] != "taken":
            continue
        made = read_labels(run.paths.label(run.final.number, case, ".nii.gz"), allowed=range(14))
        assert geometry_difference(made, read_volume(run.raw / "imagesTr" / f"{case}_0000.nii.gz")) is None
        truth = read_labels(run.raw / "labelsTr" / f"{case}.nii.gz").array
        for organ in annotated:
            np.testing.assert_array_equal(made.array == organ, truth == organ)
    assert "taken" in decided.values()


def test_the_table_says_what_each_scan_teaches(run: Run) -> None:
    start = read_table(run.preprocessed / f"flare_cases.{run.round(1).configuration}.json")
    assert start["chaos3"].role == "unlabelled", "its gallbladder is not annotated"
    assert start["torso_low"] == Case("partial", (GALLBLADDER,))
    final = read_table(run.preprocessed / f"flare_cases.{run.round(2).configuration}.json")
    assert final["torso_low"].validated == TORSO or final["torso_low"].annotated == TORSO
    if "slab" in final.cases:
        assert final["slab"].positive == (GALLBLADDER,)
    assert (run.round(2).model / "fold_all" / "checkpoint_final.pth").is_file()
