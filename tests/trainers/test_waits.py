"""How often a training step waits for the GPU, and what goes over to it, on a pretended one, beside stock's step.

A wait ends what a GPU has to do: it stands still until the program has thought of more.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from pretend_gpu import gpu

from nnunet_flare.files import write_json

STOCK = "nnUNetTrainer"
SPATIAL = (8, 16, 16)


def teacher_of(tiny: Any) -> Path:
    trained = tiny.trainer(name=STOCK, results="teachers")
    trained.initialize()
    base = Path(trained.output_folder_base)
    write_json(base / "plans.json", tiny.plans)
    write_json(base / "dataset.json", tiny.dataset_json)
    trained.save_checkpoint(str(Path(trained.output_folder, "checkpoint_final.pth")))
    return base


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """As a loader's pinning thread leaves it."""
    for part in torch.utils._pytree.tree_leaves(batch):
        if isinstance(part, torch.Tensor):
            part.is_pinned_here = True
    return batch


def batch_of(trainer: Any, *keys: str, channels: int = 1) -> dict[str, Any]:
    target = torch.randint(0, 3, (len(keys), 1, *SPATIAL)).to(torch.int16)
    if trainer.label_manager.has_regions:
        target = torch.cat((target > 0, target == 2), dim=1)
        if trainer.label_manager.has_ignore_label:
            target = torch.cat((target, torch.zeros_like(target[:, :1])), dim=1)
    parts = [target, target[..., ::2, ::2].contiguous()] if trainer.enable_deep_supervision else target
    return pinned({"data": torch.randn(len(keys), channels, *SPATIAL), "target": parts, "keys": np.array(keys)})


def counted(tiny: Any, name: str, *keys: str, **settings: Any) -> Counter[str]:
    """What happened in a step after the first one, which makes optimizer states."""
    if name.endswith("Distill"):
        settings = {"teacher": {"folder": str(teacher_of(tiny))}, **settings}
    tiny.trainer(name=name, **settings)  # writes the settings
    dataset, plans = tiny.plans["dataset_name"], tiny.plans["plans_name"]
    with gpu() as card:
        trainer = get_trainer_from_args(dataset, "3d_fullres", "all", name, plans, False, torch.device("cuda"))
        trainer.initialize()
        trainer.get_tr_and_val_datasets()
        trainer.network.train()

        def step() -> dict[str, Any]:
            channels = 2 if name.endswith("MeanTeacher") else 1
            trainer.dataloader_unlabelled = iter([batch_of(trainer, "u", channels=channels)])
            found: dict[str, Any] = trainer.train_step(batch_of(trainer, *keys))
            return found

        step()
        before = card.counts.copy()
        trainer._iteration = 0  # of ten iterations one computes losses for the curves alone
        said = step()
        assert all(not isinstance(value, torch.Tensor) for value in said.values()) and np.isfinite(said["loss"])
        return card.counts - before


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    tiny.add("true", "pseudo", "some", "marked")
    tiny.table(
        {
            "true": "labelled",
            "pseudo": "pseudo",
            "some": {"role": "partial", "annotated": [1]},
            "marked": {"role": "partial", "annotated": [1], "positive": [2]},
        }
    )
    return tiny


ADVERSARIAL = {"adversarial": {"warmup": 0, "finish": 0, "discriminator_features": 2}}

COUNTS = {
    "stock": (STOCK, {}, ("true", "true"), (3, 1)),
    "labels": ("nnUNetTrainerFlareST", {}, ("true", "true"), (3, 1)),
    "labels, bf16": ("nnUNetTrainerFlareST", {"cuda_precision": "bf16"}, ("true", "true"), (3, 1)),
    "labels and pseudo-labels": ("nnUNetTrainerFlareST", {}, ("true", "pseudo"), (3, 1)),
    "some voxels ignored": ("nnUNetTrainerFlareST", {"ignore_label": 3}, ("true", "pseudo"), (3, 1)),
    "soft Dice": ("nnUNetTrainerFlareSelective", {}, ("true", "pseudo"), (2, 1)),
    "soft Dice with weights and ignored voxels": (
        "nnUNetTrainerFlareSelective",
        {"class_weights": [1.0, 2.0, 3.0], "ignore_label": 3},
        ("true", "pseudo"),
        (2, 1),
    ),
    "complete labels alone": ("nnUNetTrainerFlarePartial", {}, ("true", "true"), (3, 1)),
    "some organs": ("nnUNetTrainerFlarePartial", {}, ("true", "some"), (4, 1)),
    "some organs, some marked, some voxels ignored": (
        "nnUNetTrainerFlarePartial",
        {"ignore_label": 3},
        ("some", "marked"),
        (4, 1),
    ),
    "a teacher": ("nnUNetTrainerFlareDistill", {}, ("true", "true"), (3, 1)),
    "a discriminator": ("nnUNetTrainerFlareAdversarial", ADVERSARIAL, ("true", "true"), (3, 1)),
    "a mean teacher": ("nnUNetTrainerFlareMeanTeacher", {}, ("true", "true"), (4, 1)),
}
"""Trainer, settings, cases of a batch; uploads of a step (image, targets, unlabelled image, table) and downloads."""

WAITS = {"labels, bf16": 1, "a teacher": 3, "a discriminator": 4}
"""Of a step where it is not 2: for the loss, and for the gradient scaler, which bf16 needs none of. A teacher's scores
are looked at before they are learnt; beside a discriminator three steps of an optimizer are taken."""


REGIONS = {
    "labels": ("nnUNetTrainerFlareST", ("true", "true"), 3),
    "some organs": ("nnUNetTrainerFlarePartial", ("true", "some"), 4),
    "some organs, some marked": ("nnUNetTrainerFlarePartial", ("some", "marked"), 4),
    "a mean teacher": ("nnUNetTrainerFlareMeanTeacher", ("true", "true"), 4),
}


@pytest.mark.parametrize("what", REGIONS)
def test_regions_cost_no_further_wait(data: Any, what: str) -> None:
    name, keys, uploads = REGIONS[what]
    data.dataset_json["labels"] = {"background": 0, "both": [1, 2], "spleen": [2]}
    data.dataset_json["regions_class_order"] = [1, 2]
    found = counted(data, name, *keys)
    assert (found["waits"], found["uploads"], found["downloads"]) == (2, uploads, 1)


@pytest.mark.parametrize("what", COUNTS)
def test_a_step_waits_no_more_often_than_stocks(data: Any, what: str) -> None:
    name, settings, keys, (uploads, downloads) = COUNTS[what]
    if name.endswith("Adversarial"):
        data.table({"true": "labelled", "pseudo": "pseudo", "some": "unlabelled", "marked": "unlabelled"})
    found = counted(data, name, *keys, **settings)
    assert found["waits"] == WAITS.get(what, 2)
    assert (found["uploads"], found["downloads"]) == (uploads, downloads)
