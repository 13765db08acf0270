"""The doctor's verdicts: a use that does not work is not called fine because another one is."""

from __future__ import annotations

import shutil
import sys

import pytest

from nnunet_flare import uses
from nnunet_flare.diagnosis import Finding
from nnunet_flare.uses import broken_import, verdicts

FINE = {title: [Finding("ok", "fine")] for title in ("packages", "plugin", "hardware", "folders")}


@pytest.fixture(autouse=True)
def all_imports_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "broken_import", lambda name: None)


def broken(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(uses, "broken_import", lambda name: f"{name} is broken" if name in names else None)


def test_a_broken_torchvision_is_told_where_it_bites(monkeypatch):
    broken(monkeypatch, "torchvision")
    found = verdicts(FINE)
    assert found["train"].level == "note" and "torchvision is broken; those of this package are" in found["train"].text
    assert found["predict"].text.startswith("yes") and "torchvision" not in found["predict"].text


@pytest.mark.parametrize("section", ["packages", "plugin", "folders"])
def test_a_problem_stops_training_and_not_the_report(section):
    found = verdicts({**FINE, section: [Finding("problem", "x")]})
    assert found["train"] == Finding("problem", f"no: see the problems under {section}")
    assert found["report"] == Finding("ok", "yes")


def test_without_torch_exported_models_still_predict(monkeypatch):
    broken(monkeypatch, "torch")
    monkeypatch.setattr(uses.importlib.util, "find_spec", lambda name: object())
    found = verdicts(FINE)
    assert found["predict"].level == "note" and "only models that flare-export wrote" in found["predict"].text
    assert found["train"].level == found["export"].level == "problem"
    monkeypatch.setattr(uses.importlib.util, "find_spec", lambda name: None)
    assert verdicts(FINE)["predict"].level == "problem"


def test_a_report_without_its_packages_is_a_problem(monkeypatch):
    broken(monkeypatch, "PIL")
    assert verdicts(FINE)["report"] == Finding("problem", "no: PIL is broken")


def test_slurm_needs_all_its_commands(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert verdicts(FINE)["Slurm"] == Finding("ok", "yes")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "squeue" else f"/bin/{name}")
    assert verdicts(FINE)["Slurm"].text.startswith("no: squeue not on PATH")


def test_an_import_that_fails_is_a_line(monkeypatch, tmp_path):
    (tmp_path / "broken_on_purpose.py").write_text("raise OSError('libX.so: undefined symbol\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert broken_import("broken_on_purpose") == (
        "broken_on_purpose cannot be imported (OSError: libX.so: undefined symbol)"
    )
    assert broken_import("no_such_package_at_all") == "no_such_package_at_all is not installed"
    assert broken_import("json") is None and "broken_on_purpose" not in sys.modules
