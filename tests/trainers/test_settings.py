"""Settings under "flare" are validated, say where they are wrong, and default to stock nnU-Net's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.settings import TrainingSettings, checkpoint_epochs, read_settings, with_environment


def test_a_configuration_without_settings_has_the_class_defaults() -> None:
    assert read_settings({"patch_size": [1, 2, 3]}) == TrainingSettings()
    assert TrainingSettings().to_json() == {}


def test_settings_survive_the_way_through_the_plans() -> None:
    given = TrainingSettings(
        num_epochs=7,
        labelled_to_pseudo=(1, 3),
        checkpoints_at=(0.36, 0.66, 1.0),
        class_weights=(1.0, 2.5),
        augmentation={"labelled": "weak", "pseudo": "strong", "partial": "stock"},
        optimizer="AdamW",
        seed=0,
    )
    written = given.to_json()
    assert set(written) == {
        "num_epochs",
        "labelled_to_pseudo",
        "checkpoints_at",
        "class_weights",
        "augmentation",
        "optimizer",
        "seed",
    }
    assert read_settings({"flare": written}) == given


@pytest.mark.parametrize("iterations", [1, 4, 5, 250])
def test_validation_takes_a_fifth_of_the_iterations_but_at_least_one(iterations: int) -> None:
    settings = TrainingSettings(iterations_per_epoch=iterations)
    assert settings.num_validation_iterations == max(1, iterations // 5)
    assert TrainingSettings(iterations_per_epoch=iterations, validation_iterations=3).num_validation_iterations == 3


@pytest.mark.parametrize(
    ("settings", "path", "says"),
    [
        ({"num_epochs": 0}, "flare.num_epochs", "greater than or equal to 1"),
        ({"num_epochs": "5"}, "flare.num_epochs", "'5'"),
        ({"num_epoch": 5}, "flare.num_epoch", "unknown key, allowed are num_epochs"),
        (
            {"augmentation": {"pseudo": "hard"}},
            "flare.augmentation.pseudo",
            "'jitter', 'strong', 'shift' or 'modality'",
        ),
        (
            {"augmentation": {"unlabelled": "weak"}},
            "flare.augmentation.unlabelled",
            "allowed are labelled, pseudo, partial",
        ),
        ({"labelled_to_pseudo": [0, 0]}, "flare.labelled_to_pseudo", "above 0"),
        ({"labelled_to_pseudo": [1, 2, 3]}, "flare.labelled_to_pseudo", "at most 2 items"),
        ({"checkpoints_at": [0.5, 0.5]}, "flare.checkpoints_at", "increasing"),
        ({"checkpoints_at": [1.5]}, "flare.checkpoints_at.0", "less than or equal to 1"),
        ({"optimizer": "Lion"}, "flare.optimizer", "'SGD', 'Adam' or 'AdamW'"),
        ({"adversarial": {"warmup": 0.6, "finish": 0.5}}, "flare.adversarial", "leave some epochs between"),
        ({"adversarial": {"noise": 1}}, "flare.adversarial.noise", "allowed are unlabelled, unlabelled_batch_size"),
        ({"initial_lr": 0}, "flare.initial_lr", "greater than 0"),
        ({"initial_lr": float("nan")}, "flare.initial_lr", "finite"),
        ({"class_weights": "median"}, "flare.class_weights", "inverse-sqrt-frequency"),
        ({"patience": 3, "checkpoints_at": [0.5, 1.0]}, "patience 3", "give one of the two"),
        ({"patience": 0}, "flare.patience", "greater than or equal to 1"),
        ({"class_weights": [0, 0]}, "class_weights", "above 0"),
        ({"mirroring": 1}, "flare.mirroring", "boolean"),
        ({"seed": -1}, "flare.seed", "greater than or equal to 0"),
        ({"round": "r1"}, "flare.round", "integer"),
        ({"cpu_precision": "fp16"}, "flare.cpu_precision", "'fp32' or 'bf16'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(settings: dict[str, Any], path: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings({"flare": settings}, where="plans.json, configuration '3d_fullres'")
    assert str(error.value).startswith("plans.json, configuration '3d_fullres': ")
    assert path in str(error.value)
    assert says in str(error.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InputError, match="3 problem"):
        read_settings({"flare": {"num_epochs": 0, "initial_lr": -1, "colour": "blue"}})


@pytest.mark.parametrize("settings", [5, [1], "fast"])
def test_settings_must_be_an_object(settings: Any) -> None:
    with pytest.raises(InputError, match="must be an object"):
        read_settings({"flare": settings})


def test_the_variables_for_tests_win_over_the_settings() -> None:
    given = TrainingSettings(iterations_per_epoch=250, validation_iterations=99, seed=5)
    changed = with_environment(given, {"NNUNET_FLARE_ITERATIONS": "12", "NNUNET_FLARE_SEED": "0"})
    assert (changed.iterations_per_epoch, changed.num_validation_iterations, changed.seed) == (12, 2, 0)
    assert with_environment(given, {}) == given
    for variable, value in (("NNUNET_FLARE_ITERATIONS", "0"), ("NNUNET_FLARE_SEED", "x")):
        with pytest.raises(InputError, match=variable):
            with_environment(given, {variable: value})


@pytest.mark.parametrize(
    ("fractions", "epochs", "expected"),
    [
        (
            (0.36, 0.66, 1.0),
            1000,
            {"checkpoint_1of3.pth": 360, "checkpoint_2of3.pth": 660, "checkpoint_3of3.pth": 1000},
        ),
        ((0.36, 0.66, 1.0), 10, {"checkpoint_1of3.pth": 4, "checkpoint_2of3.pth": 7, "checkpoint_3of3.pth": 10}),
        ((0.07,), 100, {"checkpoint_1of1.pth": 7}),
        ((0.1, 0.2), 1, {"checkpoint_1of2.pth": 1, "checkpoint_2of2.pth": 1}),
        ((), 10, {}),
    ],
)
def test_checkpoints_are_kept_after_a_rounded_up_share_of_the_epochs(
    fractions: tuple[float, ...], epochs: int, expected: dict[str, int]
) -> None:
    assert checkpoint_epochs(fractions, epochs) == expected


def test_reading_settings_imports_no_torch() -> None:
    code = "import sys, nnunet_flare.trainers.settings; sys.exit('torch' in sys.modules or 'nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
