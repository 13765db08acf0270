"""flare-evaluate efficiency --container, with programs on the PATH that take an engine's words and write them down."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli.evaluate import main
from nnunet_flare.evaluation.containers import Processes
from nnunet_flare.evaluation.engines import ENGINES, Limits, command_line
from nnunet_flare.evaluation.sampling import record
from nnunet_flare.images import Volume, read_volume, write_labels, write_volume

ENGINE = """#!{python}
# Behaves as one container whose predict.sh does as the scan's name says.
import json, os, pathlib, shutil, subprocess, sys, time
words = sys.argv[1:]
here = pathlib.Path({here!r})
with open(here / "calls", "a") as stream:
    stream.write(json.dumps([pathlib.Path(sys.argv[0]).name, *words]) + "\\n")
if "inspect" in words:
    if words[-1] == "missing":
        sys.exit("Error: no such image")
    sys.exit(0)
if words[0] == "rm":
    sys.exit(0)
if words[0] == "info":
    print((here / "limits").read_text() if (here / "limits").exists() else "")
    sys.exit(0)
folders = dict(reversed([part.split("=")[1] for part in word.split(",")[1:]]) for word in words if "type=bind" in word)
inputs, outputs = (pathlib.Path(folders["/workspace/" + name]) for name in ("inputs", "outputs"))
(scan,) = inputs.iterdir()
assert oct(outputs.stat().st_mode)[-3:] == "777"
case = scan.name[: -len("_0000.nii.gz")]
print("predicting", case, flush=True)
if case == "broken":
    sys.exit("the network is not there\\nTraceback of it")
if case == "hungry":
    sys.exit(137)
if case == "endless":
    (here / "started").touch()
    time.sleep(60)
if case == "heavy":
    subprocess.run([sys.executable, "-c", "import time; b = bytearray(b'x') * (150 << 20); time.sleep(0.8)"])
if case == "empty":
    sys.exit(0)
shutil.copy(here / ("other.nii.gz" if case == "moved" else "map.nii.gz"), outputs / (case + ".nii.gz"))
"""

SMI = """#!/bin/sh
case "$*" in *memory.total*) echo "81920, 80000" ;; esac
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with ``scans``, and a PATH with all engines and a GPU."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("docker", "podman", "apptainer"):
        (programs / name).write_text(ENGINE.format(python=sys.executable, here=str(tmp_path)))
    (programs / "nvidia-smi").write_text(SMI)
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    grid = Volume(np.zeros((4, 6, 5), np.uint8), (2.5, 0.8, 0.8))
    labels = grid.array.copy()
    labels[1:3, 2:4, 1:4] = 1
    write_labels(tmp_path / "map.nii.gz", labels, grid)
    write_volume(tmp_path / "other.nii.gz", Volume(np.zeros((4, 6, 6), np.uint8), grid.spacing_mm))
    return tmp_path


def add_scans(lab, *cases):
    for case in cases:
        grid = Volume(np.zeros((4, 6, 5), np.int16), (2.5, 0.8, 0.8))
        write_volume(lab / "scans" / f"{case}_0000.nii.gz", grid)


def measure(lab, *words):
    table = ["-o", str(lab / "out" / "eff.csv")]
    return main(["efficiency", *table, "--container", "team", "-i", str(lab / "scans"), *words])


def calls(lab):
    """The words of each call, with the scratch folder as FOLDER and the container's name as NAME."""
    found = []
    for line in (lab / "calls").read_text().splitlines():
        words = json.loads(line)
        mount = next((word for word in words if word.endswith("target=/workspace/inputs")), None)
        if mount is not None:
            folder = mount.split(",")[1].removeprefix("source=").removesuffix("/inputs")
            assert Path(folder).parent == lab / "out"
            words = [word.replace(folder, "FOLDER") for word in words]
        found.append(["NAME" if word.startswith("flare-efficiency-") else word for word in words])
    return found


