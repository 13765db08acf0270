"""The container's entry script, run as the challenge runs it, by plain ``sh``, with its folders moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import model_folders as models
import pytest
import small_scans as scans

from nnunet_flare.images import read_volume, write_volume

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKER = Path(__file__).parents[2] / "docker"


def run_script(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLARE_INPUTS": str(folder / "inputs"),
        "FLARE_OUTPUTS": str(folder / "outputs"),
        "FLARE_MODEL": str(folder / "model"),
        **variables,
    }
    script = ["sh", str(DOCKER / "predict.sh")]
    return subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_script_segments_every_input(tmp_path):
    models.write_model(tmp_path / "model", folds=("all",))
    for name in ("FLARE22Ts_0001", "name with space"):
        write_volume(tmp_path / "inputs" / f"{name}_0000.nii.gz", scans.blobs((8, 32, 32)))
    done = run_script(tmp_path, FLARE_OPTIONS="--backend torch -step_size 1")
    assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in (tmp_path / "outputs").iterdir())
    assert written == ["FLARE22Ts_0001.nii.gz", "name with space.nii.gz"]
    assert read_volume(tmp_path / "outputs" / written[0]).array.shape == (8, 32, 32)


def test_script_hands_on_the_exit_code(tmp_path):
    models.write_model(tmp_path / "model")
    (tmp_path / "inputs").mkdir()
    assert run_script(tmp_path, FLARE_OPTIONS="--backend torch").returncode == 2
    (tmp_path / "inputs" / "bad_0000.nii.gz").write_bytes(b"")
    assert run_script(tmp_path, FLARE_OPTIONS="--backend torch").returncode == 1


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_containers_run_as_an_ordinary_user_with_the_convention_s_folders(name):
    lines = (DOCKER / name).read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")
    assert "WORKDIR /workspace" in lines
    assert 'CMD ["sh", "predict.sh"]' in lines
    assert "ARG BASE=python:3.11-slim" in lines


def test_what_the_image_installs_is_what_the_package_asks_for():
    """The image leaves packages out, but takes no other versions than a user gets."""
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["openvino"]}
    installed = (DOCKER / "requirements.txt").read_text().splitlines()
    assert set(installed) <= asked
    assert not any(line.startswith(("torch", "nnunetv2")) for line in installed)


@pytest.mark.parametrize("name", ["predict.sh", "build.sh"])
def test_scripts_are_sound(name):
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, str(DOCKER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
