"""``members.start=member``: every generation of students goes on from the weights of the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import do_all, phantom, started

from nnunet_flare.errors import InputError


def test_each_generation_starts_from_the_weights_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=0)
    settings = {"rounds": "2", "members.start": "member"}
    run = started(tmp_path, folders, "noisy_student", settings)
    do_all(run, monkeypatch)
    kinds = {each.number: each.kind for each in run.rounds}
    assert "self-training" in kinds.values()
    for number, kind in kinds.items():
        (folder,) = run.round(number).model.glob("fold_*")
        (log,) = folder.glob("training_log_*.txt")
        before = run.round(number - 1).model / "fold_all" / "checkpoint_final.pth" if number else None
        goes_on = kind == "self-training"
        assert ("Started from the weights of" in log.read_text()) == goes_on
        assert not goes_on or f"Started from the weights of {before}" in log.read_text()


def test_several_members_of_one_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = phantom(tmp_path, monkeypatch, labelled=2, unlabelled=1, test=0)
    with pytest.raises(InputError, match="would agree because they all started from the same network"):
        started(tmp_path, folders, "uncertainty", {"members.start": "member"})
