"""The mean-teacher trainer: its step and its average against references by hand, its checkpoints, its settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from test_resume import Killed, kill_in
from tiny_dataset import write_case
from torch.nn import functional as F

from nnunet_flare.checkpoints import load_checkpoint
from nnunet_flare.errors import InputError
from nnunet_flare.trainers.averages import WeightAverage, decay_at, ramp_up
from nnunet_flare.trainers.heads import Heads
from nnunet_flare.trainers.mean_teacher import sure_labels, too_long_a_memory
from nnunet_flare.trainers.sampling import stop_augmenter, workers_of
from nnunet_flare.trainers.settings import MeanTeacherSettings
from nnunet_flare.trainers.transforms.painting import PaintingTransform
from nnunet_flare.trainers.transforms.shift import ShiftTransform
from nnunet_flare.trainers.transforms.two_views import TwoViews

NAME = "nnUNetTrainerFlareMeanTeacher"
CASES, UNLABELLED = ["a", "b", "c"], ["u", "v", "w"]
SETTINGS = {"num_epochs": 2, "iterations_per_epoch": 2, "final_validation": False, "seed": 3}
CURVES = ("unlabelled_loss", "sure_share")


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    """Three labelled and three unlabelled scans."""
    tiny.add(*CASES)
    folder = tiny.data.with_name(f"{tiny.data.name}_un")
    folder.mkdir()
    for number, case in enumerate(UNLABELLED):
        write_case(folder, case, seed=number, seg=np.zeros((1, 10, 20, 20), np.int8))
    tiny.unlabelled = folder
    return tiny


def trainer_of(data: Any, *, mean_teacher: dict | None = None, **settings: Any) -> Any:
    return data.trainer(name=NAME, **{**SETTINGS, **settings}, mean_teacher=mean_teacher or {})


def started(data: Any, **settings: Any) -> Any:
    """A trainer in front of its first step."""
    trainer = trainer_of(data, **settings)
    torch.manual_seed(0)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    return trainer


def batch_of(*keys: str, seed: int = 5) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(seed)
    data = torch.randn((len(keys), 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 3, (len(keys), 1, 8, 16, 16), generator=stream).to(torch.int16)
    return {"data": data, "target": [target, target[..., ::2, ::2]], "keys": np.array(keys)}


def views() -> dict[str, Any]:
    """One unlabelled sample: the weak view, and the strong one behind it."""
    return {"data": torch.randn((1, 2, 8, 16, 16), generator=torch.Generator().manual_seed(9)), "keys": ("u",)}


# ------------------------------------------------------------------------------------------------ by hand


def test_a_step_is_the_one_written_by_hand(data: Any) -> None:
    trainer = started(data, mean_teacher={"threshold": 0.36, "weight": 0.5, "ramp_up": 0.5, "decay": 0.75})
    with torch.no_grad():  # so that teacher and student differ
        for weight in trainer.average.network.parameters():
            weight.mul_(1.5)
    trainer.average.updates = 9
    student, teacher = copy.deepcopy(trainer.network), copy.deepcopy(trainer.average.network)
    before = [weight.clone() for weight in teacher.parameters()]
    batch, unlabelled = batch_of("a", "b"), views()
    trainer.dataloader_unlabelled = iter([unlabelled])
    trainer.current_epoch, trainer._iteration = 0, 1  # one of the two iterations in which the weight rises
    result = trainer.train_step(batch)

    probability, label = torch.softmax(teacher.eval()(unlabelled["data"][:, :1])[0], 1).max(1)
    label = torch.where(probability >= 0.36, label, 3)[:, None]
    assert 0 < (label == 3).float().mean() < 1, "some are sure, some are not"
    assert result["sure_share"] == pytest.approx((label != 3).float().mean().item())
    output = student(torch.cat([batch["data"], unlabelled["data"][:, 1:]]))
    hard = trainer.loss([part[:2] for part in output], batch["target"])
    target = [label, F.interpolate(label.float(), output[1].shape[2:], mode="nearest-exact")]
    soft = trainer.loss([part[2:] for part in output], target)
    weight = 0.5 * np.exp(-5 * 0.25)
    assert result["loss"] == pytest.approx((hard + weight * soft).item(), rel=1e-5)
    assert (result["labelled_loss"], result["unlabelled_loss"]) == pytest.approx((hard.item(), soft.item()), rel=1e-5)
    for old, new, average in zip(
        before, trainer.network.parameters(), trainer.average.network.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)
        assert not average.requires_grad and average.grad is None


def test_voxels_that_no_class_is_sure_of_are_left_out() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.1], [0.0, 0.0]])[None, :, :, None, None]
    assert sure_labels(logits, 0.9, Heads(3)).flatten().tolist() == [0, 3]
    assert sure_labels(logits, 0.0, Heads(3)).flatten().tolist() == [0, 1]


def test_ignored_voxels_change_no_weight(data: Any) -> None:
    """The teacher is sure of nothing: the step is that on the labels alone."""
    weights = []
    for unlabelled in (0.0, 7.0):
        trainer = started(data, mean_teacher={"threshold": 1.0, "weight": unlabelled, "ramp_up": 0})
        trainer.dataloader_unlabelled = iter([views()])
        result = trainer.train_step(batch_of("a", "b"))
        assert result["sure_share"] == 0
        weights.append(list(trainer.network.parameters()))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_the_labelled_loss_is_that_of_a_dataset_without_an_ignore_label(data: Any) -> None:
    plain = data.trainer(name="nnUNetTrainerFlareST", **SETTINGS)
    torch.manual_seed(0)
    plain.initialize()
    trainer = started(data)
    batch = batch_of("a", "b")
    with torch.no_grad():
        output = plain.network(batch["data"])
    assert trainer.loss(output, batch["target"]) == pytest.approx(plain.loss(output, batch["target"]).item(), rel=1e-6)


def test_the_weight_rises_as_in_the_paper() -> None:
    assert ramp_up(0) == pytest.approx(np.exp(-5))
    assert ramp_up(0.5) == pytest.approx(np.exp(-1.25))
    assert ramp_up(1) == ramp_up(3) == 1


def test_the_average_starts_as_a_plain_mean() -> None:
    assert [decay_at(updates, 0.7) for updates in range(5)] == pytest.approx([0, 1 / 2, 2 / 3, 0.7, 0.7])
    network = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(network)
    for value in (1.0, 2.0, 6.0):
        torch.nn.init.constant_(network.weight, value)
        average.update(network, 0.999)
    assert average.network.weight.item() == pytest.approx(3.0), "the mean of 1, 2 and 6"


# ------------------------------------------------------------------------------------------------ the stream


def streamed(data: Any) -> list[torch.Tensor]:
    trainer = trainer_of(data)
    trainer.on_train_start()
    return [next(trainer.dataloader_unlabelled)["data"] for _ in range(6)]


def test_both_views_have_one_place_and_other_intensities(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = streamed(data)
    assert {tuple(batch.shape) for batch in batches} == {(1, 2, 8, 16, 16)}
    assert any(not torch.equal(*batch[0]) for batch in batches)
    monkeypatch.setattr("nnunet_flare.trainers.mean_teacher.intensity_transforms", lambda windows: [])
    assert all(torch.equal(*batch[0]) for batch in streamed(data)), "nothing else is done to the second view"


def test_workers_are_shared_by_the_size_of_the_batches() -> None:
    assert workers_of(12, {"training": 2, "unlabelled": 1}) == {"training": 8, "unlabelled": 4}
    assert workers_of(1, {"training": 2, "unlabelled": 1}) == {"training": 1, "unlabelled": 1}
    assert workers_of(0, {"training": 2, "unlabelled": 1}) == {"training": 0, "unlabelled": 0}


@pytest.mark.parametrize("allowed", [1, 6])
def test_three_loaders_start_as_many_workers_as_stocks_two(
    data: Any, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    for module in ("by_role", "unlabelled"):
        monkeypatch.setattr(
            f"nnunet_flare.trainers.{module}.start_augmenter", lambda _, *, processes, **__: started.append(processes)
        )
    monkeypatch.setattr("nnunet_flare.trainers.by_role.get_allowed_n_proc_DA", lambda: allowed)
    trainer = trainer_of(data)
    trainer.initialize()
    trainer.get_dataloaders()
    assert started == ([4, 3, 2] if allowed == 6 else [1, 1, 1]), "training, validation, unlabelled"


def test_an_ignore_label_asks_nothing_of_scans_without_labels(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data.dataset_json["labels"] = {**data.dataset_json["labels"], "ignore": 3}
    made: list[Any] = []
    for module in ("by_role", "unlabelled"):
        monkeypatch.setattr(f"nnunet_flare.trainers.{module}.start_augmenter", lambda loader, **__: made.append(loader))
    trainer = trainer_of(data)
    trainer.initialize()
    trainer.get_dataloaders()
    assert [loader.has_ignore for loader in made] == [True, True, False], "training, validation, unlabelled"
    assert made[-1].generate_train_batch()["data"].shape == (1, 2, 8, 16, 16)


# ------------------------------------------------------------------------------------------------ settings


def check_unlabelled(data: Any) -> None:
    with pytest.raises(InputError, match="elsewhere: holds no unlabelled scan"):
        trainer_of(data, mean_teacher={"unlabelled": "elsewhere"}).run_training()


def check_unlabelled_batch_size(data: Any) -> None:
    trainer = trainer_of(data, mean_teacher={"unlabelled_batch_size": 3})
    trainer.on_train_start()
    assert len(next(trainer.dataloader_unlabelled)["data"]) == 3


def check_augmentation(data: Any) -> None:
    for kind, has_shift in (("weak", False), ("shift", True)):
        trainer = trainer_of(data, mean_teacher={"augmentation": kind})
        trainer.on_train_start()
        weak, strong = trainer.dataloader_unlabelled.data_loader.transforms.transforms
        assert any(isinstance(part, ShiftTransform) for part in weak.transforms) == has_shift
        assert isinstance(strong, TwoViews)
        kinds = {type(getattr(part, "transform", part)) for part in strong.transform.transforms}
        assert PaintingTransform in kinds


def check_decay(data: Any) -> None:
    trainer = started(data, mean_teacher={"decay": 0.0})
    trainer.dataloader_unlabelled = iter([views()])
    trainer.train_step(batch_of("a", "b"))
    for average, weight in zip(trainer.average.network.parameters(), trainer.network.parameters(), strict=True):
        assert torch.equal(average, weight)


def check_threshold(data: Any) -> None:
    shares = []
    for threshold in (0.0, 1.0):
        trainer = started(data, mean_teacher={"threshold": threshold})
        trainer.dataloader_unlabelled = iter([views()])
        shares.append(trainer.train_step(batch_of("a", "b"))["sure_share"])
    assert shares == [1, 0]


def check_weight(data: Any) -> None:
    assert started(data, mean_teacher={"weight": 0.3, "ramp_up": 0}).weight_now() == 0.3


def check_ramp_up(data: Any) -> None:
    trainer = started(data, mean_teacher={"ramp_up": 0.5})
    found = []
    for epoch, iteration in ((0, 0), (0, 1), (1, 0), (1, 1)):
        trainer.current_epoch, trainer._iteration = epoch, iteration
        found.append(trainer.weight_now())
    assert found == pytest.approx([np.exp(-5), np.exp(-1.25), 1, 1])


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def test_every_setting_has_a_check() -> None:
    assert set(CHECKS) == set(MeanTeacherSettings.model_fields)


@pytest.mark.parametrize("key", sorted(CHECKS))
def test_a_setting_has_its_effect(data: Any, key: str) -> None:
    CHECKS[key](data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.0}, "mean_teacher.decay: found 1.0"),
        ({"threshold": 1.1}, "mean_teacher.threshold: found 1.1"),
        ({"weight": -1}, "mean_teacher.weight: found -1"),
        ({"ramp_up": 2}, "mean_teacher.ramp_up: found 2"),
        ({"ramp": 0.5}, "mean_teacher.ramp: unknown key, allowed are unlabelled"),
    ],
)
def test_impossible_settings_are_refused_with_their_place(data: Any, change: dict, message: str) -> None:
    with pytest.raises(InputError, match="problem") as caught:
        trainer_of(data, mean_teacher=change)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [NAME, "nnUNetTrainerFlareAdversarial"])
def test_the_second_stage_of_a_cascade_is_refused(data: Any, name: str) -> None:
    """No first stage labelled the unlabelled scans; its labels are missing channels."""
    configurations = data.plans["configurations"]
    configurations["3d_lowres"] = {**configurations["3d_fullres"]}
    configurations["3d_fullres"]["previous_stage"] = "3d_lowres"
    with pytest.raises(InputError, match="'3d_fullres': is the second stage of a cascade"):
        data.trainer(name=name, **SETTINGS).initialize()


def test_other_trainers_have_no_average(data: Any) -> None:
    with pytest.raises(InputError, match=r"flare\.mean_teacher: nnUNetTrainerFlareST has no average that teaches"):
        data.trainer(name="nnUNetTrainerFlareST", mean_teacher={})


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_predict_with_the_average_and_the_final_one_is_that_alone(data: Any) -> None:
    trainer = trainer_of(data, checkpoints_at=[0.5, 1.0])
    trainer.run_training()
    folder = Path(trainer.output_folder)
    kept, final = (load_checkpoint(folder / name) for name in ("checkpoint_2of2.pth", "checkpoint_final.pth"))
    assert "flare_state" not in final
    assert set(kept["flare_state"]) == {"student_weights", "updates"}
    assert kept["flare_state"]["updates"] == 4
    average = trainer.average.network.state_dict()
    for name, weight in average.items():
        assert torch.equal(weight, final["network_weights"][name]), name
        assert torch.equal(weight, kept["network_weights"][name]), name
    assert any(not torch.equal(weight, average[name]) for name, weight in trainer.network.state_dict().items())
    for name, weight in trainer.network.state_dict().items():
        assert torch.equal(weight, kept["flare_state"]["student_weights"][name]), name


def test_the_average_is_what_is_validated(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started(data)
    with torch.no_grad():
        for weight in trainer.average.network.parameters():
            weight.zero_()
    batch = batch_of("a", "b")
    student = trainer.network
    counts = trainer.validation_step(batch)
    assert trainer.network is student and student.training
    assert counts["tp_hard"].sum() == 0, "all voxels are the first class"
    seen: list[float] = []
    monkeypatch.setattr(
        "nnunet_flare.trainers.self_training.nnUNetTrainerFlareST.perform_actual_validation",
        lambda self, _: seen.append(sum(float(weight.detach().abs().sum()) for weight in self.network.parameters())),
    )
    trainer.perform_actual_validation()
    assert seen == [0.0]


RESUMED = {"num_epochs": 4, "iterations_per_epoch": 3, "save_every": 1, "warmup_iterations": 2}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_and_resumed_training_equals_an_undisturbed_one(data: Any, workers: str) -> None:
    data.environment.setenv("nnUNet_n_proc_DA", workers)
    undisturbed = trainer_of(data, results="undisturbed", **RESUMED)
    undisturbed.run_training()
    killed = trainer_of(data, results="killed", **RESUMED)
    kill_in(killed, epoch=2, iteration=1)
    with pytest.raises(Killed):
        killed.run_training()
    for augmenter in (killed.dataloader_train, killed.dataloader_val, killed.dataloader_unlabelled):
        stop_augmenter(augmenter)
    again = trainer_of(data, results="killed", continued=True, **RESUMED)
    maybe_load_checkpoint(again, continue_training=True, validation_only=False)
    assert (again.current_epoch, again.average.updates) == (2, 6)
    again.run_training()
    pairs = ((undisturbed.network, again.network), (undisturbed.average.network, again.average.network))
    for one, other in pairs:
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name
    for curve in (*CURVES, "train_losses", "val_losses", "labelled_loss"):
        values = [t.logger.get_value(curve, step=None) for t in (undisturbed, again)]
        np.testing.assert_array_equal(*values, err_msg=curve)
    assert "no student" not in Path(again.log_file).read_text()


def test_a_training_without_a_saved_student_goes_on_from_the_average_and_says_so(data: Any) -> None:
    trainer = trainer_of(data)
    trainer.run_training()
    longer = trainer_of(data, num_epochs=3, continued=True)
    maybe_load_checkpoint(longer, continue_training=True, validation_only=False)
    assert "This checkpoint has no student: training continues from the average." in Path(longer.log_file).read_text()
    for one, other in zip(longer.network.parameters(), trainer.average.network.parameters(), strict=True):
        assert torch.equal(one, other)
    validated = trainer_of(data, num_epochs=3)
    maybe_load_checkpoint(validated, continue_training=False, validation_only=True)
    logs = (path.read_text() for path in Path(validated.output_folder).glob("training_log*.txt"))
    assert "".join(logs).count("no student") == 1, "--val trains nothing"


@pytest.mark.parametrize(
    ("decay", "iterations", "most"),
    [(0.999, 250_000, None), (0.999, 10_000, None), (0.999, 400, "0.975"), (0.98, 400, "0.975"), (0.97, 400, None)],
)
def test_a_decay_whose_average_holds_the_start_of_a_short_training_is_told(decay, iterations, most) -> None:
    told = too_long_a_memory(decay, iterations)
    assert told is None if most is None else told.endswith(f"Set decay to at most {most}")


def test_the_log_tells_it(data: Any) -> None:
    assert "averages the weights" not in Path(started(data, mean_teacher={"decay": 0.0}).log_file).read_text()
    assert (
        "WARNING: mean_teacher.decay 0.999" in Path(started(data, mean_teacher={"decay": 0.999}).log_file).read_text()
    )
