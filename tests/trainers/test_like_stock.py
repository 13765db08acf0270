"""Without a case table and without settings, nnUNetTrainerFlareST trains like nnUNetTrainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

CASES = [f"case{k}" for k in range(6)]


def seeded_pair(tiny: Any, **keywords: Any) -> tuple[Any, Any]:
    """A stock trainer and ours with the same initial weights."""
    pair = []
    for name in ("nnUNetTrainer", "nnUNetTrainerFlareST"):
        trainer = tiny.trainer(name=name, **keywords)
        torch.manual_seed(0)
        trainer.initialize()
        pair.append(trainer)
    return pair[0], pair[1]


def next_batches(loaders: tuple[Any, Any]) -> list[dict]:
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    return [next(loader) for loader in loaders]


@pytest.fixture(autouse=True)
def one_thread_always(one_thread: None) -> None:
    """Sums over threads differ in their last digits."""


def test_the_numbers_of_a_training_are_stocks(tiny: Any) -> None:
    tiny.add(*CASES)
    stock, ours = seeded_pair(tiny)
    for attribute in (
        "num_epochs",
        "num_iterations_per_epoch",
        "num_val_iterations_per_epoch",
        "initial_lr",
        "weight_decay",
        "oversample_foreground_percent",
        "probabilistic_oversampling",
        "enable_deep_supervision",
        "batch_size",
    ):
        assert getattr(ours, attribute) == getattr(stock, attribute), attribute
    assert type(ours.optimizer) is type(stock.optimizer)
    assert ours.optimizer.defaults == stock.optimizer.defaults
    assert str(ours.loss) == str(stock.loss)


class ScaledLoss(torch.nn.Module):
    """A loss times a number."""

    def __init__(self, loss: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self.loss, self.scale = loss, scale

    def forward(self, *args: Any) -> torch.Tensor:
        scaled: torch.Tensor = self.loss(*args) * self.scale
        return scaled


@pytest.mark.parametrize("fold", [0, 3, 6, "all"])
def test_the_folds_are_stocks(tiny: Any, fold: int | str) -> None:
    tiny.add(*CASES)
    stock, ours = tiny.trainer(name="nnUNetTrainer", fold=fold), tiny.trainer(fold=fold)
    splits_file = tiny.folder / "splits_final.json"
    expected = [sorted(map(str, part)) for part in stock.do_split()]
    written = splits_file.read_text() if splits_file.exists() else None
    splits_file.unlink(missing_ok=True)
    assert [sorted(part) for part in ours.do_split()] == expected
    if written is not None:
        assert splits_file.read_text().split() == written.split()


def test_batches_are_stocks(tiny: Any) -> None:
    tiny.add(*CASES)
    stock, ours = seeded_pair(tiny)
    for trainer in (stock, ours):
        trainer.loaders = trainer.get_dataloaders()
    for stock_batch, our_batch in zip(next_batches(stock.loaders), next_batches(ours.loaders), strict=True):
        assert list(stock_batch["keys"]) == list(our_batch["keys"])
        assert torch.equal(stock_batch["data"], our_batch["data"])
        for stock_target, our_target in zip(stock_batch["target"], our_batch["target"], strict=True):
            assert torch.equal(stock_target, our_target)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["small gradients", "gradients that are clipped"])
def test_training_and_validation_steps_are_stocks(tiny: Any, scale: float) -> None:
    tiny.add(*CASES)
    stock, ours = seeded_pair(tiny)
    batch, validation_batch = next_batches(ours.get_dataloaders())
    losses = []
    for trainer in (stock, ours):
        trainer.loss = ScaledLoss(trainer.loss, scale)
        trainer.network.train()
        trainer.lr_scheduler.step(3)
        losses.append([trainer.train_step(batch)["loss"].item() for _ in range(3)])
    assert losses[0] == losses[1]
    for (name, weight), other in zip(stock.network.named_parameters(), ours.network.parameters(), strict=True):
        assert torch.equal(weight, other), name
    with torch.no_grad():
        stock_output, our_output = (trainer.validation_step(validation_batch) for trainer in (stock, ours))
    for key, value in stock_output.items():
        assert np.array_equal(value, our_output[key]), key


def test_region_based_validation_is_stocks(tiny: Any) -> None:
    tiny.dataset_json["labels"] = {"background": 0, "both": [1, 2], "spleen": 2}
    tiny.dataset_json["regions_class_order"] = [1, 2]
    tiny.add(*CASES)
    stock, ours = seeded_pair(tiny)
    _, batch = next_batches(ours.get_dataloaders())
    with torch.no_grad():
        stock_output, our_output = (trainer.validation_step(batch) for trainer in (stock, ours))
    for key, value in stock_output.items():
        assert np.array_equal(value, our_output[key]), key


def test_a_declared_ignore_label_is_treated_as_stock_does(tiny: Any) -> None:
    tiny.dataset_json["labels"] = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    tiny.add(*CASES)
    stock, ours = seeded_pair(tiny)
    stream = torch.Generator().manual_seed(0)
    data = torch.randn((2, 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 4, (2, 1, 8, 16, 16), generator=stream).to(torch.int16)
    targets = [target, target[..., ::2, ::2]]
    results = []
    for trainer in (stock, ours):
        with torch.no_grad():
            results.append(trainer.validation_step({"data": data, "target": [part.clone() for part in targets]}))
    for key, value in results[0].items():
        assert np.array_equal(value, results[1][key]), key
