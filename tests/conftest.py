"""Shared fixtures: nnU-Net's folders, the real CT scans, and a tiny loop on synthetic scans."""

from __future__ import annotations

import locale
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# nnU-Net starts this many processes for everything by default; tests have two cores.
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_compile", "f")

# OpenVINO reports every conversion through a process that it forks; only where this package imports it, it does not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# A shell's background job ignores Ctrl-C, and so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure: properties are checked without a time limit for a single example.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file whose first test makes the run that many share: other test processes would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_build.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let threads list a folder's files: nnU-Net forks twelve processes for it, a second where PyTorch is loaded."""
    if (utilities := sys.modules.get("nnunetv2.utilities.utils")) is not None:
        utilities.Pool = ThreadPool


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say what ended a test process (xdist says only that it is gone): minus the signal's number, or its exit code."""
    if error:
        process = node.gateway._io.popen
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        print(f"\n{node.gateway.id} (process {process.pid}) ended with {process.poll()}", file=sys.stderr, flush=True)


@pytest.fixture(autouse=True)
def signals_are_left_alone() -> Iterator[None]:
    """A handler that a test leaves behind would be inherited by the pool workers of the tests after it."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has the first two
    has_masks = hasattr(signal, "pthread_sigmask")
    before = [signal.getsignal(number) for number in numbers]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if has_masks else None
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "a signal handler outlived what it was set for"
    assert mask is None or signal.pthread_sigmask(signal.SIG_SETMASK, mask) == mask


@pytest.fixture(autouse=True)
def locale_is_left_alone() -> Iterator[None]:
    """SimpleITK leaves the process in the locale "C" where it writes DICOM, as tests do; text then is ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(autouse=True)
def environment_is_left_alone() -> Iterator[None]:
    """Commands that run in this process set nnU-Net's folders; the tests after them start without."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT scans; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("FLARE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "ts_torso3mm_ct.nii.gz").is_file():
        pytest.skip(f"no real CT scans in {folder} (set FLARE_SHARED_DATA)")
    return folder


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """nnU-Net's three folders, empty, with the environment variables set to them."""
    folders = {}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        monkeypatch.setenv(name, str(folders[name]))
    return folders
