"""The curves labelled_loss and pseudo_loss: the loss on the labels of either kind of samples, in every trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def data(tiny: Any, one_thread: None) -> Any:
    tiny.add("true0", "true1", "pseudo0", "pseudo1")
    tiny.table({"pseudo0": "pseudo", "pseudo1": "pseudo"})
    return tiny


def started(data: Any, name: str = "nnUNetTrainerFlareST", **settings: Any) -> Any:
    trainer = data.trainer(name=name, **settings)
    torch.manual_seed(0)
    trainer.initialize()
    trainer.get_tr_and_val_datasets()
    trainer.lr_scheduler.step(0)
    return trainer


def batch_of(*keys: str) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(5)
    data = torch.randn((len(keys), 1, 8, 16, 16), generator=stream)
    target = torch.randint(0, 3, (len(keys), 1, 8, 16, 16), generator=stream).to(torch.int16)
    return {"data": data, "target": [target, target[..., ::2, ::2]], "keys": np.array(keys)}


def losses_before(trainer: Any, batch: dict[str, Any]) -> list[float]:
    """Each sample's own loss before the step."""
    with torch.no_grad():
        output = trainer.network(batch["data"])
        return [
            trainer.loss([o[k : k + 1] for o in output], [t[k : k + 1] for t in batch["target"]]).item()
            for k in range(len(batch["keys"]))
        ]


def test_a_mixed_batch_has_a_loss_of_each_kind(data: Any) -> None:
    trainer = started(data)
    batch = batch_of("true0", "pseudo1")
    expected = losses_before(trainer, batch)
    result = trainer.train_step(batch)
    assert [result["labelled_loss"], result["pseudo_loss"]] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_one_kind_has_its_loss_alone(data: Any) -> None:
    trainer = started(data)
    result = trainer.train_step(batch_of("true0", "true1"))
    assert result["labelled_loss"] == float(result["loss"]) and np.isnan(result["pseudo_loss"])
    result = trainer.train_step(batch_of("pseudo0", "pseudo1"))
    assert result["pseudo_loss"] == float(result["loss"]) and np.isnan(result["labelled_loss"])


def test_partial_cases_count_as_labelled_on_their_annotated_organs(data: Any) -> None:
    data.table({"true0": {"role": "partial", "annotated": [1]}, "pseudo1": "pseudo"})
    batch = batch_of("true0", "pseudo1")
    marginal = started(data, name="nnUNetTrainerFlarePartial").train_step(batch)
    plain = started(data).train_step(batch)
    assert marginal["pseudo_loss"] == pytest.approx(plain["pseudo_loss"], rel=1e-5)
    assert marginal["labelled_loss"] != pytest.approx(plain["labelled_loss"], rel=1e-2)


def test_what_a_teacher_adds_is_no_loss_on_labels(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_flare.trainers import distillation

    trainer = distillation.nnUNetTrainerFlareDistill
    batch = batch_of("true0", "true1")
    plain = started(data).train_step(batch)
    monkeypatch.setattr(trainer, "initialize", lambda self: super(trainer, self).initialize())
    monkeypatch.setattr(trainer, "_taught", lambda self, batch: torch.zeros(1))
    monkeypatch.setattr(distillation, "soft_loss", lambda *_: torch.tensor(100.0))
    teacher = {"folder": "none is opened", "weight": 0.25}
    taught = started(data, name="nnUNetTrainerFlareDistill", teacher=teacher).train_step(batch)
    assert float(taught["loss"]) == pytest.approx(0.75 * float(plain["loss"]) + 25, rel=1e-5)
    assert taught["labelled_loss"] == pytest.approx(plain["labelled_loss"], rel=1e-4)


def test_mixed_batches_are_looked_at_once_in_ten(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started(data)
    counted: list[int] = []
    loss = trainer.loss_on_labels
    monkeypatch.setattr(trainer, "loss_on_labels", lambda *given: (counted.append(trainer._iteration), loss(*given))[1])
    results = [trainer.train_step(batch_of("true0", "pseudo1")) for _ in range(11)]
    assert [counted.count(iteration) for iteration in range(1, 12)] == [3, *[1] * 9, 3]
    assert [not np.isnan(result["pseudo_loss"]) for result in results] == [True, *[False] * 9, True]


def test_an_epoch_has_the_mean_over_the_samples_that_had_a_loss(data: Any) -> None:
    trainer = started(data)
    trainer._samples = {}
    nan = float("nan")
    outputs = [
        {"loss": np.float32(1), "labelled_loss": 1.0, "pseudo_loss": nan},
        {"loss": np.float32(1), "labelled_loss": 2.0, "pseudo_loss": nan},
        {"loss": np.float32(1), "labelled_loss": nan, "pseudo_loss": nan},
    ]
    trainer.on_train_epoch_end(outputs)
    assert trainer.logger.get_value("labelled_loss", step=0) == 1.5
    assert np.isnan(trainer.logger.get_value("pseudo_loss", step=0))


def test_processes_that_share_a_batch_dice_do_not_wait_for_each_other(data: Any) -> None:
    """Where one process has a mixed batch and another has not, an extra loss would wait for ever."""
    trainer = started(data)
    trainer.is_ddp = True
    trainer.configuration_manager.configuration["batch_dice"] = True
    batch = batch_of("true0", "pseudo1")
    with torch.no_grad():
        output = trainer.network(batch["data"])
    values = trainer.watched(output, batch["target"], batch, torch.tensor(1.0))
    assert np.isnan(list(values.values())).all()
