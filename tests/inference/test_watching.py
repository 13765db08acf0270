"""``--watch``: scans as they come, in a real process; what counts as arrived, with a clock of the test's own."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.cli import predict
from nnunet_flare.cli.further_outputs import forms_of
from nnunet_flare.images import read_volume, write_volume
from nnunet_flare.inference.folder import predict_cases
from nnunet_flare.inference.inputs import InputCase, find_inputs
from nnunet_flare.inference.made_with import mark_in
from nnunet_flare.inference.watching import Arrivals

SMALL = (10, 36, 40)
PATIENCE_S = 120


class Server:
    """A ``flare-predict --watch`` process."""

    def __init__(self, model: Path, folder: Path, *options: object) -> None:
        words = ["--watch", folder / "in", "-o", folder / "out", "-m", model, "--json_lines", "--settle", 1]
        words += ["--backend", "torch", "--precision", "fp32", "-device", "cpu", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nnunet_flare.cli.predict", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._rest = b""

    def line(self) -> dict:
        """The next outcome."""
        end = time.monotonic() + PATIENCE_S
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not chunk:
                self.process.kill()
                raise AssertionError(self.process.stderr.read().decode())
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def end(self) -> tuple[int, list[dict]]:
        """SIGTERM; the exit code and the outcomes that were told until then."""
        self.process.send_signal(signal.SIGTERM)
        out, self.errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, [json.loads(line) for line in (self._rest + out).splitlines()]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model")


def test_scans_are_predicted_as_they_come_and_damaged_ones_are_left_until_they_change(model, tmp_path):
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "a_0000.nii.gz", scans.blobs(SMALL))
    whole = (tmp_path / "a_0000.nii.gz").read_bytes()
    with Server(model, tmp_path, "--statistics") as server:
        (tmp_path / "a_0000.nii.gz").rename(tmp_path / "in" / "a_0000.nii.gz")
        first = server.line()
        assert (first["case"], first["outcome"]) == ("a", "written")
        assert first["files"][0] == str(tmp_path / "out" / "a.nii.gz") and first["seconds"] > 0
        (tmp_path / "in" / "b_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
        half = server.line()
        assert (half["case"], half["outcome"]) == ("b", "set aside") and "truncated" in half["reason"]
        (tmp_path / "in" / "c_0000.nii.gz").write_bytes(whole)
        assert server.line()["case"] == "c"  # and not b again
        (tmp_path / "in" / "b_0000.nii.gz").write_bytes(whole)
        assert (again := server.line())["case"] == "b" and again["outcome"] == "written"
        code, rest = server.end()
    assert code == 0 and rest == []
    assert b"stopped on request" in server.errors
    expected = tmp_path / "expected"
    words = ["-i", tmp_path / "in" / "a_0000.nii.gz", "-o", expected, "-m", model, "-device", "cpu"]
    assert predict.main([str(w) for w in (*words, "--backend", "torch", "--precision", "fp32")]) == 0
    for name in "abc":
        found = read_volume(tmp_path / "out" / f"{name}.nii.gz").array
        np.testing.assert_array_equal(found, read_volume(expected / "a.nii.gz").array)
    rows = (tmp_path / "out" / "statistics.csv").read_text().splitlines()
    assert sorted({row.split(",")[0] for row in rows[1:]}) == ["a", "b", "c"]


def test_a_model_that_is_removed_while_the_server_runs_is_the_one_that_label_maps_name(model, tmp_path):
    """Its weights are in memory; the mark in the label maps is that of the files that they came from."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    write_volume(tmp_path / "a_0000.nii.gz", scans.blobs(SMALL))
    (tmp_path / "in").mkdir()
    for ending in ("nii.gz", "nrrd"):
        (tmp_path / "in" / f"twice_0000.{ending}").touch()
    with Server(copy, tmp_path) as server:
        assert "twice" in server.line()["case"], "it is ready when it tells what it does not take"
        shutil.rmtree(copy)
        (tmp_path / "a_0000.nii.gz").rename(tmp_path / "in" / "a_0000.nii.gz")
        while (told := server.line())["case"] != "a":
            assert told["outcome"] == "set aside"
        assert told["outcome"] == "written", told
        assert server.end()[0] == 0
    words = ["-i", tmp_path / "in" / "a_0000.nii.gz", "-o", tmp_path / "expected", "-m", model, "--backend", "torch"]
    assert predict.main(list(map(str, words))) == 0
    assert mark_in(tmp_path / "out" / "a.nii.gz") == mark_in(tmp_path / "expected" / "a.nii.gz") is not None