def rows(lab):
    with open(lab / "out" / "eff.csv", newline="") as stream:
        return {row["Name"]: row for row in csv.DictReader(stream)}


MOUNTS = (
    "--mount type=bind,source=FOLDER/inputs,target=/workspace/inputs "
    "--mount type=bind,source=FOLDER/outputs,target=/workspace/outputs team sh predict.sh"
)

STARTS = {
    "docker": "docker run --rm --name NAME --cidfile FOLDER/container_id",
    "podman": "podman run --rm --name NAME --cidfile FOLDER/container_id --security-opt label=disable",
    "apptainer": "apptainer exec --compat --workdir FOLDER/work --pwd /workspace",
}


@pytest.mark.parametrize(
    "engine, options, limits",
    [
        ("docker", "", "--memory 8g"),
        ("podman", "", "--memory 8g"),
        ("apptainer", "", "--memory 8g"),
        ("docker", "--task 1", "--memory 28g --shm-size 28g --gpus device=0"),
        ("podman", "--task 3 --gpu 2", "--memory 28g --shm-size 28g --device nvidia.com/gpu=2"),
        ("apptainer", "--task 1 --gpu 1", "--memory 28g --nv --env CUDA_VISIBLE_DEVICES=1"),
        ("docker", "--memory 4GB --cpus 2 --shm-size 512m", "--memory 4g --cpus 2 --shm-size 512m"),
        ("podman", "--cpus 1.5 --shm_size 1g", "--memory 8g --cpus 1.5 --shm-size 1g"),
        ("apptainer", "--memory 512M --cpus 2", "--memory 512m --cpus 2"),
    ],
)
def test_every_word_that_an_engine_gets(lab, engine, options, limits):
    add_scans(lab, "case_1")
    assert measure(lab, "--engine", engine, *options.split()) == 0
    look = [engine, "inspect", "team"] if engine == "apptainer" else [engine, "image", "inspect", "team"]
    asked = [[engine, *ENGINES[engine].sets_limits]] if engine != "apptainer" else []
    assert calls(lab) == [look, *asked, f"{STARTS[engine]} {limits} {MOUNTS}".split()]


@pytest.mark.parametrize(("engine", "answer"), [("docker", "false"), ("podman", "v1 rootless=true")])
def test_an_engine_that_would_ignore_the_limits_is_refused(lab, capsys, engine, answer):
    """As docker and podman say it: rootless ones with control groups of version 1 only warn, and set no limit."""
    add_scans(lab, "case_1")
    (lab / "limits").write_text(answer)
    assert measure(lab, "--engine", engine) == 2
    assert f"{engine}: sets no limits of memory and cores here" in capsys.readouterr().err
    assert not any("predict.sh" in words for words in calls(lab))


def docker_client():
    """Whether docker is there, and not podman under its name."""
    if shutil.which("docker") is None:
        return False
    said = subprocess.run(["docker", "--version"], capture_output=True, text=True, check=False)
    return said.stdout.lower().startswith("docker version")


@pytest.mark.skipif(not docker_client(), reason="there is no docker client")
def test_dockers_own_client_takes_every_word(tmp_path):
    """It reads its options, and the value of each, before it looks for the service that it talks to."""
    folder = tmp_path / 'a, "b"'
    for inner in ("inputs", "outputs"):
        (folder / inner).mkdir(parents=True)
    words = command_line("docker", "no/image:1", Limits("28g", 2.5, "28g", True), folder, name="never", gpu=1)
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none"}

    def said(line):
        return subprocess.run(line, capture_output=True, text=True, env=environment).stderr

    assert "docker.sock" not in said(words) and f"{tmp_path}/none" in said(words), "nothing but its service is missing"
    for word, wrong in (("28g", "28q"), ("device=1", "devise=1"), ("--cpus", "--cpux"), ("type=bind,", "tipe=bind,")):
        assert f"{tmp_path}/none" not in said([each.replace(word, wrong) for each in words]), word


