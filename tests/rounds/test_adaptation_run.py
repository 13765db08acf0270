"""The recipe adaptation from end to end, tiny: CTs with labels, MR and PET without, a share of each taken."""

from __future__ import annotations

import numpy as np
import pytest
from in_process import do_all, phantom, started

from nnunet_flare.documents import load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.files import read_json, write_csv
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages.arrays import read_array

TINY = {
    "planner": "nnUNetPlannerFlareModality",
    "plan.max_features": "8",
    "plan.convs_per_stage": "1",
    "rounds": "1",
    "members.count": "2",
    "selection.top_fraction": "0.5",
    "seed": "1",
}
DOMAINS = ["mr", "pet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two labelled CTs; two MRs and two PETs, one of which only the table knows."""
    folder = tmp_path_factory.mktemp("adaptation")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, unlabelled=4, test=2, domain=DOMAINS)
        odd = folder / "unlabelled" / "FLAREPhantom_Un_pet_0003_0000.nii.gz"
        odd.rename(odd.with_name("scan3_0000.nii.gz"))
        with pytest.raises(InputError, match=r"no domain is known for 1 scan\(s\): scan3. Searched: mr: "):
            started(folder, folders, "adaptation", TINY)
        write_csv(folder / "domains.csv", [("case", "domain"), ("scan3", "pet")])
        settings = {**TINY, "domains.table": str(folder / "domains.csv")}
        held_out = {f"eval_{kind}": folder / "test" / kind for kind in ("images", "labels")}
        run = started(folder, folders, "adaptation", settings, **held_out)
        do_all(run, monkeypatch)
    return run


def test_the_recipe() -> None:
    recipe = load_recipe("adaptation")
    assert recipe.settings(0, run=None).augmentation.labelled == "modality"
    assert [recipe.selection_of(number).top_fraction for number in range(3)] == [0.3, 0.5, 0.7]
    assert recipe.selection.per_domain and recipe.matches_histograms(0) and recipe.matches_histograms(3)
    assert not load_recipe("uncertainty").matches_histograms(0)


def test_the_domain_of_every_scan_is_frozen_with_the_run(finished: Run) -> None:
    found = {case.case: case.domain for case in read_list(finished.paths.unlabelled)}
    assert found == {
        "FLAREPhantom_Un_mr_0000": "mr",
        "FLAREPhantom_Un_pet_0001": "pet",
        "FLAREPhantom_Un_mr_0002": "mr",
        "scan3": "pet",
    }


def test_half_of_each_modality_is_taken_and_none_is_odd(finished: Run) -> None:
    entries = read_decisions(finished.paths, 0)
    assert {entry.decision for entry in entries} == {"taken", "refused"}
    domains = {case.case: case.domain for case in read_list(finished.paths.unlabelled)}
    assert sorted(str(domains[e.case]) for e in entries if e.decision == "taken") == DOMAINS
    reasons = [row[-1] for _, row in load_rows(finished.paths.selection(0))[1:]]
    assert sum("of domain mr" in reason for reason in reasons) == 2


def test_first_teachers_match_histograms_of_the_unlabelled_scans(finished: Run) -> None:
    assert graph(finished)["build-r0"].needs == ("plan", "unlabelled")
    configurations = read_json(finished.plans_file)["configurations"]
    for number in (0, 1):
        flare = configurations[finished.round(number).configuration]["flare"]
        assert flare["references"] == finished.unlabelled_data.name
        assert flare["augmentation"]["labelled"] == "modality"
    assert (finished.final.model / "fold_all" / "checkpoint_final.pth").is_file()
    assert set(read_json(finished.paths.evaluation(1) / "dice.json")["cases"]) == {
        "FLAREPhantom_Ts_mr_0000",
        "FLAREPhantom_Ts_pet_0001",
    }


def test_scans_of_each_modality_are_normalised_by_themselves(finished: Run) -> None:
    assert read_json(finished.plans_file)["configurations"]["3d_fullres"]["normalization_schemes"] == [
        "FlareModalityNormalization"
    ]
    for case in read_list(finished.paths.unlabelled):
        array = read_array(finished.unlabelled_data / f"{case.case}.b2nd")[0]
        bright = array[array > array.mean()]
        assert abs(float(np.mean(bright))) < 0.3 and 0.7 < float(bright.std()) < 1.3
