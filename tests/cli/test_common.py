"""What the commands share."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli import evaluate
from nnunet_flare.cli.common import run_command, seldom_collecting
from nnunet_flare.evaluation import plots
from nnunet_flare.images import Volume, write_labels


def test_the_garbage_collector_is_as_before_after_a_command():
    before = gc.get_threshold()
    with pytest.raises(KeyError), seldom_collecting():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before and gc.isenabled()


def test_a_program_that_ends_looks_through_nothing_that_it_made():
    code = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))  # runs after what is registered later
from nnunet_flare.cli.common import seldom_collecting
with seldom_collecting():
    kept = [[number] for number in range(10_000)]
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True"


# ------------------------------------------------------------------ standard streams


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Output waits in a buffer, as it does for people."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A folder of one label map."""
    folder = tmp_path_factory.mktemp("labels")
    array = np.zeros((6, 12, 12), np.uint8)
    array[1:5, 2:9, 2:9] = 1
    write_labels(folder / "a.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    return folder


def call(labels: Path, out: Path, streams: str) -> subprocess.CompletedProcess[str]:
    """Score the label map against itself in a process whose streams the shell closes."""
    words = f"{sys.executable} -m nnunet_flare.cli.evaluate -ref {labels} -pred {labels} -o {out} -np 1 {streams}"
    return subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False, env=BUFFERED)


@pytest.mark.parametrize("streams", ["2>&-", ">&-", "<&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_with_closed_streams_does_its_work_and_writes_into_no_file_of_ours(labels, tmp_path, streams):
    done = call(labels, tmp_path / "out.csv", streams)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written.keys() == {"out.csv", "out_summary.csv", "out.json", "out.png"}
    assert written["out.csv"].startswith(b"Name,Liver_DSC,") and written["out.csv"].count(b"\n") == 2
    assert written["out.png"].startswith(b"\x89PNG") and b"1 cases" not in b"".join(written.values())


@pytest.mark.parametrize("command", ["pseudolabel", "predict", "evaluate", "postprocess", "doctor"])
def test_wrong_usage_with_closed_streams_is_exit_code_2(command, tmp_path):
    code = f"import sys; from nnunet_flare.cli.{command} import main; sys.exit(main())"
    words = f"{sys.executable} -c '{code}' --no-such-option <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], check=False, cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_reader_keeps_its_exit_code(labels, tmp_path):
    assert call(labels / "missing", tmp_path / "out.csv", "2>&-").returncode == 2


def test_output_on_a_full_disk_is_said(labels, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = call(labels, tmp_path / "out.csv", "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("error: the output cannot be written: No space left on device\n")
    assert "Exception ignored" not in done.stderr and (tmp_path / "out.csv").is_file()


def test_a_reader_that_has_gone_changes_no_exit_code():
    code = """
import sys
from nnunet_flare.cli.common import run_command
def body():
    print("text")
    return 1
sys.exit(run_command("flare-x", body))
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_work_that_was_cut_short_because_its_reader_has_gone_is_no_success():
    """As a watching prediction whose lines go to a program that ended: scans may wait that nobody predicts."""
    code = """
import sys
from nnunet_flare.cli.common import run_command
def body():
    print("text", flush=True)
    print("done", file=sys.stderr)
    return 0
sys.exit(run_command("flare-x", body))
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_run_command_gives_the_code_of_its_body():
    assert [run_command("flare-x", lambda code=code: code) for code in (0, 1, 2)] == [0, 1, 2]


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("fault", ["no matplotlib", "no fonts"])
def test_a_plot_that_cannot_be_drawn_ends_no_evaluation_and_leaves_no_old_picture(
    labels, tmp_path, monkeypatch, capsys, fault
):
    def fail(*words):
        raise RuntimeError("no font\nfamily was found")

    if fault == "no fonts":
        monkeypatch.setattr(plots, "_save", fail)
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out.csv"
    out.with_suffix(".png").write_bytes(b"of an earlier call")
    words = ["-ref", str(labels), "-pred", str(labels), "-o", str(out), "-np", "1"]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr()
    assert "out.png was not drawn" in printed.err and "1 cases, official rules" in printed.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.json", "out_summary.csv"]
    other = tmp_path / "other.csv"
    other.write_bytes(out.read_bytes())
    assert evaluate.main(["--compare", str(out), str(other), "-o", str(tmp_path / "c.csv")]) == 0
    assert "c.png was not drawn" in capsys.readouterr().err and (tmp_path / "c.json").is_file()
    words = ["efficiency", "-o", str(tmp_path / "e.csv"), "--name", "x", "--", sys.executable, "-c", "pass"]
    assert evaluate.main(words) == 0
    assert "e_x.png was not drawn" in capsys.readouterr().err and (tmp_path / "e_x.json").is_file()