def test_the_first_engine_on_the_path_is_taken(lab):
    add_scans(lab, "case_1")
    assert measure(lab) == 0
    (lab / "bin" / "docker").unlink()
    assert measure(lab) == 0
    assert [words[0] for words in calls(lab)] == ["docker"] * 3 + ["podman"] * 3


def test_each_scan_gets_a_container_a_row_and_its_label_map(lab, capsys):
    add_scans(lab, "case_1", "case_2")
    assert measure(lab) == 0
    out = lab / "out"
    assert sorted(path.name for path in (out / "eff_maps").iterdir()) == ["case_1.nii.gz", "case_2.nii.gz"]
    assert np.array_equal(read_volume(out / "eff_maps" / "case_2.nii.gz").array, read_volume(lab / "map.nii.gz").array)
    found = rows(lab)
    assert list(found) == ["case_1_0000.nii.gz", "case_2_0000.nii.gz"]
    official = {"Time", "MaxGPU_Mem", "AUC_GPU_Time", "MaxCPU_Utilization", "AUC_CPU_Time", "MaxRAM", "AUC_RAM_Time"}
    assert official <= set(found["case_1_0000.nii.gz"])
    assert all(float(row["Time"]) > 0 and row["Exit_Code"] == "0" for row in found.values())
    assert (out / "eff_case_1_0000.nii.gz.log").read_text() == "predicting case_1\n"
    assert (out / "eff_case_1_0000.nii.gz.png").is_file()
    document = json.loads((out / "eff_case_1_0000.nii.gz.json").read_text())
    assert document["command"][-2:] == ["sh", "predict.sh"]
    assert not list(out.glob(".*")), "the folders of the containers are gone"
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(found)


def test_the_gpu_of_a_task_with_one_is_measured(lab):
    add_scans(lab, "case_1")
    assert measure(lab, "--task", "1") == 0
    (row,) = rows(lab).values()
    assert float(row["MaxGPU_Mem"]) == 1920
    assert measure(lab, "--task", "2") == 0
    (row,) = rows(lab).values()
    assert row["MaxGPU_Mem"] == "", "the laptop task has none"


@pytest.mark.parametrize(
    "case, told",
    [
        ("broken", ["exit code 1", "the network is not there", "Traceback of it"]),
        ("hungry", ["exit code 137", "8g of memory"]),
        ("empty", ["wrote no empty.nii.gz", "found: nothing", "predicting empty"]),
        ("moved", ["not on the grid of its scan", "(4, 6, 6)"]),
    ],
)
def test_a_container_without_a_good_label_map_is_told_with_its_last_lines(lab, capsys, case, told):
    add_scans(lab, case, "zz")
    kept = lab / "out" / "eff_maps" / f"{case}.nii.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of an earlier measurement")
    assert measure(lab) == 1
    error = capsys.readouterr().err
    assert f"flare-evaluate: {case}: " in error
    assert all(words in error for words in told), error
    assert not kept.exists()
    assert kept.with_name("zz.nii.gz").is_file(), "the others are measured"
    assert len(rows(lab)) == 2