def test_it_ends_after_the_current_scan_and_goes_on_when_it_is_started_again(model, tmp_path):
    names = [f"scan{number}" for number in range(5)]
    for number, name in enumerate(names):
        write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", scans.blobs((14, 90, 90), seed=number))
    with Server(model, tmp_path, "-step_size", 0.3) as server:
        told = [server.line()]
        code, rest = server.end()
        told += rest
    assert code == 0
    done = {one["case"] for one in told}
    assert all(one["outcome"] == "written" for one in told)
    assert 1 <= len(done) < len(names)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(f"{name}.nii.gz" for name in done)
    before = {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in done}
    replaced = told[0]["case"]  # by another scan on the same grid, while nobody watches
    done.remove(replaced)
    old = read_volume(tmp_path / "out" / f"{replaced}.nii.gz").array
    del before[replaced]
    write_volume(tmp_path / "in" / f"{replaced}_0000.nii.gz", scans.blobs((14, 90, 90), seed=9))
    with Server(model, tmp_path) as server:
        again = [server.line() for _ in names]
        code, rest = server.end()
    assert code == 0 and rest == []
    assert {one["case"] for one in again if one["outcome"] == "already there"} == done
    assert {one["case"] for one in again if one["outcome"] == "written"} == set(names) - done
    assert before == {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in done}
    assert (read_volume(tmp_path / "out" / f"{replaced}.nii.gz").array != old).any()


def test_an_older_scan_that_comes_under_the_name_of_one_that_was_done_and_taken_away_is_predicted(model, tmp_path):
    scan, last_week = tmp_path / "in" / "a_0000.nii.gz", time.time() - 7 * 86_400

    def bring(seed: int) -> None:
        """As rsync -a and mv do: the file keeps its time."""
        write_volume(tmp_path / "a_0000.nii.gz", scans.blobs(SMALL, seed=seed))
        os.utime(tmp_path / "a_0000.nii.gz", (last_week, last_week))
        (tmp_path / "a_0000.nii.gz").rename(scan)

    maps = []
    scan.parent.mkdir()
    with Server(model, tmp_path) as server:
        bring(0)
        assert server.line()["outcome"] == "written"
        maps.append((tmp_path / "out" / "a.nii.gz").read_bytes())
        scan.unlink()
        time.sleep(3)
        bring(1)
        assert server.line()["outcome"] == "written"
        maps.append((tmp_path / "out" / "a.nii.gz").read_bytes())
        server.end()
    bring(2)
    for outcome in ("written", "already there"):
        with Server(model, tmp_path) as server:
            assert server.line()["outcome"] == outcome
            server.end()
    maps.append((tmp_path / "out" / "a.nii.gz").read_bytes())
    assert len(set(maps)) == 3


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def arrivals(tmp_path, monkeypatch):
    """What has arrived in ``tmp_path/in``, for a settling time of 5 s."""
    clock = Clock()
    (tmp_path / "in").mkdir()
    document = models.dataset_json(channels=1)
    made = Arrivals(lambda: find_inputs([tmp_path / "in"], document, may_be_empty=True), 5.0, clock)
    return made, clock, tmp_path / "in"


def names(looked) -> tuple[list[str], list[str], list[str]]:
    fresh, changed, refused = looked
    return [case.name for case in fresh], [case.name for case in changed], [Path(name).name for name in refused]


def test_a_file_that_grows_has_not_arrived(arrivals):
    made, clock, folder = arrivals
    path = folder / "a_0000.nii.gz"
    for size in (10, 20, 30):
        path.write_bytes(bytes(size))
        assert names(made.look()) == ([], [], [])
        clock.now += 4
    assert names(made.look()) == ([], [], [])
    clock.now += 1.5
    assert names(made.look()) == (["a"], [], [])
    clock.now += 60
    assert names(made.look()) == ([], [], []), "handed out twice"
    path.write_bytes(bytes(40))
    made.look()
    clock.now += 6
    assert names(made.look()) == ([], ["a"], [])


