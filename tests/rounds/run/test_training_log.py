"""What a training's log says of its epochs, as stock nnU-Net and our trainers write it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nnunet_flare.rounds.run.training_log import epoch_seconds, read_epochs

OURS = """
2026-11-26 11:36:41.735503: Weights of the classes in the cross-entropy: [0.059, 0.242]
2026-11-26 11:36:41.773954: Epoch {number}
2026-11-26 11:36:41.774087: Current learning rate: 0.01
2026-11-26 11:36:42.143021: train_loss {loss}
2026-11-26 11:36:42.143112: val_loss 2.9271
2026-11-26 11:36:42.143184: Pseudo dice [{dice}, nan, {dice}]
2026-11-26 11:36:42.143356: labelled_loss 9.9
2026-11-26 11:36:42.143425: Epoch time: {seconds} s
2026-11-26 11:36:42.143474: New best EMA pseudo Dice: 0.0081
"""


def write(folder: Path, name: str, *epochs: tuple[int, float, float, float], tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [OURS.format(number=n, loss=loss, dice=dice, seconds=s) for n, loss, dice, s in epochs]
    (folder / f"training_log_{name}.txt").write_text("".join(parts) + tail)


def test_epochs_have_losses_moving_dice_and_time(tmp_path):
    write(tmp_path, "1", (0, 1.5, 0.2, 80.0), (1, 0.5, 0.4, 60.0))
    first, second = read_epochs(tmp_path)
    assert (first.number, first.train_loss, first.val_loss, first.seconds) == (0, 1.5, 2.9271, 80.0)
    assert (first.dice, first.moving_dice) == pytest.approx((0.2, 0.2))
    assert (second.dice, second.moving_dice) == pytest.approx((0.4, 0.9 * 0.2 + 0.1 * 0.4))


def test_stocks_numbers_are_read_as_well(tmp_path):
    text = (
        "2026-11-26 11:36:41.773954:  \n2026-11-26 11:36:41.773954: Epoch 0 \n"
        "2026-11-26 11:36:42.143021: train_loss -0.2345 \n2026-11-26 11:36:42.143112: val_loss -0.5 \n"
        "2026-11-26 11:36:42.143184: Pseudo dice [np.float32(0.5), np.float64(0.25)] \n"
        "2026-11-26 11:36:42.143425: Epoch time: 12.34 s \n"
    )
    (tmp_path / "training_log_1.txt").write_text(text)
    (epoch,) = read_epochs(tmp_path)
    assert (epoch.train_loss, epoch.val_loss, epoch.dice, epoch.seconds) == (-0.2345, -0.5, 0.375, 12.34)


def test_an_epoch_that_is_not_over_does_not_count(tmp_path):
    write(
        tmp_path, "1", (0, 1.0, 0.1, 5.0), tail="2026-11-26 11:36:41.7: Epoch 1 \n2026-11-26 11:36:41.8: train_loss 3"
    )
    assert [epoch.number for epoch in read_epochs(tmp_path)] == [0]


def test_logs_are_read_by_date_and_not_by_letter(tmp_path):
    for name, first in (("2026_9_30_23_50_07", 0), ("2026_10_1_08_00_00", 2), ("2026_10_12_09_00_00", 4)):
        write(tmp_path, name, *((number, 1.0, 0.1, 5.0) for number in (first, first + 1)))
    assert [epoch.number for epoch in read_epochs(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_continued_training_counts_from_its_checkpoint(tmp_path):
    write(tmp_path, "1", (0, 1.0, 0.1, 5.0), (1, 0.9, 0.2, 5.0), (2, 0.8, 0.3, 5.0))
    write(tmp_path, "2", (1, 0.7, 0.25, 6.0))
    assert [(epoch.number, epoch.train_loss) for epoch in read_epochs(tmp_path)] == [(0, 1.0), (1, 0.7)]


def test_a_training_without_validation_cases_has_no_dice(tmp_path):
    write(tmp_path, "1", (0, 1.0, math.nan, 5.0))
    assert math.isnan(read_epochs(tmp_path)[0].moving_dice)


def test_a_log_that_grows_is_read_again(tmp_path):
    write(tmp_path, "1", (0, 1.0, 0.1, 5.0))
    assert len(read_epochs(tmp_path)) == 1
    write(tmp_path, "1", (0, 1.0, 0.1, 5.0), (1, 1.0, 0.1, 5.0))
    assert len(read_epochs(tmp_path)) == 2


def test_a_slow_start_does_not_count_for_ever(tmp_path):
    write(tmp_path, "1", (0, 1.0, 0.1, 500.0), *((n, 1.0, 0.1, 5.0) for n in range(1, 6)))
    assert epoch_seconds(read_epochs(tmp_path)) == 5.0
    assert epoch_seconds([]) is None
