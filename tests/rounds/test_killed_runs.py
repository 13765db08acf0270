"""A run that is interrupted ends its children; see ``test_soak.py`` for kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.rounds.do_task import TASK_VARIABLE
from nnunet_flare.rounds.run.manifest import load_run


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "nnunet_flare.cli.pseudolabel", *command],
            env={**os.environ, **environment},
            stdout=stream,
            stderr=stream,
        )


def wait_for(text: str, log: Path, driver: subprocess.Popen, seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while text not in log.read_text():
        assert driver.poll() is None, f"the driver ended before '{text}':\n{log.read_text()}"
        assert time.monotonic() < ends, f"'{text}' did not come:\n{log.read_text()}"
        time.sleep(0.05)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TASK_VARIABLE, "").startswith(str(run_dir)):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def same_input(tiny_loop, tmp_path):
    """A copy of the tiny run's input and preprocessed data, without anything that the run itself wrote."""
    for name in ("nnUNet_raw", "unlabelled", "test"):
        shutil.copytree(tiny_loop.folder / name, tmp_path / name, symlinks=True)
    shutil.rmtree(tmp_path / "nnUNet_raw" / "Dataset022_FLAREPhantom" / "imagesUn")
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    return type(tiny_loop)(tmp_path, 0)


@pytest.mark.timeout(300)
def test_ctrl_c_ends_the_children_and_a_second_driver_is_refused_meanwhile(same_input, tmp_path, monkeypatch, capsys):
    for name, value in same_input.environment.items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "driver.log"
    log.touch()
    driver = start(same_input.command(), same_input.environment, log)
    wait_for("plan: started", log, driver)
    assert main(same_input.command()) == 1
    assert f"process {driver.pid}" in capsys.readouterr().err
    time.sleep(1)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    assert not processes_of(same_input.run_dir)
    assert not load_run(same_input.run_dir).paths.driver_lock.exists()
