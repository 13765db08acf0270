"""``nnUNetTrainerFlareST_<N>epochs`` is one class, found by stock nnU-Net and by spawned workers."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_flare.trainers import self_training
from nnunet_flare.trainers.self_training import nnUNetTrainerFlareST


def test_a_length_by_name_is_one_class_however_it_is_found() -> None:
    found = self_training.nnUNetTrainerFlareST_17epochs  # type: ignore[attr-defined]
    assert found is self_training.nnUNetTrainerFlareST_17epochs  # type: ignore[attr-defined]
    assert found is recursive_find_trainer_class_by_name("nnUNetTrainerFlareST_17epochs")
    assert issubclass(found, nnUNetTrainerFlareST)
    assert (found.__name__, found.epochs_by_name) == ("nnUNetTrainerFlareST_17epochs", 17)
    assert pickle.loads(pickle.dumps(found)) is found


def test_the_constructor_is_stocks() -> None:
    """nnU-Net reads the parameters' names to write them into checkpoints."""
    stock = inspect.signature(nnUNetTrainer.__init__)
    for ours in (nnUNetTrainerFlareST, self_training.nnUNetTrainerFlareST_3epochs):  # type: ignore[attr-defined]
        assert list(inspect.signature(ours.__init__).parameters) == list(stock.parameters)


def name_and_epochs(trainer: type) -> tuple[str, int]:
    return trainer.__name__, trainer.epochs_by_name  # type: ignore[attr-defined]


def test_a_spawned_worker_unpickles_the_class() -> None:
    trainer = self_training.nnUNetTrainerFlareST_23epochs  # type: ignore[attr-defined]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(name_and_epochs, (trainer,)) == ("nnUNetTrainerFlareST_23epochs", 23)


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerFlareST_0epochs",
        "nnUNetTrainerFlareST_05epochs",
        "nnUNetTrainerFlareST_epochs",
        "nnUNetTrainerFlareST_5epochs_6epochs",
        "nnUNetTrainerOther_5epochs",
        "FlareTrainer_x",
        "losses_5epochs",
    ],
)
def test_other_names_are_no_attributes(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(self_training, name)
