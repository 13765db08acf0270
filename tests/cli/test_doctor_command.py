"""``flare-doctor``: its exit codes and what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_flare import diagnosis, uses
from nnunet_flare.cli.doctor import main
from nnunet_flare.diagnosis import Finding
from nnunet_flare.phantom import DATASET, write_phantom


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is wrong, whatever the one that runs the tests is like."""
    for name in ("check_packages", "check_plugin", "check_hardware", "check_folders"):
        monkeypatch.setattr(
            diagnosis, name, lambda name=name: [Finding("ok", f"{name} is fine"), Finding("note", "so")]
        )
    monkeypatch.setattr(uses, "broken_import", lambda name: None)


@pytest.fixture
def phantom(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_phantom(tmp_path / "p", labelled=1, partial=1, unlabelled=0, test=0, size=(8, 12, 16))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "p" / "nnUNet_raw"))
    return tmp_path / "p" / "nnUNet_raw" / DATASET


def test_all_is_well(healthy: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for name in ("packages", "plugin", "hardware", "folders"):
        assert f"  ok       check_{name} is fine" in out
    assert out.endswith("no problem, 4 note(s)\n")


def test_one_problem_is_exit_code_1(
    healthy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diagnosis, "check_folders", lambda: [Finding("problem", "nnUNet_raw is not set")])
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "  problem  nnUNet_raw is not set" in out
    assert out.endswith("1 problem(s), 3 note(s)\n")


def test_a_use_that_does_not_work_is_a_problem_where_the_rest_is_well(healthy, monkeypatch, capsys) -> None:
    monkeypatch.setattr(uses, "broken_import", lambda name: f"{name} is broken" if name == "jinja2" else None)
    assert main([]) == 1
    assert capsys.readouterr().out.endswith("1 problem(s), 4 note(s)\n")


def test_a_sound_dataset(healthy: None, phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-d", "22"]) == 0
    assert f"ok       {phantom}: every image and label map can be used" in capsys.readouterr().out


def test_every_problem_of_a_dataset_is_listed(healthy: None, phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (phantom / "labelsTr").iterdir():
        path.unlink()
    assert main(["-d", DATASET]) == 1
    out = capsys.readouterr().out
    assert out.count("no such file") == 2
    assert ", 4 note(s)\n" in out and "2 problem(s)" in out


def test_rounds_with_ignored_voxels_are_a_note(
    healthy: None, phantom: Path, nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nnunet_folders["nnUNet_preprocessed"] / DATASET
    folder.mkdir()
    (folder / "nnUNetPlansFlare.json").write_text('{"configurations": {"c_r1": {"flare": {"ignore_label": 14}}}}')
    assert main(["-d", "22"]) == 0
    assert "configuration c_r1 marks uncertain voxels with 14" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["23", "Dataset023_Other"])
def test_an_unknown_dataset_is_wrong_usage(
    healthy: None, phantom: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    assert main(["-d", dataset]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flare-doctor: error: dataset {dataset}: not in ")
    assert DATASET in error


def test_an_unknown_option_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--no-such-option"])
    assert stopped.value.code == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom nnunet_flare.cli.doctor import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'nnunetv2', 'pydantic', 'packaging') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
