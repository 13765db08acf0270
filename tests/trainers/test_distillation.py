"""nnUNetTrainerFlareDistill: a student learns from a frozen teacher's logits; one that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_flare.errors import FlareError, InputError
from nnunet_flare.files import read_json, write_json
from nnunet_flare.trainers.distillation import soft_loss
from nnunet_flare.trainers.heads import Heads

CASES = [f"case{k}" for k in range(4)]
NAME = "nnUNetTrainerFlareDistill"


@pytest.fixture
def teacher(tiny: Any) -> Path:
    """A trained model folder of stock nnU-Net's trainer."""
    tiny.add(*CASES)
    trained = tiny.trainer(name="nnUNetTrainer", results="teachers")
    torch.manual_seed(1)
    trained.initialize()
    base = Path(trained.output_folder_base)
    write_json(base / "plans.json", tiny.plans)
    write_json(base / "dataset.json", tiny.dataset_json)
    trained.save_checkpoint(str(Path(trained.output_folder, "checkpoint_final.pth")))
    return base


def student(tiny: Any, teacher: Path, *, name: str = NAME, continued: bool = False, **changes: Any) -> Any:
    settings = {"num_epochs": 2, "iterations_per_epoch": 2, "final_validation": False, "seed": 3}
    given = {"folder": str(teacher), **changes}
    return tiny.trainer(name=name, continued=continued, **settings, teacher=given)


