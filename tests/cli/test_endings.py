"""How commands end: with where they wrote and what comes next, and after Ctrl-C with how to go on."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from nnunet_flare.cli import common, evaluate, predict, pseudolabel, terminal
from nnunet_flare.images import Volume, write_labels


def interrupt(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["run", "preprocess"])
def test_after_ctrl_c_a_run_says_that_the_same_command_goes_on(monkeypatch, capsys, command):
    monkeypatch.setattr(pseudolabel.run, command, interrupt)
    assert pseudolabel.main([command, "-d", "1", "-u", "x"]) == 130
    assert capsys.readouterr().err == (
        "flare-pseudolabel: interrupted; finished work is kept; the same command goes on from there\n"
    )


def test_after_ctrl_c_a_prediction_names_the_option_that_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(predict, "_run", interrupt)
    assert predict.main(["-i", "x", "-o", "y", "-m", "z"]) == 130
    assert "the same command with --continue_prediction goes on" in capsys.readouterr().err


def test_after_ctrl_c_other_commands_start_again(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_evaluate", interrupt)
    assert evaluate.main(["-ref", "x", "-pred", "y", "-o", "z.csv"]) == 130
    assert "interrupted; the same command starts again" in capsys.readouterr().err


def test_scores_end_with_the_files_and_the_next_command(tmp_path, capsys):
    array = np.zeros((6, 12, 12), np.uint8)
    array[1:5, 2:9, 2:9] = 1
    write_labels(tmp_path / "maps" / "a.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    maps, out = str(tmp_path / "maps"), tmp_path / "s.csv"
    assert evaluate.main(["-ref", maps, "-pred", maps, "-o", str(out), "-np", "1"]) == 0
    written, following = capsys.readouterr().out.splitlines()[-2:]
    names = [out, tmp_path / "s_summary.csv", tmp_path / "s.json", tmp_path / "s.png"]
    assert written == f"written: {', '.join(map(str, names))}" and all(name.is_file() for name in names)
    assert following.startswith(f"next: flare-evaluate --compare {out} OTHER.csv -o compared.csv")


def test_the_next_command_can_be_copied_from_a_narrow_terminal(monkeypatch, capsys):
    command = "flare-pseudolabel status -o /a/rather/long/folder/of/a/run/that/is/no/word"
    monkeypatch.setattr(terminal, "columns", lambda: 60)
    terminal.next_step(command, "the state")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "next, the state:" and all(line.endswith(" \\") for line in lines[:-1])
    assert " ".join("\n".join(lines).replace("\\\n", " ").split()) == command
    monkeypatch.setattr(terminal, "columns", lambda: None)
    terminal.next_step(command, "the state")
    assert capsys.readouterr().out == f"next: {command}  (the state)\n"


def test_what_stock_nnunet_prints_is_kept_for_those_who_ask(capsys, caplog):
    caplog.set_level(logging.DEBUG, logger="nnunet_flare")
    with common.quiet_stock():
        print("{'data_identifier': 'nnUNetPlans_3d_fullres', ...}")
    assert capsys.readouterr().out == ""
    assert "data_identifier" in caplog.text and caplog.records[0].levelno == logging.DEBUG
