"""nnUNetTrainerFlareST by its roles: who trains, who validates, what is drawn, what is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.ignored import WeightedCrossEntropy

TRUE = [f"true{k}" for k in range(5)]
PSEUDO = [f"pseudo{k}" for k in range(5)]


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def drawn_cases(trainer: Any, batches: int) -> Counter[str]:
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    return Counter(str(case) for _ in range(batches) for case in next(loader)["keys"])


def short(**settings: Any) -> dict[str, Any]:
    return {"num_epochs": 1, "iterations_per_epoch": 2, "final_validation": False, **settings}


# ---------------------------------------------------------------------------------------------------- roles


def test_pseudo_cases_train_but_never_validate(tiny: Any) -> None:
    tiny.add(*TRUE, *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    training, validation = tiny.trainer(fold=0).do_split()
    assert len(validation) == 1
    assert set(validation) <= set(TRUE)
    assert len(set(training) & set(PSEUDO)) == 4, "4/5 of the pseudo cases"
    assert set(training) & set(TRUE) == set(TRUE) - set(validation)
    training, validation = tiny.trainer(fold="all").do_split()
    assert training == sorted(TRUE + PSEUDO)
    assert validation == sorted(TRUE)
    assert not any(case in (tiny.folder / "splits_final.json").read_text() for case in PSEUDO)


def test_partial_cases_validate_and_unlabelled_ones_take_no_part(tiny: Any) -> None:
    tiny.add(*TRUE, "extra")
    tiny.table({"true0": {"role": "partial", "annotated": [1]}, "extra": "unlabelled"})
    training, validation = tiny.trainer(fold="all").do_split()
    assert training == validation == sorted(TRUE)


def test_the_log_counts_each_role(tiny: Any) -> None:
    tiny.add(*TRUE, *PSEUDO)
    tiny.table({**dict.fromkeys(PSEUDO, "pseudo"), "true0": {"role": "partial", "annotated": [1]}})
    trainer = tiny.trainer(fold="all")
    trainer.get_tr_and_val_datasets()
    assert "Training on 4 labelled, 5 pseudo, 1 partial cases" in log_of(trainer)
    assert "validating on 4 labelled, 1 partial cases" in log_of(trainer)
    assert "The validation cases are training cases too" in log_of(trainer)


def test_a_rounds_own_table_comes_first(tiny: Any) -> None:
    tiny.add(*TRUE, *PSEUDO)
    tiny.plans["configurations"]["3d_fullres_demo_r1"] = {"inherits_from": "3d_fullres"}
    tiny.table(dict.fromkeys(TRUE, "pseudo"))
    tiny.table(
        {**dict.fromkeys(TRUE, "labelled"), **dict.fromkeys(PSEUDO, "pseudo")},
        name="flare_cases.3d_fullres_demo_r1.json",
    )
    trainer = tiny.trainer(configuration="3d_fullres_demo_r1", **short(round=1, run="demo"))
    assert trainer.do_split()[1] == sorted(TRUE)


def test_a_round_without_its_table_is_refused(tiny: Any) -> None:
    tiny.add(*TRUE)
    with pytest.raises(InputError, match="is a round of flare-pseudolabel"):
        tiny.trainer(**short(round=1)).do_split()


def test_a_case_that_a_rounds_table_lacks_is_refused(tiny: Any) -> None:
    tiny.add(*TRUE)
    tiny.table(dict.fromkeys(TRUE[:-1], "labelled"), name="flare_cases.3d_fullres.json")
    with pytest.raises(InputError, match="'true4' is in the training data but not in this table"):
        tiny.trainer(**short(round=0)).do_split()


def test_a_table_in_the_raw_folder_counts_and_must_agree(tiny: Any) -> None:
    tiny.add(*TRUE, *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"), raw=True)
    assert tiny.trainer(fold="all").do_split()[1] == sorted(TRUE)
    tiny.table({}, raw=False)
    with pytest.raises(InputError, match="differ"):
        tiny.trainer(fold="all").do_split()


def test_too_few_labelled_cases_for_the_folds_is_refused(tiny: Any) -> None:
    tiny.add(*TRUE[:3], *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    with pytest.raises(InputError, match="too few for 5 folds"):
        tiny.trainer(fold=0).do_split()


# ---------------------------------------------------------------------------------------------------- sampling


def test_observed_shares_follow_the_ratio(tiny: Any) -> None:
    tiny.add(*TRUE[:2], *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    drawn = drawn_cases(tiny.trainer(labelled_to_pseudo=[3, 1], seed=1), 150)
    share = sum(drawn[case] for case in PSEUDO) / drawn.total()
    assert share == pytest.approx(0.25, abs=0.06)
    assert set(drawn) == {*TRUE[:2], *PSEUDO}


def test_without_a_ratio_all_cases_are_alike_but_for_their_weight(tiny: Any) -> None:
    tiny.add(*TRUE[:2], *PSEUDO[:2])
    tiny.table({"pseudo0": {"role": "pseudo", "weight": 3.0}, "pseudo1": {"role": "pseudo", "weight": 0.0}})
    drawn = drawn_cases(tiny.trainer(seed=1), 150)
    assert drawn["pseudo0"] / drawn.total() == pytest.approx(0.6, abs=0.07)
    assert drawn["pseudo1"] == 0


def test_the_share_of_pseudo_samples_is_logged(tiny: Any) -> None:
    tiny.add(*TRUE[:2], *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    trainer = tiny.trainer(**short(labelled_to_pseudo=[0, 1]))
    trainer.run_training()
    assert trainer.logger.get_value("pseudo_share", step=None) == [1.0]


# ---------------------------------------------------------------------------------------------------- validation


def test_a_fold_without_true_cases_reports_no_dice(tiny: Any) -> None:
    tiny.add(*PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    trainer = tiny.trainer(fold="all", **short(final_validation=True))
    trainer.run_training()
    trainer.perform_actual_validation()
    log = log_of(trainer)
    assert "no Dice is reported" in log
    assert "Pseudo dice" not in log
    assert "Final validation skipped: this fold has no labelled or partial validation case" in log
    assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))
    assert np.isnan(trainer.logger.get_value("mean_fg_dice", step=-1))
    files = {entry.name for entry in Path(trainer.output_folder).iterdir()}
    assert "checkpoint_final.pth" in files
    assert "checkpoint_best.pth" not in files


def test_an_epoch_whose_validation_meets_no_organ_leaves_the_moving_dice(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a small lesion alone, which no patch of the epoch holds and nothing predicts: not a number for good."""
    tiny.add(*TRUE[:2])
    trainer = tiny.trainer(fold="all", **short(num_epochs=5, patience=3))
    dice_by_epoch = [None, 0.2, None, 0.6, None]

    def step(batch: dict) -> dict:
        dice = dice_by_epoch[trainer.current_epoch]
        counted = [np.full(2, 0.0 if dice is None else share) for share in (dice, *2 * [1 - (dice or 0)])]
        return {"loss": np.float32(1), **dict(zip(("tp_hard", "fp_hard", "fn_hard"), counted, strict=True))}

    monkeypatch.setattr(trainer, "validation_step", step)
    trainer.run_training()
    moving = [trainer.logger.get_value("ema_fg_dice", step=epoch) for epoch in range(5)]
    np.testing.assert_allclose(moving, [np.nan, 0.2, 0.2, 0.24, 0.24])
    best = torch.load(Path(trainer.output_folder, "checkpoint_best.pth"), weights_only=False)
    assert best["current_epoch"] == 4, "the fourth epoch has the best moving Dice"