def batch() -> dict[str, Any]:
    stream = torch.Generator().manual_seed(5)
    data = torch.randn((2, 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 3, (2, 1, 8, 16, 16), generator=stream).to(torch.int16)
    return {"data": data, "target": [target, target[..., ::2, ::2]], "keys": CASES[:2]}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_the_one_written_by_hand(temperature: float) -> None:
    stream = np.random.default_rng(0)
    ours, theirs = (stream.normal(0, 3, (2, 3, 2, 3, 4)) for _ in range(2))
    total, voxels = 0.0, 0
    for case in range(2):
        for voxel in np.ndindex(2, 3, 4):
            p, q = (np.exp(logits[(case, slice(None), *voxel)] / temperature) for logits in (theirs, ours))
            p, q = p / p.sum(), q / q.sum()
            total += (p * np.log(p / q)).sum()
            voxels += 1
    found = soft_loss(torch.tensor(ours), torch.tensor(theirs), temperature, Heads())
    assert found.item() == pytest.approx(temperature**2 * total / voxels, rel=1e-5)


def test_a_step_mixes_hard_and_soft_loss_and_leaves_the_teacher_alone(
    tiny: Any, teacher: Path, one_thread: None
) -> None:
    trainer = student(tiny, teacher, temperature=2.0, weight=0.25)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    given = batch()
    with torch.no_grad():
        output = trainer.network(given["data"])
        hard = trainer.loss(output, given["target"])
        soft = soft_loss(output[0], trainer.teacher(given["data"]), 2.0, Heads())
        validated = trainer.validation_step(given)["loss"]
    trainer.network.train()
    loss = trainer.train_step(given)["loss"]
    assert loss == pytest.approx((0.75 * hard + 0.25 * soft).item(), abs=1e-6)
    assert validated == pytest.approx(loss, abs=1e-5)
    assert not trainer.teacher.training
    for name, value in trainer.teacher.named_parameters():
        assert value.grad is None and not value.requires_grad, name
    for name, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_is_its_checkpoint_and_never_in_the_students(tiny: Any, teacher: Path) -> None:
    trainer = student(tiny, teacher)
    trainer.initialize()
    saved = torch.load(teacher / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for name, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, saved[name]), name
    path = Path(trainer.output_folder, "checkpoint_x.pth")
    trainer.save_checkpoint(str(path))
    student_weights = torch.load(path, weights_only=False)["network_weights"]
    assert student_weights.keys() == trainer.network.state_dict().keys()
    assert any(not torch.equal(value, saved[name]) for name, value in student_weights.items())


class Overflowing(torch.nn.Module):
    """A teacher whose scores are infinite in its first calls."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times
        self.calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.left -= 1
        return torch.full((len(image), 3, *image.shape[2:]), float("inf") if self.left >= 0 else 1.0)


def test_a_teacher_that_overflows_goes_on_in_single_precision_and_the_log_says_so(tiny: Any, teacher: Path) -> None:
    trainer = student(tiny, teacher)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.teacher = Overflowing(1)
    losses = [trainer.train_step(batch())["loss"] for _ in range(2)]
    assert np.isfinite(losses).all()
    assert trainer.teacher.calls == 3, "twice for the first batch, once for the second"
    assert Path(trainer.log_file).read_text().count("overflow in fp16") == 1


def test_a_teacher_without_finite_scores_ends_the_training(tiny: Any, teacher: Path) -> None:
    trainer = student(tiny, teacher)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.teacher = Overflowing(9)
    with pytest.raises(
        FlareError, match=r"checkpoint_final.pth: its scores of case0, case1 are infinite or not a number even in"
    ):
        trainer.train_step(batch())


def test_weight_zero_is_training_without_a_teacher(tiny: Any, teacher: Path, one_thread: None) -> None:
    trainer = student(tiny, teacher, weight=0.0)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    given = batch()
    with torch.no_grad():
        output = trainer.network(given["data"])
        assert torch.equal(trainer.compute_loss(output, given["target"], given), trainer.loss(output, given["target"]))


def test_a_resumed_training_ends_as_one_that_was_not_killed(tiny: Any, teacher: Path, one_thread: None) -> None:
    whole = student(tiny, teacher)
    whole.run_training()
    assert "Teacher: " in Path(whole.log_file).read_text()
    killed = tiny.trainer(name=NAME, results="killed")
    killed.settings = killed.settings.model_copy(update={"save_every": 1})
    killed.save_every = 1
    epoch_start = killed.on_epoch_start

    def stop_in_second_epoch() -> None:
        if killed.current_epoch == 1:
            raise KeyboardInterrupt
        epoch_start()

    killed.on_epoch_start = stop_in_second_epoch
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    resumed = tiny.trainer(name=NAME, results="killed", continued=True)
    resumed.load_checkpoint(str(Path(resumed.output_folder, "checkpoint_latest.pth")))
    assert resumed.current_epoch == 1
    resumed.run_training()
    for (name, one), other in zip(whole.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("scheme", ["CTNormalization", "FlareModalityNormalization"])
def test_a_teacher_of_other_intensities_is_refused(tiny: Any, teacher: Path, scheme: str) -> None:
    plans = read_json(teacher / "plans.json")
    for each in (plans, tiny.plans):
        each["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = 12.5
    write_json(teacher / "plans.json", plans)
    with pytest.raises(InputError, match=r"its normalisation is .*12\.5.* is .*80\.0"):
        student(tiny, teacher).initialize()


@pytest.mark.parametrize("kind", ["spacing", "labels", "channels", "patch", "first stage of a cascade"])
def test_a_teacher_that_does_not_fit_is_refused_with_both_sides(tiny: Any, teacher: Path, kind: str) -> None:
    plans, dataset = read_json(teacher / "plans.json"), read_json(teacher / "dataset.json")
    configuration = plans["configurations"]["3d_fullres"]
    expected = [f"its {kind} is"]
    if kind == "spacing":
        configuration["spacing"] = [4.0, 1.2, 1.2]
        expected += ["[4.0, 1.2, 1.2]", "[2.0, 1.0, 1.0]", "hard labels"]
    elif kind == "labels":
        dataset["labels"]["spleen"], dataset["labels"]["liver"] = 1, 2
        expected += ["'spleen': 1", "'spleen': 2"]
    elif kind == "channels":
        dataset["channel_names"]["0"] = "MR"
        expected += ["MR", "CT"]
    elif kind == "first stage of a cascade":
        configurations = tiny.plans["configurations"]
        configurations["3d_lowres"] = {**configurations["3d_fullres"]}
        configurations["3d_fullres"]["previous_stage"] = "3d_lowres"
        expected += ["None", "3d_lowres"]
    else:
        configuration["architecture"]["arch_kwargs"]["strides"][-1] = [3, 3, 3]
        expected = ["is not a multiple of that", "[8, 16, 16]"]
    write_json(teacher / "plans.json", plans)
    write_json(teacher / "dataset.json", dataset)
    with pytest.raises(InputError) as caught:
        student(tiny, teacher).initialize()
    for words in expected:
        assert words in str(caught.value)


def test_a_trainer_without_a_teacher_and_a_teacher_without_its_checkpoint_are_refused(tiny: Any, teacher: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        student(tiny, teacher, fold=3).initialize()
    with pytest.raises(InputError, match="learns from no teacher"):
        student(tiny, teacher, name="nnUNetTrainerFlareST")
    tiny.plans["configurations"]["3d_fullres"].pop("flare")
    with pytest.raises(InputError, match=r"set flare\.teacher\.folder"):
        tiny.trainer(name=NAME).initialize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1.5}, "teacher.weight: found 1.5"),
        ({"temperature": 0}, "teacher.temperature: found 0"),
        ({"folds": 0}, "teacher.folds: unknown key, allowed are folder, fold"),
    ],
)
def test_impossible_settings_are_refused_with_their_place(tiny: Any, teacher: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match="problem") as caught:
        student(tiny, teacher, **change)
    assert message in str(caught.value)
