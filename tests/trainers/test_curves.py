"""Our own curves are seen where stock's are: in progress.png and, where it is switched on, in Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.training.logging import nnunet_logger
from PIL import Image

from nnunet_flare.trainers.curves import add_panels

TRUE = [f"true{number}" for number in range(3)]
PSEUDO = [f"pseudo{number}" for number in range(3)]
STOCK = (300, 200)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small progress.png, red all over."""
    Image.new("RGB", STOCK, "red").save(tmp_path / "progress.png")
    return tmp_path / "progress.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(panel: np.ndarray) -> int:
    """Pixels that are neither grey nor white: those of the curves."""
    return int(((panel.max(axis=-1) - panel.min(axis=-1)) > 60).sum())


def test_losses_and_shares_get_a_panel_each_below_stocks(picture: Path) -> None:
    add_panels(picture, {"pseudo_loss": [3, 2, 1], "discriminator_loss": [1, 1, 2], "pseudo_share": [0.1, 0.2, 0.3]})
    drawn = pixels(picture)
    assert drawn.shape == (STOCK[1] + 2 * 1800, 3000, 3)
    assert (drawn[: STOCK[1], : STOCK[0]] == (255, 0, 0)).all()  # stock's part is as it was
    losses, shares = drawn[STOCK[1] : STOCK[1] + 1800], drawn[STOCK[1] + 1800 :]
    assert coloured(losses) > 1.5 * coloured(shares) > 0  # two curves, one curve


def test_epochs_without_a_number_leave_a_gap_and_empty_curves_nothing(picture: Path) -> None:
    nothing = float("nan")
    add_panels(picture, {"discriminator_loss": [nothing, 1.0, 2.0], "winner_score": [nothing] * 3})
    assert pixels(picture).shape[0] == STOCK[1] + 1800
    before = picture.read_bytes()
    add_panels(picture, {"discriminator_loss": [nothing], "pseudo_share": []})
    assert picture.read_bytes() == before


def test_a_single_epoch_is_seen(picture: Path) -> None:
    add_panels(picture, {"pseudo_share": [0.5]})
    assert coloured(pixels(picture)[STOCK[1] :]) > 50


def train(tiny: Any, **settings: Any) -> Any:
    tiny.add(*TRUE, *PSEUDO)
    tiny.table(dict.fromkeys(PSEUDO, "pseudo"))
    options = {"num_epochs": 2, "iterations_per_epoch": 2, "final_validation": False, "labelled_to_pseudo": [1, 1]}
    trainer = tiny.trainer(**{**options, **settings})
    trainer.run_training()
    return trainer


def test_a_training_draws_its_own_curves_into_progress_png(tiny: Any) -> None:
    def stock(self: Any, folder: str) -> None:  # stock's own drawing takes seconds
        Image.new("RGB", STOCK, "red").save(Path(folder, "progress.png"))

    tiny.environment.setattr(nnunet_logger.LocalLogger, "plot_progress_png", stock)
    trainer = train(tiny)
    assert pixels(Path(trainer.output_folder, "progress.png")).shape[0] > STOCK[1] + 1000


class FakeWandb:
    """Stands in for the wandb package: keeps what nnU-Net's logger sends."""

    def __init__(self) -> None:
        self.sent: dict[str, dict[int, Any]] = {}
        config = SimpleNamespace(update=lambda *_: None)
        self.run = SimpleNamespace(config=config, step=0, summary={}, log=self.log)

    def init(self, **_: Any) -> Any:
        return self.run

    def log(self, values: dict[str, Any], step: int) -> None:
        for key, value in values.items():
            self.sent.setdefault(key, {})[step] = value


def test_weights_and_biases_gets_every_curve_once_an_epoch(tiny: Any) -> None:
    wandb = FakeWandb()
    tiny.environment.setattr(nnunet_logger, "wandb", wandb)
    tiny.environment.setenv("nnUNet_wandb_enabled", "1")
    trainer = train(tiny)
    assert trainer.curves
    for curve in ("train_losses", *trainer.curves):
        assert list(wandb.sent[curve]) == [0, 1], curve
        assert list(wandb.sent[curve].values()) == pytest.approx(
            trainer.logger.get_value(curve, step=None), nan_ok=True
        )


@pytest.mark.parametrize("error", [RuntimeError("no font family was found"), OSError(28, "No space left on device")])
def test_a_picture_that_cannot_be_drawn_ends_no_training(tmp_path, error):
    from nnunet_flare.trainers.base import FlareTrainer

    def fail(folder):
        raise error

    said: list[str] = []
    trainer = SimpleNamespace(
        logger=SimpleNamespace(plot_progress_png=fail), output_folder=str(tmp_path), print_to_log_file=said.append
    )
    FlareTrainer.plot_progress(trainer)
    assert said == [f"progress.png was not drawn ({type(error).__name__}: {error})"]
