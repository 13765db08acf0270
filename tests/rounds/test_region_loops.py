"""Loops over some labels of a data set of regions, and a coarse-to-fine run on regions: drawn as stock draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import TINY_COARSE_TO_FINE, do_all, phantom, started
from kinds import dice, mask, redress

from nnunet_flare.cases import Case, read_table, write_table
from nnunet_flare.errors import InputError
from nnunet_flare.images import read_labels, write_labels
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.check_input import Request
from nnunet_flare.rounds.run.ledger import read_decisions
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.rounds.stages.label import read_labelled
from nnunet_flare.rounds.start import plan_run, start_run

LABELS = {"background": 0, "organs": [1, 2], "spleen": 2, "tumour": 3}
ORGANS = {"organs": (1, 2), "spleen": (2,)}
NEARLY_ALL = 0.9995
LOOPS = "[{name: organs, organs: [1, 2]}, {name: tumour, organs: [3], absence: open}]"


def renumbered(labels: np.ndarray) -> np.ndarray:
    """Liver, spleen and tumour of the phantom."""
    return np.select([labels == 1, labels == 3, labels == 14], [1, 2, 3], 0)


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two complete cases, one of which only the liver is annotated, and one of which only the tumour is."""
    folder = tmp_path_factory.mktemp("loops")
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = phantom(folder, monkeypatch, labelled=2, partial=2, lesions=True, unlabelled=2, test=1)
        raw = redress(folder, renumbered, labels=LABELS, regions_class_order=[1, 2, 3])
        partial = [case for case, e in read_table(raw / "flare_cases.json").cases.items() if e.role == "partial"]
        table = {case: Case("partial", (label,)) for case, label in zip(partial, (1, 3), strict=True)}
        for case, entry in table.items():
            volume = read_labels(raw / "labelsTr" / f"{case}.nii.gz")
            known = np.where(np.isin(volume.array, entry.annotated), volume.array, 0).astype(np.uint8)
            write_labels(raw / "labelsTr" / f"{case}.nii.gz", known, volume)
        write_table(raw / "flare_cases.json", table)
        parted = "[{name: liver, organs: [1]}, {name: rest, organs: [2, 3]}]"
        with pytest.raises(InputError) as caught:
            started(folder, folders, "partial", {"loops": parted, "rounds": "1"})
        for loop in ("liver", "rest"):
            assert f"loop {loop}: has some labels of region organs [1, 2] and not the others" in str(caught.value)
        run = started(folder, folders, "partial", {"loops": LOOPS, "rounds": "1", "training.iterations_per_epoch": "6"})
        do_all(run, monkeypatch)
    return run


def test_a_loop_draws_its_regions_alone_as_stock_draws_them(looped: Run) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    drawn = set()
    for number, kept in ((0, [True, True, False]), (1, [False, False, True])):
        predictor = nnUNetPredictor(1.0, use_gaussian=True, use_mirroring=False, device=torch.device("cpu"),
                                    perform_everything_on_device=False, allow_tqdm=False)  # fmt: skip
        predictor.initialize_from_trained_model_folder(str(looped.round(number).model), ("all",))
        manager = predictor.label_manager
        for entry in read_decisions(looped.paths, number):
            if entry.role != "pseudo":
                continue
            data = torch.from_numpy(read_array(looped.unlabelled_data / f"{entry.case}.b2nd").astype(np.float32))
            logits = predictor.predict_logits_from_preprocessed_data(data).float()
            probabilities = manager.apply_inference_nonlin(logits).numpy()
            clear = (abs(probabilities - 0.5) > 5e-3).all(axis=0)
            probabilities[~np.array(kept)] = 0
            expected = np.asarray(manager.convert_probabilities_to_segmentation(probabilities))
            found = np.maximum(read_array(looped.paths.training_label(number, entry.case))[0], 0)
            assert (found == expected)[clear].mean() > NEARLY_ALL and clear.mean() > 0.5
            drawn |= set(np.unique(found))
            stored = read_labels(looped.paths.label(number, entry.case, ".nii.gz")).array
            assert set(np.unique(stored)) <= ({0, 1, 2} if number == 0 else {0, 3})
            assert set(read_labelled(looped, number, entry.case).volume_mm3) == set(
                ORGANS if number == 0 else ("tumour",)
            )
    assert drawn > {0}, "something is drawn"


def test_the_union_of_the_loops_trains_the_final_model(looped: Run) -> None:
    final = looped.final
    taken = [entry.case for entry in read_decisions(looped.paths, final.number) if entry.decision == "taken"]
    assert taken
    table = read_table(looped.preprocessed / f"flare_cases.{final.configuration}.json").cases
    for case in taken:
        if table[case].role == "pseudo":
            organs, tumour = (read_labels(looped.paths.label(n, case, ".nii.gz")).array for n in (0, 1))
            made = read_labels(looped.paths.label(final.number, case, ".nii.gz")).array
            np.testing.assert_array_equal(made, np.where(tumour == 3, 3, organs))
            assert table[case].annotated == (1, 2) and table[case].positive == (3,)
    log = next((final.model / "fold_all").glob("training_log*.txt")).read_text()
    assert "the loss leaves that open" in log
    assert (final.model / "fold_all" / "checkpoint_final.pth").is_file()


def test_checkpoints_of_one_training_judge_regions_coarse_to_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=2)
    redress(tmp_path, lambda labels: renumbered(np.where(labels == 14, 0, labels)),
            labels={"background": 0, "organs": [1, 2], "spleen": 2}, regions_class_order=[1, 2])  # fmt: skip
    settings = {**TINY_COARSE_TO_FINE, "rounds": "1", "selection.top_fraction": "null", "selection.threshold": "0"}
    request = Request(dataset="22", unlabelled=tmp_path / "unlabelled", device="cpu")
    run = start_run(plan_run(request, load_recipe("selective", settings), folders))
    do_all(run, monkeypatch)
    for entry in read_decisions(run.paths, 0):
        members = read_array(run.paths.members(0, entry.case))
        by_hand = {
            name: np.mean([dice(mask(members[i], ids), mask(members[-1], ids)) for i in range(len(members) - 1)])
            for name, ids in ORGANS.items()
        }
        assert read_labelled(run, 0, entry.case).agreement == pytest.approx(by_hand)
        assert entry.decision == "taken"
    assert (run.final.model / "fold_all" / "checkpoint_final.pth").is_file()
