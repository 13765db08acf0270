"""The image is really built and run, as hardened hosts run it; its label maps are those of ``flare-predict`` outside.

``FLARE_CONTAINER_ENGINE`` is a command that takes ``build -t TAG -f FILE CONTEXT [options]``, ``run [options] TAG
COMMAND`` and ``image inspect TAG`` (``docker``, ``podman``, or a script around one of them). ``FLARE_CONTAINER_BASE``
is the base image, ``FLARE_CONTAINER_TORCH`` what pip is asked for in place of ``torch``.
"""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.cli.evaluate import main as evaluate
from nnunet_flare.cli.predict import main as predict
from nnunet_flare.images import geometry_difference, read_volume, write_volume

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]

REPOSITORY = Path(__file__).parents[2]

TAG = "localhost/nnunet-flare-test"

LIMITS = ("--network", "none", "--read-only", "--user", "4711", "--memory", "8g", "--cpus", "2", "--shm-size", "64m")
"""A host that gives little: no network, a root that cannot be written, a user without a name or a home."""

MOST_BYTES = 600e6
"""Of the image beyond its base; uncompressed."""


def engine() -> list[str]:
    command = shlex.split(os.environ.get("FLARE_CONTAINER_ENGINE", ""))
    if command:
        return command
    for name in ("docker", "podman"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True, check=False).returncode:
            return [name]
    pytest.skip("no container engine works here (set FLARE_CONTAINER_ENGINE)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("trained") / "model", folds=(0, 1))


@pytest.fixture(scope="module")
def image(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that runs a container of the image, which was built of a copy of the repository with a model."""
    command = engine()
    context = tmp_path_factory.mktemp("context") / "source"
    names = (".git", ".venv*", ".*_cache", "__pycache__", "benchmarks", "build", "dist", "tests")
    shutil.copytree(REPOSITORY, context, ignore=shutil.ignore_patterns(*names))
    shutil.copytree(model, context / "trained_model")
    arguments = {"MODEL": "trained_model", "BASE": os.environ.get("FLARE_CONTAINER_BASE", "python:3.11-slim")}
    arguments["TORCH"] = os.environ.get("FLARE_CONTAINER_TORCH", "torch")
    options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    build = [*command, "build", "-t", TAG, "-f", str(context / "docker" / "Dockerfile"), *options, str(context)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    yield [*command, "run", "--rm"]


def contained(image: list[str], options: tuple[str, ...], words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*image, *options, TAG, *words], capture_output=True, text=True, check=False)


def test_a_locked_down_container_gives_the_label_maps_of_flare_predict(image, model, tmp_path):
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    write_volume(inputs / "FLARE22Ts_0001_0000.nii.gz", scans.blobs((30, 70, 80)))
    outputs.mkdir(mode=0o777)
    for folder in (tmp_path, inputs, outputs):
        folder.chmod(0o777)
    folders = ("-v", f"{inputs}:/workspace/inputs:ro", "-v", f"{outputs}:/workspace/outputs")
    done = contained(image, (*LIMITS, "--env", "HOME=", *folders), ("sh", "predict.sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in outputs.iterdir()] == ["FLARE22Ts_0001.nii.gz"]
    assert predict(["-i", str(inputs), "-o", str(tmp_path / "own"), "-m", str(model), "-device", "cpu"]) == 0
    found, own = (read_volume(folder / "FLARE22Ts_0001.nii.gz") for folder in (outputs, tmp_path / "own"))
    assert geometry_difference(found, own) is None
    assert len(np.unique(own.array)) > 1
    assert np.mean(found.array == own.array) > 0.999  # weights in half precision: near ties


def test_threads_keep_to_the_containers_cpus(image):
    code = "from nnunet_flare.inference.cpus import usable_cpus; print(usable_cpus())"
    done = contained(image, ("--network", "none", "--cpus", "1"), ("python", "-c", code))
    assert done.stdout.split()[-1:] == ["1"], done.stdout + done.stderr


def test_the_image_holds_neither_pytorch_nor_nnunet_and_is_small(image):
    code = (
        "import importlib.util as u; print(*[u.find_spec(n) for n in ('torch', 'nnunetv2')]);"
        "import os; print(os.getuid(), sum(os.lstat(os.path.join(f, n)).st_size for t in ('/opt', '/workspace')"
        " for f, _, ns in os.walk(t) for n in ns))"
    )
    done = contained(image, ("--network", "none"), ("python", "-c", code))
    lines = done.stdout.splitlines()
    assert lines[-2] == "None None", done.stderr
    user, size = map(int, lines[-1].split())
    assert user != 0 and size < MOST_BYTES


def test_efficiency_measures_the_container_and_not_the_engine_s_client(image, tmp_path, monkeypatch):
    """The figures are those of Python with OpenVINO: more than any client has, less than the limit."""
    program = tmp_path / "bin" / ("docker" if image[0] == "docker" else "podman")
    program.parent.mkdir()
    path = f"PATH={shlex.quote(os.environ['PATH'])}"  # a script around an engine looks for the engine itself
    program.write_text(f'#!/bin/sh\n{path} exec {shlex.join(image[:-2])} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    write_volume(tmp_path / "scans" / "FLARE22Ts_0001_0000.nii.gz", scans.blobs((30, 70, 80)))
    table = tmp_path / "out" / "eff.csv"
    words = ["--container", TAG, "-i", str(tmp_path / "scans"), "--engine", program.name, "--memory", "2g"]
    assert evaluate(["efficiency", "-o", str(table), *words, "--cpus", "1"]) == 0
    with open(table, newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["Name"] == "FLARE22Ts_0001_0000.nii.gz" and row["Exit_Code"] == "0"
    assert 100 < float(row["Tree_RAM"]) < 2048
    assert 0.5 < float(row["Tree_CPU_Seconds"]) < 1.2 * float(row["Time"])
    found = read_volume(table.with_name("eff_maps") / "FLARE22Ts_0001.nii.gz")
    assert len(np.unique(found.array)) > 1
