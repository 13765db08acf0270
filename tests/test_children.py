"""A file that lies in the current folder runs in no process of ours, whatever its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_flare import plugin
from nnunet_flare.children import python_module, safe_children, safe_environment, users_environment
from nnunet_flare.evaluation.sampling import record
from nnunet_flare.phantom import write_phantom

POISONED = (
    "tqdm", "numpy", "torch", "psutil", "nnunetv2", "nnunet_flare", "multiprocessing", "pickle", "signal", "runpy",
    "json", "logging", "concurrent", "batchgenerators", "SimpleITK", "blosc2", "yaml",
)  # fmt: skip


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A folder of files named as modules that we import; each leaves a marker when it runs."""
    folder = tmp_path / "poisoned"
    folder.mkdir()
    for name in POISONED:
        text = f"open({str(tmp_path / 'marker')!r}, 'a').write({name!r} + chr(10))\nraise SystemExit(66)\n"
        (folder / f"{name}.py").write_text(text)
    return folder


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def marker(tmp_path: Path) -> str:
    path = tmp_path / "marker"
    return path.read_text() if path.is_file() else ""


@pytest.mark.parametrize("has_flag", [True, False], ids=["3.11 and newer", "3.10"])
def test_a_module_is_not_run_from_the_current_folder(poisoned: Path, tmp_path: Path, has_flag: bool) -> None:
    if has_flag and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    words = python_module("nnunet_flare.cli.pseudolabel", "recipes", has_flag=has_flag)
    done = subprocess.run(words, cwd=poisoned, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "noisy_student" in done.stdout, done.stderr
    assert not marker(tmp_path)
    plain = [sys.executable, "-m", "nnunet_flare.cli.pseudolabel", "recipes"]
    assert subprocess.run(plain, cwd=poisoned, capture_output=True, check=False).returncode == 66
    assert marker(tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the plugin does this for 3.10")
def test_worker_processes_of_our_children_are_safe_too(poisoned: Path, tmp_path: Path) -> None:
    code = "import multiprocessing as m; print(m.get_context('spawn').Pool(1).apply(abs, (-3,)))"
    script = tmp_path / "pool.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=poisoned, env=safe_environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "3\n" and not marker(tmp_path), done.stderr


@pytest.mark.slow
def test_preprocessing_with_nnunets_worker_processes_runs_nothing_of_the_current_folder(
    poisoned: Path, tmp_path: Path
) -> None:
    """Stock nnU-Net's pools and ours, started by the command that a user types."""
    data = tmp_path / "data"
    write_phantom(data, labelled=2, unlabelled=2, test=0, size=(12, 16, 16), seed=1)
    folders = {name: str(data / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir(exist_ok=True)
    environment = {**os.environ, **folders, "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    words = ["preprocess", "-d", "22", "-u", str(data / "unlabelled"), "--recipe", "demo"]
    words += ["--set", "members.count=2", "plan.patch_size=[16, 32, 32]", "plan.base_features=4", "plan.stages=3"]
    done = subprocess.run(
        [program("flare-pseudolabel"), *words],
        cwd=poisoned,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not marker(tmp_path) and "2 unlabelled scans" in done.stdout


def test_empty_entries_of_the_python_path_are_not_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert safe_environment({"PYTHONPATH": ":/a::/b:"})["PYTHONPATH"] == "/a:/b"
    monkeypatch.setenv("PYTHONPATH", ":/a")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_children():
        assert os.environ["PYTHONPATH"] == "/a" and os.environ["PYTHONSAFEPATH"] == "1"
        assert "PYTHONSAFEPATH" not in users_environment()
    assert os.environ["PYTHONPATH"] == ":/a" and "PYTHONSAFEPATH" not in os.environ
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with safe_children():
        assert users_environment()["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_command_of_the_users_own_that_is_measured_keeps_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "script.py").write_text("import beside\n")
    with safe_children():
        assert record([sys.executable, str(tmp_path / "script.py")], gpu=None).exit_code == 0


def test_the_plugin_keeps_the_path_of_python_3_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rest = [str(tmp_path / "lib"), "/usr/lib"]
    for first, left in (("", rest), (str(tmp_path), rest), ("/a/script's", ["/a/script's", *rest])):
        guard = plugin._PathGuard(rest[0])
        monkeypatch.setattr(sys, "meta_path", [guard, *(f for f in sys.meta_path if f is not guard)])
        monkeypatch.setattr(sys, "path", list(rest))
        assert guard.find_spec("early") is None and guard in sys.meta_path and sys.path == rest
        sys.path.insert(0, first)
        assert guard.find_spec("tqdm") is None and guard not in sys.meta_path and sys.path == left
