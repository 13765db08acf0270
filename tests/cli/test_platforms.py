"""``flare-predict``, ``flare-evaluate`` and ``flare-postprocess`` use nothing that only POSIX systems have.

Linux is what is supported; here these modules and functions are taken away, as they are missing on Windows.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nnunet_flare.images import Volume, write_labels

WITHOUT_POSIX = """
import builtins, importlib, os, signal, sys
BLOCKED = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog", "posix"}
for name in ("numpy", "scipy.ndimage", "SimpleITK", "nibabel", "pydantic", "tqdm", "psutil", "matplotlib.pyplot",
             "multiprocessing.pool", "concurrent.futures.process", "tempfile", "subprocess", "cc3d", "yaml"):
    importlib.import_module(name)  # other packages know what they may use where
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if name in BLOCKED and str((globals or {}).get("__name__", "")).startswith("nnunet_flare"):
        raise ImportError(f"{name} is of POSIX alone")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
for name in ("fork", "getuid", "geteuid", "getgid", "killpg", "setsid", "sched_getaffinity", "pathconf",
             "register_at_fork", "mkfifo", "chown"):
    delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGHUP", "pthread_sigmask"):
    delattr(signal, name)
"""


def without_posix(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + code], capture_output=True, text=True, check=False, timeout=500
    )


def test_the_guard_stops_what_it_should():
    done = without_posix("exec('import fcntl', {'__name__': 'nnunet_flare.x'})")
    assert done.returncode == 1 and "fcntl is of POSIX alone" in done.stderr


@pytest.mark.parametrize("command", ["predict", "evaluate", "postprocess"])
def test_help_needs_nothing_of_posix(command):
    done = without_posix(f"from nnunet_flare.cli.{command} import main; main(['--help'])")
    assert done.returncode == 0 and "usage: flare-" in done.stdout, done.stderr


def test_what_a_prediction_imports_needs_nothing_of_posix():
    modules = (
        "folder",
        "inputs",
        "forms",
        "statistics",
        "previews",
        "watching",
        "exported",
        "cache",
        "openvino_runtime",
    )
    done = without_posix("".join(f"import nnunet_flare.inference.{name}\n" for name in modules))
    assert done.returncode == 0, done.stderr


def test_statistics_are_written_without_locks(tmp_path):
    done = without_posix(
        "from pathlib import Path\n"
        "from nnunet_flare.inference.statistics import Statistics\n"
        f"with Statistics(Path({str(tmp_path)!r}), {{1: 'liver'}}, ct=True)._locked(): print('inside')"
    )
    assert done.stdout == "inside\n", done.stderr


def test_label_maps_are_cleaned_and_scored(tmp_path):
    array = np.zeros((6, 12, 12), np.uint8)
    array[1:5, 2:9, 2:9] = 1
    write_labels(tmp_path / "maps" / "a.nii.gz", array, Volume(array, (2.0, 1.0, 1.0)))
    maps, out, table = str(tmp_path / "maps"), str(tmp_path / "out"), str(tmp_path / "s.csv")
    done = without_posix(
        "from nnunet_flare.cli.postprocess import main as clean\n"
        "from nnunet_flare.cli.evaluate import main as score\n"
        f"assert clean(['-i', {maps!r}, '-o', {out!r}, '-np', '1']) == 0\n"
        f"assert score(['-ref', {maps!r}, '-pred', {out!r}, '-o', {table!r}, '-np', '1']) == 0\n"
    )
    assert done.returncode == 0, done.stderr
    assert "1 cases, official rules" in done.stdout and (tmp_path / "s.png").is_file()