def test_online_dice_of_a_partial_case_counts_its_annotated_organs_only(tiny: Any) -> None:
    tiny.add("full", "part")
    tiny.table({"part": {"role": "partial", "annotated": [2]}})
    trainer = tiny.trainer(fold="all")
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    data = torch.randn(2, 1, 8, 16, 16)
    target = torch.randint(0, 3, (2, 1, 8, 16, 16)).to(torch.int16)
    targets = [target, target[..., ::2, ::2]]

    def counts(*keys: str) -> np.ndarray:
        with torch.no_grad():
            output = trainer.validation_step({"data": data, "target": targets, "keys": list(keys)})
        return np.stack([output["tp_hard"], output["fp_hard"], output["fn_hard"]])

    both = counts("full", "full")
    mixed = counts("full", "part")
    assert np.array_equal(mixed[:, 1], both[:, 1]), "organ 2 is annotated in both"
    assert np.all(mixed[:, 0] <= both[:, 0])
    assert mixed[:, 0].sum() < both[:, 0].sum(), "organ 1 of the partial case is not counted"
    assert np.array_equal(counts("part", "part")[:, 0], np.zeros(3))


def test_a_partial_case_is_validated_on_its_annotated_organs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's own validation is replaced by its summary: it needs images, and has its own tests."""
    from nnunetv2.evaluation.evaluate_predictions import load_summary_json, save_summary_json
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    tiny.add(*TRUE[:2])
    tiny.table({"true1": {"role": "partial", "annotated": [1]}})
    trainer = tiny.trainer(fold="all")
    folder = Path(trainer.output_folder, "validation")

    def stock_validation(self: Any, save_probabilities: bool = False) -> None:
        folder.mkdir()
        cases = [
            {"prediction_file": str(folder / f"{case}.nii.gz"), "metrics": {k: {"Dice": dice} for k in (1, 2)}}
            for case, dice in (("true0", 0.8), ("true1", 0.4))
        ]
        means = {1: {"Dice": 0.6}, 2: {"Dice": 0.6}}
        document = {"metric_per_case": cases, "mean": means, "foreground_mean": {"Dice": 0.6}}
        save_summary_json(document, str(folder / "summary.json"))
        for name in ("class_1", "class_2", "foreground"):
            self.logger.log_summary(f"final_val/{name}_dice", 0.6)

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", stock_validation)
    logged: dict[str, float] = {}
    trainer.logger.loggers.append(SimpleNamespace(log_summary=logged.__setitem__))
    trainer.perform_actual_validation()
    summary = load_summary_json(str(folder / "summary.json"))
    assert summary["mean"][1]["Dice"] == pytest.approx(0.6)
    assert summary["mean"][2]["Dice"] == pytest.approx(0.8), "organ 2 is not annotated in true1"
    assert summary["foreground_mean"]["Dice"] == pytest.approx(0.7)
    assert "over the annotated organs" in log_of(trainer)
    shown = {"final_val/class_1_dice": 0.6, "final_val/class_2_dice": 0.8, "final_val/foreground_dice": 0.7}
    assert logged == pytest.approx(shown), "what Weights & Biases and TensorBoard show"


