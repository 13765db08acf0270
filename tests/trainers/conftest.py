"""What every test of a trainer may ask for: a tiny data set, and one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import blosc2
import pytest
import torch
from tiny_dataset import TinyDataset


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    """An empty tiny data set; nnU-Net's folders point to it and nothing starts workers."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for variable, value in (("nnUNet_n_proc_DA", "0"), ("nnUNet_def_n_proc", "1"), ("nnUNet_compile", "f")):
        monkeypatch.setenv(variable, value)
    for variable in ("NNUNET_FLARE_ITERATIONS", "NNUNET_FLARE_SEED", "NNUNET_FLARE_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", lambda self, folder: None
    )
    blosc2.set_nthreads(1)
    dataset = TinyDataset(tmp_path)
    dataset.environment = monkeypatch
    return dataset


@pytest.fixture
def one_thread() -> Callable[[], None]:
    """Keeps torch on one thread, so that two equal trainings are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
