"""Seeds are fixed functions of their names."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_flare.trainers.seeding import derived_seed, seed_everything, seed_from_system, temporary_seed


def draws() -> tuple[float, float]:
    return torch.rand(1).item(), float(np.random.uniform())  # noqa: NPY002


def test_a_seed_depends_on_each_of_its_parts_and_never_changes() -> None:
    parts = [(0, 1, 0, "training", 0), (0, 1, 0, "training", 1), (0, 1, "all", "training", 0), (0, None, 0, "x", 0)]
    seeds = {derived_seed(*part) for part in parts}  # type: ignore[arg-type]
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down, so that a resumed run of another version draws the same.
    assert derived_seed(0, 1, 0, "training", 0) == 5330992702012525588


def test_a_temporary_seed_is_undone() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with temporary_seed(99):
        inside = draws()
    assert draws() == expected
    with temporary_seed(99):
        assert draws() == inside


def test_system_seeds_differ() -> None:
    found = set()
    for _ in range(3):
        seed_from_system()
        found.add(draws())
    assert len(found) == 3
