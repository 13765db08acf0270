"""What a step moves to the device: every tensor of a batch once, counted without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from nnunet_flare.files import write_json


class CountedMoves(TorchFunctionMode):
    """Takes the CPU for a device: ``to`` of a tensor that is not there yet copies it and is counted, in voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.there: list[torch.Tensor] = []
        self.moved: list[tuple[int, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [part for part in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "to" and torch.device("cpu") in args:
            if any(args[0] is tensor for tensor in self.there):
                return result
            self.moved.append((args[0].numel(), bool(kwargs.get("non_blocking"))))
            result = args[0].clone()
            self.there.append(result)
        elif isinstance(result, torch.Tensor) and any(t is part for t in self.there for part in tensors):
            self.there.append(result)
        return result


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    tiny.add("a", "b")
    return tiny


def teacher_of(data: Any) -> Path:
    trained = data.trainer(name="nnUNetTrainer", results="teachers")
    trained.initialize()
    base = Path(trained.output_folder_base)
    write_json(base / "plans.json", data.plans)
    write_json(base / "dataset.json", data.dataset_json)
    trained.save_checkpoint(str(Path(trained.output_folder, "checkpoint_final.pth")))
    return base


def batch_of(samples: int, *, channels: int = 1, levels: int = 2) -> dict[str, Any]:
    target = torch.randint(0, 3, (samples, 1, 8, 16, 16)).to(torch.int16)
    data = torch.randn(samples, channels, 8, 16, 16)
    full = [target, target[..., ::2, ::2]][:levels]
    return {"data": data, "target": full if levels > 1 else target, "keys": np.array(["a", "b"][:samples])}


VOXELS = 8 * 16 * 16
LABELLED = [2 * VOXELS, 2 * VOXELS, 2 * VOXELS // 4]
"""Image and both targets of a batch of two."""


@pytest.mark.parametrize(
    ("name", "settings", "levels", "stream", "expected"),
    [
        ("nnUNetTrainerFlareST", {}, 2, 0, LABELLED),
        ("nnUNetTrainerFlareSelective", {}, 1, 0, LABELLED[:2]),
        ("nnUNetTrainerFlareDistill", {"teacher": {}}, 2, 0, LABELLED),
        (
            "nnUNetTrainerFlareAdversarial",
            {"adversarial": {"warmup": 0, "finish": 0, "discriminator_features": 2}},
            1,
            1,
            [*LABELLED[:2], VOXELS],
        ),
        ("nnUNetTrainerFlareMeanTeacher", {}, 2, 2, [2 * VOXELS, *LABELLED]),
    ],
)
def test_a_training_step_moves_each_tensor_once_without_waiting(
    data: Any, name: str, settings: dict, levels: int, stream: int, expected: list[int]
) -> None:
    if "teacher" in settings:
        settings = {"teacher": {"folder": str(teacher_of(data))}}
    trainer = data.trainer(name=name, num_epochs=1, **settings)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.network.train()
    trainer.dataloader_unlabelled = iter([batch_of(1, channels=stream)] if stream else [])
    batch = batch_of(2, levels=levels)
    with CountedMoves() as counted:
        trainer.train_step(batch)
    large = [moved for moved in counted.moved if moved[0] >= VOXELS // 4]  # no scalars
    assert sorted(size for size, _ in large) == sorted(expected)
    assert all(without_waiting for _, without_waiting in large)