def test_a_numbered_fold_of_pseudo_cases_only_writes_no_split(tiny: Any) -> None:
    tiny.add(*PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    training, validation = tiny.trainer(fold=1).do_split()
    assert len(training) == 4
    assert validation == []
    assert not (tiny.folder / "splits_final.json").exists()


def test_class_weights_are_measured_on_true_labels(tiny: Any) -> None:
    """Pseudo-labels of a weak model may lack an organ altogether."""
    tiny.add(*TRUE[:2])
    trainer = tiny.trainer(fold="all", class_weights="inverse-sqrt-frequency")
    trainer.initialize()
    before = trainer.loss.loss.ce.weight
    tiny.add(*PSEUDO, seg=np.ones((1, 10, 20, 20), np.int8))
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    trainer = tiny.trainer(fold="all", class_weights="inverse-sqrt-frequency")
    trainer.initialize()
    assert torch.equal(trainer.loss.loss.ce.weight, before)


@pytest.mark.parametrize("name", ["nnUNetTrainerFlareST", "nnUNetTrainerFlarePartial", "nnUNetTrainerFlareSelective"])
def test_a_background_of_weight_zero_trains_on_patches_without_an_organ(tiny: Any, name: str) -> None:
    from tiny_dataset import SHAPE

    tiny.add("empty", seg=np.zeros((1, *SHAPE), np.int8))
    trainer = tiny.trainer(name=name, **short(class_weights=[0, 1, 2]))
    trainer.run_training()
    assert all(torch.isfinite(weights).all() for weights in trainer.network.state_dict().values())
    loss = WeightedCrossEntropy(torch.tensor([0.0, 1.0, 2.0]), ignore_index=3)
    logits, labels = torch.randn(2, 3, 4, 4), torch.arange(32).reshape(2, 4, 4) % 4
    torchs = torch.nn.functional.cross_entropy(logits, labels, loss.weight, ignore_index=3)
    assert loss(logits, labels) == pytest.approx(float(torchs))


def test_class_weights_do_not_take_an_organ_that_nobody_annotated_for_background(tiny: Any) -> None:
    """The same scans, of which one names the liver alone: the spleen is as frequent as in the other one."""
    tiny.add(*TRUE[:2])
    trainer = tiny.trainer(fold="all", class_weights="inverse-sqrt-frequency")
    trainer.initialize()
    expected = trainer.loss.loss.ce.weight
    without_spleen = np.zeros((1, 10, 20, 20), np.int8)
    without_spleen[0, 2:7, 3:11, 3:11] = 1
    for path in tiny.data.glob(f"{TRUE[1]}*"):
        path.unlink()
    tiny.add(TRUE[1], seg=without_spleen)
    tiny.table({TRUE[1]: {"role": "partial", "annotated": [1]}})
    trainer = tiny.trainer(fold="all", class_weights="inverse-sqrt-frequency")
    trainer.initialize()
    torch.testing.assert_close(trainer.loss.loss.ce.weight, expected)


# ---------------------------------------------------------------------------------- organs that are never predicted


def counts(tp: list[int], fp: list[int], fn: list[int]) -> dict[str, Any]:
    return {"loss": np.float32(1), "tp_hard": np.array(tp), "fp_hard": np.array(fp), "fn_hard": np.array(fn)}


def test_the_log_names_organs_that_an_epochs_validation_never_predicted(tiny: Any) -> None:
    tiny.add(*TRUE)
    trainer = tiny.trainer(fold=0)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    said: list[str] = []
    trainer.print_to_log_file = lambda *words, **_: said.append(" ".join(map(str, words)))
    trainer.on_validation_epoch_end([counts([5, 0], [0, 0], [1, 4]), counts([0, 0], [2, 0], [1, 0])])
    assert said == ["Organs that this epoch's validation never predicted although they are there: spleen"]
    said.clear()
    trainer.on_validation_epoch_end([counts([5, 0], [0, 0], [1, 0])])  # no spleen there
    trainer.on_validation_epoch_end([counts([5, 0], [0, 3], [1, 4])])  # predicted, in the wrong place
    assert said == []


# ---------------------------------------------------------------------------------------------------- ignore label


def test_ignored_voxels_change_neither_loss_nor_dice(tiny: Any) -> None:
    tiny.add(*TRUE[:2])
    trainer = tiny.trainer(fold="all", ignore_label=3)
    trainer.initialize()
    assert trainer.network.decoder.seg_layers[-1].out_channels == 3, "the ignored value is no class"
    data = torch.randn(2, 1, 8, 16, 16)
    target = torch.randint(0, 3, (2, 1, 8, 16, 16)).to(torch.int16)
    target[..., :8] = 3
    results = []
    with torch.no_grad():
        results.append(trainer.validation_step({"data": data, "target": [target, target[..., ::2, ::2]]}))
        spoilt = [output.clone() for output in trainer.network(data)]
        for output in spoilt:
            output[..., : output.shape[-1] // 2] = torch.randn_like(output[..., : output.shape[-1] // 2]) * 50
        trainer.network.forward = lambda _: spoilt
        results.append(trainer.validation_step({"data": data, "target": [target, target[..., ::2, ::2]]}))
    for key, value in results[0].items():
        assert np.allclose(value, results[1][key]), key


def test_a_round_with_ignored_voxels_trains_though_dataset_json_does_not_know_them(tiny: Any) -> None:
    seg = np.zeros((1, 10, 20, 20), np.int8)
    seg[0, 2:8, 4:14, 4:14] = 1
    seg[0, 2:8, 14:18, 4:14] = 3
    tiny.add(*TRUE[:2])
    tiny.add(*PSEUDO[:3], seg=seg)
    tiny.table(dict.fromkeys(PSEUDO[:3], "pseudo"))
    for roles in ("stock", "weak", "strong"):
        trainer = tiny.trainer(
            fold="all",
            results=roles,
            **short(ignore_label=3, augmentation={"pseudo": roles}, labelled_to_pseudo=[0, 1]),
        )
        trainer.run_training()
        assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert tiny.dataset_json["labels"] == {"background": 0, "liver": 1, "spleen": 2}


def test_ignored_voxels_in_a_fold_of_pseudo_cases_only(tiny: Any) -> None:
    """The online validation draws training patches then, which do carry the ignored value."""
    seg = np.full((1, 10, 20, 20), 3, np.int8)
    seg[0, 2:8, 4:14, 4:14] = 1
    tiny.add(*PSEUDO[:2], seg=seg)
    tiny.table(dict.fromkeys(PSEUDO[:2], "pseudo"))
    trainer = tiny.trainer(fold="all", **short(ignore_label=3))
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))


