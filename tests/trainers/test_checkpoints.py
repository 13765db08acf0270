"""Checkpoints are whole or absent; a broken one is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunet_flare.errors import InputError
from nnunet_flare.trainers.checkpoints import (
    newest_good,
    read_to_resume,
    remove_leftovers,
    written_whole,
)


def save(path: Path, epoch: int) -> None:
    keys = ("network_weights", "optimizer_state", "logging", "init_args")
    torch.save({**{key: {} for key in keys}, "current_epoch": epoch}, path)


def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    path.write_text("the previous one")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "the previous one"
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "the previous one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint_latest.pth"]
    assert path.read_text() == "new"


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123-checkpoint_latest.pth").write_text("half")
    save(tmp_path / "checkpoint_latest.pth", 3)
    remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "flipped", "no checkpoint"])
def test_a_broken_checkpoint_is_recognised(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    weights = {"network_weights": {"w": torch.arange(5000.0)}}
    torch.save({**weights, "optimizer_state": {}, "logging": {}, "init_args": {}, "current_epoch": 4}, path)
    whole = path.read_bytes()
    at = whole.index(torch.arange(5000.0).numpy().tobytes()) + 2000
    changed = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "garbage": b"not a checkpoint" * 100,
        "flipped": whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :],
    }
    if damage == "no checkpoint":
        torch.save({"current_epoch": 4}, path)
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(InputError, match="checkpoint_latest"):
        read_to_resume(path)


def test_the_newest_good_checkpoint_has_most_epochs(tmp_path: Path) -> None:
    for name, epoch in (("best", 3), ("1of3", 5), ("2of3", 4)):
        save(tmp_path / f"checkpoint_{name}.pth", epoch)
    latest = tmp_path / "checkpoint_latest.pth"
    latest.write_bytes(b"")
    assert newest_good(tmp_path, besides=latest) == tmp_path / "checkpoint_1of3.pth"
    assert newest_good(tmp_path, besides=tmp_path / "checkpoint_1of3.pth") == tmp_path / "checkpoint_2of3.pth"


def test_no_good_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path, besides=tmp_path / "checkpoint_latest.pth") is None
