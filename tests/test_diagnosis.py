"""What the doctor finds: each healthy state says so, each broken one names the cause and the remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from nnunet_flare import diagnosis, plugin
from nnunet_flare.diagnosis import Finding

Usage = namedtuple("Usage", "total used free")
REPOSITORY = Path(__file__).resolve().parents[1]


def texts(findings: list[Finding], level: str) -> str:
    return "\n".join(finding.text for finding in findings if finding.level == level)


def test_this_environment_has_all_packages() -> None:
    findings = diagnosis.check_packages()
    assert texts(findings, "problem") == ""
    for package in ("nnunet-flare", "nnunetv2", "torch"):
        assert f"{package} {metadata.version(package)}" in texts(findings, "ok")


def test_missing_and_outdated_packages_come_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["nnunetv2>=99", "numpy", "no-such-package<3", "other-system; platform_system == 'Amiga'"]
    optional = ['no-such-extra>=1; extra == "openvino"']
    monkeypatch.setattr(metadata, "requires", lambda name: required + optional)
    findings = diagnosis.check_packages()
    assert texts(findings, "problem").splitlines() == [
        f"nnunetv2 {metadata.version('nnunetv2')} is installed: pip install 'nnunetv2>=99'",
        "no-such-package is missing: pip install 'no-such-package<3'",
    ]
    assert texts(findings, "note") == "optional: no-such-extra not installed: pip install 'nnunet-flare[openvino]'"


def test_package_on_the_path_only_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert "is only on the path, not installed" in texts(diagnosis.check_packages(), "problem")


@pytest.fixture
def inactive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's finder is not there, whatever this test run was started with."""
    monkeypatch.setattr(plugin, "is_installed", lambda: False)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.delenv("NNUNET_FLARE_PLUGIN", raising=False)


def test_active_plugin_names_what_stock_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    findings = diagnosis.check_plugin()
    assert "the plugin is active" in texts(findings, "ok")
    assert all(name in texts(findings, "ok") for name in [*plugin.TRAINERS, *plugin.PLANNERS])


