"""Every key of the settings has an effect that can be read after one epoch of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform

from nnunet_flare.errors import InputError
from nnunet_flare.rounds.stages.arrays import read_array
from nnunet_flare.trainers.seeding import derived_seed
from nnunet_flare.trainers.settings import AugmentationSettings, TrainingSettings
from nnunet_flare.trainers.transforms.histogram import HistogramMatchTransform, landmarks
from nnunet_flare.trainers.transforms.organ_shift import OrganShiftTransform
from nnunet_flare.trainers.transforms.painting import PaintingTransform

TRUE = [f"true{k}" for k in range(5)]
PSEUDO = [f"pseudo{k}" for k in range(5)]


@dataclass
class Trained:
    """A trainer after its training, and what was seen on the way."""

    trainer: Any
    learning_rates: list[float] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    validation_batches: int = 0
    saved: list[tuple[str, int]] = field(default_factory=list)
    autocast: set[bool] = field(default_factory=set)

    @property
    def log(self) -> str:
        return Path(self.trainer.log_file).read_text()

    def transforms_of(self, role: str) -> list[Any]:
        return list(flattened(self.trainer.dataloader_train.data_loader.transforms.chains[role]))


def flattened(transform: Any) -> list[Any]:
    found = [transform]
    for part in [*getattr(transform, "transforms", []), *getattr(transform, "list_of_transforms", [])]:
        found += flattened(part)
    return found + flattened(transform.transform) if hasattr(transform, "transform") else found


def train(tiny: Any, *, fold: int | str = "all", with_partial: bool = True, **settings: Any) -> Trained:
    """One epoch of three iterations, unless the settings say otherwise, on labelled, pseudo and one partial case."""
    if not (tiny.data / "true0.b2nd").exists():
        tiny.add(*TRUE, *PSEUDO)
    roles: dict[str, Any] = {**dict.fromkeys(TRUE, "labelled"), **dict.fromkeys(PSEUDO, "pseudo")}
    if with_partial:
        roles["true0"] = {"role": "partial", "annotated": [1, 2]}
    tiny.table(roles, name="flare_cases.3d_fullres.json")
    tiny.plans["configurations"]["3d_fullres"].pop("flare", None)
    defaults = {"num_epochs": 1, "iterations_per_epoch": 3, "final_validation": False}
    seen = Trained(tiny.trainer(fold=fold, **{**defaults, **settings}))
    trainer = seen.trainer
    train_step, validation_step, save = trainer.train_step, trainer.validation_step, trainer.save_checkpoint

    def watched_train_step(batch: dict) -> dict:
        result: dict = train_step(batch)
        seen.learning_rates.append(trainer.optimizer.param_groups[0]["lr"])
        seen.drawn += [str(case) for case in batch["keys"]]
        return result

    def watched_validation_step(batch: dict) -> dict:
        seen.validation_batches += 1
        result: dict = validation_step(batch)
        return result

    def watched_save(filename: str) -> None:
        seen.saved.append((Path(filename).name, trainer.current_epoch + 1))
        save(filename)

    trainer.train_step, trainer.validation_step = watched_train_step, watched_validation_step
    trainer.save_checkpoint = watched_save
    trainer.initialize()
    trainer.network.encoder.stages[0].register_forward_pre_hook(
        lambda *_: seen.autocast.add(torch.is_autocast_enabled("cpu"))
    )
    trainer.run_training()
    trainer.perform_actual_validation()
    return seen


def check_num_epochs(tiny: Any) -> None:
    assert len(train(tiny, num_epochs=3).learning_rates) == 9


def check_iterations_per_epoch(tiny: Any) -> None:
    seen = train(tiny, iterations_per_epoch=11)
    assert len(seen.learning_rates) == 11
    assert seen.validation_batches == 2


def check_validation_iterations(tiny: Any) -> None:
    assert train(tiny, validation_iterations=4).validation_batches == 4


def check_augmentation(tiny: Any) -> None:
    seen = train(
        tiny, augmentation={"labelled": "weak", "pseudo": "strong", "partial": "stock"}, iterations_per_epoch=9
    )
    kinds = {role: {type(part) for part in seen.transforms_of(role)} for role in ("labelled", "pseudo", "partial")}
    assert OrganShiftTransform in kinds["labelled"]
    assert PaintingTransform not in kinds["labelled"]
    assert {OrganShiftTransform, PaintingTransform} <= kinds["pseudo"]
    assert not {OrganShiftTransform, PaintingTransform} & kinds["partial"]


def check_references(tiny: Any) -> None:
    """The scans of a folder of the dataset are those whose histograms are matched; without one none is."""
    chains = {"labelled": "modality", "pseudo": "stock", "partial": "stock"}
    (matching,) = [
        part
        for part in train(tiny, augmentation=chains, references=tiny.data.name).transforms_of("labelled")
        if isinstance(part, HistogramMatchTransform)
    ]
    scans = [read_array(tiny.data / f"{case}.b2nd") for case in sorted([*TRUE, *PSEUDO])]
    assert len(matching.references) == len(scans)
    for found, scan in zip(matching.references, scans, strict=True):
        torch.testing.assert_close(found, torch.stack([landmarks(torch.from_numpy(channel)) for channel in scan]))
    without = train(tiny, augmentation=chains).transforms_of("labelled")
    assert not any(isinstance(part, HistogramMatchTransform) for part in without)
    with pytest.raises(InputError, match=r"flare.references: .*nowhere has no preprocessed scan"):
        train(tiny, augmentation=chains, references="nowhere")


def check_mirroring(tiny: Any) -> None:
    assert train(tiny).trainer.inference_allowed_mirroring_axes == (0, 1, 2)
    seen = train(tiny, mirroring=False, augmentation={"labelled": "stock", "pseudo": "strong", "partial": "weak"})
    assert seen.trainer.inference_allowed_mirroring_axes is None
    for role in ("labelled", "pseudo", "partial"):
        assert not any(isinstance(part, MirrorTransform) for part in seen.transforms_of(role)), role
    checkpoint = torch.load(Path(seen.trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] is None


def check_labelled_to_pseudo(tiny: Any) -> None:
    assert set(train(tiny, labelled_to_pseudo=[0, 1]).drawn) <= set(PSEUDO)
    assert set(train(tiny, labelled_to_pseudo=[1, 0]).drawn) <= set(TRUE)


def check_pseudo_folds(tiny: Any) -> None:
    def pseudo_of(seen: Trained) -> set[str]:
        return set(seen.trainer.do_split()[0]) & set(PSEUDO)

    assert len(pseudo_of(train(tiny, fold=0, pseudo_folds="split"))) == 4
    assert len(pseudo_of(train(tiny, fold=0, pseudo_folds="all"))) == 5


def check_checkpoints_at(tiny: Any) -> None:
    seen = train(tiny, num_epochs=3, checkpoints_at=[0.34, 1.0])
    assert [entry for entry in seen.saved if "of" in entry[0]] == [
        ("checkpoint_1of2.pth", 2),
        ("checkpoint_2of2.pth", 3),
    ]
    for name, epoch in (("checkpoint_1of2.pth", 2), ("checkpoint_2of2.pth", 3)):
        checkpoint = torch.load(Path(seen.trainer.output_folder, name), weights_only=False)
        assert checkpoint["current_epoch"] == epoch


def check_optimizer(tiny: Any) -> None:
    assert type(train(tiny).trainer.optimizer) is torch.optim.SGD
    for name in ("Adam", "AdamW"):
        assert type(train(tiny, optimizer=name).trainer.optimizer) is getattr(torch.optim, name)


def check_initial_lr(tiny: Any) -> None:
    assert train(tiny, initial_lr=0.004).learning_rates == [0.004] * 3


def check_weight_decay(tiny: Any) -> None:
    for optimizer in ("SGD", "AdamW"):
        seen = train(tiny, weight_decay=0.125, optimizer=optimizer)
        assert seen.trainer.optimizer.param_groups[0]["weight_decay"] == 0.125


def check_betas(tiny: Any) -> None:
    assert train(tiny, optimizer="AdamW", betas=[0.5, 0.75]).trainer.optimizer.param_groups[0]["betas"] == (0.5, 0.75)


def check_lr_schedule(tiny: Any) -> None:
    rates = train(tiny, num_epochs=4, iterations_per_epoch=1, lr_schedule="steps").learning_rates
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001])


def check_warmup_iterations(tiny: Any) -> None:
    rates = train(tiny, warmup_iterations=4, iterations_per_epoch=6).learning_rates
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def check_class_weights(tiny: Any) -> None:
    given = train(tiny, class_weights=[1, 2, 5]).trainer.loss.loss.ce.weight
    assert given.tolist() == [1, 2, 5]
    measured = train(tiny, class_weights="inverse-sqrt-frequency").trainer.loss.loss.ce.weight
    voxels = np.array([4000 - 5 * 8 * 8 - 5 * 6 * 8, 5 * 8 * 8, 5 * 6 * 8])
    expected = voxels**-0.5
    assert measured.numpy() == pytest.approx(expected / expected.mean(), rel=1e-5)
    assert train(tiny).trainer.loss.loss.ce.weight is None


def check_oversample_foreground(tiny: Any) -> None:
    loader = train(tiny, oversample_foreground=1.0).trainer.dataloader_train.data_loader
    assert [loader.get_do_oversample(sample) for sample in range(2)] == [True, True]
    loader = train(tiny, oversample_foreground=0.0).trainer.dataloader_train.data_loader
    assert [loader.get_do_oversample(sample) for sample in range(2)] == [False, False]


def check_init_from(tiny: Any) -> None:
    source = Path(train(tiny, num_epochs=2).trainer.output_folder, "checkpoint_final.pth").rename(
        tiny.root / "init.pth"
    )
    weights = torch.load(source, weights_only=False)["network_weights"]
    trainer = tiny.trainer(fold="all", num_epochs=1, init_from=str(source))
    trainer.initialize()
    assert any("seg_layers" in name for name in weights)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, weights[name]), name


def check_init_part(tiny: Any) -> None:
    source = Path(train(tiny).trainer.output_folder, "checkpoint_final.pth").rename(tiny.root / "init.pth")
    weights = torch.load(source, weights_only=False)["network_weights"]
    taken = {}
    for part in ("all", "but-head", "encoder"):
        trainer = tiny.trainer(fold="all", num_epochs=1, init_from=str(source), init_part=part, seed=3)
        trainer.initialize()
        same = {name for name, value in trainer.network.named_parameters() if torch.equal(value, weights[name])}
        trained = {name for name in same if name.endswith(("conv.weight", ".0.weight"))}
        taken[part] = {name.split(".")[0] + (".seg" if "seg_layers" in name else "") for name in trained}
    assert taken == {
        "all": {"encoder", "decoder", "decoder.seg"},
        "but-head": {"encoder", "decoder"},
        "encoder": {"encoder"},
    }
    assert "weights (encoder) of" in Path(trainer.log_file).read_text()


def check_ignore_label(tiny: Any) -> None:
    trainer = train(tiny, ignore_label=3).trainer
    assert trainer.loss.loss.ce.ignore_index == 3
    assert trainer.dataloader_train.data_loader.without_label == 3


def check_final_validation(tiny: Any) -> None:
    assert "Final validation skipped: the settings say so" in train(tiny, final_validation=False).log
    seen: list[str] = []
    tiny.environment.setattr(
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer.perform_actual_validation",
        lambda self, save_probabilities=False: seen.append("stock"),
    )
    train(tiny, final_validation=True, with_partial=False)
    assert seen == ["stock"]


def check_cpu_precision(tiny: Any) -> None:
    has_bf16 = "nnunet_flare.trainers.base.computes_bf16"
    tiny.environment.setattr(has_bf16, lambda device: False)  # there it would take 80 times as long
    seen = train(tiny, cpu_precision="bf16")
    assert seen.autocast == {False}
    assert "fp32 is used" in Path(seen.trainer.log_file).read_text()
    tiny.environment.setattr(has_bf16, lambda device: True)
    seen = train(tiny, cpu_precision="bf16")
    assert seen.autocast == {True}
    weight = seen.trainer.network.encoder.stages[1][0].convs[0].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert np.isfinite(seen.trainer.logger.get_value("train_losses", step=-1))
    assert train(tiny).autocast == {False}


def check_cuda_precision(tiny: Any) -> None:
    """Without a GPU: what the trainer would enter there."""
    for precision, dtype, has_scaler in (("fp16", torch.float16, True), ("bf16", torch.bfloat16, False)):
        trainer = tiny.trainer(cuda_precision=precision)
        trainer.device, trainer.grad_scaler = torch.device("cuda"), "stock's"
        trainer.take_settings()
        assert (trainer.grad_scaler is not None) == has_scaler
        assert trainer._autocast().fast_dtype == dtype
    tiny.environment.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(InputError, match=r"flare\.cuda_precision: found 'bf16'.*expected 'fp16'"):
        trainer.initialize()


def check_save_every(tiny: Any) -> None:
    saved = [epoch for name, epoch in train(tiny, num_epochs=5, save_every=2).saved if name == "checkpoint_latest.pth"]
    assert saved == [2, 4]


def check_seed(tiny: Any) -> None:
    first, again, other = (train(tiny, seed=seed) for seed in (4, 4, 5))
    assert first.drawn == again.drawn
    assert first.drawn != other.drawn
    for one, two in zip(first.trainer.network.parameters(), again.trainer.network.parameters(), strict=True):
        assert torch.equal(one, two)


def check_run(tiny: Any) -> None:
    assert train(tiny, run="demo").trainer.settings.run == "demo"


def check_round(tiny: Any) -> None:
    trainer = train(tiny, round=2, seed=4).trainer
    assert trainer.derived_seed("epoch", 0) == derived_seed(4, 2, "all", "epoch", 0)
    (tiny.folder / "flare_cases.3d_fullres.json").unlink()
    with pytest.raises(Exception, match="is a round of flare-pseudolabel"):
        trainer.do_split()


def check_teacher(tiny: Any) -> None:
    """What it does is tested with its own trainer; the others refuse it."""
    with pytest.raises(InputError, match="learns from no teacher"):
        train(tiny, teacher={"folder": "model"})


def check_adversarial(tiny: Any) -> None:
    """What it does is tested with its own trainer; the others refuse it."""
    with pytest.raises(InputError, match="has no discriminator"):
        train(tiny, adversarial={})


def check_patience(tiny: Any) -> None:
    """Ended early and late by Dice that are given here: .2 .4 .3 .35 .1, moving: .2 .22 .228 .2402 .2262."""
    dice = iter([0.2, 0.4, 0.3, 0.35, 0.1, 0.1, 0.1])

    def given(self: Any, outputs: list[dict]) -> None:
        self.logger.log("mean_fg_dice", next(dice), self.current_epoch)
        self.logger.log("dice_per_class_or_region", [0.0, 0.0], self.current_epoch)
        self.logger.log("val_losses", 0.0, self.current_epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_flare.trainers.self_training.nnUNetTrainerFlareST.on_validation_epoch_end", given)
        trained = train(tiny, num_epochs=9, iterations_per_epoch=1, patience=2)
    assert trained.trainer.current_epoch == 6  # best in the fourth epoch
    assert "No new best moving validation Dice for 2 epochs: the training ends after 6 of 9." in trained.log
    saved = torch.load(Path(trained.trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert saved["current_epoch"] == 6
    continued = tiny.trainer(continued=True, num_epochs=9, iterations_per_epoch=1, patience=2, final_validation=False)
    continued.load_checkpoint(str(Path(trained.trainer.output_folder) / "checkpoint_final.pth"))
    continued.run_training()
    assert continued.current_epoch == 6, "a training that had ended does not go on"


def check_mean_teacher(tiny: Any) -> None:
    """What it does is tested with its own trainer; the others refuse it."""
    with pytest.raises(InputError, match="has no average that teaches"):
        train(tiny, mean_teacher={})


def check_recipe_hash(tiny: Any) -> None:
    """Kept with the model, where the ledger and the report find it."""
    folder = Path(train(tiny, recipe_hash="abc123").trainer.output_folder)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    plans = checkpoint["init_args"]["plans"]
    assert plans["configurations"]["3d_fullres"]["flare"]["recipe_hash"] == "abc123"
    assert "abc123" in (folder.parent / "plans.json").read_text()


CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def test_every_setting_has_a_check() -> None:
    assert set(CHECKS) == set(TrainingSettings.model_fields)
    assert set(AugmentationSettings.model_fields) == {"labelled", "pseudo", "partial"}


@pytest.mark.parametrize("key", sorted(CHECKS))
def test_a_setting_has_its_effect(tiny: Any, one_thread: None, key: str) -> None:
    CHECKS[key](tiny)
