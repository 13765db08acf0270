"""A plugin of pytest: every test runs with the pretended GPU. What starts processes of its own is left out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from pretend_gpu import Gpu, gpu


@pytest.fixture(autouse=True)
def pretended_gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    if "real_data" in request.fixturenames:
        pytest.skip("a process of its own finds no GPU")
    with gpu() as card:

        def limit(share: float, device: int = 0) -> None:
            """What PyTorch's allocator keeps to; the card itself has no less memory for that."""
            card.room = int(share * card.total)

        answers = {
            "get_device_properties": lambda device=0: SimpleNamespace(total_memory=card.total),
            "set_per_process_memory_fraction": limit,
            "mem_get_info": lambda device=None: (card.total - card.live, card.total),
        }
        with patch.multiple(torch.cuda, **answers):
            yield card
