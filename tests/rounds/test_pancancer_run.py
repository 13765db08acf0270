"""The recipe pancancer from end to end, tiny: one label, healthy scans as negatives, absence of lesions left open."""

from __future__ import annotations

import numpy as np
import pytest
from in_process import do_all, phantom, started

from nnunet_flare.cases import Case, read_table
from nnunet_flare.files import read_json, write_json
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.tasks import graph

TINY = {
    "rounds": "1",
    "training.iterations_per_epoch": "20",
    "training.optimizer": "AdamW",
    "training.class_weights": "inverse-sqrt-frequency",
    "seed": "2",
}
LIVER = 1
"""Stands for a lesion: large enough for a network of seconds to find."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three scans with one label, the last made healthy; two unlabelled ones."""
    folder = tmp_path_factory.mktemp("pancancer")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=3, unlabelled=2, test=0)
        raw = folders["nnUNet_raw"] / "Dataset022_FLAREPhantom"
        paths = sorted((raw / "labelsTr").iterdir())
        for path in paths:
            label = read_labels(path)
            lesion = np.zeros_like(label.array) if path == paths[-1] else (label.array == LIVER).astype(np.uint8)
            write_labels(path, lesion, label)
        document = read_json(raw / "dataset.json")
        write_json(raw / "dataset.json", {**document, "labels": {"background": 0, "lesion": 1}})
        run = started(folder, folders, "pancancer", TINY)
        do_all(run, monkeypatch)
    return run


def table_of(run: Run, number: int) -> dict[str, Case]:
    return dict(read_table(run.preprocessed / f"flare_cases.{run.round(number).configuration}.json", strict=True).cases)


def test_the_recipe_is_the_tumour_loop_of_partial_alone() -> None:
    recipe, partial = load_recipe("pancancer"), load_recipe("partial")
    assert [loop.ids([1]) for loop in recipe.loops] == [(1,)] and recipe.final_round == 2
    for key in ("planner", "trainer", "rounds", "members", "training", "augmentation", "predict", "selection"):
        assert getattr(recipe, key) == getattr(partial, key), key
    assert recipe.loops[0].absence == partial.loops[1].absence == "open"


def test_a_healthy_scan_is_a_negative_and_a_lesion_s_absence_in_unlabelled_scans_is_open(finished: Run) -> None:
    cases = {f"FLAREPhantom_Tr_{number:04d}" for number in range(3)}
    first = table_of(finished, 0)
    assert first == dict.fromkeys(cases, Case("partial", (1,))), "the healthy one teaches where no lesion is"
    final = table_of(finished, finished.final.number)
    assert {case for case, entry in final.items() if entry.role == "labelled"} == cases
    for entry in read_decisions(finished.paths, finished.final.number):
        known = final.get(entry.case)
        assert (known is not None) == (entry.decision == "taken")
        if known is not None:
            assert known.annotated == () and known.positive == (1,)
            assert set(np.unique(read_labels(finished.paths.label(0, entry.case, ".nii.gz")).array)) <= {0, 1}


def test_it_ends_with_a_model_of_one_label(finished: Run) -> None:
    assert list(graph(finished))[-1] == f"report-r{finished.final.number}"
    assert (finished.final.model / "fold_all" / "checkpoint_final.pth").is_file()
    assert read_json(finished.final.model / "dataset.json")["labels"] == {"background": 0, "lesion": 1}