@pytest.mark.parametrize("value", [2, 4])
def test_an_ignore_label_in_the_wrong_place_is_refused(tiny: Any, value: int) -> None:
    with pytest.raises(InputError, match=f"found {value}, expected 3"):
        tiny.trainer(ignore_label=value)


def test_an_ignore_label_that_dataset_json_declares_too_is_accepted(tiny: Any) -> None:
    tiny.dataset_json["labels"] = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert tiny.trainer(ignore_label=3).label_manager.ignore_label == 3
    with pytest.raises(InputError, match="found 4, expected 3"):
        tiny.trainer(ignore_label=4)


def test_class_weights_must_fit_the_classes(tiny: Any) -> None:
    tiny.add(TRUE[0])
    with pytest.raises(InputError, match=r"found 2 weights, expected 3 \(background first\)"):
        tiny.trainer(class_weights=[1, 2]).initialize()
    tiny.dataset_json["labels"] = {"background": 0, "both": [1, 2], "spleen": 2}
    tiny.dataset_json["regions_class_order"] = [1, 2]
    with pytest.raises(InputError, match="region-based training has no cross-entropy over classes"):
        tiny.trainer(class_weights=[1, 2, 3]).initialize()


def test_ignored_voxels_of_region_based_training_change_nothing(tiny: Any) -> None:
    """The last channel of the target marks them."""
    tiny.dataset_json["labels"] = {"background": 0, "both": [1, 2], "spleen": 2}
    tiny.dataset_json["regions_class_order"] = [1, 2]
    tiny.add(*TRUE[:2])
    trainer = tiny.trainer(fold="all", ignore_label=3)
    trainer.initialize()
    data = torch.randn(2, 1, 8, 16, 16)
    target = torch.randint(0, 2, (2, 3, 8, 16, 16)).bool()
    target[:, 2] = False
    target[:, 2, ..., :8] = True
    flipped = target.clone()
    flipped[:, :2, ..., :8] = ~flipped[:, :2, ..., :8]
    with torch.no_grad():
        results = [
            trainer.validation_step({"data": data, "target": [each, each[..., ::2, ::2]]}) for each in (target, flipped)
        ]
    for key in ("tp_hard", "fp_hard", "fn_hard"):
        assert np.array_equal(results[0][key], results[1][key]), key


