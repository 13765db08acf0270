"""flare-evaluate as people call it: files written, exit codes, refusals."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from nnunet_flare.cli.evaluate import main
from nnunet_flare.images import Volume, write_labels


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for place in range(4):
        labels = np.kron(rng.integers(0, 14, (3, 3, 3)), np.ones((4, 4, 4))).astype(np.uint8)
        grid = Volume(labels, (2.5, 0.8, 0.8))
        for folder, shift in (("ref", 0), ("good", 0 if place else 1), ("bad", 2)):
            write_labels(tmp_path / folder / f"case_{place}.nii.gz", np.roll(labels, shift, axis=2), grid)
    return tmp_path


def call(folders, *words):
    return main([word.format(d=folders) for word in words])


def test_scores_summary_json_and_picture_are_written(folders, capsys):
    assert call(folders, "-ref", "{d}/ref", "-pred", "{d}/good", "-o", "{d}/out/good.csv", "-np", "1") == 0
    with open(folders / "out/good.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["Name"] for row in rows] == [f"case_{i}.nii.gz" for i in range(4)]
    assert float(rows[1]["Liver_DSC"]) == 1.0 > float(rows[0]["Stomach_DSC"])
    assert json.loads((folders / "out/good.json").read_text())["rules"] == "official"
    assert (
        (folders / "out/good_summary.csv").read_text().startswith("Structure,Measure,Cases,Mean,SD,Median,Worst_Cases")
    )
    assert (folders / "out/good.png").read_bytes().startswith(b"\x89PNG")
    assert "worst DSC" in (told := capsys.readouterr().out) and "case_0 " in told


def test_lesions_and_corrected_rules_can_be_asked_for(folders):
    words = ["-ref", "{d}/ref", "-pred", "{d}/good", "-o", "{d}/o.csv", "--labels", "flare23", "--corrected"]
    assert call(folders, *words, "-np", "1") == 0
    assert "Lesion_DSC" in (folders / "o.csv").read_text()
    assert json.loads((folders / "o.json").read_text())["rules"] == "corrected"


def test_two_methods_are_compared_from_folders_or_from_their_tables(folders, capsys):
    words = ["-ref", "{d}/ref", "-np", "1", "-o"]
    assert call(folders, *words, "{d}/folders.csv", "--compare", "{d}/good", "{d}/bad") == 0
    assert "Organ_mean" in capsys.readouterr().out
    for name in ("good", "bad"):
        assert call(folders, *words, f"{{d}}/{name}.csv", "-pred", f"{{d}}/{name}") == 0
    (folders / "tables_summary.csv").write_bytes((folders / "good_summary.csv").read_bytes())  # of an earlier call
    assert call(folders, "-o", "{d}/tables.csv", "--compare", "{d}/good.csv", "{d}/bad.csv") == 0
    assert not (folders / "tables_summary.csv").exists()
    assert (folders / "tables.csv").read_text() == (folders / "folders.csv").read_text()
    assert (folders / "tables.png").is_file()
    rows = json.loads((folders / "tables.json").read_text())["rows"]
    assert rows[0]["difference"] < 0


@pytest.mark.parametrize(
    ("labels", "scored", "compared", "complaint"),
    [
        ("flare22", ["--corrected"], ["{d}/a.csv", "{d}/b.csv"], "their rules differ, official and corrected"),
        ("flare22", [], ["{d}/a.csv", "{d}/bad", "-ref", "{d}/ref", "--corrected"], "official and corrected"),
        ("{d}/dataset.json", ["--tolerance_mm", "5"], ["{d}/a.csv", "{d}/b.csv"], "tolerances (mm) differ, [2.0] and"),
        ("flare22", [], ["{d}/a.csv", "{d}/b.csv", "--corrected", "--missing", "zero"], "out --corrected --missing"),
    ],
)
def test_methods_that_were_scored_by_other_rules_are_not_compared(folders, capsys, labels, scored, compared, complaint):
    """The same predictions would differ, by the rules alone."""
    (folders / "dataset.json").write_text('{"labels": {"background": 0, "cyst": 1}}')
    words = ["--labels", labels, "-np", "1"]
    for name, extra in (("a", []), ("b", scored)):
        assert call(folders, "-ref", "{d}/ref", "-pred", "{d}/good", "-o", f"{{d}}/{name}.csv", *words, *extra) == 0
    assert call(folders, "--compare", *compared, "-o", "{d}/c.csv", *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (folders / "c.csv").exists()


def test_failed_cases_are_named_and_the_exit_code_is_one(folders, capsys):
    (folders / "good/case_2.nii.gz").write_bytes(b"")
    assert call(folders, "-ref", "{d}/ref", "-pred", "{d}/good", "-o", "{d}/o.csv", "-np", "1") == 1
    assert "not scored: case_2" in capsys.readouterr().err
    assert "case_1.nii.gz" in (folders / "o.csv").read_text()


@pytest.mark.parametrize(
    "labels, extra, code, named",
    [
        ("flare22", [], 0, False),
        ("flare23", [], 2, False),
        ("flare22", ["--corrected"], 0, True),
        ("flare23", ["--missing", "zero"], 0, True),
    ],
)
def test_a_missing_prediction_counts_as_the_chosen_rules_say(folders, capsys, labels, extra, code, named):
    (folders / "good/case_2.nii.gz").unlink()
    words = ["-ref", "{d}/ref", "-pred", "{d}/good", "-o", "{d}/o.csv", "--labels", labels, "-np", "1", *extra]
    assert call(folders, *words) == code
    assert "case_2.nii.gz" in capsys.readouterr().err
    if code == 0:
        assert ("case_2.nii.gz" in (folders / "o.csv").read_text()) == named
    else:
        assert not (folders / "o.csv").exists()


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["-pred", "{d}/good"], "-ref"),
        (["-ref", "{d}/ref"], "-pred"),
        (["-ref", "{d}/ref", "-pred", "{d}/none"], "no such folder"),
        (["-ref", "{d}/ref", "-pred", "{d}/good", "--labels", "flare99"], "flare99"),
        (["--compare", "{d}/good", "{d}/good", "-ref", "{d}/ref"], "the same path twice"),
        (["--compare", "{d}/good", "{d}/bad"], "-ref"),
        (["--compare", "{d}/good.csv", "{d}/bad.csv"], "good.csv"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(folders, capsys, words, complaint):
    assert call(folders, *words, "-o", "{d}/o.csv") == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and "Traceback" not in error


def test_the_table_must_be_named_as_csv(folders, capsys):
    assert call(folders, "-ref", "{d}/ref", "-pred", "{d}/good", "-o", "{d}/o.json") == 2
    assert ".csv" in capsys.readouterr().err


def test_efficiency_measures_the_command_after_two_hyphens(folders, capfd):
    words = [
        "efficiency",
        "-o",
        "{d}/eff.csv",
        "--name",
        "case_1.nii.gz",
        "--",
        sys.executable,
        "-c",
        "print('worked')",
    ]
    assert call(folders, *words) == 0
    assert "worked" in capfd.readouterr().out
    with open(folders / "eff.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["Name"] == "case_1.nii.gz" and float(row["Time"]) > 0
    assert (folders / "eff_case_1.nii.gz.png").is_file() and (folders / "eff_case_1.nii.gz.json").is_file()


def test_rows_whose_names_look_alike_have_samples_of_their_own(folders, capsys):
    def measured(table, name):
        return call(folders, "efficiency", "-o", f"{{d}}/{table}.csv", "--name", name, "--", "true")

    names = ("a/b", "a_b", "a%2Fb")
    assert [measured("eff", name) for name in names] == [0, 0, 0]
    samples = {json.loads(path.read_text())["name"] for path in folders.glob("eff_*.json")}
    assert samples == set(names) and len(list(folders.glob("eff_*.png"))) == 3
    assert measured("eff", "a_b") == 0, "measured again"
    capsys.readouterr()
    assert measured("eff_a", "b") == 2  # eff_a_b.json too
    assert "eff_a_b.json: holds the samples of 'a_b', not of 'b'" in capsys.readouterr().err
    assert not (folders / "eff_a.csv").exists()


def test_a_gpu_that_is_named_and_not_there_is_refused_before_the_command_starts(folders, capsys, monkeypatch):
    """Its columns would be empty, as those of a command that uses no GPU."""
    monkeypatch.setattr("nnunet_flare.evaluation.gpu.open_gpu", lambda index: None)
    command = ("--", sys.executable, "-c", "open(r'{d}/started', 'w')")
    assert call(folders, "efficiency", "-o", "{d}/eff.csv", "--gpu", "5", *command) == 2
    assert "--gpu 5: there is no such NVIDIA GPU here" in capsys.readouterr().err
    assert not (folders / "started").exists() and not (folders / "eff.csv").exists()
    assert call(folders, "efficiency", "-o", "{d}/eff.csv", *command) == 0
    assert (folders / "started").exists()


def test_efficiency_of_a_failing_command_says_so(folders, capsys):
    assert call(folders, "efficiency", "-o", "{d}/eff.csv", "--", sys.executable, "-c", "raise SystemExit(7)") == 1
    assert "exit code 7" in capsys.readouterr().err
    assert (folders / "eff.csv").read_text().splitlines()[1].endswith(",7")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_ends_the_command_and_writes_no_row(folders, ending):
    code = f"import os, time; open({str(folders / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = ["efficiency", "-o", str(folders / "eff.csv"), "--", sys.executable, "-c", code]
    process = subprocess.Popen([sys.executable, "-m", "nnunet_flare.cli.evaluate", *command], stderr=subprocess.PIPE)
    pid = wait_for_pid(folders / "pid")
    process.send_signal(ending)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and b"interrupted" in error
    assert not psutil.pid_exists(pid)
    assert not (folders / "eff.csv").exists()


def wait_for_pid(path):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the measured command did not start")


@pytest.mark.parametrize("words", [[], ["--"], ["--", "no-such-command-here"]])
def test_efficiency_without_a_usable_command_is_refused(folders, capsys, words):
    assert call(folders, "efficiency", "-o", "{d}/eff.csv", *words) == 2
    assert not (folders / "eff.csv").exists()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from nnunet_flare.cli.evaluate import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'torch', 'scipy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "--compare" in done.stdout
