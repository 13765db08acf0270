"""One tiny run, made once by the real command: 4 labelled, 6 unlabelled, 2 held-out scans, two members, one round."""

from __future__ import annotations

import os
import shutil

import pytest
from tiny_loop import TinyLoop

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.phantom import write_phantom
from nnunet_flare.rounds.run.locks import LockFile
from nnunet_flare.rounds.run.manifest import Run, load_run


@pytest.fixture(scope="session")
def tiny_loop(tmp_path_factory: pytest.TempPathFactory) -> TinyLoop:
    """Treat it as read-only; copy what a test changes. Test processes that run beside each other share one."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "tiny"
    with LockFile(shared / "tiny.lock", "the tiny loop", wait=True):
        code = shared / "tiny.exit_code"
        if not code.is_file():
            code.write_text(str(_run(TinyLoop(folder, -1))))
    return TinyLoop(folder, int(code.read_text()))


def _run(loop: TinyLoop) -> int:
    write_phantom(loop.folder, labelled=4, unlabelled=6, test=2, size=(20, 32, 32), seed=3)
    (loop.unlabelled / "truncated_0000.nii.gz").write_bytes(b"\x1f\x8b not a scan")
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (loop.folder / name).mkdir(exist_ok=True)
    saved = dict(os.environ)
    os.environ.update(loop.environment, nnUNet_n_proc_DA="0", NNUNET_FLARE_THREADS="1")
    try:
        return main(loop.command())
    finally:
        os.environ.clear()
        os.environ.update(saved)


@pytest.fixture
def tiny_environment(tiny_loop: TinyLoop, monkeypatch: pytest.MonkeyPatch) -> TinyLoop:
    """nnU-Net's variables as in the tiny run."""
    for name, value in {**tiny_loop.environment, "nnUNet_n_proc_DA": "0", "NNUNET_FLARE_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    return tiny_loop


@pytest.fixture
def copied_run(tiny_loop, tmp_path, monkeypatch) -> Run:
    """A copy of the whole tiny run that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_loop.folder, folder, symlinks=True)
    for path in folder.glob("nnUNet_*/Dataset022_FLAREPhantom/**/*.json"):
        if str(tiny_loop.folder) in (text := path.read_text()):
            path.write_text(text.replace(str(tiny_loop.folder), str(folder)))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder / name))
    return load_run(folder / "nnUNet_results" / "Dataset022_FLAREPhantom" / "flare_tiny")
