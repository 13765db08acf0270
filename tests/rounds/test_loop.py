"""The whole loop as a user runs it: what was decided, what the next round trains on, and why."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_flare.cases import read_table
from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.files import read_json
from nnunet_flare.images import geometry_difference, read_labels, read_volume
from nnunet_flare.rounds.run.dataset import organ_ids
from nnunet_flare.rounds.run.ledger import read_ledger, rebuild
from nnunet_flare.rounds.run.manifest import Run
from nnunet_flare.rounds.run.unlabelled import read_list
from nnunet_flare.rounds.stages import label as labelling
from nnunet_flare.rounds.stages.arrays import ENDINGS, read_array, read_properties
from nnunet_flare.rounds.stages.label import label_shard
from nnunet_flare.rounds.stages.select import select_round


def by_decision(run: Run, decision: str) -> set[str]:
    return {entry.case for entry in read_ledger(run.paths) if entry.round == 0 and entry.decision == decision}


def test_the_loop_ends_with_a_final_model_and_names_the_scan_that_it_set_aside(tiny_loop):
    run = tiny_loop.run()
    assert tiny_loop.exit_code == 1  # one scan could not be read; all others went through
    assert by_decision(run, "failed") == {"truncated"}
    assert (run.round(1).model / "fold_all" / "checkpoint_final.pth").is_file()
    assert {p.name for p in (run.preprocessed / "imagesUn").glob("*")} == set()  # links lie with the raw data
    assert len(list((run.raw / "imagesUn").glob("*_0000.nii.gz"))) == 7


def test_half_of_the_cases_are_taken_and_every_case_has_its_reason(tiny_loop):
    run = tiny_loop.run()
    taken, refused = by_decision(run, "taken"), by_decision(run, "refused")
    assert len(taken) == 3 and len(refused) == 3
    for entry in read_ledger(run.paths):
        assert entry.reason and entry.recipe_hash == run.recipe.hash and "nnUNetTrainerFlareST" in entry.model
    scores = {e.case: e.mean_organ for e in read_ledger(run.paths) if e.mean_organ is not None}
    assert min(scores[c] for c in taken) >= max(scores[c] for c in refused)
    with open(run.paths.scores(0), newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["case", *organ_ids(run), "mean_organ", "min_organ", "members"]
    assert {row["case"] for row in rows} == taken | refused and {row["members"] for row in rows} == {"2"}


def test_the_next_round_holds_labelled_and_taken_cases_alone(tiny_loop):
    run = tiny_loop.run()
    labelled = {p.name[: -len(".nii.gz")] for p in (run.raw / "labelsTr").iterdir()}
    files = {p.name for p in run.round(1).data.iterdir()}
    assert files == {case + ending for case in labelled | by_decision(run, "taken") for ending in ENDINGS}
    table = read_table(run.preprocessed / f"flare_cases.{run.round(1).configuration}.json", strict=True)
    assert {case for case, entry in table.cases.items() if entry.role == "pseudo"} == by_decision(run, "taken")


def test_images_are_hard_links_and_cost_no_disk(tiny_loop):
    run = tiny_loop.run()
    for case in by_decision(run, "taken"):
        assert os.path.samefile(run.round(1).data / f"{case}.b2nd", run.unlabelled_data / f"{case}.b2nd")
        assert os.stat(run.round(1).data / f"{case}.b2nd").st_nlink >= 2


def test_the_raw_dataset_is_only_added_to(tiny_loop):
    run = tiny_loop.run()
    found = {p.name for p in run.raw.iterdir()}
    assert found == {"dataset.json", "imagesTr", "labelsTr", "imagesUn"}
    assert len(list((run.raw / "imagesTr").iterdir())) == len(list((run.raw / "labelsTr").iterdir())) == 4


def members_mean_softmax(run: Run, case: str) -> np.ndarray:
    """The mean softmax written out: every window by stock's network in float32, Gaussian weights in float64."""
    from itertools import product

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
    from scipy.ndimage import gaussian_filter

    data = read_array(run.unlabelled_data / f"{case}.b2nd").astype(np.float32)
    total: np.ndarray | float = 0.0
    for fold in (0, 1):
        predictor = nnUNetPredictor(1.0, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(run.round(0).model), (fold,))
        patch = predictor.configuration_manager.patch_size
        peak = np.zeros(patch)
        peak[tuple(p // 2 for p in patch)] = 1
        weight = gaussian_filter(peak, [p / 8 for p in patch], mode="constant")
        weight /= weight.max()
        weight[weight == 0] = weight[weight > 0].min()
        corners = product(*compute_steps_for_sliding_window(data.shape[1:], patch, 1.0))
        logits, weights = np.zeros((14, *data.shape[1:])), np.zeros(data.shape[1:])
        for corner in corners:
            where = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            with torch.no_grad():
                window = predictor.network(torch.from_numpy(data[(slice(None), *where)])[None])[0].double().numpy()
            logits[(slice(None), *where)] += window * weight
            weights[where] += weight
        logits /= weights
        exponent = np.exp(logits - logits.max(0))
        total = total + exponent / exponent.sum(0)
    return np.asarray(total) / 2


def test_a_pseudo_label_is_the_argmax_of_the_members_mean_softmax(tiny_loop):
    run = tiny_loop.run()
    case = min(by_decision(run, "taken"))
    softmax = members_mean_softmax(run, case)
    label = read_array(run.round(1).data / f"{case}_seg.b2nd")[0]
    crop = read_array(run.unlabelled_data / f"{case}_seg.b2nd")[0]
    expected = softmax.argmax(0)
    best = np.sort(softmax, axis=0)
    clear = best[-1] - best[-2] > 1e-3  # rounding may turn near ties
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.maximum(label, 0)[clear], expected[clear])
    assert ((label == -1) <= (crop == -1)).all()
    located = read_properties(run.round(1).data / f"{case}.pkl")["class_locations"]
    assert list(located) == [organ for (organ,) in organ_ids(run).values()]
    for organ, voxels in located.items():
        assert (label[tuple(voxels[:, 1:].T)] == organ).all() and bool(len(voxels)) == bool((label == organ).any())


def test_fused_label_maps_lie_on_the_grid_of_their_scans(tiny_loop):
    run = tiny_loop.run()
    for case in read_list(run.paths.unlabelled):
        if case.case != "truncated":
            label = read_labels(run.paths.label(0, case.case, ".nii.gz"), allowed=range(14))
            assert geometry_difference(label, read_volume(Path(case.images[0]))) is None
            assert label.array.dtype == np.uint8


def test_the_trainer_draws_only_taken_cases_and_in_the_share_that_was_asked(tiny_environment):
    from nnunetv2.run.run_training import get_trainer_from_args

    run = tiny_environment.run()
    configuration = run.round(1).configuration
    trainer = get_trainer_from_args("22", configuration, "all", run.recipe.trainer, run.settings.plans_name,
                                    device=torch.device("cpu"))  # fmt: skip
    trainer.initialize()
    batches, _ = trainer.get_dataloaders()
    drawn = [key for _ in range(120) for key in next(batches)["keys"]]
    labelled = {p.name[: -len(".nii.gz")] for p in (run.raw / "labelsTr").iterdir()}
    taken, refused = by_decision(run, "taken"), by_decision(run, "refused")
    assert set(drawn) == labelled | taken and not set(drawn) & (refused | {"truncated"})
    share = sum(key in taken for key in drawn) / len(drawn)
    expected = len(taken) / (len(taken) + len(labelled))
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drawn))