def test_a_file_that_was_written_before_and_renamed_in_is_taken_at_once(arrivals):
    made, _, folder = arrivals
    path = folder.parent / "a_0000.nii.gz"
    path.write_bytes(bytes(10))
    os.utime(path, (time.time() - 60, time.time() - 60))
    path.rename(folder / "a_0000.nii.gz")
    assert names(made.look()) == (["a"], [], [])


def test_what_no_scan_is_made_of_is_told_once_when_it_stands_still(arrivals):
    made, clock, folder = arrivals
    part = folder / "a.nii.gz.part"
    for size in (10, 20):
        part.write_bytes(bytes(size))
        assert names(made.look()) == ([], [], [])
        clock.now += 4
    clock.now += 2
    assert names(made.look()) == ([], [], ["a.nii.gz.part"])
    assert names(made.look()) == ([], [], [])
    part.rename(folder / "a.nii.gz")
    made.look()
    clock.now += 6
    assert names(made.look()) == (["a"], [], [])


def test_a_series_has_arrived_when_no_slice_comes_any_more(arrivals):
    pydicom = pytest.importorskip("pydicom")
    assert pydicom
    from small_series import write_patient_series

    made, clock, folder = arrivals
    series = write_patient_series(folder.parent / "patient", scans.blobs((4, 8, 8)))
    (folder / "patient").mkdir()
    for path in sorted(series.iterdir()):
        path.rename(folder / "patient" / path.name)
        os.utime(folder / "patient" / path.name)
        assert names(made.look()) == ([], [], [])
        clock.now += 4
    clock.now += 2
    assert names(made.look()) == (["patient"], [], [])


def test_a_folder_that_is_gone_for_a_while_is_no_end(arrivals, caplog):
    made, _, folder = arrivals
    folder.rename(folder.with_name("away"))
    assert names(made.look()) == names(made.look()) == ([], [], [])
    assert len([record for record in caplog.records if "cannot be searched" in record.message]) == 1
    folder.with_name("away").rename(folder)
    path = folder / "a_0000.nii.gz"
    path.write_bytes(bytes(10))
    os.utime(path, (1, 1))
    assert names(made.look()) == (["a"], [], [])


def test_a_scan_without_the_form_that_is_asked_for_is_set_aside_before_it_is_predicted(tmp_path):
    pytest.importorskip("highdicom", reason="highdicom (extra: dicom) is not installed")
    pytest.importorskip("pydicom", reason="pydicom (extra: dicom) is not installed")
    words = ["--watch", "in", "-o", str(tmp_path / "out"), "--dicom_seg", "--rtstruct"]
    forms = forms_of(predict.parser().parse_args(words), [], models.dataset_json(), tmp_path)
    case = InputCase("a", (tmp_path / "in" / "a.nii.gz",), ".nii.gz")
    for form, option in zip(forms, ("--dicom_seg", "--rtstruct"), strict=True):
        report = predict_cases([case], tmp_path / "out", lambda: pytest.fail("opened the model"), forms=[form])
        assert report.failed == {
            "a": f"{option}: {case.files[0]} is not a folder of a DICOM series; leave out {option}"
        }


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--watch", "in", "-num_parts", "2"], "its own folder"),
        (["--watch", "missing"], "no such folder"),
        (["--watch", "in", "--save_members", "--windows", "skip-empty"], "--save_members needs --windows all"),
        (["-i", "in", "--json_lines"], "go with --watch"),
    ],
)
def test_what_cannot_be_is_refused(model, tmp_path, capsys, words, expected):
    (tmp_path / "in").mkdir()
    words = [str(tmp_path / word) if word in ("in", "missing") else word for word in words]
    assert predict.main([*words, "-o", str(tmp_path / "out"), "-m", str(model)]) == 2
    assert expected in capsys.readouterr().err
