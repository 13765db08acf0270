"""Random streams that depend on names, not on history.

With a seed, every stream of a training is derived from (seed, round, fold, epoch) and a word for its purpose. A
training that was killed and resumed at any epoch therefore goes on exactly as an undisturbed one, and the members of an
ensemble differ from each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Part = int | str | None


def derived_seed(seed: int, *parts: Part) -> int:
    """A number of 63 bits that is a fixed function of the seed and the parts (round, fold, purpose, epoch, ...)."""
    text = json.dumps([seed, *parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Set NumPy's and torch's global streams; what batchgenerators and nnU-Net draw from."""
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global stream is the one that they use
    torch.manual_seed(seed)


def seed_from_system() -> None:
    """Give this process its own NumPy and torch streams.

    Stock augmenter workers reseed NumPy only, so that all forked workers share one torch stream, and what draws from
    torch (mirroring, whether a transform is applied) is the same in each of them.
    """
    seed_everything(int.from_bytes(os.urandom(8), "little") >> 1)


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Run a block on the streams of ``seed`` and put the process's own streams back afterwards."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.random.set_rng_state(torch_state)
