"""Our own curves are seen where stock shows its own: progress.png, Weights and Biases, and our TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging import nnunet_logger
from PIL import Image

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.curves import add_panels
from nnunet_flare.trainers.tensorboard import TensorBoardLogger, is_enabled

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


class FakeWriter:
    """Stands in for TensorBoard's writer."""

    made: list[FakeWriter] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.texts, self.flushed = folder, purge_step, {}, 0
        self.sent: dict[str, dict[int, float]] = {}
        FakeWriter.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.sent.setdefault(key, {})[step] = value

    def add_text(self, key: str, text: str, step: int) -> None:
        self.texts[key] = text

    def flush(self) -> None:
        self.flushed += 1


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(FakeWriter, "made", [])
    return FakeWriter.made


def test_tensorboard_gets_every_curve_once_an_epoch(tiny: Any, writers: list[FakeWriter]) -> None:
    tiny.environment.setenv("nnUNet_tensorboard_enabled", "1")
    trainer = train(tiny)
    (writer,) = writers
    assert writer.folder == str(Path(trainer.output_folder, "tensorboard")) and "num_epochs" in writer.texts["config"]
    for curve in ("train_losses", "ema_fg_dice", *trainer.curves):
        assert list(writer.sent[curve]) == [0, 1], curve
        assert list(writer.sent[curve].values()) == pytest.approx(
            trainer.logger.get_value(curve, step=None), nan_ok=True
        )
    assert "dice_per_class_or_region/class_1" in writer.sent and writer.flushed >= 2
    assert all(0 < seconds < 600 for seconds in writer.sent["epoch_seconds"].values())


def test_tensorboard_of_a_training_that_goes_on_continues_its_curves(tmp_path, writers: list[FakeWriter]) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("earlier")
    TensorBoardLogger(tmp_path).log("train_losses", 0.5, 7)
    assert writers[0].purge_step == 7 and (tmp_path / "tensorboard" / "events").is_file()
    TensorBoardLogger(tmp_path).log("train_losses", 0.5, 0)
    assert not (tmp_path / "tensorboard").exists()


def test_a_validation_alone_keeps_the_curves_of_its_training(tiny: Any, writers: list[FakeWriter]) -> None:
    """``nnUNetv2_train --val`` makes a trainer that is not continued."""
    tiny.environment.setenv("nnUNet_tensorboard_enabled", "1")
    folder = Path(train(tiny).output_folder, "tensorboard")
    folder.mkdir()
    (folder / "events").write_text("of the training")
    trainer = tiny.trainer()
    maybe_load_checkpoint(trainer, continue_training=False, validation_only=True)
    trainer.logger.log_summary("final_val/foreground_dice", 0.5)
    assert (folder / "events").is_file()
    assert writers[1].sent == {"final_val/foreground_dice": {0: 0.5}}


def test_tensorboard_that_is_missing_or_asked_for_in_other_words_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'nnunet-flare\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)
    assert not is_enabled({}) and is_enabled({"nnUNet_tensorboard_enabled": "True"})
    with pytest.raises(InputError, match="found 'yes', expected 1 or 0"):
        is_enabled({"nnUNet_tensorboard_enabled": "yes"})


def test_tensorboard_itself_reads_what_was_written(tmp_path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    for epoch in range(3):
        logger.log("epoch_start_timestamps", 10.0 * epoch, epoch)
        logger.log("train_losses", 1.0 - epoch, epoch)
        logger.log("epoch_end_timestamps", 10.0 * epoch + 4, epoch)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_losses")] == [(0, 1.0), (1, 0.0), (2, -1.0)]
    assert [e.value for e in events.Scalars("epoch_seconds")] == [4.0, 4.0, 4.0]


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