def test_the_final_model_is_not_the_supervised_one(tiny_loop):
    run = tiny_loop.run()
    logs = [p.read_text() for p in (run.round(1).model / "fold_all").glob("training_log*.txt")]
    assert any("4 labelled" in log and "3 pseudo" in log for log in logs)
    first = torch.load(run.round(0).model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    last = torch.load(run.round(1).model / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert last["init_args"]["configuration"] == "3d_fullres_tiny_r1"
    key = next(iter(first["network_weights"]))
    assert not torch.equal(first["network_weights"][key], last["network_weights"][key])


def test_held_out_cases_are_scored_for_the_ensemble_and_the_final_model(tiny_loop):
    run = tiny_loop.run()
    for number in (0, 1):
        result = read_json(run.paths.evaluation(number) / "dice.json")
        assert len(result["cases"]) == 2 and 0 <= result["mean"] <= 1
        case, row = next(iter(result["cases"].items()))
        found = read_labels(run.paths.evaluation(number) / f"{case}.nii.gz").array
        truth = read_labels(Path(run.settings.eval_labels) / f"{case}.nii.gz").array
        both = ((found == 1) & (truth == 1)).sum()
        assert row["liver"] == pytest.approx(2 * both / ((found == 1).sum() + (truth == 1).sum()))


def test_status_says_what_a_person_wants_to_know(tiny_environment, capsys):
    assert main(["status", "-o", str(tiny_environment.run_dir)]) == 0
    text = capsys.readouterr().out
    for word in ("round", "taken", "final", "liver", "time used", "7 unlabelled cases"):
        assert word in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80
    assert "\x1b" not in text


def test_the_same_command_again_does_nothing_new(tiny_environment, caplog):
    before = {p: p.stat().st_mtime_ns for p in tiny_environment.run_dir.rglob("*.done.json")}
    assert main(tiny_environment.command()) == 1
    assert {p: p.stat().st_mtime_ns for p in tiny_environment.run_dir.rglob("*.done.json")} == before


def test_other_settings_are_refused_with_the_differences(tiny_environment, capsys):
    command = [word.replace("iterations_per_epoch=2", "iterations_per_epoch=3") for word in tiny_environment.command()]
    assert main([*command, "selection.top_fraction=0.25"]) == 2
    error = capsys.readouterr().err
    assert "recipe.training.iterations_per_epoch: 2 there, 3 now" in error
    assert "recipe.selection.top_fraction: 0.5 there, 0.25 now" in error


def test_a_name_belongs_to_one_run_dir(tiny_environment, tmp_path, capsys):
    assert main([*tiny_environment.command("-o", str(tmp_path / "elsewhere"))]) == 2
    assert str(tiny_environment.run_dir) in capsys.readouterr().err


def test_a_lost_ledger_is_rebuilt_from_the_rounds(tiny_loop, tmp_path):
    run = copy_of(tiny_loop.run(), tmp_path)
    before = read_ledger(run.paths)
    run.paths.ledger.unlink()
    assert read_ledger(run.paths) == before
    run.paths.ledger.write_bytes(b"not a database, but long enough to be taken for one" * 20)
    assert read_ledger(run.paths) == before
    assert rebuild(run.paths) == 1


def copy_of(run: Run, folder: Path) -> Run:
    """A copy of the run's folder that may be changed; data and models stay where they are."""
    import shutil

    shutil.copytree(run.root, folder / "run")
    return Run(folder / "run", run.settings, run.recipe)


class SpoiledMember:
    """A predictor whose second member loses one organ in every case (elsewhere it agrees with the first)."""

    def __init__(self, predictor, organ):
        self._predictor, self._organ = predictor, organ

    def __getattr__(self, name):
        return getattr(self._predictor, name)

    def predict_members(self, data, *, only=None):
        prediction = self._predictor.predict_members(data, only=only)
        first = prediction.labels[0].copy()
        first[:2, :2, :2] = self._organ  # so that the organ is there at all
        second = first.copy()
        second[second == self._organ] = 0
        return type(prediction)([first, second], prediction.mean_softmax)


def test_a_spoiled_member_lowers_exactly_its_organ_and_flips_the_decision(tiny_environment, tmp_path, monkeypatch):
    run = copy_of(tiny_environment.run(), tmp_path)
    organs = organ_ids(run)
    case = min(by_decision(run, "taken"))
    original = labelling.open_members
    for path in run.paths.round(0).glob("cases/*.json"):
        if path.stem == case:
            path.unlink()
    monkeypatch.setattr(labelling, "open_members", lambda *a: SpoiledMember(original(*a), organs["spleen"]))
    label_shard(run, run.round(0), 0, 1)
    agreement = read_json(run.paths.case(0, case))["agreement"]
    assert agreement["spleen"] == 0.0
    assert all(value == 1.0 for organ, value in agreement.items() if organ != "spleen")
    strict = run.recipe.model_copy(
        update={"selection": run.recipe.selection.model_copy(
            update={"rule": "min-organ", "threshold": 0.9, "top_fraction": None})}
    )  # fmt: skip
    document = read_json(run.paths.case(0, case))
    perfect = {**document, "agreement": dict.fromkeys(agreement, 1.0)}
    from nnunet_flare.files import write_json

    def decide(one):
        write_json(run.paths.case(0, case), one)
        others = [p for p in run.paths.round(0).glob("cases/*.json") if p.stem not in (case, "truncated")]
        write_json(others[0], {**read_json(others[0]), "agreement": dict.fromkeys(agreement, 1.0)})
        select_round(replace(run, recipe=strict), run.round(0))
        return {e.case: e for e in read_ledger(run.paths)}[case]

    assert decide(perfect).decision == "taken"
    spoiled = decide(document)
    assert spoiled.decision == "refused" and "spleen 0.000" in spoiled.reason
