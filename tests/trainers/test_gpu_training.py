"""Every trainer on a real GPU; ``FLARE_GPU_TEST_DEVICE=cpu`` tries the tests themselves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from tiny_dataset import write_case

from nnunet_flare.files import write_json
from nnunet_flare.plugin import TRAINERS

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("FLARE_GPU_TEST_DEVICE", "cuda"))
SETTINGS = {"nnUNetTrainerFlareAdversarial": {"adversarial": {"warmup": 0, "finish": 0, "discriminator_features": 2}}}


def on_the_gpu(tiny, name: str, device: torch.device = DEVICE, **settings):
    made = tiny.trainer(name=name, **settings)  # writes the settings
    dataset, plans = made.plans_manager.dataset_name, made.plans_manager.plans_name
    return get_trainer_from_args(dataset, "3d_fullres", "all", name, plans, False, device)


def settings_of(tiny, name: str) -> dict:
    if not name.endswith("Distill"):
        return SETTINGS.get(name, {})
    teacher = tiny.trainer(name="nnUNetTrainer", results="teachers")
    teacher.initialize()
    base = Path(teacher.output_folder_base)
    write_json(base / "plans.json", tiny.plans)
    write_json(base / "dataset.json", tiny.dataset_json)
    teacher.save_checkpoint(str(Path(teacher.output_folder, "checkpoint_final.pth")))
    return {"teacher": {"folder": str(base)}}


def write_cases(tiny) -> None:
    tiny.add("a", "b")
    unlabelled = tiny.data.with_name(f"{tiny.data.name}_un")
    unlabelled.mkdir()
    for number, case in enumerate("uv"):
        write_case(unlabelled, case, seed=number)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_two_epochs_are_trained_and_saved(tiny, name, precision):
    write_cases(tiny)
    settings = settings_of(tiny, name)
    common = {"num_epochs": 2, "iterations_per_epoch": 2, "validation_iterations": 1, "cuda_precision": precision}
    trainer = on_the_gpu(tiny, name, **common, **settings)
    trainer.run_training()
    losses = np.array(trainer.logger.get_value("train_losses", step=None), float)
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())
    assert next(trainer.network.parameters()).device.type == DEVICE.type
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_the_first_loss_is_the_cpus_but_for_half_precision(tiny, name):
    write_cases(tiny)
    settings = settings_of(tiny, name)  # once: a teacher is made of it
    common = {"num_epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1, "seed": 3}
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        trainer = on_the_gpu(tiny, name, device, **common, **settings)
        trainer.run_training()
        losses.append(float(trainer.logger.get_value("train_losses", step=0)))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