def test_switched_off(inactive: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNUNET_FLARE_PLUGIN", "0")
    findings = diagnosis.check_plugin()
    assert "NNUNET_FLARE_PLUGIN=0 turns it off; unset NNUNET_FLARE_PLUGIN" in texts(findings, "problem")


def test_missing_start_up_file(inactive: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis.site, "getsitepackages", lambda: [str(REPOSITORY)])
    monkeypatch.setattr(diagnosis.site, "getusersitepackages", lambda: str(tmp_path))
    assert f"{REPOSITORY} holds no nnunet_flare_plugin.pth; install" in texts(diagnosis.check_plugin(), "problem")
    monkeypatch.setattr(diagnosis.site, "getsitepackages", lambda: [str(tmp_path)])
    assert "is not a site folder of this Python" in texts(diagnosis.check_plugin(), "problem")
    (tmp_path / "nnunet_flare_plugin.pth").write_text("")
    assert "exists but did not run" in texts(diagnosis.check_plugin(), "problem")


def test_inactive_plugin_comes_with_the_official_fallback(inactive: None, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = diagnosis.check_plugin()
    line = next(f.text for f in findings if "export nnUNet_extTrainer=" in f.text)
    folder = Path(line.partition("export nnUNet_extTrainer=")[2])
    assert [p.name for p in folder.glob("*.py")] == ["flare_trainers.py"]
    assert "-pl nnUNetPlannerFlare" in texts(findings, "note")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/some/other", str(folder)]))
    findings = diagnosis.check_plugin()
    assert "not active" in texts(findings, "note")
    assert "not active" not in texts(findings, "problem")
    assert "trainers are found anyway" in texts(findings, "note")


def test_the_command_for_planners_is_one_that_works(inactive: None, tmp_path: Path) -> None:
    """The doctor's own line, with --help in place of the dataset."""
    line = next(f.text for f in diagnosis.check_plugin() if "-pl nnUNetPlannerFlare" in f.text)
    code = line.partition('python -c "')[2].partition('"')[0]
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "NNUNET_FLARE_PLUGIN": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "-pl" in done.stdout


@pytest.mark.parametrize("broken", ["missing function", "syntax error"])
def test_an_nnunet_that_cannot_be_wrapped(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def imports(name: str) -> types.ModuleType:
        if broken == "syntax error":
            raise SyntaxError("oops")
        return types.ModuleType(name)

    monkeypatch.setattr(plugin, "is_installed", lambda: True)
    monkeypatch.setattr(diagnosis.importlib, "import_module", imports)
    told = texts(diagnosis.check_plugin(), "problem")
    assert ("SyntaxError: oops" in told) or ("has no nnunetv2.utilities.find_class_by_name." in told)
    assert "not active" in told


def test_commands_of_another_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    assert f"{tmp_path / 'nnUNetv2_train'} belongs to another environment" in texts(diagnosis.check_plugin(), "problem")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "nnUNetv2_train is not on PATH" in texts(diagnosis.check_plugin(), "note")


def test_hardware_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    findings = diagnosis.check_hardware()
    assert "no GPU" in texts(findings, "note")
    assert f"{torch.get_num_threads()} torch threads; precision auto is" in texts(findings, "ok")


def test_hardware_with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    card = types.SimpleNamespace(name="Some card", total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    findings = diagnosis.check_hardware()
    assert "GPU 1: Some card, 24.0 GB" in texts(findings, "ok")
    assert "no GPU" not in texts(findings, "note")


def test_torchvision_that_does_not_fit_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(diagnosis.importlib, "import_module", unfit)
    assert "(operator torchvision::nms does not exist): nnUNetv2_train" in texts(list(diagnosis._torchvision()), "note")


def test_small_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64e6, 0, 64e6))
    assert "has 0.06 GB" in texts(list(diagnosis._shared_memory(tmp_path)), "note")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(8e9, 0, 8e9))
    assert list(diagnosis._shared_memory(tmp_path)) == []
    assert list(diagnosis._shared_memory(tmp_path / "absent")) == []


def test_folders_in_place(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1e12, 0, 5e11))
    findings = diagnosis.check_folders()
    assert [f.level for f in findings] == ["ok"] * 3
    for variable, folder in nnunet_folders.items():
        assert f"{variable}={folder}, 500 GB free" in texts(findings, "ok")


def test_unset_and_missing_folders_come_with_the_command(
    nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    nnunet_folders["nnUNet_results"].rmdir()
    assert texts(diagnosis.check_folders(), "problem").splitlines() == [
        "nnUNet_raw is not set: export nnUNet_raw=FOLDER",
        f"nnUNet_results={nnunet_folders['nnUNet_results']}: no such folder: "
        f"mkdir -p {nnunet_folders['nnUNet_results']}",
    ]


def test_read_only_raw_data_are_fine_and_other_folders_not(
    nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    findings = diagnosis.check_folders()
    assert "goes to nnUNet_preprocessed instead" in texts(findings, "note")
    assert texts(findings, "problem").count("not writable") == 2


def test_little_disk_is_a_note(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1e12, 0, 3e9))
    assert texts(diagnosis.check_folders(), "note").count("3 GB free: not much for") == 2


def test_rounds_with_ignored_voxels_are_told(tmp_path: Path) -> None:
    plans = {
        "configurations": {
            "3d_fullres": {"spacing": [1, 1, 1]},
            "3d_fullres_a_r0": {"inherits_from": "3d_fullres", "flare": {"round": 0}},
            "3d_fullres_a_r1": {"inherits_from": "3d_fullres", "flare": {"round": 1, "ignore_label": 14}},
        }
    }
    (tmp_path / "nnUNetPlansFlare.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "dataset_fingerprint.json").write_text('{"configurations": 3}')
    (tmp_path / "broken.json").write_text("{")
    findings = diagnosis.check_rounds(tmp_path)
    assert len(findings) == 1
    assert "nnUNetPlansFlare.json: configuration 3d_fullres_a_r1 marks uncertain voxels with 14" in findings[0].text
    assert diagnosis.check_rounds(tmp_path / "absent") == []