# ---------------------------------------------------------------------------------------------------- environment


def test_wrong_settings_and_variables_stop_before_anything_is_trained(tiny: Any) -> None:
    with pytest.raises(InputError, match=r"nnUNetPlansFlareTiny.json, configuration '3d_fullres'.*flare.num_epochs"):
        tiny.trainer(num_epochs=0)
    tiny.environment.setenv("NNUNET_FLARE_THREADS", "many")
    with pytest.raises(InputError, match="NNUNET_FLARE_THREADS: found 'many'"):
        tiny.trainer(num_epochs=1).initialize()


def test_the_number_of_threads_can_be_chosen(tiny: Any, one_thread: None) -> None:
    tiny.add(TRUE[0])
    torch.set_num_threads(2)
    tiny.environment.setenv("NNUNET_FLARE_THREADS", "1")
    tiny.trainer().initialize()
    assert torch.get_num_threads() == 1


def test_the_length_in_the_name_wins_over_the_settings(tiny: Any) -> None:
    assert tiny.trainer(name="nnUNetTrainerFlareST_12epochs", num_epochs=3).num_epochs == 12


def test_nothing_to_train_on_is_refused(tiny: Any) -> None:
    tiny.add("extra")
    tiny.table({"extra": "unlabelled"})
    with pytest.raises(InputError, match="no labelled, partial or pseudo case"):
        tiny.trainer(fold="all").do_split()