def test_what_is_no_scan_is_named_and_the_exit_code_says_so(lab, capsys):
    add_scans(lab, "case_1")
    write_volume(lab / "scans" / "case_2_0000.nrrd", read_volume(lab / "map.nii.gz"))
    assert measure(lab) == 1
    assert "case_2_0000.nrrd: is not a .nii.gz file" in capsys.readouterr().err
    assert list(rows(lab)) == ["case_1_0000.nii.gz"]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--container", "missing", "-i", "{lab}/scans"], "no such image"),
        (["--container", "team", "-i", "{lab}/nowhere"], "nowhere"),
        (["--container", "team", "-i", "{lab}/bin"], "no scans named"),
        (["--container", "team"], "-i"),
        (["--container", "team", "-i", "{lab}/scans", "--", "true"], "--container"),
        (["--container", "team", "-i", "{lab}/scans", "--name", "a"], "--name"),
        (["--cpus", "2", "--", "true"], "--cpus needs --container"),
        (["--container", "team", "-i", "{lab}/scans", "--engine", "apptainer", "--shm-size", "1g"], "--shm-size"),
        (["--container", "team", "-i", "{lab}/scans", "--gpu", "0"], "containers of --task 2 get no GPU"),
        (["--container", "team", "-i", "{lab}/scans", "--task", "1", "--gpu", "0"], "NVIDIA"),
        (["--container", "team", "-i", "{lab}/scans", "--engine", "podman"], "podman is not on the PATH"),
    ],
)
def test_wrong_use_is_refused_before_a_container_starts(lab, capsys, words, complaint):
    add_scans(lab, "case_1")
    (lab / "bin" / "nvidia-smi").unlink()
    (lab / "bin" / "podman").unlink()
    assert main(["efficiency", "-o", str(lab / "eff.csv"), *(word.format(lab=lab) for word in words)]) == 2
    assert complaint in capsys.readouterr().err
    assert not (lab / "eff.csv").exists()
    assert not any("predict.sh" in words for words in (calls(lab) if (lab / "calls").exists() else []))


def test_an_interrupted_measurement_removes_the_container(lab):
    add_scans(lab, "endless")
    words = ["efficiency", "-o", str(lab / "out" / "eff.csv"), "--container", "team", "-i", str(lab / "scans")]
    process = subprocess.Popen([sys.executable, "-m", "nnunet_flare.cli.evaluate", *words], stderr=subprocess.PIPE)
    wait_for(lab / "started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert calls(lab)[-1] == ["docker", "rm", "--force", "NAME"]
    assert not (lab / "out" / "eff.csv").exists()
    assert not list((lab / "out").glob(".tmp*"))


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def test_below_an_engine_that_is_the_parent_the_client_does_not_count(lab):
    add_scans(lab, "heavy")
    assert measure(lab, "--engine", "apptainer", "--interval", "0.05") == 0
    (row,) = rows(lab).values()
    assert 150 < float(row["Tree_RAM"]) < 180
    assert float(row["Tree_CPU_Seconds"]) > 0


def test_a_service_s_container_is_found_by_its_control_group_and_its_client_does_not_count(tmp_path):
    container = "0123456789ab" * 5
    ready = tmp_path / "ready"
    child = f"b = bytearray(b'x') * (150 << 20); open({str(ready)!r}, 'w'); import time; time.sleep(30)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    served = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    monitor = subprocess.Popen(["sleep", "30"])
    try:
        for process, group in ((served, f"libpod-{container}"), (monitor, f"libpod-conmon-{container}")):
            folder = tmp_path / "proc" / str(process.pid)
            folder.mkdir(parents=True)
            (folder / "cgroup").write_text(f"12:memory:/machine.slice/{group}.scope\n0::/\n")
        processes = Processes(tmp_path / "id", tmp_path / "proc")
        assert processes(os.getpid()) == [], "the container has not started"
        (tmp_path / "id").write_text(container)
        wait_for(ready)
        found = record(["sleep", "0.5"], gpu=None, processes=processes, interval_s=0.1)
        assert processes(os.getpid())[0].pid == served.pid
    finally:
        os.killpg(served.pid, signal.SIGKILL)
        monitor.kill()
        served.wait()
        monitor.wait()
    assert max(sample.tree_ram_mb for sample in found.samples) > 150
    assert found.cpu_seconds > 0.02


def test_a_container_that_is_never_seen_has_empty_cells_and_not_zeros(lab, capsys):
    add_scans(lab, "case_1")
    assert measure(lab) == 0
    (row,) = rows(lab).values()
    assert {name for name, cell in row.items() if cell == "" and "GPU" not in name} == {
        "Tree_CPU_Seconds",
        "Tree_RAM",
        "Integral_Tree_RAM_Time",
    }
    assert "none of its processes was seen" in capsys.readouterr().err
