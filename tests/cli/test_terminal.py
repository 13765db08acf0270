"""What commands print: on a terminal of 80 columns, in a log file, and without colours."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

from nnunet_flare.cli import terminal
from nnunet_flare.files import write_json
from nnunet_flare.images import Volume, write_labels
from nnunet_flare.organs import FLARE22
from nnunet_flare.recipes.load import load_recipe
from nnunet_flare.rounds.run.ledger import Entry, write_round
from nnunet_flare.rounds.run.manifest import Run, create_run
from nnunet_flare.rounds.run.settings import RunSettings

COLUMNS = 80
LAST_LINES = (
    "epoch 3:  10%|# | 1/10\r\x1b[31mRuntimeError\x1b[0m: CUDA out of memory.\x07 Tried to allocate 20 MiB of 47"
)
"""A progress bar, a colour and a bell, as trainings leave them."""


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of two rounds: the first is judged, a training of the second has failed."""
    recipe = load_recipe("demo", {"rounds": "2"})
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    settings = RunSettings(
        name="look",
        dataset="Dataset022_Boxes",
        plans_name="plans",
        unlabelled_dir=str(tmp_path),
        recipe=recipe.model_dump(mode="json"),
        folders=folders,
        device="cpu",
        shards=1,
    )
    made = create_run(tmp_path / "run", settings, recipe)
    agreement = {organ.name: 0.5 for organ in FLARE22}
    entry = Entry(0, "case", "pseudo", "taken", "good", 0.5, 0.5, 0.5, agreement, {}, "m", "h", "s")
    write_round(made.paths, 0, [entry])
    for name in ("train-r0-f0", "train-r0-f1", "train-r0-f2", "label-r0-p0", "select-r0"):
        write_json(made.paths.done(name), {"task": name, "seconds": 3725.0})
    write_json(made.paths.failed("train-r1-f0"), {"task": "train-r1-f0", "exit_code": 1, "last_lines": LAST_LINES})
    return made


def on_terminal(*words: str, program: str = "pseudolabel", **variables: str) -> str:
    """What a command writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "TQDM_DISABLE")}
    command = [sys.executable, "-m", f"nnunet_flare.cli.{program}", *words]
    environment = {**inherited, "TERM": "xterm-256color", **variables}
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed: the command is done
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert child.wait() == 0, written.decode()
    return written.decode()


def in_file(path, *words: str) -> str:
    """What a command writes into a log file."""
    with open(path, "wb") as stream:
        command = [sys.executable, "-m", "nnunet_flare.cli.pseudolabel", *words]
        assert subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode == 0
    return path.read_text()


def shown_lines(written: str) -> list[str]:
    """The lines that stand on the screen at some time, without their colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", written))


def test_status_fits_a_terminal_of_80_columns_and_has_colours(run):
    written = on_terminal("status", "-o", str(run.root))
    lines = shown_lines(written)
    assert not [line for line in lines if breaks(line)]
    assert (
        "\x1b[32mdone\x1b[0m" in written and "\x1b[31mfailed\x1b[0m" in written and "\x1b[1;31mFAILED\x1b[0m" in written
    )
    header, first = (next(line for line in lines if line.startswith(word)) for word in ("round ", "r0 "))
    assert header.index("train") + len("train") == first.index("done") + len("done")  # colours move no column


def test_status_in_a_log_file_has_no_control_character(run, tmp_path):
    text = in_file(tmp_path / "log", "status", "-o", str(run.root))
    assert "CUDA out of memory" in text and "r0 " in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def breaks(line: str) -> bool:
    """Whether a terminal of 80 columns breaks a line within a word, though it could be broken between two."""
    return len(line) > COLUMNS and max(map(len, line.split())) + 6 <= COLUMNS  # indent, blank, backslash


def test_recipes_break_at_words_only():
    lines = shown_lines(on_terminal("recipes"))
    assert not [line for line in lines if breaks(line)]
    assert any(line.startswith("uncertainty") for line in lines) and lines[-2].startswith("next: ")


def test_scores_fit_a_terminal_of_80_columns(tmp_path):
    array = np.zeros((6, 12, 12), np.uint8)
    array[1:5, 2:9, 2:9] = 1
    for case in ("a_case_with_a_rather_long_name", "another_case_with_a_rather_long_name", "third"):
        write_labels(tmp_path / "maps" / f"{case}.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    folder = str(tmp_path / "maps")
    words = ("-ref", folder, "-pred", folder, "-o", str(tmp_path / "s.csv"), "-np", "1")
    lines = shown_lines(on_terminal(*words, program="evaluate"))
    assert not [line for line in lines if breaks(line)]
    assert any(line.split()[:2] == ["Liver", "1.0000"] for line in lines)
    assert any(line.split()[:2] == ["another_case_with_a_rather_long_name", "1.0000,"] for line in lines)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_gets_none(run, variables):
    assert "\x1b" not in on_terminal("status", "-o", str(run.root), **variables)


PHANTOM = ("--labelled", "1", "--unlabelled", "1", "--test", "1", "--size", "16", "24", "24")


def test_a_progress_bar_stays_on_one_line_of_80_columns(tmp_path):
    written = on_terminal("phantom", "-o", str(tmp_path / "data"), *PHANTOM)
    bars = [line for line in shown_lines(written) if line.startswith("phantom: ")]
    assert len(bars) > 1 and "100%" in bars[-1] and max(map(len, bars)) <= COLUMNS


def test_a_log_file_has_no_progress_bar(tmp_path):
    text = in_file(tmp_path / "log", "phantom", "-o", str(tmp_path / "data"), *PHANTOM)
    assert "%|" not in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_words_are_coloured_only_where_they_stand_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.show("done abandoned /failed/run failed")
    assert capsys.readouterr().out == "\x1b[32mdone\x1b[0m abandoned /failed/run \x1b[31mfailed\x1b[0m\n"


def test_long_lines_are_indented_to_their_text_and_paths_stay_whole():
    path = "/a/rather/long/path/" + "x" * 70
    assert terminal.wrapped(f"  problem  {path} holds no image that anybody could read", 40) == [
        "  problem",
        f"           {path}",
        "           holds no image that anybody",
        "           could read",
    ]
    assert terminal.wrapped("short", 40) == ["short"]
