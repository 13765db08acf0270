"""Prediction tests: one thread, a cache of their own, and PyTorch in single precision unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Converted networks of a test go to the test's own folder."""
    monkeypatch.setenv("NNUNET_FLARE_CACHE", str(tmp_path / "flare-cache"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and other programs may need them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
